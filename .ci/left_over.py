#!/usr/bin/env python3
"""left_over.py ID FOLDER [SECONDS]: name every process that a test run left behind, and exit 1 if there is one.

A process is known by BGHOST_CI_RUN_ID=ID in its environment; or, since one that sets its title may write over that
area, by a working directory or an open file in FOLDER. Processes that are just ending get 10 seconds, or SECONDS.
"""

import os
import sys
import time
from pathlib import Path


def belongs(process: Path, marker: bytes, folder: str) -> bool:
    try:
        if marker in (process / "environ").read_bytes().split(b"\0"):
            return True
        links = [process / "cwd", *(process / "fd").iterdir()]
    except OSError:  # it is gone
        return False
    for link in links:
        try:
            if (os.readlink(link) + "/").startswith(folder + "/"):
                return True
        except OSError:
            pass
    return False


def main() -> int:
    marker, folder = f"BGHOST_CI_RUN_ID={sys.argv[1]}".encode(), os.path.realpath(sys.argv[2])
    deadline = time.monotonic() + float(sys.argv[3] if len(sys.argv) > 3 else 10)
    while True:
        left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and belongs(p, marker, folder)]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    for process in left:
        words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        print(f"left behind: process {process.name}: {words}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

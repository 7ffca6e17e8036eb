"""What .ci/run relies on."""

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Final

import pytest
from support import until

LEFT_OVER: Final = Path(__file__).resolve().parent.parent / ".ci" / "left_over.py"


@pytest.mark.parametrize("known_by", ["environment", "working directory", "open file"])
def test_a_process_that_was_left_behind_is_named(tmp_path: Path, known_by: str) -> None:
    """A process that outlives its test run is named, and is a failure, however it is known; once it is gone, none."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    run = uuid.uuid4().hex
    mark = {"BGHOST_CI_RUN_ID": run} if known_by == "environment" else {}
    check = [sys.executable, str(LEFT_OVER), run, str(folder), "0"]
    with (folder / "file").open("w") as file:
        process = subprocess.Popen(
            ["cat", "-u"],
            stdin=subprocess.PIPE,
            stdout=file if known_by == "open file" else subprocess.DEVNULL,
            cwd=folder if known_by == "working directory" else "/",
            env={**os.environ, **mark},
        )
    try:
        # Popen returns an instant before the new command line can be read.
        until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes() == b"cat\0-u\0")
        found = subprocess.run(check, capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (1, f"left behind: process {process.pid}: cat -u\n")
    finally:
        process.communicate()
    assert subprocess.run(check).returncode == 0

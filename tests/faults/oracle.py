"""What has to be so after each fault, whatever it was: nothing lost, nothing left, nobody kept waiting."""

import fcntl
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from support import SLOW, Host, until

ANSWER = 0.25
"""Seconds in which a host that is well answers."""

_ENDED = ("stopped", "done", "failed", "backoff")
_UNSEEN = re.compile(r"Exception ignored|RuntimeError|ResourceWarning|Logging error|Traceback")


class Usage(NamedTuple):
    """What a host has of the machine."""

    fds: int
    rss: int  # bytes


def pid_of(host: Host) -> int:
    """The pid of the host itself, also where another program has started it."""
    pid: int = host.client.status()["pid"]
    return pid


def usage(host: Host) -> Usage:
    """What the host has now, when no request but this one's is open."""
    pid = pid_of(host)
    until(lambda: not _connections(host), what="no connection")
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]
    return Usage(len(os.listdir(f"/proc/{pid}/fd")), rss)


def _connections(host: Host) -> int:
    """How many connections to its socket are open at its end."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return sum(fields[5] == "03" and fields[-1] == host.directories.socket for fields in lines)


def oracle(host: Host, before: Usage, *, faults: int = 1) -> None:
    """Look a running host over.

    :param before: its usage before the fault.
    :param faults: how many there were; each may have cost 1 KiB.
    """
    assert min(_answers(host) for _ in range(5)) < ANSWER * SLOW
    until(lambda: not _discrepancy(host), what="children that are the workers of ps")
    try:
        until(lambda: usage(host).fds == before.fds, what=f"{before.fds} descriptors, as before")
    except AssertionError as error:
        fds = Path(f"/proc/{pid_of(host)}/fd")
        there = [os.readlink(fd) for fd in fds.iterdir() if fd.is_symlink()]
        raise AssertionError(f"{error}: {sorted(there, key=there.count)[:20]}, {len(there)}") from None
    assert usage(host).rss - before.rss < (1 << 20) + (faults << 10)
    quiet(host)


def _answers(host: Host) -> float:
    """Seconds that an answer takes."""
    begun = time.monotonic()
    host.client.status()
    return time.monotonic() - begun


def _discrepancy(host: Host) -> str:
    """How the host's children differ from what it says of them."""
    pid = pid_of(host)
    try:
        children = {
            int(child): Path(f"/proc/{child}/stat").read_text()
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        }
        titles = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    except OSError:
        return "one has just ended"
    guards = [child for child, title in titles.items() if title.startswith(b"bghost: guard")]
    said = {row["pid"] for row in host.client.ps() if row["pid"]}
    zombies = [child for child, stat in children.items() if stat.rpartition(")")[2].split()[0] == "Z"]
    wrong = [row["name"] for row in host.client.ps() if row["pid"] and row["state"] in _ENDED]
    if zombies or wrong or len(guards) != 1 or said != children.keys() - set(guards):
        return f"zombies {zombies}, guards {guards}, children {sorted(children)}, said {said}, over with a pid {wrong}"
    return ""


def quiet(host: Host) -> None:
    """Nothing was printed that nobody is to see."""
    unseen = _UNSEEN.search(host.text())
    assert unseen is None, host.text()


def ended(host: Host, code: int = 0, timeout: float = 20.0) -> None:
    """Wait for the host's end, and look over what is there after it: nothing."""
    assert host.wait(timeout) == code, host.text()
    assert host.sandbox.processes() == {}
    left = [path for path in (host.directories.socket, host.directories.notify_socket) if os.path.exists(path)]
    assert left == []
    fd = os.open(host.directories.lock, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)

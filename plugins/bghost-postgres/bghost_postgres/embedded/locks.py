"""Lock files: what the kernel lets go of when a process dies, and who holds it.

``flock`` belongs to the open file, so that it is inherited across a fork and a handed-over descriptor keeps it;
record locks (``lockf``) belong to the process and name it, so that a pid is known and proven by the kernel.
"""

import fcntl
import os
import struct
import time
from collections.abc import Callable
from typing import Final

SLICE: Final = 0.05  # seconds; a wait for a lock that others hold looks again after so long
_FLOCK: Final = "hhqqi"  # struct flock of Linux on 64 bits: type, whence, start, length, pid


def open_lock(path: str) -> int:
    """A descriptor of the lock file *path*, which is made where it is missing; closed on exec."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the flock of *fd* if that needs no wait, and tell whether it was taken."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_lock(fd: int, timeout: float, *, shared: bool = False, waiting: Callable[[float], None] | None = None) -> bool:
    """Take the flock of *fd*, waiting for it in slices; false if *timeout* (seconds) passed.

    :param waiting: called before each slice with the seconds waited so far.
    """
    began = time.monotonic()
    while not try_lock(fd, shared=shared):
        waited = time.monotonic() - began
        if waited >= timeout:
            return False
        if waiting is not None:
            waiting(waited)
        time.sleep(SLICE)
    return True


def claim(fd: int) -> bool:
    """Take the record lock of *fd* for this process, if nobody has it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def claimant(path: str) -> int | None:
    """The pid of the process that claimed the lock file *path*; it lives, since a dead process holds nothing."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return pid if kind != fcntl.F_UNLCK else None


def claimant_pidfd(path: str) -> int | None:
    """A pidfd of the process that claimed *path*: never one that has got its number since."""
    while (pid := claimant(path)) is not None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if claimant(path) == pid:  # still holds it, so the pidfd, opened in between, is this very process
            return pidfd
        os.close(pidfd)
    return None


def holders(path: str, *, shared: bool) -> list[int]:
    """The pids of the processes that keep a flock on *path*, as far as this user may look.

    A process that took the lock stands for those that inherited it from it; they are named once it is gone.
    """
    path = os.path.realpath(path)
    mode = "READ" if shared else "WRITE"
    kept: dict[int, set[int]] = {}  # who took it -> who has it open
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            for fd in os.listdir(f"/proc/{name}/fd"):
                if os.readlink(f"/proc/{name}/fd/{fd}") != path:
                    continue
                with open(f"/proc/{name}/fdinfo/{fd}") as file:
                    for line in file:
                        words = line.split()
                        if words[0] == "lock:" and words[2] == "FLOCK" and words[4] == mode:
                            kept.setdefault(int(words[5]), set()).add(int(name))
        except OSError:
            continue  # gone, or somebody else's
    return sorted({pid for taker, having in kept.items() for pid in ((taker,) if taker in having else having)})

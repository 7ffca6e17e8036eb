"""The instance's lock: who has it is the host, and it is free once the last of its processes has gone.

It is a flock, which workers inherit: so a new host finds out that workers of a dead one still run. The text in the file
is for people, and for the client that names a pid; nothing is decided by it.
"""

import errno
import fcntl
import json
import os
import time
from typing import Final

from loguru import logger

from bghost.host.holders import SLICE, Mark, wait_gone
from bghost.shared.errors import HostError
from bghost.shared.paths import Directories

PATIENCE: Final = 10.0
"""Seconds that a start leaves to the guard of a dead host, beyond what that grants the workers."""

KILL_TIME: Final = 1.0
"""Seconds from SIGKILL until it is tried once more."""

TRIES: Final = 3
"""After which what a dead host has left counts as what cannot be killed."""


def acquire(directories: Directories, stop_timeout: float) -> int:
    """Take the lock of an instance; it is held until the last process that inherits it has ended.

    Where workers of a host that has died still hold it, they are waited for; where their guard is dead too, they are
    ended here.

    :param stop_timeout: seconds that workers have after their host's death.
    :returns: the descriptor that holds it.
    :raises HostError: if a living host has it, or what holds it cannot be killed.
    """
    fd = os.open(directories.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _take(fd, directories, stop_timeout)
    except BaseException:
        os.close(fd)
        raise
    sign(fd)
    return fd


def _take(fd: int, directories: Directories, stop_timeout: float) -> None:
    if not _within(0.0, fd, directories):
        logger.warning("processes of the last host of instance {} have not ended yet, waiting", directories.instance)
        _within(stop_timeout + PATIENCE, fd, directories)
    for _ in range(TRIES):
        if _end_left(fd, directories):
            return
    raise HostError(
        f"processes of the last host of instance {directories.instance} cannot be ended",
        detail=", ".join(f"pid {pid} ({text})" for pid, text in Mark(directories.lock).all().items()),
    )


def _end_left(fd: int, directories: Directories) -> bool:
    """Kill what the last host has left, and wait for its end; whether nothing of it lives any more and the lock is had.

    A process that was forked meanwhile has not been killed: it is for another try.
    """
    mark = Mark(directories.lock)
    left = mark.all()
    # Only now is it seen whether there is a new host: whoever is on the list was there before it.
    taken = _within(0.0, fd, directories)
    for pid, command in left.items():
        logger.warning("left by the last host: pid {} ({}), killed", pid, command)
        mark.kill(pid)
    until = time.monotonic() + KILL_TIME
    for pid in left:
        wait_gone([pid], until)  # to its very end: the mark goes before all else that it holds does
        while mark.on(pid) and time.monotonic() < until:
            wait_gone([pid], until)  # a slice, where there are no pidfds
    return (taken or _within(until - time.monotonic(), fd, directories)) and not (left and mark.all())


def _within(seconds: float, fd: int, directories: Directories) -> bool:
    """Try to take the lock for so long, in slices: nothing wakes who waits for it when another start gets it.

    At least once more after a slice: a client that sees whether the instance is free shares the lock for an instant.
    """
    until = time.monotonic() + seconds
    while not _try(fd):
        if (pid := _host_of(fd, directories)) is not None:
            raise HostError(
                f"instance {directories.instance} has a host already",
                detail=f"pid {pid}{_since(fd, pid)}",
                hint="choose another with --instance",
            )
        if time.monotonic() > until:
            return False
        time.sleep(SLICE)
    return True


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    return True


def _host_of(fd: int, directories: Directories) -> int | None:
    """The pid that took the lock, if that process lives.

    The kernel shows the number of the process that took it, which may be another's by now: that one does not hold it.
    """
    inode = os.fstat(fd).st_ino
    with open("/proc/locks") as locks:
        for line in locks:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[3] == "WRITE" and fields[5].rpartition(":")[2] == str(inode):
                pid = int(fields[4])
                if pid > 0 and Mark(directories.lock).holds(pid):
                    return pid
    return None


def _since(fd: int, pid: int) -> str:
    try:
        said = json.loads(os.pread(fd, 4096, 0))
        if said["pid"] == pid:
            return time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(said["since"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    return ""


def sign(fd: int, run_id: int = 0) -> None:
    """Write into the lock's file who holds it and since when."""
    text = json.dumps({"pid": os.getpid(), "since": time.time(), "run_id": f"{run_id:016x}"})
    os.pwrite(fd, text.encode(), 0)
    os.ftruncate(fd, len(text))

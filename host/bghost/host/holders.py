"""What belongs to a run of the host, found in /proc: who holds the instance's lock, or carries the run's mark.

The lock finds whatever a host has forked: workers that C code makes deaf, their children in sessions of their own,
programs that were exec'd with the descriptor. Others that were exec'd carry the run's id in their environment. A new
host that only waits for the lock has the file open too, but holds nothing.

What this module imports is all that the guard has to: see :mod:`bghost.host.guarding`.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time

from bghost.shared.environ import RUN

TYPE_CHECKING = False  # typing itself would double the guard's modules
if TYPE_CHECKING:
    from collections.abc import Iterator

SLICE = 0.05
"""Seconds between two looks at what the kernel tells nobody of."""


class Mark:
    """What the processes of one run have that no other process has.

    :param path: of the lock's file; its text names the run.
    """

    def __init__(self, path: str) -> None:
        self._lock = os.stat(path)
        with open(path, "rb") as file:
            run_id = file.read(4096).partition(b'"run_id": "')[2][:17]
        # Nobody is found by a text that a run's random number does not come from.
        whole = len(run_id) == 17 and run_id.endswith(b'"') and not run_id[:16].strip(b"0123456789abcdef")
        self._variable = RUN.encode() + b"=" + run_id[:16] if whole and run_id.strip(b'0"') else None

    def on(self, pid: int) -> bool:
        """Whether the process *pid* has it."""
        return self.holds(pid) or self._carries(pid)

    def holds(self, pid: int) -> bool:
        """Whether *pid* has a descriptor that holds the lock: the kernel says so for each."""
        for fd in _fds(pid):
            try:
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                if (status.st_dev, status.st_ino) == (self._lock.st_dev, self._lock.st_ino):
                    with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                        if "FLOCK" in info.read():
                            return True
            except OSError:
                continue  # closed meanwhile, or gone
        return False

    def _carries(self, pid: int) -> bool:
        if self._variable is None:
            return False
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ:
                return self._variable in environ.read().split(b"\0")
        except OSError:
            return False  # gone, or somebody else's

    def all(self) -> dict[int, str]:
        """The processes, without this one, that have it: pid to command line. None of them is a zombie."""
        pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
        return {pid: command(pid) for pid in pids if pid != os.getpid() and self.on(pid)}

    def kill(self, pid: int) -> None:
        """SIGKILL for *pid*, if it is the process that has the mark, not one that has its number now."""
        try:
            pidfd = _pidfd(pid)
        except OSError:
            return
        try:
            if self.on(pid):
                if pidfd >= 0:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
        finally:
            if pidfd >= 0:
                os.close(pidfd)


def _pidfd(pid: int) -> int:
    """-1 where there are none.

    :raises OSError: if there is no such process, or no descriptor left.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        return -1


def _fds(pid: int) -> Iterator[str]:
    try:
        yield from os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return  # gone, or somebody else's


def command(pid: int) -> str:
    """What *pid* calls itself, for messages."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(200).replace(b"\0", b" ").decode("utf-8", "replace").strip() or "?"
    except OSError:
        return "?"


def wait_gone(pids: list[int], until: float) -> None:
    """Sleep until one of *pids* has ended, or *until* (monotonic seconds); in slices where there are no pidfds."""
    poll = select.poll()
    fds = []
    try:
        for pid in pids:
            fd = _pidfd(pid)
            if fd < 0:
                time.sleep(max(0.0, min(SLICE, until - time.monotonic())))
                return
            fds.append(fd)
            poll.register(fd, select.POLLIN)
        poll.poll(max(0.0, until - time.monotonic()) * 1000)
    except ProcessLookupError:
        return
    finally:
        for fd in fds:
            os.close(fd)

"""Processes of the host: the one place that forks, and what is done to a child from outside."""

import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from loguru import logger

from bghost.shared import linux
from bghost.shared.errors import BUG, HostError

_ALL_SIGNALS: Final = signal.valid_signals()


class Process:
    """A child, held by a pidfd; its number stands for it only as long as it is not reaped.

    :param pidfd: -1 where the kernel gives none: the number is then all there is, and SIGCHLD the only news.
    """

    __slots__ = ("_id", "pid", "pidfd")

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._id = (os.P_PIDFD, pidfd) if pidfd >= 0 else (os.P_PID, pid)

    def signal(self, signum: int) -> None:
        """Send *signum* to the process itself; no harm if it has ended, or is a program with another user's rights."""
        try:
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, signum)
            else:
                os.kill(self.pid, signum)
        except (ProcessLookupError, PermissionError):
            pass

    def kill_group(self) -> None:
        """SIGKILL for its whole process group, stopped members included; the leader is not reaped yet."""
        self.signal(signal.SIGKILL)  # it may be so young that it has no group of its own yet
        for signum in (signal.SIGKILL, signal.SIGCONT):
            try:
                os.killpg(self.pid, signum)
            except (ProcessLookupError, PermissionError):
                pass

    def status(self) -> int | None:
        """Its exit code, or minus its signal, once it has ended; it stays a zombie, and so its number stays its own."""
        result = os.waitid(*self._id, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def state(self) -> str:
        """The kernel's letter for what it does; for messages."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "?"

    def reap(self) -> None:
        """Let go of the zombie."""
        os.waitid(*self._id, os.WEXITED)
        self.close()

    def close(self) -> None:
        """Let go of the descriptor."""
        if self.pidfd >= 0:
            os.close(self.pidfd)


def pidfd_of(pid: int) -> int:
    """A pidfd of a process that is not reaped; -1 where the kernel or a seccomp filter has none, which is said once.

    :raises OSError: if there is no such process, or no descriptor left.
    """
    global _without_pidfds
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        if not _without_pidfds:
            _without_pidfds = True
            logger.warning("there are no pidfds here ({}), SIGCHLD has to do", error.strerror)
        return -1


_without_pidfds = False


def why_none(error: OSError) -> str:
    """Why there is no process or descriptor to be had, with the name of the limit that it comes from."""
    text = error.strerror or str(error)
    if error.errno == errno.EAGAIN:
        most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        here = "no limit here" if most == resource.RLIM_INFINITY else f"{most} here"
        return f"{text}; the limits are RLIMIT_NPROC ({here}), pids.max of the cgroup, kernel.pid_max"
    if error.errno == errno.EMFILE:
        return f"{text}; the limit is RLIMIT_NOFILE ({resource.getrlimit(resource.RLIMIT_NOFILE)[0]} here)"
    if error.errno == errno.ENFILE:
        return f"{text}; the limit is fs.file-max"
    if error.errno == errno.ENOSPC:
        return f"{text}; the limit is fs.epoll.max_user_watches"
    if error.errno == errno.ENOMEM:
        return f"{text}; the limits are the machine's memory, memory.max of the cgroup, vm.overcommit_memory"
    return text


def check_descriptors(workers: int) -> None:
    """See before a host starts whether RLIMIT_NOFILE lets it have its descriptors; say so if there may be too few.

    :param workers: as many as there may be.
    :raises HostError: if not even the start would succeed.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return
    at_start = len(os.listdir("/proc/self/fd")) + _OWN_FDS + _SLOT_FDS * workers
    most = at_start + _WORKER_FDS * workers
    text = f"max_workers is {workers}, which takes up to {most} descriptors, and RLIMIT_NOFILE allows {soft}"
    hint = "raise that limit (LimitNOFILE of systemd), or lower max_workers in [host]"
    if soft < at_start:
        raise HostError(f"the host cannot start: {text}", hint=hint)
    if soft < most:
        logger.warning("{}; {}", text, hint)


_OWN_FDS: Final = 64  # the host's own, and its clients'
_SLOT_FDS: Final = 2  # a latch's two ends, there from the start
_WORKER_FDS: Final = 3  # a pidfd, what the worker prints, a request of its own


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Have what the kernel refuses in the block told as *what* and the limit's name.

    :raises HostError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise HostError(what, detail=why_none(error)) from None


def inherited_fds(among: Iterable[int] | None = None) -> list[int]:
    """The descriptors that this process was started with: they have passed an exec, which Python's own do not.

    :param among: look at these; ``None``: at all but the standard three.
    """
    if among is None:
        among = [fd for name in os.listdir("/proc/self/fd") if (fd := int(name)) > 2]
    found = []
    for fd in among:
        try:
            if os.get_inheritable(fd):
                found.append(fd)
        except OSError:
            pass  # closed
    return found


def fork(
    child: Callable[[], NoReturn],
    close: Iterable[int],
    host_pid: int,
    *,
    death_signal: int = signal.SIGTERM,
    outlives: bool = False,
) -> Process:
    """Fork a process that is *child*, in a session of its own, all signals blocked; it ends without coming back.

    :param close: the host's own descriptors; closed in the child before anything else runs there.
    :param death_signal: what the kernel sends the child when the host dies; 0 for nothing.
    :param outlives: whether the child has something to do when the host is dead, be it from the first instant on.
    :raises OSError: if there can be no further process, or no descriptor for it. No child is left then.
    """
    _count_threads()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _be(child, close, host_pid, death_signal, outlives)
        try:
            pidfd = pidfd_of(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            os.waitpid(pid, 0)
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Process(pid, pidfd)


def _count_threads() -> None:
    """Say once that there is more than one: a lock that another thread holds now stays held in the child for ever."""
    global _threads_told
    if _threads_told:
        return
    try:
        threads = len(os.listdir("/proc/self/task"))
    except OSError:
        return
    if threads > 1:
        _threads_told = True
        logger.error(
            "the host has {} threads, so a plugin's hook has started some; workers may hang in their locks", threads
        )


_threads_told = False


def _be(
    child: Callable[[], NoReturn], close: Iterable[int], host_pid: int, death_signal: int, outlives: bool
) -> NoReturn:
    code = BUG
    try:
        signal.set_wakeup_fd(-1)
        for fd in close:
            os.close(fd)
        os.setsid()
        if not linux.follow(host_pid, death_signal) and not outlives:
            code = 1
            os._exit(code)
        child()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)

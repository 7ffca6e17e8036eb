"""The guard: the host's first child, which ends what a host that was killed leaves behind, and then goes.

Workers see the host's death themselves and end in order; the guard is for those that cannot: the GIL held in C, all
signals blocked, children of theirs that have left. It holds the instance's lock like they do. So no new host starts
before it is done, and whom it kills can be none of a new host's.

It becomes a program of its own, which is small. From the fork on it has all that it needs to see the host's death: the
host's pidfd, the lock, its signals blocked. So there is no instant in which the host could die unseen; and where that
program cannot be had, it does its work as it was forked.
"""

import os
import signal
import sys
from collections.abc import Iterable
from typing import Final, NoReturn

import setproctitle

import bghost
from bghost.host import guarding
from bghost.host.process import Process, fork, pidfd_of

_PROGRAM: Final = (
    "import sys; sys.path[:0] = sys.argv[1:3]; from bghost.host import guarding; guarding.main(sys.argv[3:])"
)


def start(instance: str, lock: str, held: int, stop_timeout: float, close: Iterable[int] = ()) -> Process:
    """Fork the guard of this process, a host or one to be.

    :param lock: path of the lock's file.
    :param held: the descriptor that holds it.
    :param stop_timeout: seconds that workers have after the host's death.
    :param close: descriptors that a guard must not keep open when the host is dead, such as the control socket.
    :raises OSError: if it cannot be forked.
    """
    host_pid = os.getpid()
    host = pidfd_of(host_pid)

    def child() -> NoReturn:
        try:
            _become(instance, lock, held, stop_timeout, host_pid, host)
        except OSError:
            setproctitle.setproctitle(f"bghost: guard ({instance})")
            guarding.guard(instance, lock, stop_timeout, host_pid, host)
        os._exit(0)

    try:
        # SIGUSR1 at the host's death, blocked and waited for, where there are no pidfds.
        return fork(child, close, host_pid, death_signal=signal.SIGUSR1, outlives=True)
    finally:
        if host >= 0:
            os.close(host)


def _become(instance: str, lock: str, held: int, stop_timeout: float, host_pid: int, host: int) -> NoReturn:
    for fd in (held, host):
        if fd >= 0:
            os.set_inheritable(fd, True)
    ours = os.path.dirname(os.path.dirname(bghost.__file__))
    title = os.path.dirname(sys.modules["setproctitle._setproctitle"].__file__ or "")
    said = (instance, lock, repr(stop_timeout), str(host_pid), str(host))
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-E", "-c", _PROGRAM, ours, title, *said])

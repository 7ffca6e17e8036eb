"""The guard's program: waits for its host's death, ends what that leaves behind, and goes.

Run by an interpreter without site-packages, and with as few modules as can be: it is there as long as the host is, and
nothing of the host's memory lives on in it.
"""

from __future__ import annotations

import os
import select
import signal
import time

from bghost.host.holders import Mark, wait_gone

LATE = 0.5  # seconds after stop_timeout: those that end by themselves at its very end may do so


def guard(instance: str, lock: str, stop_timeout: float, host_pid: int, host: int) -> None:
    """Be the guard, all signals blocked: whoever signals everything that is called bghost does not mean the guard.

    :param lock: path of the lock's file; this process holds the lock.
    :param stop_timeout: seconds that workers have after the host's death.
    :param host: the host's pidfd; -1 where there are none: its death is then told by SIGUSR1.
    """
    if host >= 0:
        poll = select.poll()
        poll.register(host, select.POLLIN)
        poll.poll()
    while os.getppid() == host_pid and host < 0:
        signal.sigwait({signal.SIGUSR1})
    until = time.monotonic() + stop_timeout + LATE
    try:
        mark = Mark(lock)
    except FileNotFoundError:
        return  # the host has ended in order, and its directory has gone with it, as that of a single run does
    while left := mark.all():
        if time.monotonic() < until:
            wait_gone(list(left), until)
            continue
        for pid, command in left.items():
            _say(f"bghost: guard ({instance}): killed pid {pid} ({command}), which the dead host had left behind\n")
            mark.kill(pid)
        wait_gone(list(left), time.monotonic() + 1.0)


def _say(text: str) -> None:
    try:
        # Opened anew so as not to wait: a terminal that was stopped must not keep the guard, and with it the lock.
        fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        fd = 2  # a socket
    try:
        os.write(fd, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def main(argv: list[str]) -> None:
    """Be the guard that the host's child has exec'd."""
    instance, lock, stop_timeout, host_pid, host = argv
    name(f"bghost: guard ({instance})")
    guard(instance, lock, float(stop_timeout), int(host_pid), int(host))


def name(title: str) -> None:
    """Have the process called *title*. Of setproctitle its C part alone: the rest imports logging."""
    import _setproctitle  # type: ignore[import-not-found]

    _setproctitle.setproctitle(title)

"""The holder: the process of ``bghost postgres start``, which uses the embedded server and does nothing else."""

import os
import select
import signal
from typing import Final

from bghost import HostError, TimedOut
from bghost_postgres.embedded import detached, locks
from bghost_postgres.embedded.lease import Lease
from bghost_postgres.embedded.place import Place

_MODULE: Final = "bghost_postgres.embedded.holder"


def hold(lease: Lease) -> int:
    """Leave *lease* to a process that keeps it until :func:`release`; the pid of that one, or of the one there is.

    :raises BghostError: if it does not start.
    """
    lock = locks.open_lock(lease.place.hold_lock)
    try:
        for message in detached.spawn(_MODULE, {"use": lease.fd, "hold": lock}, (lease.fd, lock)):
            return int(message["pid"])
    finally:
        os.close(lock)
    raise HostError("the process that keeps the embedded PostgreSQL ended without a word")


def release(place: Place) -> int | None:
    """End the holder; its pid, or none if there is none.

    :raises TimedOut: if it does not end.
    """
    pid = locks.claimant(place.hold_lock)
    pidfd = locks.claimant_pidfd(place.hold_lock)
    if pid is None or pidfd is None:
        return None
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(5000):
            raise TimedOut(f"pid {pid}, which keeps the embedded PostgreSQL, does not end")
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
    return pid


def main() -> None:
    """Run in the process that stays."""
    given = detached.become()
    report: detached.Report = given["report"]
    os.set_inheritable(given["use"], False)
    os.set_inheritable(given["hold"], False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if locks.claim(given["hold"]):
        report(pid=os.getpid())
    else:
        report.error(HostError("the embedded PostgreSQL is kept running already"))
        os._exit(1)
    report.close()
    with open(os.devnull, "rb+") as nothing:
        os.dup2(nothing.fileno(), 2)  # errors have been told; a script that reads them must come to their end
    signal.sigwait({signal.SIGTERM})
    os._exit(0)


if __name__ == "__main__":
    main()

"""A share in the embedded server: what a host, or psql, holds while it uses it.

The share is a shared flock on an open file: forked workers inherit it on purpose, so that the server stays until the
last of them has gone, also where the host was killed. A program that is exec'd does not get it, unless handed over.
"""

import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from bghost import TimedOut
from bghost_postgres.embedded import detached, keeper, locks
from bghost_postgres.embedded.place import Place, locate, said
from bghost_postgres.embedded.server import Server

_STOPPING_LIMIT: Final = 30.0  # seconds to wait for a server that is just being stopped
_STARTING_LIMIT: Final = 600.0  # seconds to wait for somebody else's start, which may recover from a crash
_KEEPER_LIMIT: Final = 20.0  # seconds in which a living keeper must have its server up


class Lease:
    """A share in the embedded server of *place*; taken by :func:`take`, given back by :meth:`leave`."""

    def __init__(self, place: Place, fd: int) -> None:
        self.place = place
        self.fd = fd

    @property
    def uri(self) -> str:
        """What a client connects to."""
        return self.place.uri

    def leave(self) -> list[int]:
        """Give the share back; the last one out stops the server and returns when it is gone.

        :returns: the pids of those who use it still; empty if it was stopped.
        :raises TimedOut: if it should have stopped, and did not.
        """
        os.close(self.fd)
        return stop_unused(self.place)


def take(place: Place | None = None, say: Callable[[str], None] = lambda text: None) -> Lease:
    """Take a share in the embedded server, and start it if it does not run; it accepts connections then.

    :param place: the caller's own, where it is not given.
    :param say: takes a line for people when there is something to wait for.
    :raises HostError: if it cannot be started; the error says why.
    :raises TimedOut: if somebody else's stop or start does not come to an end.
    """
    place = place or locate()
    place.make()
    with said(place.home):
        use = locks.open_lock(place.use_lock)
    try:
        _enter(place, use, say)
    except BaseException:
        os.close(use)
        raise
    return Lease(place, use)


def _enter(place: Place, use: int, say: Callable[[str], None]) -> None:
    if not locks.try_lock(use, shared=True):
        say("waiting for the embedded PostgreSQL, which is just being stopped")
        if not locks.wait_lock(use, _STOPPING_LIMIT, shared=True):
            raise _stuck("is being stopped, and that does not end", place.use_lock)
    deadline: float | None = None
    while not _ready(place, say):
        # A keeper lives, and its server died just now, or was told to stop: it mends that, or goes.
        now = time.monotonic()
        deadline = deadline or now + _KEEPER_LIMIT
        if now > deadline:
            raise _stuck("does not come up", place.keeper_lock)
        time.sleep(locks.SLICE)


def _ready(place: Place, say: Callable[[str], None]) -> bool:
    """Whether the server accepts connections; where nobody keeps it, it is started."""
    door = locks.open_lock(place.start_lock)
    lock = locks.open_lock(place.keeper_lock)
    try:
        if not locks.wait_lock(door, _STARTING_LIMIT, waiting=_Patience(place, say)):
            raise _stuck("is being started, and that does not end", place.start_lock)
        if locks.try_lock(lock):
            _start(place, door, lock, say)
            return True
        running = Server(place).find()
        if running is None:
            return False
        running.close()
        return running.status == "ready"
    finally:
        os.close(lock)
        os.close(door)


def _start(place: Place, door: int, lock: int, say: Callable[[str], None]) -> None:
    """Start a keeper, hand it both locks, and wait for its word."""
    ready = False
    for message in detached.spawn(keeper.MODULE, keeper.argument(place, door, lock), (door, lock)):
        if "say" in message:
            say(message["say"])
        else:
            ready = True
    if not ready:
        raise Server(place).failure("did not start: its keeper ended without a word")


def stop_unused(place: Place) -> list[int]:
    """Stop the server unless somebody uses it, and return when it is gone.

    :returns: the pids of those who use it; empty if it does not run any more.
    :raises TimedOut: if it did not stop.
    """
    if not os.path.isdir(place.home):
        return []
    door = locks.open_lock(place.start_lock)
    use = locks.open_lock(place.use_lock)
    try:
        # One at a time: two who leave at once would each take the other's look at the lock for its use.
        if not locks.wait_lock(door, _STOPPING_LIMIT):
            raise _stuck("is being started or left, and that does not end", place.start_lock)
        if not locks.try_lock(use):
            if locks.try_lock(use, shared=True):
                os.close(use)  # else this very look would be listed
                use = -1
                return locks.holders(place.use_lock, shared=True)
            if not locks.wait_lock(use, _STOPPING_LIMIT, shared=True):  # the keeper was faster, and is at it
                raise _stuck("does not stop", place.use_lock)
            return []
        # Alone: nobody can come before this descriptor is closed.
        Server(place).stop()
        lock = locks.open_lock(place.keeper_lock)
        try:
            if not locks.wait_lock(lock, 5.0, shared=True):
                raise _stuck("has ended, but its keeper has not", place.keeper_lock)
        finally:
            os.close(lock)
        return []
    finally:
        if use >= 0:
            os.close(use)
        os.close(door)


def _stuck(what: str, lock: str) -> TimedOut:
    pids = locks.holders(lock, shared=False)
    who = "pid " + ", ".join(map(str, pids)) if pids else "nobody that this user may see"
    return TimedOut(
        f"the embedded PostgreSQL {what}",
        detail=f"{lock} is held by {who}",
        hint="see server.log in the same directory",
    )


class _Patience:
    """Says whom one waits for, at once and then every 10 s."""

    def __init__(self, place: Place, say: Callable[[str], None]) -> None:
        self._place = place
        self._say = say
        self._next = 0.2

    def __call__(self, waited: float) -> None:
        if waited >= self._next:
            self._next = waited + 10
            pids = ", ".join(map(str, locks.holders(self._place.start_lock, shared=False))) or "?"
            self._say(f"waiting for pid {pids}, which is starting or leaving the embedded PostgreSQL")


class Status(NamedTuple):
    """What is known of the embedded server from outside."""

    running: bool
    pid: int | None
    since: float | None  # unix seconds
    version: str | None
    data: str
    log: str
    uri: str
    users: list[int]
    keeper: int | None
    kept_by: int | None  # the process of `bghost postgres start`


def status(place: Place) -> Status:
    """Look at the embedded server without touching it."""
    running = Server(place).find()
    if running is not None:
        running.close()
    try:
        with open(f"{place.data}/PG_VERSION") as file:
            version: str | None = file.read().strip()
    except OSError:
        version = None
    return Status(
        running=running is not None,
        pid=running.pid if running else None,
        since=running.since if running else None,
        version=version,
        data=place.data,
        log=place.log,
        uri=place.uri,
        users=locks.holders(place.use_lock, shared=True),
        keeper=locks.claimant(place.keeper_lock),
        kept_by=locks.claimant(place.hold_lock),
    )

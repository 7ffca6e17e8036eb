"""A server that is down is probed by one worker of a host; the others wait for what that one finds.

The prober is whoever could bind a Unix socket's abstract name. The others connect to it, which the kernel does without
the prober's help, and wait until they can read: a byte when the server is back, the end of the stream when the prober
gave up or died, and then one of them is the next. No file is left behind, and nobody looks again and again.
What a worker does after an attempt that failed is decided here, too; plain code and coroutines only sleep differently.
"""

import contextlib
import hashlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bghost_postgres.connection import first_line
from bghost_postgres.extension import TOKEN

if TYPE_CHECKING:
    from bghost import Worker

PING_TIMEOUT: Final = 2  # seconds; the shortest that libpq knows
FIRST_DELAY: Final = 0.5  # seconds before the second attempt to reach the server; doubles
LONGEST_DELAY: Final = 30.0

_BACKLOG: Final = 1024
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid

# What the server says while it cannot be used, but will be: shutting down, crashed, starting; no connection left.
_PASSING: Final = frozenset({"57P01", "57P02", "57P03", "53300"})
# The same as the words of an error that came before the connection was there: libpq tells no SQLSTATE of those.
_FULL: Final = ("too many clients", "too many connections", "remaining connection slots")


class Outage:
    """One worker's part in an outage of the server that *conninfo* names, whatever it calls itself there."""

    def __init__(self, conninfo: str) -> None:
        place = {name: value for name, value in conninfo_to_dict(conninfo).items() if name != "application_name"}
        secret = f"{os.environ.get(TOKEN) or os.getpid()}\n{os.geteuid()}\n{sorted(place.items())}"
        self._name = f"\0bghost-postgres-{hashlib.sha256(secret.encode()).hexdigest()[:32]}"
        self._socket: socket.socket | None = None
        self.probes = False
        """Whether this worker is the one that tries to connect."""

    def follow(self) -> int | None:
        """Become the prober, or a follower of the one that there is.

        :returns: for a follower a descriptor that can be read when it is its turn to try; ``None`` for the prober.
        """
        self.leave()
        with contextlib.ExitStack() as stack:
            mine = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            try:
                mine.bind(self._name)
                mine.listen(_BACKLOG)
                self.probes = True
            except OSError:
                try:
                    mine.connect(self._name)
                    peer = mine.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                except OSError:  # it has just ended, or more wait for it than it can have
                    return None
                if _CREDENTIALS.unpack(peer)[1] != os.geteuid():
                    return None  # somebody else's: not to be waited for
            stack.pop_all()
            self._socket = mine
        return None if self.probes else mine.fileno()

    def leave(self, *, back: bool = False) -> None:
        """The end of this worker's part; the prober's followers are told whether the server is *back*."""
        mine, self._socket = self._socket, None
        probes, self.probes = self.probes, False
        if mine is None:
            return
        with mine:
            if probes and back:
                with contextlib.suppress(OSError):  # nobody else waits
                    while True:
                        follower, _ = mine.accept()
                        with follower:
                            follower.send(b"1")


class Patience:
    """What follows each attempt to connect that has failed, until this is left: with a connection, or by an error."""

    def __init__(self, worker: "Worker[Any]", conninfo: str) -> None:
        self._worker = worker
        self._conninfo = conninfo
        self._outage = Outage(conninfo)
        self._began: float | None = None  # monotonic seconds
        self._delay = FIRST_DELAY
        self._refused = False  # by the last attempt

    def __enter__(self) -> "Patience":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._outage.leave(back=error is None)
        if error is None and self._began is not None:
            seconds = time.monotonic() - self._began
            self._worker.log.info("the database can be reached again, after {:.1f} s", seconds)

    def passes(self, error: psycopg.OperationalError) -> bool:
        """Whether *error* of an attempt is one that waiting mends; the server may be asked, which may take 2 s."""
        if error.sqlstate is not None:
            return error.sqlstate in _PASSING
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return True
        # No SQLSTATE is told of an error before the connection was there, and the words may be in any language: ask
        # libpq once more, which does tell whether a server answered (with a refusal, then), or is not ready for it.
        answer = pq.PGconn.ping(make_conninfo(self._conninfo, connect_timeout=PING_TIMEOUT).encode())
        if answer in (pq.Ping.NO_RESPONSE, pq.Ping.REJECT):
            return True
        return answer == pq.Ping.OK and _is_full(error)

    def pause(self, error: psycopg.OperationalError, *, passes: bool) -> tuple[float, tuple[int, ...]]:
        """How long to wait for the next attempt after *error*, and the descriptor that ends this early when readable.

        :raises psycopg.OperationalError: *error*, if it does not pass.
        """
        if not passes:
            if self._refused:
                raise error
            self._refused = True  # it may have come up between the attempt and the question
            return 0.0, ()
        self._refused = False
        if self._began is None:
            self._began = time.monotonic()
            limit = " (max_connections, or the connection limit of the role or the database)" if _is_full(error) else ""
            text = "the database cannot be reached, waiting for it: {}{}"
            self._worker.log.warning(text, first_line(error), limit)
        turn = None if self._outage.probes else self._outage.follow()
        if turn is not None:
            return LONGEST_DELAY, (turn,)
        delay, self._delay = self._delay, min(self._delay * 2, LONGEST_DELAY)
        return delay, ()


def _is_full(error: psycopg.OperationalError) -> bool:
    return error.sqlstate == "53300" or any(words in str(error) for words in _FULL)

"""A server that is down is probed by one worker of a host; the others wait for what that one finds.

The prober is whoever could bind a Unix socket's abstract name. The others connect to it, which the kernel does without
the prober's help, and wait until they can read: a byte when the server is back, the end of the stream when the prober
gave up or died, and then one of them is the next. No file is left behind, and nobody looks again and again.
"""

import contextlib
import hashlib
import os
import socket
import struct
from typing import Final

from psycopg.conninfo import conninfo_to_dict

from bghost_postgres.extension import TOKEN

_BACKLOG: Final = 1024
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


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

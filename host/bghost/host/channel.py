"""The host's end of a channel to a worker of another user: connections come in, descriptors of the log go out.

Such a worker cannot open the control socket, whose directory is the host's user's, nor the log. The host believes none
of what comes: neither that it is a socket, nor that it does not block.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Final

from bghost.host.poller import FIRST, Poller

_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Channel:
    """Of one process. Made before the fork; the child lets go of the host's end with :meth:`become`.

    :param connected: given each connection.
    :raises OSError: if there is no descriptor for it.
    """

    def __init__(self, poller: Poller, connected: Callable[[socket.socket], None]) -> None:
        self._poller = poller
        self._connected = connected
        kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._near, self._far = socket.socketpair(socket.AF_UNIX, kind)

    def become(self) -> int:
        """In the child: its own end."""
        self._near.close()
        return self._far.detach()

    def watch(self) -> None:
        """In the host, once the child is there."""
        self._poller.register(self._near.fileno(), self._receive, rank=FIRST)

    def fds(self) -> list[int]:
        """The descriptors that another child must not keep."""
        return [self._near.fileno(), self._far.fileno()]

    def close(self) -> None:
        """The process has ended, or there is none."""
        if self._near.fileno() in self._poller:
            self._poller.unregister(self._near.fileno())
        self._near.close()
        self._far.close()

    def hand_out(self, fd: int) -> None:
        """Give it the log, instead of what it has not taken yet."""
        with contextlib.suppress(OSError):
            while True:
                for old in socket.recv_fds(self._far, 1, 1, _FLAGS)[1]:
                    os.close(old)
        with contextlib.suppress(OSError):
            socket.send_fds(self._near, [b"l"], [fd], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _receive(self, events: int) -> None:
        try:
            fds = socket.recv_fds(self._near, 1, 1, _FLAGS)[1]
        except OSError:
            return
        for fd in fds:
            try:
                connection = socket.socket(fileno=fd)
            except OSError:
                os.close(fd)
                continue
            if (connection.family, connection.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
                self._connected(connection)
            else:
                connection.close()

"""Where programs that workers have become say that they are ready (sd_notify); the sender's pid is checked."""

import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from bghost.host.poller import Poller

_DATAGRAMS: Final = 64  # taken in one turn of the loop
_CREDENTIALS: Final = struct.Struct("3i")


class Readiness:
    """Listens on a datagram socket in the runtime directory.

    :param ready: told the pid of a sender that is ready.
    """

    def __init__(self, path: str, poller: Poller, ready: Callable[[int], None]) -> None:
        self._path = path
        self._poller = poller
        self._ready = ready
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        before = os.umask(0o177)
        try:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            self._socket.bind(path)
        finally:
            os.umask(before)
        poller.register(self._socket.fileno(), self._receive)

    def fds(self) -> list[int]:
        """The descriptors that a child must not keep."""
        return [self._socket.fileno()]

    def close(self) -> None:
        """Remove the socket."""
        self._poller.unregister(self._socket.fileno())
        self._socket.close()
        try:
            os.unlink(self._path)
        except OSError:
            pass  # the next start takes it away

    def _receive(self, events: int) -> None:
        for _ in range(_DATAGRAMS):
            try:
                data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
            except BlockingIOError:
                return
            for level, kind, credentials in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and b"READY=1" in data.split(b"\n"):
                    self._ready(_CREDENTIALS.unpack(credentials[: _CREDENTIALS.size])[0])

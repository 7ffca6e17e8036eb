"""The socket to its host of a worker that runs as another user, who can open neither the control socket nor the log."""

import os
import socket
from typing import Final

from bghost.shared import logs

_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Channel:
    """This process's; the host has made it before the fork.

    :param fd: inherited.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        logs.opened_by(lambda path: self._newest())

    def connection(self) -> socket.socket:
        """A connection as the control socket would give it, but for what this worker's user may ask.

        :raises BlockingIOError: if the host has many to take up already.
        :raises OSError: if it has gone.
        """
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        with far:
            try:
                socket.send_fds(self._socket, [b"c"], [far.fileno()], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BaseException:
                near.close()
                raise
        return near

    def _newest(self) -> int:
        """The descriptor of the log that the host has handed out last.

        :raises BlockingIOError: if there is none that is new.
        """
        newest = -1
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 1, 1, _FLAGS)
            except BlockingIOError:
                if newest < 0:
                    raise
                return newest
            for fd in fds:
                if newest >= 0:
                    os.close(newest)
                newest = fd
            if not data:
                return newest if newest >= 0 else self._gone()

    def _gone(self) -> int:
        raise BlockingIOError("the host has gone")

"""The control socket as a test speaks it that has to know what was sent when."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from support import SLOW, Host

from bghost.shared.frames import Decoder, encode


@contextlib.contextmanager
def connected(host: Host) -> Iterator[socket.socket]:
    """A connection to the host."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10 * SLOW)
        connection.connect(host.directories.socket)
        yield connection


def ask(connection: socket.socket, verb: str, **args: Any) -> None:
    """Send a request, and wait for nothing."""
    connection.sendall(encode({"verb": verb, "args": args}))


def answer(connection: socket.socket) -> dict[str, Any]:
    """The answer to what was asked."""
    decoder = Decoder()
    while (message := decoder.next()) is None:
        data = connection.recv(1 << 16)
        assert data
        decoder.feed(data)
    return message

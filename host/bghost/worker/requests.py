"""What a worker asks of its host: a request over the control socket, like anybody else's, the wait interruptible."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from bghost.shared import errors, frames
from bghost.shared.errors import HostError, TimedOut
from bghost.worker import waiting
from bghost.worker.channel import Channel
from bghost.worker.waiting import Steps

if TYPE_CHECKING:
    from bghost.worker.worker import Worker

CONNECT_TIMEOUT: Final = 5.0  # seconds; the host's loop never waits, so a queue that stays full says that it is stopped
_RETRY: Final = 0.05  # seconds; the kernel tells nobody when there is room in the queue
_CHUNK: Final = 1 << 16

channel: Channel | None = None
"""What this process asks by, if it cannot open the control socket."""


def request(
    worker: "Worker[Any]", path: str, verb: str, args: Mapping[str, object], timeout: float | None
) -> Steps[Any]:
    """Ask the host *verb*, and wait for its answer; a wake-up or a reload does not end that wait.

    :param path: the control socket.
    :param timeout: seconds for the answer; ``None``: as long as it takes.
    :raises BghostError: the one that the host answers with.
    :raises TimedOut: if there is no answer in time.
    :raises Stop: if the worker is to stop; likewise Canceled. The request may have been carried out then.
    """
    until = float("inf") if timeout is None else time.monotonic() + timeout
    with (yield from _connection(worker, path)) as connection:
        decoder = frames.Decoder()
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have said why it hung up
                connection.sendall(frames.encode({"verb": verb, "args": dict(args)}))
            while (answer := decoder.next()) is None:
                woken = yield from waiting.sleep(worker, until, (connection.fileno(),), wakes=False, reloads=False)
                if woken == waiting.TIMEOUT:
                    raise TimedOut(f"the host has not answered {verb} within {timeout:g} s")
                data = connection.recv(_CHUNK)
                if not data:
                    raise HostError(f"the host closed the connection instead of answering {verb}")
                decoder.feed(data)
        except (OSError, frames.FrameError) as error:
            raise HostError(f"the host cannot be asked to {verb}", detail=str(error)) from None
    if answer.get("ok") is True:
        return answer.get("result")
    told = answer.get("error")
    raise errors.from_wire(told if isinstance(told, dict) else {})


def _connection(worker: "Worker[Any]", path: str) -> Steps[socket.socket]:
    until = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            return channel.connection() if channel is not None else _connected(path)
        except BlockingIOError:
            if time.monotonic() > until:
                raise HostError(f"the host does not take connections at {path}", hint="is it stopped?") from None
        except OSError as error:
            raise HostError(f"the host cannot be reached at {path}", detail=error.strerror or str(error)) from None
        yield from waiting.sleep(worker, time.monotonic() + _RETRY, wakes=False, reloads=False)


def _connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if pid != os.getppid() and uid not in (0, os.geteuid()):
            raise HostError(f"the control socket {path} is not this worker's host's")
    except BaseException:
        connection.close()
        raise
    return connection

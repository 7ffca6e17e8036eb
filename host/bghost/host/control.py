"""The control socket: clients' requests in, replies out, and nobody makes the host wait."""

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import msgspec
from loguru import logger

from bghost.host.poller import FIRST, READ, SHARE, WRITE, Poller
from bghost.host.process import why_none
from bghost.host.timers import Timer, Timers
from bghost.shared import errors, frames

ROOM: Final = 64  # clients at a time, beyond one for each worker
BACKLOG: Final = 4096  # as many as the kernel allows: all workers of an instance may ask at one time
ACCEPT_RETRY: Final = 0.1  # seconds after a connection could not be taken
FRAME_TIMEOUT: Final = 5.0  # seconds from a client's coming, or its last reply, to its next whole request
CHUNK: Final = 1 << 16  # bytes read from one client in one turn

Table = Mapping[str, Callable[[dict[str, Any]], Any]]
"""What may be asked: verbs by name, called with the request's ``args``; each gives the result, or a :data:`Later`, or
raises a BghostError."""

Later = Callable[[], Any | None]
"""A verb's answer that is not there yet: asked again after each change, gives the result once there is one."""


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket, verbs: "Table") -> None:
        self.connection = connection
        self.verbs = verbs
        self.decoder = frames.Decoder()
        self.out = bytearray()
        self.later: Later | None = None
        self.deadline: Timer | None = None
        self.closing = False


class Control:
    """The listening socket and its clients.

    :param workers: how many there may be; each may have a request under way.
    :param verbs: what may be asked by who may connect.
    """

    def __init__(
        self,
        path: str,
        poller: Poller,
        timers: Timers,
        verbs: Table,
        workers: int,
    ) -> None:
        self._path = path
        self._poller = poller
        self._timers = timers
        self._verbs = verbs
        self._limit = workers + ROOM
        self._clients: set[Client] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)  # a dead host's: the caller holds the instance's lock
            # Not under another name until it listens: a socket is known by the name that it was bound to, to ss(8) too.
            self._listener.bind(path)
        finally:
            os.umask(before)
        self._listener.listen(BACKLOG)
        self._reserve: int | None = None  # a descriptor to turn a client away with when there is no other
        self._listen()

    def _listen(self) -> None:
        if self._reserve is None:
            self._reserve = _any_descriptor()
        self._poller.register(self._listener.fileno(), self._accept, rank=FIRST)

    def fds(self) -> list[int]:
        """The descriptors that a child must not keep."""
        reserve = [] if self._reserve is None else [self._reserve]
        return [self._listener.fileno(), *reserve, *(client.connection.fileno() for client in self._clients)]

    def close(self) -> None:
        """Remove the socket and send what is still to be sent, as far as clients take it at once."""
        if self._listener.fileno() in self._poller:
            self._poller.unregister(self._listener.fileno())
        self._listener.close()
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
        try:
            os.unlink(self._path)
        except OSError:
            pass  # the next start takes it away
        for client in list(self._clients):
            self._send(client)
            self._drop(client)

    def changed(self) -> None:
        """Something about a worker has changed: see which clients have their answer now."""
        for client in [client for client in self._clients if client.later is not None]:
            self._answer(client)

    def _accept(self, events: int) -> None:
        until = time.monotonic() + SHARE  # for what they begin with, too
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if not self._turn_away(error):
                    # It went away, or waits: the loop does not try all the time.
                    self._poller.unregister(self._listener.fileno())
                    self._timers.at(time.monotonic() + ACCEPT_RETRY, self._listen)
                return
            self._look_at(connection)
            if time.monotonic() > until:
                return

    def _turn_away(self, error: OSError) -> bool:
        """Tell a client that there is no descriptor for it, with the one that is kept for that; one client a turn.

        :returns: whether this was all that *error* of accept() asks for.
        """
        if error.errno not in (errno.EMFILE, errno.ENFILE) or self._reserve is None:
            return False
        os.close(self._reserve)
        try:
            connection, _ = self._listener.accept()
            refusal = errors.HostError("the host can take no further connection", detail=why_none(error))
            self._refuse(Client(connection, {}), refusal)
        except BlockingIOError:
            pass  # nobody waits: accept() wants a descriptor before it looks
        except OSError:
            return False
        finally:
            self._reserve = _any_descriptor()
        return True

    def _look_at(self, connection: socket.socket) -> None:
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            logger.warning("a client of uid {} was refused", uid)
            self._refuse(Client(connection, {}), errors.HostError(f"uid {uid} may not command this host"))
        else:
            self.welcome(connection, self._verbs)

    def welcome(self, connection: socket.socket, verbs: Table) -> None:
        """Take up a connection, on which *verbs* may be asked."""
        client = Client(connection, verbs)
        connection.setblocking(False)
        if len(self._clients) >= self._limit:
            self._refuse(client, errors.HostError(f"all {self._limit} places for clients are taken"))
        else:
            self._poller.register(connection.fileno(), lambda events: self._serve(client, events), rank=FIRST)
            self._clients.add(client)
            self._expect(client)
            self._serve(client, READ)  # what it asks for comes with it, mostly

    @staticmethod
    def _refuse(client: Client, error: errors.BghostError) -> None:
        try:
            data = frames.encode({"ok": False, "error": errors.to_wire(error)})
            client.connection.send(data, socket.MSG_DONTWAIT)
        except OSError:
            pass
        client.connection.close()

    def _expect(self, client: Client) -> None:
        if client.deadline is not None:
            client.deadline.cancel()
        client.deadline = self._timers.at(time.monotonic() + FRAME_TIMEOUT, lambda: self._drop(client))

    def _drop(self, client: Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self._poller.unregister(client.connection.fileno())
            client.connection.close()
            client.later = None
            if client.deadline is not None:
                client.deadline.cancel()

    def _serve(self, client: Client, events: int) -> None:
        if events & WRITE:
            self._send(client)
        if events & READ:
            try:
                data = client.connection.recv(CHUNK, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(client)
                return
            client.decoder.feed(data)
            self._next(client)

    def _next(self, client: Client) -> None:
        """Take up the next request, unless one is still to be answered; one at a time and client."""
        if client.later is not None or client.closing:
            return
        try:
            message = client.decoder.next()
        except frames.FrameError as error:
            client.closing = True
            self._reply(client, error=errors.UsageError(str(error)))
            return
        if message is None:
            return
        if client.deadline is not None:
            client.deadline.cancel()
        try:
            result = self._call(message, client.verbs)
        except errors.BghostError as error:
            self._reply(client, error=error)
        except Exception as error:
            logger.opt(exception=error).error("a request failed")
            self._reply(client, error=error)
        else:
            if callable(result):
                client.later = result
                self._answer(client)
            else:
                self._reply(client, result)

    @staticmethod
    def _call(message: dict[str, object], verbs: Table) -> Any:
        verb, args = message.get("verb"), message.get("args", {})
        if not isinstance(verb, str) or not isinstance(args, dict):
            raise errors.UsageError("a request is an object with a verb and its args")
        call = verbs.get(verb)
        if call is None:
            raise errors.UsageError(f"the host knows no verb {verb[:40]!r}")
        return call(args)

    def _answer(self, client: Client) -> None:
        later = client.later
        if later is None:
            return
        try:
            result = later()
        except errors.BghostError as error:
            client.later = None
            self._reply(client, error=error)
        except Exception as error:
            client.later = None
            logger.opt(exception=error).error("a request failed")
            self._reply(client, error=error)
        else:
            if result is not None:
                client.later = None
                self._reply(client, result)

    def _reply(self, client: Client, result: Any = None, *, error: BaseException | None = None) -> None:
        message = {"ok": True, "result": result} if error is None else {"ok": False, "error": errors.to_wire(error)}
        try:
            client.out += _encoded(message)
        except frames.FrameError as too_long:
            client.out += frames.encode({"ok": False, "error": errors.to_wire(errors.HostError(str(too_long)))})
        self._send(client)
        self._expect(client)
        if client in self._clients:
            self._next(client)

    def _send(self, client: Client) -> None:
        try:
            while client.out:
                del client.out[: client.connection.send(client.out, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if client.closing and not client.out:
            self._drop(client)
        elif client in self._clients:
            self._poller.want(client.connection.fileno(), READ | WRITE if client.out else READ)


def _any_descriptor() -> int | None:
    """One that stands for nothing, if there is one to be had."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _encoded(message: dict[str, object]) -> bytes:
    """As frames.encode() has it, but ten times as fast: a thousand rows are half a megabyte."""
    try:
        return frames.framed(msgspec.json.encode(message))
    except (TypeError, ValueError):
        return frames.encode(message)  # half a surrogate pair, which JSON's own escapes can carry

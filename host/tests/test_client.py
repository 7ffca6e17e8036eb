"""The client of the control socket, against listeners that answer as they should, or do not."""

import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import SLOW, accepted, until, within

from bghost.shared.client import Client
from bghost.shared.errors import BghostError, ConfigError, HostError, NoHost, NotFound, TimedOut, UsageError
from bghost.shared.frames import LIMIT, Decoder, encode
from bghost.shared.paths import prepare

Message = dict[str, object]
Answer = Callable[[Message], bytes | None]
"""Bytes to send; none: nothing, and the connection stays open."""

STRANGER = 54321  # the uid of nobody on this machine


def ok(result: object) -> bytes:
    return encode({"ok": True, "result": result})


def well(answer: Answer) -> Answer:
    """A listener that says it is well, and answers everything else by *answer*."""
    return lambda message: ok({}) if message["verb"] == "status" else answer(message)


class Listener:
    """A Unix socket where a test's own function answers, in threads."""

    def __init__(self, path: str, answer: Answer) -> None:
        self.requests: list[Message] = []
        self._answer = answer
        self._connections: list[socket.socket] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        for connection in accepted(self._socket):
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        decoder = Decoder()
        try:
            while data := connection.recv(1 << 16):
                decoder.feed(data)
                while (message := decoder.next()) is not None:
                    self.requests.append(message)
                    reply = self._answer(message)
                    if reply is not None:
                        connection.sendall(reply)
        except OSError:
            pass

    def hang_up(self) -> None:
        for connection in self._connections:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(5)
        for connection in self._connections:
            connection.close()


@pytest.fixture
def client() -> Iterator[Client]:
    """A client, and directories, of an instance that has no host yet."""
    with tempfile.TemporaryDirectory(prefix="bghost-") as path:
        client = Client("test", 10.0 * SLOW, environ={"BGHOST_RUNTIME_DIR": path})
        prepare(client.directories)
        yield client


@pytest.fixture
def listen(client: Client) -> Iterator[Callable[[Answer], Listener]]:
    """Has a function answer the client."""
    listeners: list[Listener] = []

    def start(answer: Answer) -> Listener:
        listeners.append(Listener(client.directories.socket, answer))
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.close()


Listen = Callable[[Answer], Listener]


def test_a_request_is_answered(client: Client, listen: Listen) -> None:
    listener = listen(lambda message: ok([{"name": "counter"}]))
    assert [row["name"] for row in client.ps("counter")] == ["counter"]
    assert listener.requests == [{"verb": "ps", "args": {"names": ["counter"]}}]


def test_an_answer_may_be_as_long_as_a_frame(client: Client, listen: Listen) -> None:
    """It comes in many pieces then."""
    listen(lambda message: ok("x" * (LIMIT - 100)))
    assert client.request("anything") == "x" * (LIMIT - 100)


@pytest.mark.parametrize(
    ("code", "kind"), [(1, HostError), (2, UsageError), (4, TimedOut), (5, NotFound), (70, HostError), (99, HostError)]
)
def test_an_error_that_is_answered_is_raised(
    client: Client, listen: Listen, code: int, kind: type[BghostError]
) -> None:
    """With the message, detail and hint that the host gave, and its exit code."""
    told: Message = {"code": code, "message": "no", "detail": "really", "hint": "try again"}
    listen(lambda message: encode({"ok": False, "error": told}))
    with pytest.raises(kind) as raised:
        client.ps()
    error = raised.value
    assert (error.message, error.detail, error.hint) == ("no", "really", "try again")
    assert error.exit_code == (code if code != 99 else 1)


def test_without_a_socket_there_is_no_host(client: Client) -> None:
    with pytest.raises(NoHost) as raised:
        client.ps()
    assert str(raised.value) == (
        f"no host of instance 'test' is running: nobody listens at {client.directories.socket}"
    )
    assert raised.value.exit_code == 3


def test_a_socket_that_a_dead_host_left_is_no_host(client: Client) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(client.directories.socket)
    with pytest.raises(NoHost):
        client.ps()
    with pytest.raises(NoHost):
        client.stop("counter")


def test_a_host_that_does_not_answer_times_out_and_is_named(client: Client, listen: Listen) -> None:
    client.timeout = 0.5
    listen(lambda message: None)

    def attempt() -> float:
        began = time.monotonic()
        said = rf"the host of instance 'test' does not answer: pid {os.getpid()}, silent for"
        with pytest.raises(TimedOut, match=said):
            client.ps()
        took = time.monotonic() - began
        assert took >= 0.5
        return took

    within(2.0, attempt)


def full(path: str) -> list[socket.socket]:
    """A listener that accepts nobody, and connections that fill its backlog."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(0)
    sockets = [listener]
    while True:
        one = socket.socket(socket.AF_UNIX)
        one.setblocking(False)
        sockets.append(one)
        try:
            one.connect(path)
        except BlockingIOError:
            return sockets


def test_a_full_backlog_is_tried_again_until_the_deadline(client: Client) -> None:
    """The pid comes from the host's note in the lock file then."""
    Path(client.directories.lock).write_text('{"pid": 12345678, "since": 1.0, "run_id": "x"}')
    client.timeout = 0.5
    sockets = full(client.directories.socket)
    try:

        def attempt() -> float:
            began = time.monotonic()
            with pytest.raises(TimedOut, match=r"pid 12345678, silent for \d+\.\d s"):
                client.ps()
            took = time.monotonic() - began
            assert took >= 0.4
            return took

        within(2.0, attempt)
        with pytest.raises(TimedOut):
            client.shutdown()
    finally:
        for one in sockets:
            one.close()


def test_a_full_backlog_that_empties_delays_the_answer_only(client: Client) -> None:
    sockets = full(client.directories.socket)
    listener = sockets[0]

    def empty() -> None:
        for _ in sockets[2:]:
            listener.accept()[0].close()
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(ok([]))

    thread = threading.Timer(0.2, empty)
    thread.start()
    try:
        client.timeout = 5.0
        assert client.ps() == []
    finally:
        thread.join()
        for one in sockets:
            one.close()


@pytest.mark.parametrize("note", ["", "no json", "[]", '{"pid": "1"}', "[" * 4000])
def test_what_the_lock_file_says_is_not_relied_on(client: Client, note: str) -> None:
    Path(client.directories.lock).write_text(note)
    sockets = full(client.directories.socket)
    try:
        with pytest.raises(TimedOut, match="pid unknown"):
            client.request("ps", 0.1)
    finally:
        for one in sockets:
            one.close()


def test_a_host_that_hangs_up_is_an_error(client: Client, listen: Listen) -> None:
    listener = listen(lambda message: listener.hang_up())
    with pytest.raises(HostError, match="the host hung up before it answered"):
        client.ps()


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (struct.pack(">I", LIMIT + 1), f"a frame of {LIMIT + 1} bytes"),
        (struct.pack(">I", 0), "a frame of 0 bytes"),
        (struct.pack(">I", 4) + b"oops", "no JSON"),
        (struct.pack(">I", 2) + b"[]", "no JSON object"),
        (struct.pack(">I", 100_000) + b"[" * 100_000, "no JSON: RecursionError"),
    ],
)
def test_an_answer_that_is_no_frame_is_an_error(client: Client, listen: Listen, reply: bytes, why: str) -> None:
    listen(lambda message: reply)
    with pytest.raises(HostError, match=f"the host's answer cannot be read: {why}"):
        client.ps()


@pytest.mark.parametrize("reply", [{}, {"ok": False}, {"ok": False, "error": "x"}, {"ok": 1, "result": []}])
def test_an_answer_of_no_form_is_an_error(client: Client, listen: Listen, reply: Message) -> None:
    listen(lambda message: encode(reply))
    with pytest.raises(HostError, match="the host answered with an error of no form"):
        client.ps()


def test_a_request_that_is_too_long_is_not_sent(client: Client, listen: Listen) -> None:
    listener = listen(lambda message: ok([]))
    with pytest.raises(UsageError, match=f"the request cannot be sent: a frame of .* bytes; the limit is {LIMIT}"):
        client.ps("x" * LIMIT)
    with pytest.raises(UsageError, match="the request cannot be sent: no JSON"):
        client.request("anything", number=float("nan"))
    assert listener.requests == []


def test_a_long_wait_is_fine_while_the_host_is_well(client: Client, listen: Listen) -> None:
    """A verb that waits may take longer than an answer may: the host is asked now and then whether it is well."""
    client.timeout = 0.5 * SLOW  # in which it has to say so each time
    done = threading.Event()

    def answer(message: Message) -> bytes | None:
        if message["verb"] == "status":
            if len(listener.requests) > 4:
                done.set()
            return ok({})
        done.wait(10)
        return ok({"stopped": ["counter"], "killed": []})

    listener = listen(answer)
    assert client.stop("counter", mode="fast") == {"stopped": ["counter"], "killed": []}
    verbs = [message["verb"] for message in listener.requests]
    assert verbs[0] == "status"
    assert verbs.count("status") > 2
    assert verbs.count("stop") == 1
    assert {"verb": "stop", "args": {"names": ["counter"], "mode": "fast"}} in listener.requests


def test_a_wait_ends_when_the_host_falls_silent(client: Client, listen: Listen) -> None:
    client.timeout = 0.2
    listener = listen(lambda message: ok({}) if len(listener.requests) == 1 else None)
    with pytest.raises(TimedOut, match="does not answer"):
        client.wait("counter")


def test_a_host_is_not_blamed_for_the_callers_time(client: Client, listen: Listen) -> None:
    """What it has not answered when the caller's time is over says nothing, if that was less than its own time."""
    client.timeout = 0.5 * SLOW
    listener = listen(lambda message: ok({}) if len(listener.requests) == 1 else None)
    with pytest.raises(TimedOut, match="not over within"):
        client.wait("counter", timeout=client.timeout + 0.2)


def test_nothing_is_asked_of_a_host_that_is_silent(client: Client, listen: Listen) -> None:
    """It would do it when it comes to itself, after its user was told that it failed."""
    client.timeout = 0.5
    listener = listen(lambda message: None)
    with pytest.raises(TimedOut):
        client.stop("counter")
    until(lambda: listener.requests, what="the listener's thread has read it")
    assert [message["verb"] for message in listener.requests] == ["status"]


def test_a_wait_ends_at_the_callers_time(client: Client, listen: Listen) -> None:
    listener = listen(well(lambda message: None))
    timeout = 0.5 * SLOW  # in which the listener has to say that it is well
    with pytest.raises(TimedOut) as raised:
        client.wait("counter", until="stopped", timeout=timeout)
    assert str(raised.value) == f"not over within {timeout:g} s: wait counter"
    with pytest.raises(TimedOut) as raised:
        client.stop("counter", timeout=timeout)
    assert str(raised.value) == f"not over within {timeout:g} s: stop counter (the host goes on with it)"
    asked = {"verb": "wait", "args": {"names": ["counter"], "for": "stopped"}}
    until(lambda: asked in listener.requests, what="the listener's thread has read it")


def test_a_reload_that_is_refused_is_the_hosts_error(client: Client, listen: Listen) -> None:
    refused: Message = {"code": 2, "message": "bghost.toml has an unknown table [x]", "detail": "", "hint": ""}
    listen(well(lambda message: encode({"ok": False, "error": refused})))
    with pytest.raises((UsageError, ConfigError), match="unknown table"):
        client.reload()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen as somebody else")
def test_a_listener_that_is_somebody_else_is_refused(client: Client) -> None:
    """Whoever could put a socket in the way must not be given commands, nor believed."""
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(client.directories.socket)
        os.seteuid(STRANGER)
        try:
            stranger.listen()  # the kernel notes who it is now
        finally:
            os.seteuid(0)
        with pytest.raises(HostError, match=f"is user {STRANGER}'s, and we are 0"):
            client.ps()


def test_an_instance_that_is_no_plain_word_is_refused() -> None:
    with pytest.raises(UsageError):
        Client("../x")

"""The client of a host's control socket: asks a running host, and never waits for one that does not answer.

On ``_socket``, what the standard library's ``socket`` is made of: that one imports selectors and enum as well, and with
them takes a fifth of all the time that ``bghost ps`` does.
"""

from __future__ import annotations

import _socket
import fcntl
import json
import os
import select
import struct
import time

from bghost.shared.errors import HostError, NoHost, TimedOut, UsageError, from_wire
from bghost.shared.frames import Decoder, FrameError, encode
from bghost.shared.paths import directories

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Literal

    from bghost.shared.replies import Launched, Mode, PoolDump, Reloaded, Row, Shutdown, Stopped, Why
    from bghost.shared.spec import WorkerSpec

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_RETRY = 0.05  # seconds between two tries to connect to a full backlog, or to share the lock
_REMAINS = 15.0  # seconds that what a host leaves behind may take: its guard ends that after stop_timeout, 10


class Connection(_socket.socket):
    """A connection to a host; closed at the end of a ``with``."""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Client:
    """Asks the host of one instance. Each request is a connection of its own: a client can be shared, and forked.

    Besides what each method says, all raise :class:`~bghost.NoHost` if no host of the instance is running,
    :class:`~bghost.TimedOut` if it does not answer, and the error that it answers with.

    :param instance: the instance's name; ``None``: BGHOST_INSTANCE, or else ``default``.
    :param timeout: seconds in which a host that is well answers. While a method waits, it is asked as often if it is.
    :param environ: where the ``BGHOST_*`` and ``XDG_*`` variables are looked up.
    :raises UsageError: if *instance* is no plain word.
    """

    def __init__(
        self, instance: str | None = None, timeout: float = 5.0, *, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.directories = directories(instance, environ)
        self.timeout = timeout

    def ps(self, *names: str) -> list[Row]:
        """The workers of these names, or all.

        :raises NotFound: if there is no worker of one of the names.
        """
        rows: list[Row] = self.request("ps", names=list(names))
        return rows

    def status(self) -> dict[str, Any]:
        """The host itself: pid, since, config number, slots, and more."""
        status: dict[str, Any] = self.request("status")
        return status

    def launch(self, spec: WorkerSpec, *, wait: bool = False, timeout: float | None = None) -> Launched:
        """Launch a worker.

        :param wait: return when it is ready, and not when it is under way.
        :param timeout: seconds to wait for that; ``None``: as long as it takes.
        :raises LaunchError: if it is refused, or fails before it is ready.
        """
        import msgspec

        args = {"spec": msgspec.to_builtins(spec), "wait": wait}
        launched: Launched = self._await("launch", timeout, args) if wait else self.request("launch", timeout, **args)
        return launched

    def wait(
        self, *names: str, until: Literal["ready", "stopped"] = "ready", timeout: float | None = None
    ) -> list[Row]:
        """Wait until the workers of these names are ready, or have stopped for good.

        :param timeout: seconds; ``None``: as long as it takes.
        """
        rows: list[Row] = self._await("wait", timeout, {"names": list(names), "for": until})
        return rows

    def dump(self, *names: str) -> dict[str, str]:
        """The stacks, and what was open, of the workers of these names; empty for one without a process."""
        dumps: dict[str, str] = self.request("dump", names=list(names))
        return dumps

    def pools(self, *names: str) -> list[PoolDump]:
        """The tables of the pools of these names, or of all, and what is wrong with them.

        :raises NotFound: if there is no pool of one of the names.
        """
        pools: list[PoolDump] = self.request("pool_dump", names=list(names))
        return pools

    def why(self, *names: str) -> list[Why]:
        """Why the workers of these names are in the state that they are in, and how their last processes ended."""
        whys: list[Why] = self.request("why", names=list(names))
        return whys

    def stop(self, *names: str, mode: Mode = "smart", timeout: float | None = None) -> Stopped:
        """Stop workers, and return when they have stopped.

        :param timeout: seconds to wait for that; ``None``: as long as it takes, for which the host has its limits.
        """
        stopped: Stopped = self._await("stop", timeout, {"names": list(names), "mode": mode})
        return stopped

    def restart(self, *names: str, mode: Mode = "smart", timeout: float | None = None) -> list[Row]:
        """Stop workers and start them again, also those that are over; return when each is ready, or over again.

        :param timeout: seconds to wait for that; ``None``: as long as it takes.
        """
        rows: list[Row] = self._await("restart", timeout, {"names": list(names), "mode": mode})
        return rows

    def signal(self, *names: str, signum: int) -> list[str]:
        """Send a signal to workers' processes; the names of those that had one."""
        answer: dict[str, list[str]] = self.request("signal", names=list(names), signal=int(signum))
        return answer["signaled"]

    def wake(self, *names: str) -> list[str]:
        """End workers' sleep; the names of those that had a process."""
        answer: dict[str, list[str]] = self.request("wake", names=list(names))
        return answer["woken"]

    def shutdown(self, mode: Mode = "smart", timeout: float | None = None) -> Shutdown:
        """Stop every worker and the host, and return when all of them are gone and the instance is free.

        :param timeout: seconds to wait for that; ``None``: as long as it takes, for which the host has its limits.
        """
        deadline = _deadline(timeout)
        self._probe(deadline)
        with self._connect(deadline) as connection:
            host = _pidfd(_peer(connection)[0])
            try:
                result: Shutdown = self._converse(connection, "shutdown", {"mode": mode}, timeout, deadline)
                deadline = min(deadline, time.monotonic() + _REMAINS)
                if host is not None:
                    ends = select.poll()
                    ends.register(host, select.POLLIN)
                    ends.poll(max(0.0, deadline - time.monotonic()) * 1000)
            finally:
                if host is not None:
                    os.close(host)
        self._wait_free(deadline)
        return result

    def reload(
        self, *, dry_run: bool = False, wait: bool = False, rollback: bool = False, timeout: float | None = None
    ) -> Reloaded:
        """Have the host read its config again; either all of it is taken, or nothing has changed.

        :param dry_run: change nothing, and tell what would be changed.
        :param wait: return when each worker runs by it, or has failed.
        :param rollback: have the old config back if one of them fails, or is not ready in time; waits, too.
        :param timeout: seconds to wait; ``None``: as long as it takes. With *rollback* what is not ready then is late.
        :raises ConfigError: if it is not valid.
        :raises HostError: if it was taken back.
        """
        args: dict[str, object] = {"dry_run": dry_run, "wait": wait or rollback, "rollback": rollback}
        if rollback:
            args["within"] = timeout
            timeout = None  # the host keeps it
        reloaded: Reloaded = self._await("reload", timeout, args)
        return reloaded

    def request(self, verb: str, timeout: float | None = None, **args: object) -> Any:
        """Send one request and return the result it is answered with.

        :param timeout: seconds for the whole; ``None``: the client's own.
        """
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        with self._connect(deadline) as connection:
            _send(connection, verb, args, deadline)
            reply = _receive(connection, Decoder(), deadline)
            if reply is None:
                raise self._silent(limit, _peer(connection)[0])
        return _result(reply)

    def _await(self, verb: str, timeout: float | None, args: dict[str, object]) -> Any:
        """Send a request whose answer may be long in coming."""
        deadline = _deadline(timeout)
        self._probe(deadline)  # first, so that nothing is asked of a host that would do it some time after we gave up
        with self._connect(deadline) as connection:
            return self._converse(connection, verb, args, timeout, deadline)

    def _converse(
        self,
        connection: Connection,
        verb: str,
        args: dict[str, object],
        timeout: float | None,
        deadline: float,
    ) -> Any:
        _send(connection, verb, args, min(deadline, time.monotonic() + self.timeout))
        decoder = Decoder()
        while True:
            reply = _receive(connection, decoder, min(deadline, time.monotonic() + self.timeout))
            if reply is not None:
                return _result(reply)
            if time.monotonic() >= deadline:
                names = args.get("names")
                what = " ".join([verb, *names]) if isinstance(names, list) else verb
                hint = "" if verb == "wait" else "the host goes on with it"
                raise TimedOut(f"not over within {timeout:g} s: {what}", hint=hint)
            try:
                self._probe(deadline)
            except NoHost:
                pass  # it takes no new questions; the end of this connection will tell
            except TimedOut:
                if time.monotonic() < deadline:
                    raise
                # else it has had less than its time

    def _probe(self, deadline: float) -> None:
        self.request("status", min(self.timeout, max(0.001, deadline - time.monotonic())))

    def _connect(self, deadline: float) -> Connection:
        path = self.directories.socket
        began = time.monotonic()
        deadline = min(deadline, began + self.timeout)
        while True:
            connection = Connection(_socket.AF_UNIX, _socket.SOCK_STREAM)
            try:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                connection.connect(path)
                if (uid := _peer(connection)[1]) not in (0, os.geteuid()):
                    raise HostError(f"the process that listens at {path} is user {uid}'s, and we are {os.geteuid()}")
                return connection
            except BlockingIOError:
                connection.close()  # the backlog is full, and nothing tells when it no longer is
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                connection.close()
                raise NoHost(
                    f"no host of instance {self.directories.instance!r} is running", detail=f"nobody listens at {path}"
                ) from None
            except OSError as error:
                connection.close()
                raise HostError(f"cannot connect to {path}: {error.strerror}") from None
            except BaseException:
                connection.close()
                raise
            if time.monotonic() + _RETRY > deadline:
                raise self._silent(deadline - began, None)
            time.sleep(_RETRY)

    def _silent(self, waited: float, pid: int | None) -> TimedOut:
        """The error for a host that does not answer; its pid is told for information, and not used as an address."""
        pid = pid or self._noted_pid()
        stopped = pid is not None and _state(pid) in ("T", "t")
        return TimedOut(
            f"the host of instance {self.directories.instance!r} does not answer",
            detail=f"pid {pid or 'unknown'}, {'stopped by a signal, ' if stopped else ''}silent for {waited:.1f} s",
            hint=f"kill -CONT {pid} lets it go on" if stopped else "",
        )

    def _noted_pid(self) -> int | None:
        """The pid that the host wrote into its lock file."""
        try:
            with open(os.open(self.directories.lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as lock:
                noted = json.loads(lock.read(4096))["pid"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return noted if isinstance(noted, int) else None

    def _wait_free(self, deadline: float) -> None:
        """Return when nobody holds the instance's lock: neither the host nor a worker that outlived it."""
        try:
            lock = os.open(self.directories.lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            while True:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass
                if time.monotonic() + _RETRY > deadline:
                    raise TimedOut("the host has ended, but a process that it started holds the instance's lock still")
                time.sleep(_RETRY)
        finally:
            os.close(lock)


def _deadline(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def _peer(connection: Connection) -> tuple[int | None, int]:
    """The pid and uid of the process that listens at the other end, as the kernel noted them."""
    data = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid or None, uid


def _pidfd(pid: int | None) -> int | None:
    try:
        return None if pid is None else os.pidfd_open(pid)
    except OSError:  # gone already, or a kernel that has or allows none: the lock has to do
        return None


def _state(pid: int) -> str:
    """The letter for a process's state in /proc, or nothing."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def _send(connection: Connection, verb: str, args: dict[str, object], deadline: float) -> None:
    try:
        frame = encode({"verb": verb, "args": args})
    except FrameError as error:
        raise UsageError(f"the request cannot be sent: {error}") from None
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        connection.sendall(frame)
    except (BrokenPipeError, ConnectionResetError, TimeoutError):
        pass  # what the host said before it hung up, or that it says nothing, is for the receiver to find


def _receive(connection: Connection, decoder: Decoder, deadline: float) -> dict[str, object] | None:
    """The next message, or ``None`` if it is not there in time."""
    try:
        while (message := decoder.next()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            connection.settimeout(left)
            try:
                data = connection.recv(1 << 16)
            except TimeoutError:
                return None
            except ConnectionResetError:
                data = b""
            if not data:
                raise HostError(
                    "the host hung up before it answered", hint="'bghost status' tells whether it still runs"
                )
            decoder.feed(data)
    except FrameError as error:
        raise HostError(f"the host's answer cannot be read: {error}") from None
    return message


def _result(reply: dict[str, object]) -> object:
    if reply.get("ok") is True:
        return reply.get("result")
    error = reply.get("error")
    raise from_wire(error if isinstance(error, dict) else {})

"""The kit of the tests that run a real host: directories of its own, kinds from source text, processes with deadlines.

A test asks for the fixture ``sandbox`` (directories, environment, commands) or ``bghost_host`` (a host that runs, in a
sandbox of its own). Whatever was started is ended by pid when the test ends, and a process that is there still after
that fails the test.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import pytest

from bghost.shared.client import Client
from bghost.shared.errors import NoHost
from bghost.shared.paths import Directories, directories
from bghost.shared.replies import Launched, Row

T = TypeVar("T")

SLOW: Final = float(os.environ.get("BGHOST_TEST_SLOW", "1"))
"""What every deadline of a test is multiplied by."""

BGHOST: Final = (sys.executable, "-P", "-m", "bghost")

_PASSED: Final = ("PYTHONDEVMODE", "PYTHONWARNINGS", "TMPDIR", "BGHOST_CI_RUN_ID")

# What the interpreter prints of an error that nobody sees; none of it may come from bghost.
_UNSEEN: Final = re.compile(r"Exception ignored|ResourceWarning|RuntimeWarning|was never awaited")


class Line(NamedTuple):
    """A line that a process wrote."""

    number: int  # counts the lines of both streams of a process, from 0
    stream: str  # stdout or stderr
    text: str
    match: re.Match[str]


class Result(NamedTuple):
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """What it printed, read as JSON."""
        return json.loads(self.stdout)


def until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """The first true value of *condition*: for facts that nothing announces, of /proc or of ``ps``.

    :param timeout: seconds, times BGHOST_TEST_SLOW.
    :raises AssertionError: if there is none in that time.
    """
    deadline = time.monotonic() + timeout * SLOW
    late = False
    while not (value := condition()):
        if late:
            raise AssertionError(f"not within {timeout * SLOW:g} s: {what or condition}; at last {value!r}")
        time.sleep(0.02)
        late = time.monotonic() > deadline  # it is looked at once more then: this process may have been held up
    return value


def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """Each connection, as it comes, until *listener* is shut down."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        yield connection


def within(seconds: float, attempt: Callable[[], float], tries: int = 4) -> None:
    """Some try of *attempt*, which gives the seconds that something took, takes less than *seconds*: what is late
    because a process got no processor for a while is late this once.

    :param seconds: times BGHOST_TEST_SLOW.
    """
    took: list[float] = []
    while not took or took[-1] >= seconds * SLOW:
        assert len(took) < tries, f"not within {seconds * SLOW:g} s: {took}"
        took.append(attempt())


def pid_in(row: Row | Launched) -> int:
    """The pid of a worker that has a process, by its row of ``ps`` or of its launch; ``None`` is nobody's."""
    assert row["pid"], row
    return row["pid"]


def notes(process: "Process", worker: str) -> list[str]:
    """What *worker* has noted so far, with ``worker.log.info("note: ...")``, in order."""
    return re.findall(rf"^\S+ \S+ INFO +\[{re.escape(worker)}\] note: (.*)$", process.text(), re.MULTILINE)


class Process:
    """A process that runs, its output read by a thread as it comes, so that it never waits for the test."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self.argv = list(argv)
        self._popen = subprocess.Popen(
            self.argv,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self.pid: Final = self._popen.pid
        self._news = threading.Condition()
        self._lines: list[tuple[str, str]] = []
        self._open = 2
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self._popen.stdout), ("stderr", self._popen.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, stream: Any) -> None:
        rest = b""
        with stream:
            while True:
                select.select([stream], [], [])
                with self._news:  # read and noted in one step: what is not in the pipe any more is in the list
                    data = os.read(stream.fileno(), 1 << 16)
                    *lines, rest = (rest + data).split(b"\n")
                    if not data and rest:
                        lines.append(rest)
                    self._lines += [(name, line.decode("utf-8", "replace")) for line in lines]
                    self._news.notify_all()
                if not data:
                    break
        with self._news:
            self._open -= 1
            self._news.notify_all()

    def _unread(self) -> bool:
        """Whether something lies in the pipes that is in the list of lines not yet."""
        for stream in (self._popen.stdout, self._popen.stderr):
            try:
                if stream is not None and int.from_bytes(
                    fcntl.ioctl(stream, termios.FIONREAD, bytes(4)), sys.byteorder
                ):
                    return True
            except (OSError, ValueError):
                pass  # its reader has come to its end, and has closed it
        return False

    @property
    def alive(self) -> bool:
        return self.code is None

    @property
    def code(self) -> int | None:
        """Its exit code, -N for a signal N, ``None`` while it runs."""
        return self._popen.poll()

    def text(self, stream: str | None = None) -> str:
        """What has been written so far, to one stream or to both."""
        with self._news:
            self._news.wait_for(lambda: not self._unread(), 5.0)
            return "\n".join(text for name, text in self._lines if stream in (None, name))

    def wait_line(self, pattern: str, timeout: float = 10.0, *, after: Line | None = None) -> Line:
        """The first line, of both streams, in which *pattern* is found, from the start or *after* another one.

        :param timeout: seconds, times BGHOST_TEST_SLOW.
        :raises AssertionError: if none comes in that time, or both streams end before; the output is in its text.
        """
        looked, deadline = after.number + 1 if after else 0, time.monotonic() + timeout * SLOW
        with self._news:
            while True:
                for number in range(looked, len(self._lines)):
                    stream, text = self._lines[number]
                    if match := re.search(pattern, text):
                        return Line(number, stream, text, match)
                looked, left = len(self._lines), deadline - time.monotonic()
                if not self._open or left <= 0:
                    why = f"within {timeout * SLOW:g} s" if self._open else "and the output has ended"
                    raise AssertionError(f"no line with {pattern!r} {why}; there is:\n" + self._shown())
                self._news.wait(left)

    def _shown(self) -> str:
        return "\n".join(f"  {name}: {text}" for name, text in self._lines) or "  nothing"

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float = 10.0) -> int:
        """Its exit code (-N for a signal N), once it and whoever shares its output have ended.

        :param timeout: seconds, times BGHOST_TEST_SLOW.
        :raises AssertionError: if that takes longer.
        """
        deadline = time.monotonic() + timeout * SLOW
        try:
            code = self._popen.wait(timeout * SLOW)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} has not ended in {timeout * SLOW:g} s; output:\n{self.text()}") from None
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()) + 1.0)
            assert not reader.is_alive(), f"{self} has ended, and another process holds its output open"
        return code

    def result(self, timeout: float = 10.0) -> Result:
        return Result(self.wait(timeout), self.text("stdout"), self.text("stderr"))

    def end(self, patience: float) -> str:
        """End it, with SIGTERM first, and tell what went wrong with that, if anything did."""
        if not self.alive:
            return ""
        self._popen.send_signal(signal.SIGTERM)
        self._popen.send_signal(signal.SIGCONT)
        try:
            self._popen.wait(patience)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
            return f"{self} did not end within {patience:g} s of SIGTERM, and was killed"
        return ""

    def join(self) -> None:
        for reader in self._readers:
            reader.join(5.0)

    def __str__(self) -> str:
        return f"{' '.join(self.argv[len(BGHOST) - 1 :])} (pid {self.pid})"


def answered(client: Client) -> bool:
    """Whether there is a host that answers *client*."""
    try:
        client.ps()
    except NoHost:
        return False
    return True


class Host(Process):
    """A host that runs in a sandbox, with a client to ask it."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], sandbox: "Sandbox") -> None:
        super().__init__(argv, env, sandbox.root)
        self.sandbox: Final = sandbox
        self.client: Final = sandbox.client(env)
        self.directories: Final = directories(environ=env)

    def bghost(self, *args: str, timeout: float = 20.0) -> Result:
        """Run another ``bghost`` command against it."""
        return self.sandbox.bghost(*args, timeout=timeout)

    def row(self, name: str) -> Row:
        """What ``ps`` says of one worker."""
        (row,) = self.client.ps(name)
        return row

    def wait_row(self, name: str, condition: Callable[[Row], object], timeout: float = 10.0) -> Row:
        """What ``ps`` says of one worker, once *condition* holds of it."""

        def look() -> Row | None:
            row = self.row(name)
            return row if condition(row) else None

        try:
            return until(look, timeout, "a row of " + name)  # type: ignore[return-value]
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.row(name)}") from None

    def wait_answering(self, timeout: float = 30.0) -> None:
        """Return when it answers on its control socket."""

        def answers() -> bool:
            if not self.alive:
                raise AssertionError(f"{self} ended with {self.wait()}; output:\n{self.text()}")
            return answered(self.client)

        until(answers, timeout, f"an answer of {self}")


class Sandbox:
    """Directories, an environment, and installed distributions that belong to one test."""

    def __init__(self, root: Path, runtime: Path) -> None:
        self.root: Final = root
        self.site: Final = root / "site"
        self.config_file: Final = root / "bghost.toml"
        self._token = uuid.uuid4().hex
        self._runtime = runtime
        self._processes: list[Process] = []
        for path in (self.site, root / "home"):
            path.mkdir()
        self.env: dict[str, str] = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(root / "home"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(self.site),
            "BGHOST_RUNTIME_DIR": str(runtime),
            "BGHOST_STATE_DIR": str(root / "state"),
            "BGHOST_DATA_DIR": str(root / "data"),
            "BGHOST_CONFIG_DIR": str(root / "config"),
            "BGHOST_TEST_RUN": self._token,
            **{key: value for key, value in os.environ.items() if key in _PASSED},
        }

    @property
    def directories(self) -> Directories:
        return directories(environ=self.env)

    def client(self, env: Mapping[str, str] | None = None, timeout: float = 5.0) -> Client:
        return Client(timeout=timeout * SLOW, environ=env or self.env)

    def wait_answering(self, timeout: float = 30.0) -> None:
        """Return when a host answers here, however it was started: its socket is there an instant before it listens."""
        until(lambda: answered(self.client()), timeout, "an answer of a host")

    def environ(self, changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """The sandbox's environment with *changes*; ``None`` takes a variable away."""
        return {key: value for key, value in {**self.env, **(changes or {})}.items() if value is not None}

    def distribution(
        self,
        name: str,
        modules: Mapping[str, str],
        entry_points: Mapping[str, Mapping[str, str]],
        *,
        version: str = "1.0",
        requires: Sequence[str] = ("bghost",),
    ) -> None:
        """Install a distribution: module name to source text, and group to entry point name to ``module:attribute``."""
        for module, source in modules.items():
            (self.site / f"{module}.py").write_text(textwrap.dedent(source), "utf-8")
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join(head + [f"Requires-Dist: {r}" for r in requires]) + "\n", "utf-8")
        sections = (
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
            for group, points in entry_points.items()
        )
        (info / "entry_points.txt").write_text("\n".join(sections), "utf-8")

    def kinds(self, sources: Mapping[str, str]) -> None:
        """Install kinds: name to the source text of a module with a class Kind. One distribution for each."""
        self._plugins("bghost.kinds", "Kind", sources)

    def extensions(self, sources: Mapping[str, str]) -> None:
        """Install extensions: name to the source text of a module with a class Extension."""
        self._plugins("bghost.plugins", "Extension", sources)

    def commands(self, sources: Mapping[str, str]) -> None:
        """Install commands: name to the source text of a module with a click command named command."""
        self._plugins("bghost.commands", "command", sources)

    def _plugins(self, group: str, attribute: str, sources: Mapping[str, str]) -> None:
        for name, source in sources.items():
            word = re.sub(r"\W", "_", name)
            module = f"test_{attribute.lower()}_{word}"
            self.distribution(module.replace("_", "-"), {module: source}, {group: {name: f"{module}:{attribute}"}})

    def config(self, text: str) -> None:
        """Write the config file that every command of this sandbox is told of."""
        self.config_file.write_text(textwrap.dedent(text), "utf-8")
        self.env["BGHOST_CONFIG"] = str(self.config_file)

    def bghost(
        self, *args: str, env: Mapping[str, str | None] | None = None, timeout: float = 20.0, cwd: Path | None = None
    ) -> Result:
        """Run ``bghost`` with *args* to its end.

        :param env: variables on top of the sandbox's; ``None`` takes one away.
        :param timeout: seconds, times BGHOST_TEST_SLOW.
        """
        return self.start(*args, env=env, cwd=cwd).result(timeout)

    def bghost_each(self, *commands: Sequence[str], timeout: float = 20.0) -> list[Result]:
        """Run several ``bghost`` commands to their ends, all at once."""
        processes = [self.start(*args) for args in commands]
        return [process.result(timeout) for process in processes]

    def start(self, *args: str, env: Mapping[str, str | None] | None = None, cwd: Path | None = None) -> Process:
        """Start ``bghost`` with *args*, and do not wait for it."""
        process = Process([*BGHOST, *args], self.environ(env), cwd or self.root)
        self._processes.append(process)
        return process

    def start_host(self, *args: str, env: Mapping[str, str | None] | None = None) -> Host:
        """Start ``bghost run ...`` or whatever else *args* say, and do not wait for it."""
        host = Host([*BGHOST, *args], self.environ(env), self)
        self._processes.append(host)
        return host

    def start_host_under(self, *wrapper: str, args: Sequence[str] = ("run",)) -> Host:
        """Start a host by another program, such as strace, which takes its command line; do not wait for it."""
        host = Host([*wrapper, *BGHOST, *args], self.environ(), self)
        self._processes.append(host)
        return host

    def processes(self) -> dict[int, str]:
        """Every process that belongs to this sandbox: pid to command line.

        Told by the environment it was started with (a process title may overwrite that) or by a file of the sandbox
        that it holds open (each worker inherits the instance's lock).
        """
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    if self._is_ours(f"/proc/{entry}"):
                        line = (
                            Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                        )
                        found[int(entry)] = line.strip()
        return found

    def _is_ours(self, proc: str) -> bool:
        with open(f"{proc}/environ", "rb") as environ:
            if self._token.encode() in environ.read():
                return True
        return any(
            os.readlink(f"{proc}/fd/{fd}").startswith((f"{self._runtime}/", f"{self.root}/"))
            for fd in os.listdir(f"{proc}/fd")
        )

    def wait_empty(self, timeout: float) -> dict[int, str]:
        """Wait for the end of every process of this sandbox; those that are left after *timeout* seconds."""
        deadline = time.monotonic() + timeout * SLOW
        while left := self.processes():
            watch = select.poll()
            with contextlib.ExitStack() as stack:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        fd = os.pidfd_open(pid)
                        stack.callback(os.close, fd)
                        watch.register(fd, select.POLLIN)
                watch.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if time.monotonic() >= deadline:
                return self.processes()
        return {}

    def end(self) -> None:
        """End everything, and complain about what should have ended by itself."""
        killed = any(process.code == -signal.SIGKILL for process in self._processes)
        wrong = [text for process in self._processes if (text := process.end(20.0 * SLOW))]
        # After a killed host its workers have stop_timeout to go, and the guard then ends the rest.
        if left := self.wait_empty(20.0 if killed else 3.0):
            wrong.append(f"processes were left behind: {left}")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.join()
            print(f"--- {process}\n{process.text()}")  # pytest shows it where the test failed
            if unseen := _UNSEEN.search(process.text()):
                wrong.append(f"{process} printed {unseen[0]!r}")
        shutil.rmtree(self._runtime, ignore_errors=True)
        assert not wrong, "\n".join(wrong)


class StartHost(Protocol):
    """What the fixture ``bghost_host`` is."""

    def __call__(
        self,
        *,
        kinds: Mapping[str, str] = ...,
        args: Sequence[str],
        extensions: Mapping[str, str] = ...,
        modules: Mapping[str, str] = ...,
        env: Mapping[str, str | None] = ...,
        config: str | None = ...,
        answering: bool = ...,
    ) -> Host: ...


@pytest.fixture
def sandboxes(tmp_path: Path) -> Iterator[Callable[[], Sandbox]]:
    """Makes sandboxes; each is emptied, and looked over, at the test's end."""
    # A shell that runs pytest in the background has it ignore SIGINT, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:

        def make() -> Sandbox:
            root = Path(tempfile.mkdtemp(prefix="sandbox-", dir=tmp_path))
            # A socket's path has 107 bytes, and that of a test's own directory may be longer.
            box = Sandbox(root, Path(tempfile.mkdtemp(prefix="bghost-")))
            stack.callback(box.end)
            return box

        yield make


@pytest.fixture
def sandbox(sandboxes: Callable[[], Sandbox]) -> Sandbox:
    """Directories, an environment, and installed distributions that belong to this test."""
    return sandboxes()


@pytest.fixture
def bghost_host(sandboxes: Callable[[], Sandbox]) -> StartHost:
    """Starts a host in a sandbox of its own; see :class:`StartHost`.

    ``kinds`` and ``extensions``: name to the source of a module with a class Kind or Extension; ``modules``: name to
    the source of what they share; ``args``: what follows ``bghost``; ``env``: variables beside those of the sandbox;
    ``config``: the text of its bghost.toml; ``answering``: return only when it answers (its workers may not be ready
    then: ``host.client.wait(name)``).
    """

    def start(
        *,
        kinds: Mapping[str, str] | None = None,
        args: Sequence[str],
        extensions: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        env: Mapping[str, str | None] | None = None,
        config: str | None = None,
        answering: bool = True,
    ) -> Host:
        box = sandboxes()
        box.kinds(kinds or {})
        box.extensions(extensions or {})
        for name, source in (modules or {}).items():
            (box.site / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")
        if config is not None:
            box.config(config)
        host = box.start_host(*args, env=env)
        if answering:
            host.wait_answering()
        return host

    return start

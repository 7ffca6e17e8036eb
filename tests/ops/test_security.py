"""The edges of the host: its socket, what is sent to it, its files, and what others may see; see docs/security.md."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support import BGHOST, SLOW, Host, Process, Sandbox, StartHost, pid_in, until

from bghost import WorkerSpec
from bghost.shared.errors import BUG
from bghost.shared.frames import LIMIT, Decoder, encode

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SOAK: Final = os.environ.get("BGHOST_SOAK", "") not in ("", "0")

IDLE: Final = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            return bghost.UNTIL_WOKEN
"""

VERBS: Final = (
    "ps",
    "status",
    "stop",
    "restart",
    "launch",
    "signal",
    "wake",
    "dump",
    "why",
    "wait",
    "reload",
    "shutdown",
)


class Fuzzer:
    """Frames, of which none is a request that can be granted."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def frame(self) -> bytes:
        chance = self._random
        sort = chance.randrange(8)
        if sort == 0:  # a length that is a lie
            return struct.pack(">I", chance.choice([0, 1 << 31, (1 << 32) - 1, LIMIT + 1])) + chance.randbytes(20)
        if sort == 1:
            body = chance.randbytes(chance.randrange(1, 200))
        elif sort == 2:  # what Python's parser takes, or chokes on
            body = chance.choice([
                b"[" * 100_000, b'{"verb":' * 5000, b"9" * 5000, b"NaN", b'{"verb": NaN}', b'"\\ud800"',
                b'{"verb": "\\udfff", "args": {}}', b'{"verb": "ps", "verb": 5}', b"null", b"[]", b"{}", b"\xff\xfe",
            ])  # fmt: skip
        elif sort == 3:  # a request that was damaged
            data = bytearray(encode({"verb": chance.choice(VERBS[:1]), "args": {"names": ["nobody"]}}))
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(4, len(data))] = chance.randrange(256)
            return bytes(data)
        else:
            body = json.dumps({"verb": self._verb(), "args": self._args()}).encode()
        return struct.pack(">I", len(body)) + body

    def _verb(self) -> Any:
        return self._value(1) if self._random.random() < 0.2 else self._random.choice(VERBS)

    def _args(self) -> Any:
        chance = self._random
        if chance.random() < 0.1:
            return [self._value(3)]
        args = {
            name: self._value(3)
            for name in ("names", "handles", "spec", "for", "signal", "wait", "within", "dry_run", "rollback")
            if chance.random() < 0.5
        }
        # Nothing that would be done: a mode that there is not, a reload that is refused.
        return {**args, "mode": self._value(1), "dry_run": "no", "x": self._value(4)}

    def _value(self, depth: int) -> Any:
        chance = self._random
        sort = chance.randrange(11 if depth else 8)
        if sort == 8:
            return [self._value(depth - 1) for _ in range(chance.randrange(4))]
        if sort >= 9:
            return {self._text(): self._value(depth - 1) for _ in range(chance.randrange(4))}
        return (
            None, True, -1, chance.randrange(-(1 << 70), 1 << 70), chance.random() * 1e300, self._text(), "nobody",
            "x" * chance.randrange(5000),
        )[sort]  # fmt: skip

    def _text(self) -> str:
        return "".join(
            chr(self._random.choice([0, 10, 27, 0x2F, 0x2E, 0x61, 0x7B, 0xE4, 0xD800, 0x10FFFF])) for _ in "12345"
        )


def resident(pid: int) -> int:
    """KiB of memory that a process has."""
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


def ask(path: str, frame: bytes) -> dict[str, Any] | None:
    """What the host answers; ``None`` if it hangs up or has nothing to say while more is to come."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20 * SLOW)
        connection.connect(path)
        decoder = Decoder()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(frame)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                decoder.feed(data)
        return decoder.next()


@pytest.mark.timeout(1200 if SOAK else 120)
def test_whatever_is_sent(bghost_host: StartHost) -> None:
    """Every frame that is none, or asks for nothing that there is, gets an error with a code; no bug, no growth."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    fuzzer = Fuzzer(seed)
    host = bghost_host(kinds={"idle": IDLE}, args=["run", "idle"])
    host.client.wait("idle")
    path, pid = host.directories.socket, host.row("idle")["pid"]
    count = 100_000 if SOAK else 2_000
    for number in range(count):
        if number == count // 5:
            before = resident(host.pid)
        reply = ask(path, frame := fuzzer.frame())
        if reply is not None and not reply["ok"]:
            assert reply["error"]["code"] not in (None, BUG), (frame, reply)
    assert resident(host.pid) - before < 4096
    assert (host.row("idle")["pid"], host.row("idle")["state"]) == (pid, "ready")
    assert "a request failed" not in host.text() and "a bug of bghost" not in host.text()


def test_a_length_takes_no_memory(bghost_host: StartHost) -> None:
    """A frame that says it is long is refused by its head; one that is as long as may be is not there until it is."""
    host = bghost_host(kinds={"idle": IDLE}, args=["run", "idle"])
    before = resident(host.pid)
    for length in (0, LIMIT + 1, 1 << 31, (1 << 32) - 1):
        reply = ask(host.directories.socket, struct.pack(">I", length))
        assert reply is not None and "the limit is" in reply["error"]["message"]
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(host.directories.socket)
            connection.sendall(struct.pack(">I", LIMIT))
        host.client.ps()
        assert resident(host.pid) - before < 4096


def test_silent_clients(bghost_host: StartHost) -> None:
    """Those beyond the limit are refused at once; the others are dropped after five seconds."""
    host = bghost_host(kinds={"idle": IDLE}, args=["run", "idle"], config="[host]\nmax_workers = 1\n")
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(200):
            silent.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            silent[-1].settimeout(20 * SLOW)
            silent[-1].connect(host.directories.socket)
        refused = [connection for connection in silent if b"places for clients are taken" in _heard(connection)]
        assert len(refused) >= 200 - 65
    assert host.client.ps()


def _heard(connection: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(4096)
    return b""


@pytest.mark.parametrize("umask", ["0000", "0077", "0777"])
def test_modes(sandbox: Sandbox, umask: str) -> None:
    """The runtime directory is 0700, the socket 0600, whatever the umask; and no socket is an abstract one."""
    sandbox.kinds({"idle": IDLE})
    runtime = Path(sandbox.directories.base)
    runtime.chmod(0o700)
    host = Process(["sh", "-c", f'umask {umask}; exec "$@"', "sh", *BGHOST, "run", "idle"], sandbox.env, sandbox.root)
    try:
        host.wait_line(r"\[idle\] started")
        assert _mode(sandbox.directories.runtime) == 0o700
        assert {_mode(path) for path in (sandbox.directories.socket, sandbox.directories.notify_socket)} == {0o600}
        inodes = {
            match[1]
            for fd in os.listdir(f"/proc/{host.pid}/fd")
            if (match := re.match(r"socket:\[(\d+)\]", os.readlink(f"/proc/{host.pid}/fd/{fd}")))
        }
        lines = Path("/proc/net/unix").read_text().splitlines()
        assert not [line for line in lines if line.split()[6] in inodes and "@" in line]
    finally:
        assert sandbox.bghost("shutdown").code == 0
        assert host.wait() == 0


def _mode(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.fixture
def loosened(bghost_host: StartHost) -> Iterator[Host]:
    """A host whose directories somebody has opened to all."""
    host = bghost_host(kinds={"idle": IDLE}, args=["run", "idle"])
    host.client.wait("idle")
    for path in (host.directories.base, host.directories.runtime):
        os.chmod(path, 0o755)
    os.chmod(host.directories.socket, 0o666)
    yield host


AS_NOBODY: Final = """
    import json, socket, sys
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(sys.argv[1])
    except PermissionError:
        print("EACCES")
        sys.exit()
    try:
        connection.sendall(bytes.fromhex(sys.argv[2]))
    except BrokenPipeError:
        pass
    print(connection.recv(4096))
"""


def _as_nobody(host: Host) -> str:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/env", "python3", "-c"]
    frame = encode({"verb": "shutdown", "args": {}}).hex()
    argv = [*command, textwrap.dedent(AS_NOBODY), host.directories.socket, frame]
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True, timeout=20 * SLOW).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user(loosened: Host) -> None:
    """Is kept out by the kernel; and by the host, by the uid that the kernel tells, where the modes were loosened."""
    if not (said := _as_nobody(loosened)):
        pytest.skip("no python3 that nobody can run")
    assert "may not command this host" in said
    loosened.wait_line("a client of uid 65534 was refused")
    os.chmod(loosened.directories.runtime, 0o700)
    assert _as_nobody(loosened).strip() == "EACCES"
    assert loosened.row("idle")["state"] == "ready"


def test_a_launch_takes_installed_kinds_alone(bghost_host: StartHost) -> None:
    """No module, no path, no field that there is not."""
    host = bghost_host(kinds={"idle": IDLE}, args=["run", "idle"])
    for spec, code in (
        ({"kind": "os:system"}, 5),
        ({"kind": "/bin/sh"}, 5),
        ({"kind": "test_kind_idle:Kind"}, 5),
        ({"kind": "idle", "module": "os"}, 2),
        ({"kind": "idle", "env": {"LD_PRELOAD": "x"}}, 2),
        ({"kind": "idle", "name": "../x"}, 2),
        ({"kind": "idle", "name": "a\nb"}, 2),
    ):
        reply = ask(host.directories.socket, encode({"verb": "launch", "args": {"spec": spec}}))
        assert reply is not None and reply["error"]["code"] == code, (spec, reply)


SECRET: Final = "geheim-4711"

KEEPS: Final = """
    import bghost

    class Kind:
        class Settings(bghost.Settings):
            password: str = ""

        @bghost.hookimpl
        def bghost_tick(self, worker):
            password = worker.settings.password
            raise ValueError("it failed")
"""


def test_a_secret_stays_one(bghost_host: StartHost) -> None:
    """A password of the config is in no argv, title, row, log, dump, traceback or post-mortem."""
    text = f"[[worker]]\nkind = 'keeps'\n[kind.keeps]\npassword = '{SECRET}'\n"
    host = bghost_host(kinds={"keeps": KEEPS}, args=["run"], config=text)
    host.wait_line("ValueError: it failed")
    until(lambda: host.row("keeps")["errors"])
    said = [host.bghost(*args).stdout for args in (["ps", "--json"], ["status"], ["why", "keeps"], ["dump", "keeps"])]
    said.append(host.bghost("config", "show").stdout)
    said.append(host.text())
    for pid in host.sandbox.processes():
        with contextlib.suppress(OSError):
            said.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace"))
    assert not [text for text in said if SECRET in text]


def test_the_current_directory_is_no_place_for_modules(sandbox: Sandbox, tmp_path: Path) -> None:
    """A kind.py that lies about is not imported: the command ``bghost`` has no '' on its path."""
    (tmp_path / "loguru.py").write_text("raise SystemExit('imported from here')")
    script = Path(sys.executable).parent / "bghost"
    result = Process([str(script), "plugins"], sandbox.env, tmp_path).result()
    assert result.code == 0 and "imported from here" not in result.stderr


LEAVES: Final = """
    import atexit, os, signal
    import bghost

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0)
    atexit.register(lambda: os.write(2, b"an exit function of %d\\n" % os.getpid()))

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            return bghost.UNTIL_WOKEN
"""


def test_what_an_import_leaves_behind(bghost_host: StartHost) -> None:
    """Handlers, a umask, exit functions: host and workers take their signals, make private files, end as ever."""
    host = bghost_host(kinds={"leaves": LEAVES}, args=["run", "leaves"])
    host.client.wait("leaves")
    assert stat.S_IMODE(os.stat(host.directories.socket).st_mode) == 0o600
    os.kill(pid_in(host.row("leaves")), signal.SIGTERM)
    host.wait_row("leaves", lambda row: row["restarts"] == 1)
    host.client.restart("leaves")
    host.signal(signal.SIGTERM)
    assert host.wait() == 0
    assert set(re.findall(r"an exit function of (\d+)", host.text())) <= {str(host.pid)}


TELLS: Final = """
    import os
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            words = bytes(worker.slot.stats.cast("B"))
            worker.log.info("note: {}", [word for word in ("alpha", "beta") if word.encode() in words])
            if worker.name == "first":
                with worker.activity("alpha"), worker.activity("beta"):
                    raise bghost.GiveUp("alpha")
            return bghost.UNTIL_WOKEN
"""


def test_a_slot_has_nothing_of_its_last_worker(bghost_host: StartHost) -> None:
    """No byte of what that has written is left for the next one, or shown as the next one's."""
    host = bghost_host(kinds={"tells": TELLS}, args=["run"], config="[host]\nmax_workers = 1\nkinds = ['tells']\n")
    host.client.launch(WorkerSpec(kind="tells", name="first"))
    host.client.wait("first", until="stopped")
    assert host.row("first")["last_error"] == "gave up: alpha"
    second = host.client.launch(WorkerSpec(kind="tells", name="second"), wait=True)
    assert second["slot"] == 0
    host.wait_line(r"\[second\] note: \[\]")
    assert "alpha" not in host.bghost("why", "second").stdout


def test_each_line_of_the_page_has_its_test() -> None:
    """What docs/security.md says is shown by a test is shown by one that there is."""
    text = (ROOT / "docs/security.md").read_text()
    tests = re.findall(r"`((?:[\w-]+/)+test_\w+\.py)::(test_\w+)`", text)
    assert len(tests) > 20
    for file, name in tests:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (file, name)

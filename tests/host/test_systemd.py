"""Under systemd: what is said to NOTIFY_SOCKET, when, and that nobody else is told of it; and the unit in docs."""

import configparser
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import CHAOS, table
from support import SLOW, Sandbox, notes, pid_in

UNIT = Path(__file__).parents[2] / "docs" / "bghost.service"


class Systemd:
    """The other end: a datagram socket, and what has come in."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.said: list[tuple[float, str]] = []

    def wait(self, text: str, timeout: float = 10.0) -> float:
        """When *text* was said; what was said before it is kept in :attr:`said`."""
        deadline = time.monotonic() + timeout * SLOW
        while select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
            message = self.socket.recv(4096).decode()
            self.said.append((time.monotonic(), message))
            if text in message.split("\n"):
                return self.said[-1][0]
        raise AssertionError(f"{text!r} was not said: {self.said}")

    def words(self, *prefixes: str) -> list[str]:
        """Lines of these beginnings, in order."""
        lines = [line for _, message in self.said for line in message.split("\n")]
        return [line for line in lines if line.startswith(prefixes)]


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, sandbox: Sandbox) -> Iterator[Systemd]:
    path = f"{sandbox.directories.runtime}-notify" if request.param == "path" else f"\0{sandbox.root}"
    if request.param == "path":
        os.makedirs(os.path.dirname(path), exist_ok=True)
    systemd = Systemd(path)
    sandbox.env["NOTIFY_SOCKET"] = path.replace("\0", "@")
    yield systemd
    systemd.socket.close()


def test_a_whole_life(systemd: Systemd, sandbox: Sandbox) -> None:
    """READY once the config's workers are, RELOADING and READY around a reload, STOPPING, and STATUS throughout."""
    sandbox.kinds({"chaos": CHAOS})
    gate = sandbox.root / "gate"
    slow = f"while not os.path.exists({str(gate)!r}): worker.wait(0.02)"
    tell = "note('{}', [name for name in os.environ if 'NOTIFY' in name or 'WATCHDOG' in name])"
    sandbox.config(
        table("slow", setup=slow) + table("after", after=["slow"], tick=tell) + table("done", tick="sys.exit()")
    )
    host = sandbox.start_host("run")
    host.wait_answering()
    host.wait_row("done", lambda row: row["state"] == "done")
    systemd.wait("STATUS=0 of 2 workers ready")
    host.signal(signal.SIGHUP)  # before it is ready: no READY may come of that
    while host.client.status()["config"] < 2:
        pass
    assert systemd.words("READY", "RELOADING") == []
    gate.touch()
    systemd.wait("READY=1")
    assert host.row("after")["state"] == "ready"
    host.wait_line(r"\[after\] note")
    assert notes(host, "after") == ["[]"]
    systemd.said.clear()
    before = time.monotonic_ns() // 1000
    host.signal(signal.SIGHUP)
    systemd.wait("READY=1")
    reloading, since, ready = (line for line in systemd.words("RELOADING", "MONOTONIC_USEC", "READY"))
    assert (reloading, ready) == ("RELOADING=1", "READY=1")
    assert before <= int(since.partition("=")[2]) <= time.monotonic_ns() // 1000
    sandbox.config_file.write_text("[host]\nmax_workers = 'many'\n")
    host.signal(signal.SIGHUP)
    systemd.wait("READY=1")  # refused, and over
    os.kill(pid_in(host.row("after")), signal.SIGKILL)
    systemd.wait("STATUS=1 of 2 workers ready")
    systemd.wait("STATUS=2 of 2 workers ready")
    systemd.said.clear()
    host.signal(signal.SIGTERM)
    systemd.wait("STOPPING=1")
    assert host.wait() == 0
    assert systemd.words("READY") == []


def test_signs_of_life(systemd: Systemd, sandbox: Sandbox) -> None:
    """Twice in WATCHDOG_USEC, from the loop itself: a host that is stuck gives none; and not for another process."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config("[host]\nkinds = ['chaos']\n")
    sandbox.env["WATCHDOG_USEC"] = "200000"
    host = sandbox.start_host("run")
    systemd.wait("READY=1")  # with no worker at all
    times = [systemd.wait("WATCHDOG=1") for _ in range(30)]
    rates = [(last - first) / 5 for first, last in zip(times, times[5:], strict=False)]
    assert max(rates) > 0.08 and min(rates) < 0.2 * SLOW, times  # those that are seen late come together, or far apart
    host.signal(signal.SIGSTOP)
    while select.select([systemd.socket], [], [], 0.3)[0]:
        systemd.socket.recv(4096)
    host.signal(signal.SIGCONT)
    systemd.wait("WATCHDOG=1")
    host.signal(signal.SIGTERM)
    assert host.wait() == 0
    while select.select([systemd.socket], [], [], 0)[0]:
        systemd.socket.recv(4096)
    systemd.said.clear()
    other = sandbox.start_host("run", env={"WATCHDOG_PID": "1"})
    systemd.wait("READY=1")
    other.signal(signal.SIGTERM)
    systemd.wait("STOPPING=1")
    assert other.wait() == 0
    assert systemd.words("WATCHDOG") == []


def test_nobody_has_to_listen(sandbox: Sandbox) -> None:
    """A socket that is not there, or whose reader sleeps, is no error, and makes the host wait for nothing."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("one", count=30))
    asleep = Systemd(f"\0{sandbox.root}-asleep")
    for number, path in enumerate(("/nonexistent/notify", f"@{sandbox.root}-asleep", "", "@")):
        host = sandbox.start_host("run", env={"NOTIFY_SOCKET": path, "BGHOST_INSTANCE": f"i{number}"})
        host.wait_answering()
        host.client.wait("one")
        assert host.client.shutdown() == {"killed": []}
        assert host.wait() == 0
    asleep.socket.close()


def test_the_unit_in_docs() -> None:
    """It says what design and code need: a stop of the host alone, time for it, a reload that is told of."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["KillMode"] == "mixed"  # else systemd's own SIGTERM to the workers makes each stop a fast one
    assert service["Type"] in ("notify", "notify-reload")
    assert service["KillSignal"] == "SIGTERM"
    # smart, fast and immediate in full, and a second for the SIGKILL that comes last
    assert int(service["TimeoutStopSec"]) >= 10 + 5 + 1 + 2
    assert service["NotifyAccess"] == "main"
    assert re.fullmatch(r"\d+", service["WatchdogSec"])
    assert "BGHOST_RUNTIME_DIR=%t/bghost" in service["Environment"] and service["RuntimeDirectory"] == "bghost"
    if analyze := shutil.which("systemd-analyze"):
        done = subprocess.run([analyze, "verify", str(UNIT)], capture_output=True, text=True)
        wrong = [line for line in done.stderr.splitlines() if UNIT.name in line and "not executable" not in line]
        assert not wrong, wrong

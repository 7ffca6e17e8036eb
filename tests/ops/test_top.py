"""``bghost top``, in a real terminal: tmux types and reads the screen."""

import os
import pty
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from support import BGHOST, SLOW, Host, Sandbox, StartHost, until, within

from bghost.commands.top import Top, keys

KIND: Final = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            with worker.activity("at work"):
                return 0.1 if worker.name == "busy.1" else bghost.UNTIL_WOKEN
"""


class Terminal:
    """A screen of 140 by 30 in which ``bghost top`` runs; a tmux server of its own."""

    def __init__(self, host: Host, socket: Path) -> None:
        self._tmux = ["tmux", "-f", "/dev/null", "-S", str(socket)]
        command = shlex.join([*BGHOST, "top"]) + "; echo ended $?; exec sleep 600"
        env = {**host.sandbox.env, "TERM": "xterm-256color", "NO_COLOR": "1"}
        self._run("new-session", "-d", "-x", "140", "-y", "30", command, env=env)

    def _run(self, *args: str, env: dict[str, str] | None = None) -> str:
        return subprocess.run(
            [*self._tmux, *args], env=env, check=True, capture_output=True, text=True, timeout=20 * SLOW
        ).stdout

    def keys(self, *names: str) -> None:
        self._run("send-keys", *names)

    def screen(self, *options: str) -> str:
        return self._run("capture-pane", "-p", *options)

    def resize(self, width: int, height: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def wait(self, pattern: str, timeout: float = 15) -> str:
        def look() -> str:
            screen = self.screen()
            return screen if re.search(pattern, screen, re.MULTILINE) else ""

        try:
            return until(look, timeout, pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.screen()}") from None

    def close(self) -> None:
        self._run("kill-server")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[Host], Terminal]]:
    opened: list[Terminal] = []

    def start(host: Host) -> Terminal:
        opened.append(Terminal(host, host.sandbox.root / "tmux"))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_one_worker(bghost_host: StartHost, terminal: Callable[[Host], Terminal]) -> None:
    """Its row, which follows what it does; keys stop it, start it again, show where it is, and end top."""
    host = bghost_host(kinds={"busy": KIND}, args=["run"], config="[[worker]]\nkind = 'busy'\nname = 'busy.1'\n")
    host.client.wait("busy.1")
    screen = terminal(host)
    screen.wait(r"^bghost default, pid \d+, for .*, config 1, 1 worker$")
    shown = screen.wait(r"busy\.1 +\d+ +ready +\w+ +\d+ +[\d.]+m?s +[\d.]+m?s +0 +0 .*[▁▂▃▄▅▆▇█]")
    assert re.search(r"NAME +PID +STATE +DOING +TICKS +MEAN +MAX +ERRORS +RESTARTS +ACTIVITY +NOTE", shown)
    screen.keys("d")
    screen.wait("busy.1 is here:")
    screen.wait("File ")
    screen.keys("s")
    screen.wait(r"busy\.1 +- +stopped")
    until(lambda: "is here" not in screen.screen())
    screen.keys("r")
    screen.wait(r"busy\.1 +\d+ +ready")
    assert "\x1b[3" not in screen.screen("-e").replace("\x1b[39m", ""), "colors, and NO_COLOR is set"
    screen.resize(50, 10)
    screen.wait(r"^NAME +PID +STATE +MEAN +ERRORS$")
    host.client.shutdown()
    screen.wait("no host of instance")
    screen.keys("q")
    screen.wait("ended 0")


def test_many_workers(bghost_host: StartHost, terminal: Callable[[Host], Terminal]) -> None:
    """Five hundred of them: the rows scroll with the chosen one, and a key is answered at once."""
    stopped = "[host]\nmax_workers = 500\nkinds = ['busy']\n"
    # Rows are what this is about: all but three wait for one that is never ready, and so have no process.
    tables = "[[worker]]\nkind = 'busy'\ncount = 3\n[[worker]]\nkind = 'exec'\nname = 'never'\n"
    tables += "args = { command = ['sleep', '600'], notify = true }\n"
    tables += "[[worker]]\nkind = 'busy'\nname = 'held'\ncount = 496\nafter = ['never']\n"
    host = bghost_host(kinds={"busy": KIND}, args=["run"], config=stopped + tables)
    screen = terminal(host)
    screen.wait(r"500 workers  1 to \d+$")
    screen.wait(r"held\.\d+ +- +starting")

    def attempt() -> float:
        screen.keys(*["PPage"] * 25)
        screen.wait(r"500 workers  1 to \d+$")
        began = time.monotonic()
        for _ in range(25):
            screen.keys("NPage")
        screen.wait(r"to 500$")
        screen.wait(r"held\.496 +- +starting")
        return time.monotonic() - began

    within(10.0, attempt)
    screen.keys("PPage", "Up", "q")
    screen.wait("ended 0")


def test_without_a_terminal(bghost_host: StartHost) -> None:
    """It says that it needs one, and what to use instead."""
    host = bghost_host(kinds={"busy": KIND}, args=["run", "busy"])
    result = host.bghost("top")
    assert result.code == 2 and "bghost ps" in result.stderr


def test_without_a_host(sandbox: Sandbox, tmp_path: Path) -> None:
    """It ends as every command does."""
    near, far = pty.openpty()
    with open(far, "r+b", buffering=0) as terminal, open(tmp_path / "said", "w+") as said:
        env = sandbox.env | {"TERM": "xterm"}
        command = subprocess.run([*BGHOST, "top"], stdin=terminal, stdout=terminal, stderr=said, env=env, timeout=20)
        said.seek(0)
        assert (command.returncode, said.read()[:27]) == (3, "bghost: no host of instance")
    os.close(near)


def test_any_width(top: Top) -> None:
    """Columns are whole or not there, the important ones last; no line is longer than the terminal is wide."""
    every = ["NAME", "PID", "STATE", "DOING", "TICKS", "MEAN", "MAX", "ERRORS", "RESTARTS", "ACTIVITY", "NOTE"]
    before: list[str] = []
    for width in range(10, 200):
        lines = top.shown(width, 24).plain.splitlines()
        assert len(lines) == 24 and all(len(line) <= width for line in lines)
        heads = lines[1].split()
        assert {*before} <= {*heads} <= {*every} or width < 15, lines[1]
        assert heads == [head for head in every if head in heads] or width < 15
        if width == 15:
            assert heads == ["NAME", "STATE"]
        elif width == 80:
            assert {"NAME", "PID", "STATE", "TICKS", "MEAN", "ERRORS", "ACTIVITY", "NOTE"} <= {*heads}
        before = heads if width >= 15 else []
    assert before == every


def test_keys() -> None:
    """Several that come at once are told apart."""
    assert keys("a\x1b[A\x1b[6~q") == ["a", "\x1b[A", "\x1b[6~", "q"]


@pytest.fixture
def top(bghost_host: StartHost) -> Top:
    """One that has asked a host once."""
    host = bghost_host(kinds={"busy": KIND}, args=["run", "busy"])
    host.client.wait("busy")
    top = Top(host.client, ())
    top.ask()
    return top


def test_sparkline(top: Top) -> None:
    """Ticks of each second, by the worker's own most; an idle second is a blank."""
    assert top.sparkline("busy").strip() == ""
    for _ in range(3):
        top.ask()
    assert len(top.sparkline("busy")) == 16
    assert top.sparkline("nobody").strip() == ""

"""``make demo`` as a newcomer runs it: in a terminal, with no variables set but PATH and HOME, ended by Ctrl-C."""

import fcntl
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest
from support import SLOW, Sandbox, until

ROOT: Final = Path(__file__).resolve().parent.parent
# -o: what is installed is taken as it is; the rest is the recipe that everybody runs.
MAKE: Final = ("make", "-o", f"{sys.prefix}/installed", f"VENV={sys.prefix}", f"PYTHON={sys.executable}", "demo")
README: Final = (ROOT / "README.md").read_text()
COUNT: Final = r"worker_spi worker {}: count in schema{}\.counted is now (\d+)"


def shape(text: str) -> list[list[str]]:
    """The words of each line, all numbers alike."""
    return [re.sub(r"\d+", "0", line).split() for line in text.splitlines()]


def shown(first: str) -> str:
    """What README.md shows of an output, from the line that begins with *first* on."""
    match = re.search(rf"^{first}.*?(?=^```)", README, re.MULTILINE | re.DOTALL)
    assert match
    return match[0]


class Terminal:
    """A program that has a terminal to itself."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            argv,
            env=dict(env),
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def expect(self, pattern: str, timeout: float, after: int = 0) -> re.Match[str]:
        """The first match in what was written after that position; *timeout* in seconds, times BGHOST_TEST_SLOW."""
        deadline = time.monotonic() + timeout * SLOW
        while (match := re.compile(pattern).search(self.text, after)) is None:
            assert self._read(deadline - time.monotonic()), f"no {pattern!r} within {timeout} s in:\n{self.text}"
        return match

    def _read(self, timeout: float) -> bool:
        """Read what comes within *timeout* seconds; false if nothing has, or nothing more will."""
        if not select.select([self.master], [], [], max(0.0, timeout))[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the terminal's other end is closed
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self.master, b"\x03")

    def wait(self, timeout: float) -> int:
        """The exit code, -N for a signal N."""
        deadline = time.monotonic() + timeout * SLOW
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        os.close(self.master)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def terminal() -> Iterator[Callable[[Sequence[str], Mapping[str, str]], Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(argv: Sequence[str], env: Mapping[str, str]) -> Terminal:
        opened.append(Terminal(argv, env))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_demo_counts_until_ctrl_c_and_goes_on_from_there(
    newcomer: Sandbox, terminal: Callable[[Sequence[str], Mapping[str, str]], Terminal]
) -> None:
    """Counts grow within 15 s; Ctrl-C ends all in under 5 s, the host with 0; a second run counts on from the first."""
    first = terminal(MAKE, newcomer.env)
    began = grown = first.expect(COUNT.format(1, 1), 15)
    while int(grown[1]) < int(began[1]) + 2:  # two deltas may come in one count
        grown = first.expect(COUNT.format(1, 1), 10, grown.end())
    first.expect(COUNT.format(2, 2), 5)
    until(
        lambda: shape(newcomer.bghost("ps", "--instance", "demo").stdout) == shape(shown("NAME ")),
        what="the same of `bghost ps` as in README.md",
    )
    first.interrupt()
    assert first.wait(5) != 0  # make reports the interrupt
    assert newcomer.wait_empty(2) == {}
    assert not re.search(r"Traceback|ERROR|WARNING(?!.*root)", first.text), first.text
    for line in shape(shown(r"\d{4}-\d\d-\d\d ")):
        assert line in shape(first.text)

    told = subprocess.run([*MAKE, "--dry-run"], cwd=ROOT, env=newcomer.env, capture_output=True, text=True, check=True)
    command = shlex.split(told.stdout)
    assert command[1:3] == ["run", "worker_spi"]
    second = terminal(command, newcomer.env)
    again = second.expect(COUNT.format(1, 1), 15)
    last = max(int(count) for count in re.findall(COUNT.format(1, 1), first.text))
    assert int(again[1]) >= last >= int(began[1]) + 2, (grown, again)
    second.interrupt()
    assert second.wait(5) == 0
    assert newcomer.wait_empty(2) == {}

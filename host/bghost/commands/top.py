"""``bghost top``: the workers, live."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections import deque
from typing import Final

import click

from bghost.commands.arguments import names_argument
from bghost.commands.listing import age, plain
from bghost.shared.client import Client
from bghost.shared.errors import BghostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from rich.text import Text

    from bghost.shared.replies import Row

INTERVAL: Final = 1.0  # seconds between two questions to the host
ANSWER: Final = 2.0  # seconds that it has for one: keys wait as long
PATIENCE: Final = 0.1  # seconds that a key may take
HISTORY: Final = 16  # intervals in a sparkline
NOTE: Final = 12  # columns, below which there is no note
_BARS: Final = "▁▂▃▄▅▆▇█"
_KEYS: Final = "up down  s stop  r restart  d dump  q quit"
_UP, _DOWN, _PAGE_UP, _PAGE_DOWN = "\x1b[A", "\x1b[B", "\x1b[5~", "\x1b[6~"
_STYLES: Final = {
    "ready": "green",
    "starting": "cyan",
    "stopping": "yellow",
    "backoff": "yellow",
    "failed": "red",
    "stopped": "dim",
    "done": "dim",
}
_COLUMNS: Final = {
    # Head: whether it is for numbers, and how soon it goes where there is not room for all.
    "NAME": (False, 0),
    "PID": (True, 1),
    "STATE": (False, 0),
    "DOING": (False, 9),
    "TICKS": (True, 6),
    "MEAN": (True, 2),
    "MAX": (True, 8),
    "ERRORS": (True, 3),
    "RESTARTS": (True, 7),
    "ACTIVITY": (False, 4),
    "NOTE": (False, 5),
}


@click.command()
@names_argument(required=False)
def top(names: tuple[str, ...]) -> None:
    """Watch the workers, all or those named: states, tick times, errors, and how busy each has been.

    Keys: up, down, page up and page down choose a worker; s stops it, r restarts it, d shows where it is; q ends.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        raise UsageError("top is for a terminal", hint="'bghost ps' prints the same once, also as JSON")
    _run(Top(Client(timeout=ANSWER), names))


class Top:
    """What is shown: the last answer of the host, each worker's history, and which of them is chosen."""

    def __init__(self, client: Client, names: Sequence[str]) -> None:
        self._client = client
        self._names = names
        self._rows: list[Row] = []
        self._cells: list[list[str]] = []
        self._ticks: dict[str, deque[int]] = {}
        self._chosen: str | None = None
        self._first = 0  # of the rows that are shown
        self._head = ""
        self._said = ""  # of what a key has come to; until the next one
        self._trouble = ""  # why there is no newer answer
        self._dump: list[str] = []

    def ask(self) -> None:
        """Ask the host.

        :raises BghostError: if it cannot answer; what is shown stays as it is.
        """
        self._rows = self._client.ps(*self._names)
        status = self._client.status()
        count = len(self._rows)
        self._head = (
            f"bghost {status['instance']}, pid {status['pid']}, for {age(time.time() - status['since'])}, "
            f"config {status['config']}, {count} worker{'' if count == 1 else 's'}"
        )
        for row in self._rows:
            self._ticks.setdefault(row["name"], deque(maxlen=HISTORY + 1)).append(row["ticks"])
        self._cells = [self._cells_of(row) for row in self._rows]
        if self._index() is None and self._rows:
            self._chosen = self._rows[0]["name"]
        self._trouble = ""

    def ask_again(self) -> None:
        """Ask the host; what it cannot answer is said on the screen."""
        try:
            self.ask()
        except BghostError as error:
            self._trouble = plain(str(error))

    def _index(self) -> int | None:
        return next((index for index, row in enumerate(self._rows) if row["name"] == self._chosen), None)

    def press(self, key: str, page: int) -> bool:
        """Do what *key* asks for; whether to go on.

        :param page: rows that are shown at a time.
        """
        index = self._index() or 0
        self._said, self._dump = "", []
        steps = {_UP: -1, "k": -1, _DOWN: 1, "j": 1, _PAGE_UP: -page, _PAGE_DOWN: page}
        if key == "q":
            return False
        if key in steps and self._rows:
            self._chosen = self._rows[max(0, min(len(self._rows) - 1, index + steps[key]))]["name"]
        elif self._chosen is not None and key in ("s", "r", "d"):
            self._command(key, self._chosen)
        return True

    def _command(self, key: str, name: str) -> None:
        if key == "d":
            try:
                text = self._client.dump(name)[name]
            except BghostError as error:
                self._said = plain(str(error))
                return
            lines = [plain(line) for line in text.splitlines()] or ["nowhere, for it has no process"]
            self._dump = [f"{name} is here:", *lines]
            return
        act = self._client.stop if key == "s" else self._client.restart

        def do() -> None:
            try:
                act(name)
            except BghostError as error:
                self._said = plain(str(error))

        self._said = f"{name} is to stop" if key == "s" else f"{name} is to start again"
        thread = threading.Thread(target=do, daemon=True)  # it may take as long as a tick does
        thread.start()
        thread.join(PATIENCE)

    def page(self, height: int) -> int:
        """How many rows a screen of that height shows."""
        return max(1, height - 4 - min(len(self._dump), height // 2))

    def shown(self, width: int, height: int) -> Text:
        """The screen, for a terminal of that size."""
        from rich.text import Text

        page = self.page(height)
        index = self._index() or 0
        self._first = max(0, min(self._first, index, len(self._rows) - page), index - page + 1)
        last = self._first + min(page, len(self._rows))
        where = f"  {self._first + 1} to {last}" if len(self._rows) > page else ""
        widths = self._widths(width)
        lines = [Text(self._head + where), Text(_line(list(_COLUMNS), widths), style="bold")]
        for number in range(self._first, last):
            row, line = self._rows[number], Text(_line(self._cells[number], widths))
            begin = widths["NAME"] + 2 + (widths["PID"] + 2 if "PID" in widths else 0)
            line.stylize(_STYLES.get(row["state"], ""), begin, begin + widths["STATE"])
            if self._trouble:
                line.stylize("dim")
            if row["name"] == self._chosen:
                line.stylize("reverse")
            lines.append(line)
        lines += [Text(line) for line in self._dump[: max(1, height // 2)]]
        lines += [Text()] * (height - 2 - len(lines))
        lines += [Text(self._trouble or self._said, style="bold"), Text(_KEYS, style="dim")]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return Text("\n").join(lines)

    def _widths(self, room: int) -> dict[str, int]:
        """The columns that there is room for, and how wide each is: for all rows, that nothing moves in scrolling."""
        every = [list(_COLUMNS), *self._cells]
        widths = {head: max(map(len, column)) for head, column in zip(_COLUMNS, zip(*every, strict=True), strict=True)}
        widths["NOTE"] = NOTE
        for head in sorted(widths, key=lambda head: -_COLUMNS[head][1]):
            if sum(widths.values()) + 2 * (len(widths) - 1) > room and _COLUMNS[head][1]:
                del widths[head]
        return widths

    def _cells_of(self, row: Row) -> list[str]:
        doing = ", ".join(text for text in (row["activity"], row["wait"] and f"waits for {row['wait']}") if text)
        return [
            row["name"],
            str(row["pid"] or "-"),
            " ".join([row["state"], *row["flags"]]),
            row["doing"] or "-",
            str(row["ticks"]),
            _milliseconds(row["tick_mean"]),
            _milliseconds(row["tick_max"]),
            str(row["errors"]),
            str(row["restarts"]),
            self.sparkline(row["name"]),
            plain(doing if row["pid"] else row["last_error"] or row["exit"] or ""),
        ]

    def sparkline(self, name: str) -> str:
        """Ticks in each of the last intervals, as bars; the highest is the worker's own most."""
        ticks = list(self._ticks.get(name, ()))
        steps = [max(0, after - before) for before, after in zip(ticks, ticks[1:], strict=False)]
        most = max(steps, default=0)
        bars = "".join(" " if not step else _BARS[(step * 8 - 1) // most if most else 0] for step in steps)
        return bars.rjust(HISTORY)


def _line(cells: Sequence[str], widths: dict[str, int]) -> str:
    """The cells whose columns there is room for; the last one has what is left of the line."""
    parts = [
        cell.rjust(widths[head]) if numbers else cell.ljust(widths[head])
        for cell, (head, (numbers, _)) in zip(cells, _COLUMNS.items(), strict=True)
        if head in widths
    ]
    return "  ".join(parts)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}ms" if seconds < 1 else f"{seconds:.1f}s"


def _run(top: Top) -> None:
    """Show it until q: rich draws; keys come one at a time, unechoed."""
    import termios
    import tty

    from rich.console import Console
    from rich.live import Live

    top.ask()
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    console = Console()
    # A terminal of another size is told by a signal: it ends the wait for a key, and what is shown is drawn anew.
    bell, ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGWINCH, lambda signum, frame: None)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    try:
        tty.setcbreak(fd)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            _loop(top, fd, bell, lambda: live.update(top.shown(*console.size), refresh=True), console)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _loop(top: Top, fd: int, bell: int, draw: Callable[[], None], console: Any) -> None:
    due = time.monotonic() + INTERVAL
    while True:
        draw()
        ready, _, _ = select.select([fd, bell], [], [], max(0.0, due - time.monotonic()))
        if bell in ready:
            os.read(bell, 64)
        if fd in ready:
            data = os.read(fd, 64).decode("utf-8", "replace")
            if not data or not all(top.press(key, top.page(console.size.height)) for key in keys(data)):
                return
        if time.monotonic() >= due:
            top.ask_again()
            due = time.monotonic() + INTERVAL


def keys(data: str) -> list[str]:
    """What was typed, key by key; those that send several characters whole."""
    found = []
    while data:
        special = next((key for key in (_UP, _DOWN, _PAGE_UP, _PAGE_DOWN) if data.startswith(key)), data[0])
        found.append(special)
        data = data[len(special) :]
    return found

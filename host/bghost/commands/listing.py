"""What ``bghost ps`` prints: the host's answer as a table for people, or as JSON."""

from __future__ import annotations

import json
import os
import sys
import time

from bghost.shared.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from bghost.shared.replies import Row

_HEADS = ("NAME", "KIND", "PID", "STATE", "DOING", "FOR", "TICKS", "ERRORS", "RESTARTS", "NOTE")
_NUMBERS = frozenset({"PID", "FOR", "TICKS", "ERRORS", "RESTARTS"})


def ps(names: Sequence[str], *, as_json: bool) -> None:
    """Ask the host of this instance for its workers, and print them."""
    client = Client()
    rows = client.ps(*names)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(table(rows, time.time(), _width()))
    if refused := client.status().get("config_error"):
        print(plain(f"config refused, the old one stays: {refused}"), file=sys.stderr)


def table(rows: Sequence[Row], now: float, width: int | None = None) -> str:
    """A line for each worker under a line of heads; columns are as wide as they must be.

    :param now: seconds of the Unix clock.
    :param width: columns of the terminal, where lines are cut; ``None``: they are not.
    """
    if not rows:
        return "no workers"
    cells = [_HEADS, *(_cells(row, now) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = "  ".join(
        f"{{:{'>' if head in _NUMBERS else '<'}{size}}}" for head, size in zip(_HEADS, widths, strict=True)
    )
    return "\n".join(line.format(*each).rstrip()[:width] for each in cells)


def _cells(row: Row, now: float) -> tuple[str, ...]:
    return (
        row["name"],
        row["kind"],
        str(row["pid"] or "-"),
        " ".join([row["state"], *row["flags"], *(["pending"] if row["pending_restart"] else [])]),
        row["doing"] or "-",
        age(now - row["since"]),
        str(row["ticks"]),
        str(row["errors"]),
        str(row["restarts"]),
        plain(_note(row)),
    )


def _note(row: Row) -> str:
    """What one would ask next: of a worker that runs, what it does or waits for; of others, why they do not."""
    if row["pid"]:
        waits = f"waits for {row['wait']}" if row["wait"] else ""
        return ", ".join(text for text in (row["activity"], waits) if text)
    return ", ".join(text for text in (row["exit"], row["last_error"]) if text)


def plain(text: str) -> str:
    """*text* on one line, without characters that do something to a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " if char.isspace() else f"\\x{ord(char):02x}" for char in text)


def age(seconds: float) -> str:
    """A length of time in its two largest units, as in 3d04h."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def _width() -> int | None:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):  # no terminal
        return None

"""``bghost plugins``: what is installed, and whether it works."""

import json
import os
import sys
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from typing import Final, TypedDict

import click

from bghost.commands.arguments import json_option
from bghost.commands.listing import plain
from bghost.shared.errors import PluginError
from bghost.shared.plugins import COMMANDS, WORDS, Found, discover
from bghost.shared.throwaway import TIMEOUT, Died, Hung, throwaway

_ORDER: Final = tuple(WORDS)


class Row(TypedDict):
    """One entry point, as ``--json`` prints it."""

    type: str  # kind, extension or command
    name: str
    distribution: str
    version: str
    entry_point: str
    state: str  # ok; refused: it is not what it has to be, or its name is taken; broken: it cannot be imported
    problem: str | None


@click.command()
@json_option
def plugins(as_json: bool) -> None:
    """Show the kinds, extensions and commands that are installed, and whether they work.

    Each is imported and looked over in a process of its distribution's own, for up to ten seconds, so one that
    crashes or hangs does no harm. A plugin that does not work is no failure of this command: it exits with 0.
    """
    found = sorted(discover().found, key=lambda one: (_ORDER.index(one.group), one.name, one.dist_name))
    states = _states(found)
    rows = [_row(one, *states[one]) for one in found]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _show(rows)


def _row(found: Found, state: str, problem: str | None) -> Row:
    return {
        "type": WORDS[found.group],
        "name": found.name,
        "distribution": found.dist_name,
        "version": found.version,
        "entry_point": found.value,
        "state": state,
        "problem": problem,
    }


def _states(found: Iterable[Found]) -> dict[Found, tuple[str, str | None]]:
    """State and problem of each."""
    states: dict[Found, tuple[str, str | None]] = {}
    distribution = attrgetter("dist_name", "version")
    for _, group in groupby(sorted(found, key=distribution), distribution):
        states.update(_together(list(group)))
    return states


def _together(found: list[Found]) -> dict[Found, tuple[str, str | None]]:
    if len(found) > 1:
        try:
            return _tried(found)
        except (Died, Hung):
            pass  # one of them it was, and the others shall not be blamed for it
    return {one: _alone(one) for one in found}


def _alone(found: Found) -> tuple[str, str | None]:
    try:
        return _tried([found])[found]
    except Died as error:
        return "broken", f"{found} cannot be loaded: its import ended the process ({error})"
    except Hung:
        return "broken", f"{found} cannot be loaded: its import took longer than {TIMEOUT:g} s"


def _tried(found: list[Found]) -> dict[Found, tuple[str, str | None]]:
    """State and problem of some that share a process.

    :raises Died: if one of them ended it, and Hung if one does not come to its end.
    """
    return dict(zip(found, throwaway(lambda: [_try(one) for one in found]), strict=True))


def _try(found: Found) -> tuple[str, str | None]:
    """Runs in the throw-away process."""
    silence = os.open(os.devnull, os.O_RDWR)  # what a plugin prints has no place in the listing
    for fd in (0, 1, 2):
        os.dup2(silence, fd)
    if found.problem is not None:
        return "refused", found.problem
    try:
        loaded = found.load()
    except PluginError as error:
        return "broken", str(error)
    try:
        if found.group == COMMANDS:
            if not isinstance(loaded, click.Command):
                raise PluginError(f"{found}: it is of type {type(loaded).__name__}, not a click command")
        else:
            from bghost.shared.verify import verify

            verify(found, loaded)
    except PluginError as error:
        return "refused", str(error)
    return "ok", None


def _show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="")
    for head in ("TYPE", "NAME", "DISTRIBUTION", "VERSION", "STATE"):
        table.add_column(head, no_wrap=True)
    table.add_column("PROBLEM", overflow="fold")
    for row in rows:
        cells = row["type"], row["name"], row["distribution"], row["version"], row["state"], row["problem"] or ""
        table.add_row(*(Text(plain(cell)) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)

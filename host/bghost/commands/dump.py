"""``bghost dump``: what workers are in the middle of, and what is in the tables of pools."""

from __future__ import annotations

import json
import time

import click

from bghost.commands.arguments import json_option, names_argument
from bghost.commands.listing import age, plain
from bghost.shared.client import Client
from bghost.shared.errors import FAILED, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from bghost.shared.replies import PoolDump, PoolEntry


@click.command()
@names_argument(required=False)
@click.option("--pools", is_flag=True, help="Show the tables of pools; NAME is a pool's then, none means all.")
@json_option
def dump(names: tuple[str, ...], pools: bool, as_json: bool) -> None:
    """Show the Python stacks of workers, and the scopes and transactions that they have open.

    The stacks come at once, the rest at the next safe point; a worker that does not get to one in a quarter of a second
    shows its stacks alone. The same is written to the log.

    With --pools show the tables of pools instead: entries, events that were not read, the lock. Ends with 1 if a table
    does not agree with what the host knows.
    """
    if pools:
        _pools(names, as_json)
        return
    if not names:
        raise UsageError("which worker?", hint="bghost dump NAME..., or bghost dump --pools")
    dumps = Client().dump(*names)
    if as_json:
        print(json.dumps(dumps, indent=2))
        return
    for name, text in dumps.items():
        print(f"{name}:")
        for line in text.splitlines():
            print(f"  {plain(line)}")


def _pools(names: tuple[str, ...], as_json: bool) -> None:
    tables = Client().pools(*names)
    if as_json:
        print(json.dumps(tables, indent=2))
    elif not tables:
        print("no pools")
    else:
        for table in tables:
            for line in _shown(table, time.time()):
                print(plain(line).rstrip())
    if any(table["problems"] for table in tables):
        raise SystemExit(FAILED)


def _shown(table: PoolDump, now: float) -> Iterator[str]:
    yield (
        f"pool {table['name']} of kind {table['kind']}, managed by {table['manager'] or 'nobody'}: "
        f"{table['used']} of {table['size']} entries used, {table['free']} free, "
        f"{table['acknowledged']} of {table['events']} events read"
    )
    for problem in table["problems"]:
        yield f"  problem: {problem}"
    lock = table["lock"]
    yield f"  lock: {'intact' if lock['intact'] else 'damaged'}, held by {lock['holder'] or 'nobody'}"
    for entry in table["entries"]:
        yield f"  {_line(entry, now)}"
    if table["left_out"]:
        yield f"  and {table['left_out']} more"


def _line(entry: PoolEntry, now: float) -> str:
    parts = [
        f"{entry['index']}: key {entry['key']}, {entry['state']}, generation {entry['generation']}",
        f"worker {entry['worker'] or 'none'}, pid {entry['pid'] or 'none'}",
    ]
    if entry["launched"] is not None:
        parts.append(f"launched {age(now - entry['launched'])} ago")
    parts += [f"event {event['number']} {event['kind']} not read" for event in entry["unread"]]
    if entry["reason"]:
        parts.append(entry["reason"])
    parts.append(f"published {entry['published']} times" if entry["data"] is not None else "nothing published")
    return ", ".join(parts)

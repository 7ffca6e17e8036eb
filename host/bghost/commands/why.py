"""``bghost why``: what has become of a worker, and for what reason."""

from __future__ import annotations

import json
import time

import click

from bghost.commands.arguments import json_option, names_argument
from bghost.commands.listing import age, plain
from bghost.shared.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from bghost.shared.replies import Ended, Why


@click.command()
@names_argument()
@json_option
def why(names: tuple[str, ...], as_json: bool) -> None:
    """Tell why workers are in the state that they are in.

    How the last process ended, in the middle of what, what speaks for which cause, its last lines in the log, its
    stacks if they were taken, what was decided, and when it is tried again.
    """
    answers = Client().why(*names)
    if as_json:
        print(json.dumps(answers, indent=2))
        return
    print("\n\n".join("\n".join(map(plain, _lines(answer, time.time()))) for answer in answers))


def _lines(answer: Why, now: float) -> Iterator[str]:
    head = f"{answer['name']} ({answer['kind']}) is {answer['state']}, for {age(now - answer['since'])}"
    yield head + (f", pid {answer['pid']}" if answer["pid"] else "")
    if answer["held_by"]:
        yield f"  waits for   {', '.join(answer['held_by'])}, which it is to start after"
    if answer["next_try"] is not None:
        yield f"  next try    {_clock(answer['next_try'])}, in {max(0.0, answer['next_try'] - now):.1f} s"
    ended = answer["ended"]
    if ended is None:
        yield "  no process of it has ended so far"
    else:
        yield from _ended(ended, now)
    if answer["lines"]:
        yield "  last lines"
        yield from (f"    {line}" for line in answer["lines"])


def _ended(ended: Ended, now: float) -> Iterator[str]:
    yield f"  ended       {_clock(ended['at'])}, {age(now - ended['at'])} ago, after {age(ended['ran_for'])}"
    yield f"  exit        {ended['exit']}{', core dumped' if ended['core_dumped'] else ''}"
    doing = [ended["state"], ended["doing"], ended["activity"], ended["wait"] and f"waiting for {ended['wait']}"]
    yield f"  in          {', '.join(text for text in doing if text)}"
    if ended["last_error"]:
        yield f"  last error  {ended['last_error']}"
    for number, text in enumerate(ended["evidence"]):
        yield f"  {'' if number else 'cause':11} {text}"
    yield f"  decision    {ended['decision']}"
    if ended["lines"]:
        yield "  its last lines"
        yield from (f"    {line}" for line in ended["lines"])
    if ended["dump"]:
        yield "  its stacks"
        yield from (f"    {line}" for line in ended["dump"].splitlines())


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))

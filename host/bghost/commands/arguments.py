"""Arguments that commands share: what they are written like, and what is made of them."""

import json
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from bghost.shared.errors import UsageError

if TYPE_CHECKING:
    from bghost.shared.replies import Mode

F = TypeVar("F", bound=Callable[..., None])


def parse_set(text: str) -> tuple[str, str, str]:
    """Split ``kind.key=value`` into kind (or extension), key and value; a key may have further dots.

    :raises UsageError: if it has another form.
    """
    path, equals, value = text.partition("=")
    target, _, key = path.partition(".")
    if not (equals and target and all(key.split("."))) or path != path.strip():
        raise UsageError(f"--set {text!r} is not of the form kind.key=value", hint="as in --set counter.naptime=1")
    return target, key, value


def parse_sets(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """What several ``--set`` say, by kind or extension and key; of two for one key the later holds.

    :raises UsageError: if one of them has another form than ``kind.key=value``.
    """
    sets: dict[str, dict[str, str]] = {}
    for text in texts:
        target, key, value = parse_set(text)
        values = sets.setdefault(target, {})
        values.pop(key, None)  # the order counts: a.b may be said before and after a
        values[key] = value
    return sets


def parse_arg(text: str) -> tuple[str, Any]:
    """Split ``key=value``; the value is JSON where it parses as such, else text.

    :raises UsageError: if it has another form.
    """
    key, equals, value = text.partition("=")
    if not (equals and key) or key != key.strip():
        raise UsageError(f"--arg {text!r} is not of the form key=value", hint="as in --arg index=4")
    try:
        return key, json.loads(value, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return key, value


def _no_json(word: str) -> NoReturn:
    raise ValueError(word)  # NaN and Infinity, which Python's parser takes and JSON does not know


class Seconds(click.ParamType[float]):
    """A length of time above zero."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            self.fail(f"{value!r} is no number of seconds above 0", param, ctx)
        return seconds


def names_argument(*, required: bool = True) -> Callable[[F], F]:
    """``NAME...``: the argument ``names`` of a command about workers; a shell that completes it asks the host."""

    def argument(command: F) -> F:
        return click.argument(
            "names",
            nargs=-1,
            required=required,
            metavar="NAME..." if required else "[NAME]...",
            shell_complete=_complete_names,
        )(command)

    return argument


def _complete_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from bghost.shared.client import Client
    from bghost.shared.errors import BghostError

    try:
        names = [row["name"] for row in Client(timeout=1.0).ps()]
    except BghostError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def timeout_option(command: F) -> F:
    """``-t S``: the argument ``timeout`` of a command that waits."""
    return click.option(
        "-t", "--timeout", type=Seconds(), metavar="S", help="Seconds to wait; then it is exit code 4.  [no limit]"
    )(command)


def mode_options(command: F) -> F:
    """``--fast`` and ``--now``: the arguments of a command that stops something; see :func:`stop_mode`."""
    fast = click.option("--fast", is_flag=True, help="Not after the tick, but at the next safe point; cancel queries.")
    now = click.option("--now", is_flag=True, help="At once, without cleanup.")
    return fast(now(command))


def stop_mode(fast: bool, now: bool) -> "Mode":
    """The mode that the flags of :func:`mode_options` mean.

    :raises UsageError: if both are given.
    """
    if fast and now:
        raise UsageError("--fast and --now exclude each other")
    return "immediate" if now else "fast" if fast else "smart"


def json_option(command: F) -> F:
    """``--json``: the argument ``as_json`` of a command that prints an answer."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)

"""``bghost run``: be a host, in the foreground."""

import os

import click

from bghost.commands.arguments import parse_sets
from bghost.shared.errors import UsageError
from bghost.shared.names import check_name
from bghost.shared.paths import directories


@click.command()
@click.argument("kinds", nargs=-1, metavar="[KIND]...")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Run N workers of each kind.")
@click.option("--name", metavar="NAME", help="The worker's name, instead of its kind's; with --count, numbered.")
@click.option(
    "--set", "sets", multiple=True, metavar="KIND.KEY=VALUE", help="A setting, over the config file's.  Repeatable."
)
def run(kinds: tuple[str, ...], count: int | None, name: str | None, sets: tuple[str, ...]) -> None:
    """Run workers of each KIND, or what the config file says.

    Ctrl-C and SIGTERM stop them in order. Where kinds are named the host ends with its last worker; else it stays.
    """
    if len(kinds) != len(set(kinds)):
        raise UsageError("a kind is named twice", hint="--count N runs several workers of it")
    if name is not None:
        check_name(name)
        if len(kinds) != 1:
            raise UsageError("--name is for the workers of one kind", detail=f"{len(kinds)} were named")
    if count is not None and not kinds:
        raise UsageError("--count is for kinds that are named", hint="the config file has 'count' in its [[worker]]")
    parsed = parse_sets(sets)

    from bghost.commands.serve import serve

    config = os.environ.get("BGHOST_CONFIG") or None
    raise SystemExit(serve(directories().instance, kinds, count=count, name=name, sets=parsed, config=config))

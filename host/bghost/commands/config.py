"""``bghost config``: the config as it is written, no host asked: whether it is good, where each value comes from."""

import json
import os
from collections.abc import Iterator
from typing import Any, TypedDict

import click
import msgspec

from bghost.commands.arguments import json_option, parse_sets
from bghost.commands.listing import plain
from bghost.commands.serve import sources_of
from bghost.host.config import WorkerTable
from bghost.host.reading import Reading, Sources, host_keys
from bghost.host.verdict import Verdict, judge
from bghost.shared.errors import ConfigError, PluginError
from bghost.shared.paths import directories
from bghost.shared.plugins import discover
from bghost.shared.secrets import masked
from bghost.shared.throwaway import Died, Hung, throwaway

_TIMEOUT = 15.0  # seconds; a few more than the imports in it may take together


class Value(TypedDict):
    """One value, as ``--json`` prints it."""

    key: str
    value: Any
    source: str  # default, a file and line, a variable of the environment, or --set


@click.group()
def config() -> None:
    """Check the config, or show what it comes to; no host is asked."""


def _sets_option(command: Any) -> Any:
    return click.option("--set", "sets", multiple=True, metavar="KIND.KEY=VALUE", help="As for run.  Repeatable.")(
        command
    )


@config.command()
@click.argument("file", required=False)
@_sets_option
def check(file: str | None, sets: tuple[str, ...]) -> None:
    """Check the config in FILE, or the one that a host would read.

    Files, names, settings and the order of workers are checked as for a start, and each kind and extension that the
    config names is imported, in a process that is thrown away. If it is not good, the exit code is 2, and the error
    names file, line and key.
    """
    sources = _sources(file, sets)
    verdict, _ = _judged(sources)
    for note in verdict.notes:
        print(plain(f"note: {note}"))
    count = len(verdict.config.specs())
    what = verdict.config.path or "no config file"
    print(plain(f"{what}: good, {count} worker{'' if count == 1 else 's'}"))


@config.command()
@_sets_option
@json_option
def show(sets: tuple[str, ...], as_json: bool) -> None:
    """Show the config that a host would start with, and where each value comes from.

    Of two that say the same, the later one holds: default, bghost.toml, the files in conf.d beside it by name, the
    environment (BGHOST_HOST_...), --set. Passwords are not shown.
    """
    _, values = _judged(_sources(None, sets))
    if as_json:
        print(json.dumps(values, indent=2))
        return
    lines = [(f"{value['key']} = {json.dumps(value['value'])}", value["source"]) for value in values]
    width = min(60, max(len(line) for line, _ in lines))
    for line, source in lines:
        print(plain(f"{line:{width}}  # {source}"))


def _sources(file: str | None, sets: tuple[str, ...]) -> Sources:
    given = file or os.environ.get("BGHOST_CONFIG") or None
    return sources_of(given, directories(), parse_sets(sets))


def _judged(sources: Sources) -> tuple[Verdict, list[Value]]:
    """The verdict and all values; found out in a process that is thrown away.

    :raises BghostError: if the config is not good.
    """

    def judged() -> Any:
        reading, verdict = judge(sources, discover(), thorough=True)
        return [msgspec.to_builtins(verdict), list(_values(reading, verdict))]

    try:
        told, values = throwaway(judged, _TIMEOUT)
    except Died as error:
        raise PluginError("the process that checked the config has given no answer", detail=str(error)) from None
    except Hung:
        raise ConfigError(f"the config was not read and checked within {_TIMEOUT:g} s") from None
    return msgspec.convert(told, Verdict), values


def _values(reading: Reading, verdict: Verdict) -> Iterator[Value]:
    config = verdict.config
    host = msgspec.to_builtins(config.host)
    for path in host_keys():
        value = host
        for key in path:
            value = value[key]
        yield _value(".".join(("host", *path)), value, reading.source(("host", *path)))
    for index, table in enumerate(config.workers):
        for key in WorkerTable.__struct_fields__:
            value = msgspec.to_builtins(getattr(table, key))
            source = reading.source(("worker", index, key))
            if source is not None or value not in (None, {}, ()):
                yield _value(f"worker {table.base}: {key}", value, source)
    shown = {**config.kinds, **config.plugins, **verdict.settings}
    for section, names in (("kind", reading.kinds(shown)), ("plugin", reading.extensions(shown))):
        for name in names:
            written = (config.kinds if section == "kind" else config.plugins).get(name, {})
            settings = {key.partition(".")[2]: value for key, value in verdict.settings.get(name, {}).items()}
            for key, value in settings.items() if name in verdict.settings else written.items():
                place = "--set" if reading.set(name, key) else reading.source((section, name, *key.split(".")))
                yield _value(f"{section}.{name}.{key}", value, place)


def _value(key: str, value: Any, source: str | None) -> Value:
    return {"key": key, "value": masked(key.rpartition(".")[2], value), "source": source or "default"}

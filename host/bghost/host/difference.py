"""What a new config changes of what runs by the old one. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from bghost.host.config import Config, HostTable
from bghost.shared import settings as conversion


class Difference(msgspec.Struct, frozen=True):
    """Workers by name, in the order of the config, and settings by their keys.

    :param start: workers that are new.
    :param stop: workers that there are no longer.
    :param restart: workers whose own table has changed.
    :param settings: keys whose values have changed, such as ``kind.counter.naptime``.
    """

    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def compare(old: Config, new: Config, *, workers: bool = True) -> Difference:
    """What is different.

    :param workers: whether the tables ``[[worker]]`` count.
    """
    was, will = (config.specs() if workers else {} for config in (old, new))
    before, after = _flat(old), _flat(new)
    return Difference(
        start=tuple(name for name in will if name not in was),
        stop=tuple(name for name in was if name not in will),
        restart=tuple(name for name in will if name in was and was[name] != will[name]),
        settings=tuple(sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))),
    )


def host_pending(running: HostTable, new: HostTable) -> list[str]:
    """The start-only keys of ``[host]`` in which *new* differs from what the host was started with."""
    before = dict(conversion.start_only(running))
    return [f"host.{key}" for key, value in conversion.start_only(new) if before[key] != value]


def _flat(config: Config) -> dict[str, Any]:
    tables = {"host": msgspec.to_builtins(config.host), "kind": config.kinds, "plugin": config.plugins}
    return dict(_leaves(tables, ""))


def _leaves(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, here)
        else:
            yield here, value

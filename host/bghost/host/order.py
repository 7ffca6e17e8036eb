"""The order that ``after`` gives: who waits for whom at the start, and who ends before whom at a stop. Pure."""

from collections.abc import Collection, Mapping, Sequence

from bghost.shared.errors import ConfigError
from bghost.shared.names import near


def meant(name: str, names: Collection[str]) -> list[str]:
    """The workers that *name* means: the one called so, or else NAME.1, NAME.2, ... of *names*."""
    if name in names:
        return [name]
    prefix = name + "."
    return [each for each in names if each.startswith(prefix) and each[len(prefix) :].isdigit()]


def check(after: Mapping[str, Sequence[str]]) -> None:
    """See that each name in *after* (worker to those it waits for) means somebody, and that nobody waits for itself.

    :raises ConfigError: if not; a cycle is written out.
    """
    edges: dict[str, list[str]] = {}
    for worker, wanted in after.items():
        edges[worker] = []
        for name in wanted:
            found = meant(name, after)
            if not found:
                raise ConfigError(
                    f"worker {worker} is to start after {name!r}, which there is not",
                    hint=near(name, sorted(after.keys() - {worker})),
                )
            edges[worker] += found
    done: set[str] = set()
    for worker in edges:
        _walk(worker, edges, [], done)


def _walk(worker: str, edges: Mapping[str, Sequence[str]], path: list[str], done: set[str]) -> None:
    if worker in path:
        cycle = [*path[path.index(worker) :], worker]
        raise ConfigError(f"workers wait for each other: {' after '.join(cycle)}", hint="take one 'after' away")
    if worker not in done:
        for other in edges[worker]:
            _walk(other, edges, [*path, worker], done)
        done.add(worker)

"""The config as it was written: files, environment and command line laid over each other, each value with its place.

Of two that say the same, the later one here holds: bghost.toml, the files in conf.d beside it by name, the environment
(``BGHOST_HOST_*``, for [host] alone), ``--set``. The files are read anew for a reload; environment and command line
are those that the host was started with.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from bghost.host import order
from bghost.host.config import Config, HostTable, WorkerTable
from bghost.host.files import File, read
from bghost.host.lines import Path
from bghost.shared import settings as conversion
from bghost.shared import users
from bghost.shared.errors import BghostError, ConfigError, NotFound, UsageError
from bghost.shared.names import check_name, near
from bghost.shared.plugins import Catalog
from bghost.shared.settings import SettingError, Text

PREFIX: Final = "BGHOST_HOST_"

Sets = Mapping[str, Mapping[str, str]]
"""What ``--set`` says: by kind, extension or ``host``, and key."""


class Reading:
    """All that was written, merged.

    :param files: the later one holds.
    :raises ConfigError: if there is something that no config can have.
    """

    def __init__(self, files: Sequence[File], catalog: Catalog, environ: Mapping[str, str], sets: Sets) -> None:
        self._catalog = catalog
        self._sets = sets
        self._files = files
        self._sources: dict[Path, str | tuple[File, Path]] = {}
        self.tables: dict[str, Any] = {"host": {}, "worker": [], "kind": {}, "plugin": {}}
        for target in sets:
            if target not in (known := [*catalog.kinds, *catalog.extensions, "host"]):
                hint = near(target, known)
                raise NotFound(f"--set {target}...: {target!r} is neither a kind nor an extension", hint=hint)
        for file in files:
            self._add(file)
        self._add_environment(environ)
        for key, value in sets.get("host", {}).items():
            self._put(("host", *key.split(".")), Text(value), "--set")
        self._look_for_odd_numbers(self.tables, ())

    def _add(self, file: File) -> None:
        known = ["host", "worker", "kind", "plugin", *self._catalog.extensions]
        for name, value in file.tables.items():
            if name not in known:
                hint = f"write [kind.{name}]" if name in self._catalog.kinds else near(name, known)
                raise ConfigError(f"{file.place((name,))}: there is no table [{name}]", hint=hint)
            if name == "worker":
                self._add_workers(file, value)
                continue
            path: Path = ("plugin", name) if name in self._catalog.extensions else (name,)
            self._add_table(file, value, path, (name,), 2 if name in ("kind", "plugin") else 1)

    def _add_workers(self, file: File, tables: Any) -> None:
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ConfigError(
                f"{file.place(('worker',))}: worker is not an array of tables", hint="write [[worker]] and not [worker]"
            )
        for index, table in enumerate(tables):
            self._sources["worker", len(self.tables["worker"])] = file, ("worker", index)
            self.tables["worker"].append(table)

    def _add_table(self, file: File, value: Any, path: Path, there: Path, levels: int) -> None:
        """Lay a table of *file* over what there is; *levels* of it have to be tables."""
        if not isinstance(value, dict):
            if levels > 0:
                name = ".".join(map(str, there))
                raise ConfigError(f"{file.place(there)}: {name} is not a table", hint=f"write [{name}], settings below")
            self._put(path, value, (file, there))
            return
        self._sources.setdefault(path, (file, there))
        if not isinstance(self.value(path), dict):
            self._put(path, {}, (file, there))
        for key, each in value.items():
            self._add_table(file, each, (*path, key), (*there, key), levels - 1)

    def _put(self, path: Path, value: Any, source: str | tuple[File, Path]) -> None:
        table: dict[Any, Any] = self.tables
        for key in path[:-1]:
            if not isinstance(table.get(key), dict):
                table[key] = {}
            table = table[key]
        table[path[-1]] = value
        self._sources[path] = source

    def _add_environment(self, environ: Mapping[str, str]) -> None:
        twins = {variable(path): path for path in host_keys()}
        for name, value in environ.items():
            if name.startswith(PREFIX) and value:
                if name not in twins:
                    words = [twin.removeprefix(PREFIX) for twin in twins]
                    hint = near(name.removeprefix(PREFIX), words)
                    raise ConfigError(f"{name} in the environment is no setting of [host]", hint=hint)
                self._put(("host", *twins[name]), Text(value), name)

    def _look_for_odd_numbers(self, value: Any, path: Path) -> None:
        """JSON, in which workers are told, has neither infinity nor nan, and 64 bits is what all readers of it take."""
        if isinstance(value, dict):
            for key, each in value.items():
                self._look_for_odd_numbers(each, (*path, key))
        elif isinstance(value, list):
            for index, each in enumerate(value):
                self._look_for_odd_numbers(each, (*path, index))
        elif isinstance(value, float) and not abs(value) < float("inf"):
            self._odd(path, value, "expected a number that is one")
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            self._odd(path, value, "expected a number of at most 64 bits")

    def _odd(self, path: Path, value: object, rule: str) -> None:
        raise ConfigError(f"{self.place(path)}: {named(path)} = {value!r:.40} is not allowed", detail=rule)

    # Places

    def value(self, path: Path) -> Any:
        """What was said at *path*; ``None`` if nothing."""
        value: Any = self.tables
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def place(self, path: Path) -> str:
        """Where *path* was said: file and line, a variable of the environment, or ``--set``; empty if nowhere."""
        for length in range(len(path), 0, -1):
            source = self._sources.get(path[:length])
            if isinstance(source, str):
                return source
            if source is not None:
                file, there = source
                return file.place((*there, *path[length:]))
        return self._files[0].path if self._files else ""

    def source(self, path: Path) -> str | None:
        """Where *path* was said; ``None`` if it was not."""
        return None if self.value(path) is None else self.place(path)

    def set(self, target: str, key: str) -> bool:
        """Whether ``--set`` has said *key* of a kind or an extension, or something in it, or what it is in."""
        return any(
            f"{said}.".startswith(f"{key}.") or f"{key}.".startswith(f"{said}.") for said in self._sets.get(target, {})
        )

    def kinds(self, names: Iterable[str]) -> list[str]:
        """Those of *names* that are kinds."""
        return [name for name in names if name in self._catalog.kinds]

    def extensions(self, names: Iterable[str]) -> list[str]:
        """Those of *names* that are extensions."""
        return [name for name in names if name in self._catalog.extensions]

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Have errors of what was said at *path* name its place."""
        try:
            yield
        except BghostError as error:
            raise self._placed(error, path) from None

    @contextmanager
    def at_settings(self, kind: str, worker: int | None = None) -> Iterator[None]:
        """Have errors of settings, or of a worker's args, name the place: its table, ``--set``, the kind's table."""
        try:
            yield
        except SettingError as error:
            key = error.key.partition(".")[0]
            if worker is not None and error.where.startswith("args of "):
                path: Path = ("worker", worker, "args")
            elif worker is not None and key in self.tables["worker"][worker].get("settings", {}):
                path = ("worker", worker, "settings")
            elif self.set(kind, error.key):
                raise ConfigError(f"--set: {error.message}", detail=error.detail, hint=error.hint) from None
            else:
                path = ("plugin" if kind in self.tables["plugin"] else "kind", kind)
            raise self._placed(error, path) from None

    def _placed(self, error: BghostError, path: Path) -> BghostError:
        if isinstance(error, SettingError) and error.key:
            path = (*path, *error.key.split("."))
        place = self.place(path)
        kind = ConfigError if isinstance(error, (NotFound, UsageError, ConfigError)) else type(error)
        return kind(f"{place}: {error.message}" if place else error.message, detail=error.detail, hint=error.hint)

    # What it says

    def config(self) -> Config:
        """It, checked as far as it can be without the kinds' own types.

        :raises BghostError: if it is not valid; names the place.
        """
        tables = self.tables
        with self.at("host"):
            host = conversion.convert(tables["host"], HostTable, "host")
        workers = tuple(self._worker(index) for index in range(len(tables["worker"])))
        for index, name in enumerate(host.kinds):
            with self.at("host", "kinds", index):
                self._catalog.kind(name)
        if host.user is not None:
            with self.at("host", "user"):
                users.find(host.user)
        with self.at("host", "plugins"):
            self._catalog.active(host.plugins)
        for section, known in (("kind", self._catalog.kinds), ("plugin", self._catalog.extensions)):
            for name in tables[section]:
                if name not in known:
                    what = "extension" if section == "plugin" else section
                    hint = near(name, list(known))
                    raise ConfigError(f"{self.place((section, name))}: there is no {what} {name!r}", hint=hint)
        self._check_names(workers)
        self._check_order(workers)
        self._check_count(workers, host.max_workers)
        sets = {target: dict(values) for target, values in self._sets.items() if target != "host"}
        path = self._files[0].path if self._files else None
        return Config(host, workers, tables["kind"], tables["plugin"], sets, path)

    def _worker(self, index: int) -> WorkerTable:
        with self.at("worker", index):
            worker = conversion.convert(self.tables["worker"][index], WorkerTable, "worker")
        with self.at("worker", index, "kind"):
            self._catalog.kind(worker.kind)
        if worker.name is not None:
            with self.at("worker", index, "name"):
                check_name(worker.name)
        if worker.user is not None:
            with self.at("worker", index, "user"):
                users.find(worker.user)
        return worker

    def _check_names(self, workers: Sequence[WorkerTable]) -> None:
        taken: dict[str, int] = {}
        for index, worker in enumerate(workers):
            names = {worker.base, *(str(spec.name) for spec in worker.specs())}
            for name in sorted(names):
                with self.at("worker", index, "name"):
                    check_name(name)
                    if name in taken:
                        raise ConfigError(
                            f"a second worker {name}",
                            detail=f"the first is at {self.place(('worker', taken[name]))}",
                            hint="give one of them another name",
                        )
            taken.update(dict.fromkeys(names, index))

    def _check_count(self, workers: Sequence[WorkerTable], most: int) -> None:
        total = sum(worker.count for worker in workers)
        count = 0
        for index, worker in enumerate(workers):
            count += worker.count
            if count > most:
                with self.at("worker", index, "count"):
                    raise ConfigError(
                        f"{total} workers are more than host.max_workers, {most}", hint="raise max_workers in [host]"
                    )

    def _check_order(self, workers: Sequence[WorkerTable]) -> None:
        names = [spec.name or "" for table in workers for spec in table.specs()]
        after = {spec.name or "": spec.after for table in workers for spec in table.specs()}
        for index, table in enumerate(workers):
            for number, other in enumerate(table.after):
                if not order.meant(other, names):
                    with self.at("worker", index, "after", number):
                        order.check({**dict.fromkeys(names, ()), str(table.specs()[0].name): (other,)})
        try:
            order.check(after)
        except ConfigError as error:
            in_it = error.message.split()
            first = next(i for i, table in enumerate(workers) if any(spec.name in in_it for spec in table.specs()))
            with self.at("worker", first, "after"):
                raise


@dataclass(frozen=True)
class Sources:
    """What a host's config is read from, at its start and again for each reload.

    :param path: the file; ``None`` if none was named, and there was none at the start.
    :param default: where it is looked for, if none was named; ``None`` if nowhere.
    """

    path: str | None
    default: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    sets: Sets = field(default_factory=dict)

    def read(self, catalog: Catalog) -> "Reading":
        """Read the file, and the files in conf.d beside it; without a file there is nothing in conf.d either.

        :raises ConfigError: if one of them cannot be read or is no TOML, or has what no config can have.
        """
        path = self.path
        if path is None and self.default is not None and os.path.lexists(self.default):
            path = self.default
        return Reading([] if path is None else read(path), catalog, self.environ, self.sets)


def named(path: Path) -> str:
    """A key as it is written, such as ``kind.counter.naptime`` or ``worker[2].args``."""
    text = ""
    for key in path:
        text += f"[{key + 1}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def host_keys(type: Any = HostTable, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of ``[host]``, each as a path."""
    for key in msgspec.structs.fields(type):
        if isinstance(key.default, msgspec.Struct):
            yield from host_keys(key.type, (*path, key.encode_name))
        else:
            yield (*path, key.encode_name)


def variable(path: Sequence[str]) -> str:
    """The variable of the environment that stands for a key of ``[host]``."""
    return PREFIX + "_".join(path).upper()

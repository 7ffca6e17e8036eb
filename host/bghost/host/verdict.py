"""Whether a config is good for the kinds and extensions that it names. Runs where an import can do no harm.

Kinds and extensions that this process has not imported are imported in further processes that are thrown away.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import msgspec

from bghost.host.config import Config
from bghost.host.reading import Reading, Sources
from bghost.shared import settings as conversion
from bghost.shared import users
from bghost.shared.errors import BghostError, ConfigError, PluginError
from bghost.shared.hooks import host_hooks
from bghost.shared.plugins import Catalog, Found, discover
from bghost.shared.pools import Layout
from bghost.shared.spec import Settings, WorkerSpec
from bghost.shared.throwaway import TIMEOUT, Died, Hung, throwaway
from bghost.shared.verify import Plugin, verify

Values = dict[str, Any]
"""Settings by their names, such as ``counter.naptime``, as plain data."""

_BUDGET: Final = 0.8 * TIMEOUT  # seconds for all imports together: the process itself has TIMEOUT


class Verdict(msgspec.Struct):
    """A config that is good.

    :param found: the kinds that it names, as they are installed now.
    :param settings: the settings of the kinds and extensions that were looked at, defaults included.
    :param fixed: by worker, what its process keeps from its start on (start-only settings) in the config before and in
        this one; the extensions' settings are under no name, for each process makes its extensions but once.
    :param pools: those that a host which starts now would have otherwise than the running one, as ``pool.NAME``.
    :param notes: what could not be looked at, and why.
    """

    config: Config
    found: list[dict[str, Any]] = []
    settings: dict[str, Values] = {}
    fixed: dict[str, tuple[Values, Values]] = {}
    pools: list[str] = []
    notes: list[str] = []


def judge(
    sources: Sources,
    catalog: Catalog,
    *,
    here: Collection[str] = (),
    active: Iterable[str] = (),
    before: Config | None = None,
    running: Iterable[WorkerSpec] = (),
    named: Collection[str] | None = None,
    pools: Iterable[Layout] = (),
    thorough: bool = False,
) -> tuple[Reading, Verdict]:
    """Read the config and see whether it is good.

    :param here: the kinds and extensions that this process has imported.
    :param active: the extensions that are active, besides those that the config makes so.
    :param before: what is in force; ``None`` if nothing is.
    :param running: the workers that there are; those that no config named before have to get along with this one.
    :param named: the kinds that the host was started with, which alone can have pools; ``None`` if no host runs.
    :param pools: the pools that the host was started with.
    :param thorough: look at each kind that has a table of settings, though no worker of it is named.
    :raises BghostError: if it is not good.
    """
    try:
        reading = sources.read(catalog)
        reading.config()
    except ConfigError:
        catalog = discover()  # what it names may have been installed since
        reading = sources.read(catalog)
    look = _Look(reading, catalog, here, named, pools, before or Config())
    return reading, look.run(active, running, thorough)


class _Look:
    def __init__(
        self,
        reading: Reading,
        catalog: Catalog,
        here: Collection[str],
        named: Collection[str] | None,
        pools: Iterable[Layout],
        before: Config,
    ) -> None:
        self._reading = reading
        self._catalog = catalog
        self._here = here
        self._named = named
        self._pools = pools
        self._until = time.monotonic() + _BUDGET
        self._before = before
        self._config = reading.config()
        self._old, self._new = before.document(0), self._config.document(0)
        self._verdict = Verdict(self._config)

    def run(self, active: Iterable[str], running: Iterable[WorkerSpec], thorough: bool) -> Verdict:
        config, verdict = self._config, self._verdict
        gone = self._before.specs().keys() - config.specs().keys()
        others = [spec for spec in running if spec.name not in config.specs() and spec.name not in gone]
        kinds = dict.fromkeys(config.host.kinds)
        kinds.update(dict.fromkeys(table.kind for table in config.workers))
        kinds.update(dict.fromkeys(spec.kind for spec in others if spec.kind in self._catalog.kinds))
        if thorough:
            kinds.update(dict.fromkeys(config.kinds))
        for kind in kinds:
            found = self._catalog.kind(kind)
            verdict.found.append(asdict(found))
            answer = self._ask(found, partial(self._of_kind, found, [spec for spec in others if spec.kind == kind]))
            if answer is not None:
                verdict.settings[kind], fixed, pools = answer
                verdict.fixed.update(fixed)
                verdict.pools += pools
        names = dict.fromkeys([*active, *(found.name for found in self._catalog.active(config.host.plugins))])
        verdict.fixed[""] = {}, {}
        for name in names:
            self._look_at_extension(self._catalog.extensions[name])
        return verdict

    def _ask(self, found: Found, ask: Callable[[], Any]) -> Any:
        """What *ask* says, here if what it imports is imported already; ``None`` if that does not come to its end."""
        if found.name in self._here:
            return ask()
        if found.dist_name != "bghost":
            ask = users.asked_by(self._config.importer(found.name), ask)
        try:
            return throwaway(ask, max(0.1, self._until - time.monotonic()))
        except Died as error:
            raise PluginError(f"{found} ends the process that imports it", detail=str(error)) from None
        except Hung:
            self._verdict.notes.append(f"{found} was not imported in time: its settings are not checked")
            return None

    def _of_kind(self, found: Found, others: list[WorkerSpec]) -> Any:
        kind = found.name
        plugin = verify(found, found.load())
        type = plugin.settings_type or Settings
        workers: list[tuple[int | None, WorkerSpec]] = [(None, spec) for spec in others]
        has_pools = "bghost_pools" in plugin.marks
        named = self._named is None or kind in self._named
        for number, table in enumerate(self._config.workers):
            if table.kind == kind:
                if has_pools and not named:
                    with self._reading.at("worker", number, "kind"):
                        raise ConfigError(
                            f"kind {kind!r} has pools, and was not named at the host's start",
                            hint=f"add {kind!r} to kinds in [host], and start the host again",
                        )
                workers += [(number, spec) for spec in table.specs()]
        with self._reading.at_settings(kind):
            settings = conversion.convert(conversion.layers(self._new, WorkerSpec(kind=kind)), type, kind)
        fixed = {}
        for index, spec in workers:
            with self._reading.at_settings(kind, index):
                conversion.convert(conversion.layers(self._new, spec), type, kind)
                if plugin.args_type is not None:
                    conversion.convert(spec.args, plugin.args_type, f"args of {spec.name}")
            fixed[spec.name or ""] = _fixed(kind, self._old, spec, type), _fixed(kind, self._new, spec, type)
        return _values(kind, settings), fixed, self._changed_pools(plugin, settings) if has_pools and named else []

    def _changed_pools(self, plugin: Plugin, settings: Settings) -> list[str]:
        kind = plugin.found.name
        hooks = host_hooks({kind: (plugin.found, plugin.object)}, {}, report=lambda *_: None)
        try:
            pools = {layout.name: layout for layout in hooks.pools(kind, settings)}
        except BghostError:
            raise
        except Exception as error:
            raise plugin.found.failure("fails in bghost_pools", error) from error
        before = {layout.name: layout for layout in self._pools if layout.manager == kind}
        return [f"pool.{name}" for name in {**before, **pools} if before.get(name) != pools.get(name)]

    def _look_at_extension(self, found: Found) -> None:
        try:
            answer = self._ask(found, partial(self._of_extension, found))
        except PluginError as error:
            self._verdict.notes.append(f"{error}; left out")
            return
        if answer is not None:
            old, new = answer
            self._verdict.settings[found.name] = new
            for values, more in zip(self._verdict.fixed[""], (old, new), strict=True):
                values.update(more)

    def _of_extension(self, found: Found) -> Any:
        name = found.name
        type = verify(found, found.load()).settings_type
        if type is None:
            return {}, {}
        with self._reading.at_settings(name):
            new = conversion.convert(conversion.extension_layers(self._new, name), type, name)
        try:
            old = _values(name, conversion.convert(conversion.extension_layers(self._old, name), type, name))
        except BghostError:
            old = {}
        return old, _values(name, new)


def _fixed(kind: str, document: Mapping[str, Any], spec: WorkerSpec, type: type[Settings]) -> Values:
    try:
        settings = conversion.convert(conversion.layers(document, spec), type, kind)
    except BghostError:
        return {}  # of the config before, by which this worker did not run
    return {f"{kind}.{key}": _builtin(value) for key, value in conversion.start_only(settings)}


def _values(name: str, settings: msgspec.Struct) -> Values:
    values = {}
    for field, written in zip(settings.__struct_fields__, settings.__struct_encode_fields__, strict=True):
        key, value = f"{name}.{written}", getattr(settings, field)
        values.update(_values(key, value) if isinstance(value, msgspec.Struct) else {key: _builtin(value)})
    return values


def _builtin(value: Any) -> Any:
    try:
        return msgspec.to_builtins(value)
    except TypeError:
        return repr(value)  # of a type of the author's own; it is shown and compared, no more

"""Before the first fork: kinds and extensions imported, and asked what there is to run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from loguru import logger

from bghost.host.reading import Reading
from bghost.shared import hooks as loader
from bghost.shared import settings as conversion
from bghost.shared import users
from bghost.shared.errors import BghostError, PluginError
from bghost.shared.hooks import HostHooks
from bghost.shared.names import check_name
from bghost.shared.plugins import Found
from bghost.shared.pools import Layout
from bghost.shared.settings import SettingError
from bghost.shared.spec import Settings, WorkerSpec
from bghost.shared.throwaway import TIMEOUT, Died, Hung, threads, throwaway


class Preload:
    """What is found out about kinds and extensions before the first worker is forked."""

    def __init__(
        self,
        reading: Reading,
        kinds: Mapping[str, Found],
        extensions: Mapping[str, Found],
    ) -> None:
        self._reading = reading
        self._config = reading.config()
        self._document = self._config.document(0)
        self._kinds = kinds
        self._harmful: set[str] = set()
        self.extensions = dict(extensions)
        """Those that workers have: what could not be loaded is left out once :meth:`load` has been called."""
        self._specs: dict[str, list[WorkerSpec] | None] = {}
        self.pools: list[Layout] = []
        """Those that the kinds manage, once :meth:`load` has been called."""

    def load(self) -> tuple[HostHooks, dict[str, object]]:
        """Import kinds and extensions, each first in a throw-away child; then, where that did no harm, in this process.

        :returns: the host's hooks, and the kinds' objects.
        :raises BghostError: if a kind cannot be loaded, or its settings are not valid.
        """
        good = {}
        for name, found in self._kinds.items():
            ask = users.asked_by(self._importer(found), partial(self._ask, found))
            if self._harmless(found, ask) and not self._away(found):
                good[name] = found
        for name, found in list(self.extensions.items()):
            try:
                if not self._harmless(found, partial(_imported, found)):
                    self._harmful.add(name)
            except BghostError as error:
                logger.error("{}; left out", error)
                del self.extensions[name]
        loaded = {name: found.load() for name, found in good.items()}
        hooks = self._hooks({name: (found, loaded[name]) for name, found in good.items()}, self.extensions)
        for name in self.extensions.keys() - self._harmful - hooks.extensions.keys():
            del self.extensions[name]  # the loader has said why
        return hooks, loaded

    def _importer(self, found: Found) -> str | None:
        return None if found.dist_name == "bghost" else self._config.importer(found.name)

    def _away(self, found: Found) -> bool:
        """Whether the kind is not to be imported here: workers of it have another user, or an interpreter, each."""
        if found.dist_name == "bghost":
            return False
        own = [
            *(table for table in self._config.workers if table.kind == found.name),
            *(self._specs.get(found.name) or ()),
        ]
        return self._config.host.user is not None or any(spec.user or spec.start == "spawn" for spec in own)

    def _harmless(self, found: Found, ask: Callable[[], Any]) -> bool:
        try:
            answer, count = throwaway(ask)
        except Died as error:
            raise PluginError(f"{found} ends the process that imports it", detail=str(error)) from None
        except Hung:
            logger.warning("{} was not imported within {:g} s; it is imported in its workers", found, TIMEOUT)
            return False
        if answer is not True:
            specs, pools = answer
            self._specs[found.name] = None if specs is None else [msgspec.convert(spec, WorkerSpec) for spec in specs]
            for pool in (msgspec.convert(pool, Layout) for pool in pools):
                if any(other.name == pool.name for other in self.pools):
                    raise PluginError(f"{found} declares a pool {pool.name!r}, which another kind declares too")
                self.pools.append(pool)
        if count > 1:
            logger.warning("importing {} starts a thread; it is imported in its workers", found)
        return bool(count == 1)

    def _ask(self, found: Found) -> Any:
        hooks = self._hooks({found.name: (found, found.load())}, {})
        table = conversion.layers(self._document, WorkerSpec(kind=found.name))
        with self._reading.at_settings(found.name):
            settings = conversion.convert(table, hooks.settings_type(found.name) or Settings, found.name)
        specs = hooks.workers(found.name, settings)
        pools = [msgspec.to_builtins(pool) for pool in hooks.pools(found.name, settings)]
        return [[None if specs is None else msgspec.to_builtins(specs), pools], threads()]

    def _hooks(self, kinds: Mapping[str, tuple[Found, object]], extensions: Mapping[str, Found]) -> HostHooks:
        tables = {
            name: (found, conversion.extension_layers(self._document, name))
            for name, found in extensions.items()
            if name not in self._harmful
        }
        try:
            return loader.host_hooks(kinds, tables, report=_extension_failed)
        except SettingError as error:
            with self._reading.at_settings(error.where):
                raise

    def specs(self, kind: str, count: int | None, name: str | None) -> list[WorkerSpec]:
        """The workers that ``run`` starts of *kind*."""
        specs = self._specs.get(kind)
        base = name if name is not None else kind
        check_name(base)
        if count is not None:
            names = [base] if count == 1 else [f"{base}.{number}" for number in range(1, count + 1)]
            said = (specs or [])[:count]
            said += [WorkerSpec(kind=kind)] * (count - len(said))
            return [msgspec.structs.replace(spec, name=each) for spec, each in zip(said, names, strict=True)]
        if specs is None:
            return [WorkerSpec(kind=kind, name=base)]
        names = [base] if len(specs) == 1 else [f"{base}.{number}" for number in range(1, len(specs) + 1)]
        return [msgspec.structs.replace(spec, name=spec.name or each) for spec, each in zip(specs, names, strict=True)]


def _imported(found: Found) -> Any:
    found.load()
    return [True, threads()]


def _extension_failed(extension: str, hook: str, error: BaseException) -> None:
    if isinstance(error, BghostError):
        logger.error("{}; left out" if hook == "load" else "{}", error)
    else:
        logger.opt(exception=error).error("extension {} failed in {}; the host goes on", extension, hook)

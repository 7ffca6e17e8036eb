"""The config in force: what the host has accepted, numbered, and handed out to its workers."""

from collections.abc import Iterable

import msgspec

from bghost.host.config import Config
from bghost.shared import settings as conversion
from bghost.shared import table as t
from bghost.shared.errors import ConfigError, NotFound
from bghost.shared.hooks import HostHooks
from bghost.shared.spec import Settings, WorkerSpec


class Accepted:
    """Keeps the config, and publishes it in the table that all workers see.

    :param hooks: know the types of settings and args of the kinds that are *loaded* in this process.
    """

    def __init__(self, table: t.Table, config: Config, hooks: HostHooks, loaded: Iterable[str]) -> None:
        self.config = config
        self.error: str | None = None
        """Why the last one that was read was refused; ``None`` if it was not."""
        self._table = table
        self._hooks = hooks
        self._loaded = frozenset(loaded)
        self.take(config)

    @property
    def number(self) -> int:
        """How many configs this run has accepted."""
        return self._table.head[t.CONFIG_NUMBER]

    def settings(self, kind: str) -> Settings:
        """The settings of a loaded kind.

        :raises NotFound: if it is not loaded.
        :raises ConfigError: if they are not valid.
        """
        if kind not in self._loaded:
            raise NotFound(f"kind {kind!r} was not named at the host's start")
        return self._settings(WorkerSpec(kind=kind))

    def _settings(self, spec: WorkerSpec) -> Settings:
        table = conversion.layers(self.config.document(self.number), spec)
        return conversion.convert(table, self._hooks.settings_type(spec.kind) or Settings, spec.kind)

    def check(self, spec: WorkerSpec) -> None:
        """Refuse settings and args that the kind cannot take, as far as its types are known in this process.

        :raises ConfigError: saying which.
        """
        if spec.kind in self._loaded:
            self._settings(spec)
            args = self._hooks.args_type(spec.kind)
            if args is not None:
                conversion.convert(spec.args, args, f"args of {spec.name or spec.kind}")

    def take(self, config: Config) -> None:
        """Have *config* in force, under the next number; workers take it when they look.

        :raises ConfigError: if it is too long to be handed out; the old one stays then.
        """
        number = self.number + 1
        text = msgspec.json.encode(config.document(number))
        if len(text) > self._table.config.capacity:
            raise ConfigError(f"the config is longer than {self._table.config.capacity} bytes")
        self._table.config.write(text.decode())
        self._table.head[t.CONFIG_NUMBER] = number
        self.config = config
        self.error = None

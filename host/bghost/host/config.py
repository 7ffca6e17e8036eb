"""The config as the host keeps it: what files, environment and command line have said, checked, in one struct."""

import os
from typing import Annotated, Any, Literal

import msgspec

from bghost.shared.logs import LogFormat
from bghost.shared.spec import TimeLimit, WorkerSpec, start_only
from bghost.shared.units import Bytes, Seconds

_Level = Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"]
_Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class LogTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[host.log]``."""

    level: _Level = "INFO"
    file: str | None = None
    format: LogFormat = "text"
    rotate_size: Annotated[Bytes, msgspec.Meta(ge=1024)] | None = None
    rotate_age: Annotated[Seconds, msgspec.Meta(ge=1)] | None = None
    keep: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 7

    def __post_init__(self) -> None:
        if self.file is not None and not os.path.isabs(self.file):
            raise ValueError("file is an absolute path")
        if self.file is None and (self.rotate_size or self.rotate_age):
            raise ValueError("what is rotated is a file, and there is none")


class HostTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[host]``."""

    max_workers: Annotated[_Count, start_only] = 100
    stop_timeout: TimeLimit = 10.0
    on_crash: Literal["restart", "restart-all"] = "restart"
    kinds: Annotated[tuple[str, ...], start_only] = ()
    plugins: Annotated[tuple[str, ...] | None, start_only] = None
    user: Annotated[str | None, start_only] = None
    strict: bool = False
    log: LogTable = LogTable()


class WorkerTable(WorkerSpec, frozen=True, kw_only=True):
    """``[[worker]]``: a spec, for so many workers."""

    count: _Count = 1

    @property
    def base(self) -> str:
        """What its one worker is called, or what comes before the numbers of several."""
        return self.name or self.kind

    def specs(self) -> list[WorkerSpec]:
        """Its workers; numbered from 1 if there are several."""
        fields = {key: value for key, value in msgspec.structs.asdict(self).items() if key not in ("name", "count")}
        names = [self.base] if self.count == 1 else [f"{self.base}.{number}" for number in range(1, self.count + 1)]
        return [WorkerSpec(name=each, **fields) for each in names]


class Config(msgspec.Struct, frozen=True):
    """All of it.

    :param kinds: the tables ``[kind.NAME]``.
    :param plugins: the tables ``[plugin.NAME]``, or ``[NAME]``, of extensions.
    :param sets: what the command line says, by kind or extension and key: texts, for their types are the plugins'.
    :param path: the file; ``None`` if there is none.
    """

    host: HostTable = HostTable()
    workers: tuple[WorkerTable, ...] = ()
    kinds: dict[str, dict[str, Any]] = {}
    plugins: dict[str, dict[str, Any]] = {}
    sets: dict[str, dict[str, str]] = {}
    path: str | None = None

    def importer(self, kind: str) -> str | None:
        """The user who imports *kind* to see what it is: the first of those that its workers run as, if any do."""
        names = [table.user or self.host.user for table in self.workers if table.kind == kind]
        return min((name for name in names if name is not None), default=self.host.user)

    def specs(self) -> dict[str, WorkerSpec]:
        """The workers of all tables ``[[worker]]``, by name."""
        return {spec.name or "": spec for table in self.workers for spec in table.specs()}

    def document(self, number: int) -> dict[str, Any]:
        """What workers are told of it, numbered."""
        return {
            "number": number,
            "kinds": self.kinds,
            "plugins": self.plugins,
            "sets": self.sets,
            "strict": self.host.strict,
            "stop_timeout": self.host.stop_timeout,
            "log": {"level": self.host.log.level, "file": self.host.log.file, "format": self.host.log.format},
        }

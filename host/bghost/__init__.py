"""bghost, a host for background workers: the names an author or a script may use.

Names are resolved on first use (PEP 562): a command that asks a running host a question must not pay for the import
of pluggy, msgspec or the runtime, and a plugin pays only for what it touches.
"""

from __future__ import annotations

# mypy knows the name. The import of typing itself costs a fifth of all the time that "bghost ps" takes.
TYPE_CHECKING = False

__version__ = "0.1.0"

UNTIL_WOKEN: Final = float("inf")
"""A nap (seconds) that only a wake-up, a signal or the host's death ends; a tick may return it."""

if TYPE_CHECKING:
    from typing import Final

    from bghost.hookspecs import hookimpl
    from bghost.shared.client import Client
    from bghost.shared.errors import (
        BghostError,
        Canceled,
        ConfigError,
        EntryGone,
        EventsPending,
        GiveUp,
        HostError,
        LaunchError,
        LockDamaged,
        LockTimeout,
        NoHost,
        NotFound,
        PluginError,
        PoolFull,
        QueueDetached,
        Stop,
        Throttled,
        TimedOut,
        UsageError,
    )
    from bghost.shared.handle import Handle
    from bghost.shared.poolspec import PoolSpec
    from bghost.shared.spec import Args, Reason, Recovery, Settings, State, WorkerSpec, start_only
    from bghost.shared.units import Bytes, Seconds
    from bghost.worker.async_pool import AsyncHandle, AsyncPool
    from bghost.worker.pool import Entry, Event, Pool
    from bghost.worker.queues import SharedQueue
    from bghost.worker.scope import Scope
    from bghost.worker.tasks import AsyncWorker
    from bghost.worker.worker import Worker

__all__ = [
    "Args",
    "AsyncHandle",
    "AsyncPool",
    "AsyncWorker",
    "BghostError",
    "Bytes",
    "Canceled",
    "Client",
    "ConfigError",
    "Entry",
    "EntryGone",
    "Event",
    "EventsPending",
    "GiveUp",
    "Handle",
    "HostError",
    "LaunchError",
    "LockDamaged",
    "LockTimeout",
    "NoHost",
    "NotFound",
    "PluginError",
    "Pool",
    "PoolFull",
    "PoolSpec",
    "QueueDetached",
    "Reason",
    "Recovery",
    "Scope",
    "Seconds",
    "Settings",
    "SharedQueue",
    "State",
    "Stop",
    "Throttled",
    "TimedOut",
    "UNTIL_WOKEN",
    "UsageError",
    "Worker",
    "WorkerSpec",
    "hookimpl",
    "start_only",
]

_HOME: Final = {
    "hookimpl": "bghost.hookspecs",
    "Client": "bghost.shared.client",
    "Handle": "bghost.shared.handle",
    "PoolSpec": "bghost.shared.poolspec",
    **dict.fromkeys(("Entry", "Event", "Pool"), "bghost.worker.pool"),
    **dict.fromkeys(
        ("Args", "Reason", "Recovery", "Settings", "State", "WorkerSpec", "start_only"),
        "bghost.shared.spec",
    ),
    **dict.fromkeys(("Bytes", "Seconds"), "bghost.shared.units"),
    **dict.fromkeys(("AsyncHandle", "AsyncPool"), "bghost.worker.async_pool"),
    "AsyncWorker": "bghost.worker.tasks",
    "Scope": "bghost.worker.scope",
    "SharedQueue": "bghost.worker.queues",
    "Worker": "bghost.worker.worker",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOME.get(name, "bghost.shared.errors")), name)
    globals()[name] = value
    return value

"""What a worker process is born with: all that the host hands to a child across the fork."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bghost.shared.pools import PoolTable
from bghost.shared.spec import WorkerSpec
from bghost.shared.table import Table

if TYPE_CHECKING:
    from bghost.shared.plugins import Found


@dataclass(frozen=True, slots=True)
class Birth:
    """A worker's start. Made in the host for each fork."""

    spec: WorkerSpec
    slot: int
    generation: int
    table: Table
    instance: str
    socket: str
    """The control socket's path: what a worker asks of the host goes there, too."""
    notify_socket: str
    """Where a program that the worker has become says that it is ready."""
    lock: int
    """The descriptor that holds the instance's lock; passed on to a program that the worker becomes."""
    host_pid: int
    host_pidfd: int
    """Readable once the host is dead; -1 where the kernel gives no pidfds."""
    bell: int
    """An eventfd that the host sleeps on: written once the worker is ready."""
    kind: "Found"
    loaded: object | None
    """The kind's class or module, if the host has imported it before."""
    named: bool
    """Whether the kind was named at the host's start: only then are there pools that it manages."""
    extensions: Mapping[str, "Found"]
    pools: Mapping[str, PoolTable]
    log_number: int = 0
    """Of the log that the host had open then."""
    channel: int = -1
    """A socket to the host, of a worker that runs as another user: such a one can open neither socket nor log."""


def config_of(table: Table) -> tuple[int, dict[str, Any]]:
    """The config that the host accepted last, and its number; read whole, never a mix of two."""
    import msgspec

    document: dict[str, Any] = msgspec.json.decode(table.config.read().encode())
    return document["number"], document

"""What a plugin declares of a pool: its name, the kind of its workers, the types of key and data."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

import msgspec

from bghost.shared import keys
from bghost.shared.errors import UsageError
from bghost.shared.names import check_name
from bghost.shared.pools import Layout

if TYPE_CHECKING:
    from bghost.worker.pool import Entry
    from bghost.worker.worker import Worker

K = TypeVar("K")
D = TypeVar("D")


class PoolSpec(Generic[K, D]):
    """A set of workers of one kind under one manager, each with a key. Declared by ``bghost_pools`` of the manager.

    :param name: a plain word, unique in the instance.
    :param kind: of the entries' workers.
    :param key: a ``ctypes.Structure`` or ``Union`` of at most 256 bytes; no pointers, no bit fields.
    :param data: likewise, at most 4096 bytes: what an entry's worker shows of itself.
    :param capacity: how many entries.
    :param restart: who restarts an entry's worker: the manager (``never``), or the host by this rule.
    :param retry_after: seconds from a launch of a key to its next one; doubles while they fail, up to *retry_max*.
    :param ready_timeout: seconds that an entry's worker may take to get ready.
    :param orphans: what becomes of the entries when the manager is gone for good.
    :param on_crash: ``restart-all``: when one of the pool's workers crashes, the others are ended too.
    :param group: gives the group of a key; groups are told apart by their ``repr``.
    :param group_limit: how many entries of one group there are at most.
    :raises UsageError: if one of them is not as it has to be; names the field.
    """

    def __init__(
        self,
        name: str,
        *,
        kind: str,
        key: type[K],
        data: type[D],
        capacity: int,
        restart: Literal["on-failure", "always", "never"] = "never",
        retry_after: float = 5.0,
        retry_max: float = 60.0,
        ready_timeout: float = 30.0,
        orphans: Literal["stop", "keep"] = "stop",
        on_crash: Literal["restart", "restart-all"] = "restart",
        group: Callable[[K], Any] | None = None,
        group_limit: int | None = None,
    ) -> None:
        check_name(name, "pool")
        fields = {
            "name": name,
            "manager": "",
            "kind": kind,
            "key_size": keys.check(key, "key", keys.KEY_LIMIT),
            "data_size": keys.check(data, "data", keys.DATA_LIMIT),
            "capacity": capacity,
            "restart": restart,
            "retry_after": retry_after,
            "retry_max": retry_max,
            "ready_timeout": ready_timeout,
            "orphans": orphans,
            "on_crash": on_crash,
            "group_limit": group_limit,
        }
        try:
            self._layout: Final = msgspec.convert(fields, Layout)
        except msgspec.ValidationError as error:
            raise UsageError(f"pool {name}: {error}") from None
        if (group is None) is not (group_limit is None):
            raise UsageError(f"pool {name} has one of group and group_limit", hint="they go together")
        self.name: Final = name
        self.key: Final = key
        self.data: Final = data
        keys.make_hashable(key)
        self.group: Final = group

    def __repr__(self) -> str:
        return f"<PoolSpec {self.name}>"

    def layout(self, manager: str) -> Layout:
        """What the host has to know of it; *manager* is the kind that declares it."""
        return msgspec.structs.replace(self._layout, manager=manager)

    def entry(self, worker: "Worker[Any]") -> "Entry[K, D]":
        """The entry whose worker this is. Runs in: an entry's worker.

        :raises UsageError: if it is the worker of no entry of this pool.
        """
        return worker.pool(self).mine()

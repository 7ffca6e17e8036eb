"""The registry: which workers there are, by name and by slot; where every launch ends."""

import fnmatch
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from bghost.host import order, policy
from bghost.host.poller import SHARE
from bghost.host.workers import Registration
from bghost.shared import table as t
from bghost.shared.errors import LaunchError, NotFound
from bghost.shared.names import check_name, near
from bghost.shared.spec import State, WorkerSpec

SATISFIED = (State.READY, State.DONE)
"""States of a worker that let those after it start."""


class Registry:
    """All registrations, those that are over included, until their slot is needed.

    :param register: makes a registration of a spec in a slot.
    """

    def __init__(self, table: t.Table, register: Callable[[WorkerSpec, t.Slot], Registration]) -> None:
        self._table = table
        self._register = register
        self._workers: dict[str, Registration] = {}
        self._held: list[Registration] = []
        self.halted = False
        """Whether nothing is to be started now."""

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def live(self) -> list[Registration]:
        """Those that have a process, or are to have one."""
        return [worker for worker in self if worker.state not in policy.OVER]

    def find(self, names: Iterable[str]) -> list[Registration]:
        """The workers of these names; a name with workers NAME.1, NAME.2, ... means all of them; ``all``: everyone.

        One with ``*``, ``?`` or ``[...]`` in it means those that it fits, as in a shell.

        :raises NotFound: if a name has none.
        """
        found: dict[str, Registration] = {}
        for name in names:
            if name == "all":
                found.update(self._workers)
                continue
            meant = order.meant(name, self._workers) or fnmatch.filter(self._workers, name)
            if not meant:
                raise NotFound(f"no worker {name!r}", hint=near(name, sorted(self._workers)))
            found.update((each, self._workers[each]) for each in meant)
        return list(found.values())

    def at(self, slot: int, generation: int) -> Registration | None:
        """The worker with that address, if it still has its slot."""
        for worker in self:
            if (worker.slot.index, worker.generation) == (slot, generation):
                return worker
        return None

    def add(self, spec: WorkerSpec, *, alone: bool) -> Registration:
        """Give *spec* a name and a slot.

        :param alone: whether those that it is to start after have to be there already.
        :raises LaunchError: if there is no slot, or the name is taken.
        :raises UsageError: if the name is none.
        :raises ConfigError: if it is to start after one that there is not.
        """
        spec = self._named(spec)
        assert spec.name is not None
        if alone and spec.after:
            order.check({**dict.fromkeys(self._workers, ()), spec.name: spec.after})
        slot = self._slot_for(spec.name)
        self._workers.pop(spec.name, None)
        worker = self._workers[spec.name] = self._register(spec, slot)
        return worker

    def _named(self, spec: WorkerSpec) -> WorkerSpec:
        if spec.name is not None:
            check_name(spec.name)
            old = self._workers.get(spec.name)
            if old is not None and not old.gone:
                raise LaunchError(f"there is a worker {spec.name} already", detail=f"it is {old.state}")
            return spec
        taken = {worker.name for worker in self if not worker.gone}
        name, number = spec.kind, 0
        while name in taken or (not number and order.meant(name, taken)):
            number += 1
            name = f"{spec.kind}.{number}"
        return msgspec.structs.replace(spec, name=name)

    def has_room(self, name: str) -> bool:
        """Whether a worker of that name could be taken up now."""
        old = self._workers.get(name)
        return old.gone if old is not None else len(self) < len(self._table) or any(worker.gone for worker in self)

    def _slot_for(self, name: str) -> t.Slot:
        """The name's old slot, or a free one, or that of the worker that has been over for longest."""
        old = self._workers.get(name)
        if old is not None:
            return old.slot
        used = {worker.slot.index for worker in self}
        if len(used) < len(self._table):
            return self._table.slot(next(index for index in range(len(self._table)) if index not in used))
        over = [worker for worker in self if worker.gone]
        if over:
            oldest = min(over, key=lambda worker: worker.slot.control[t.SINCE])
            del self._workers[oldest.name]
            return oldest.slot
        kinds = [worker.spec.kind for worker in self]
        held = ", ".join(f"{kinds.count(kind)} by kind {kind}" for kind in dict.fromkeys(kinds))
        raise LaunchError(
            f"no slot for worker {name}",
            detail=f"all {len(self._table)} are taken: {held}",
            hint="raise max_workers in [host], or stop a worker",
        )

    # Order

    def check_order(self) -> None:
        """See that every ``after`` can be kept.

        :raises ConfigError: if one names nobody, or workers wait for each other.
        """
        order.check({worker.name: worker.spec.after for worker in self})

    def start(self, worker: Registration) -> None:
        """Have :meth:`release` start a worker; a new one when those that it is to come after are ready."""
        self._held.append(worker)

    def is_due(self, worker: Registration) -> bool:
        """Whether it is to be started now."""
        waits = worker.state is State.STARTING and worker.process is None
        again = worker.slot.control[t.STARTS] > 0  # the order is for the first start only
        return waits and (again or all(other.state in SATISFIED for other in self._before(worker)))

    def held_by(self, worker: Registration) -> list[str]:
        """The workers that it waits for before its first start."""
        if worker.state is not State.STARTING or worker.process is not None:
            return []
        return [other.name for other in self._before(worker) if other.state not in SATISFIED]

    def release(self) -> bool:
        """Start those that are held back no longer, a few of them; whether there are more."""
        if self.halted:
            return False
        until = time.monotonic() + SHARE
        for worker in self._held[:]:
            if worker.state is not State.STARTING or worker.process is not None:
                self._held.remove(worker)
            elif self.is_due(worker):
                if time.monotonic() > until:
                    return True
                self._held.remove(worker)
                worker.start()
        return False

    def _before(self, worker: Registration) -> list[Registration]:
        return [self._workers[name] for each in worker.spec.after for name in order.meant(each, self._workers)]

    def last(self) -> list[Registration]:
        """Those of the live ones that no other live one came after: whom a stop ends next."""
        live = self.live
        needed = {other.name for worker in live for other in self._before(worker)}
        return [worker for worker in live if worker.name not in needed]

"""The host's side of pools: who has which entry, what its manager is told, and who the manager is."""

import heapq
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from loguru import logger

from bghost.host import policy
from bghost.host.damage import Damage
from bghost.host.inspection import inspect
from bghost.host.workers import Registration
from bghost.shared import pools as p
from bghost.shared import table as t
from bghost.shared.backoff import doubled
from bghost.shared.errors import BghostError, EventsPending, LaunchError, NotFound, PoolFull, Throttled, UsageError
from bghost.shared.pools import EntryState, EventKind, Layout, PoolTable
from bghost.shared.spec import State, StopMode, WorkerSpec

if TYPE_CHECKING:
    from bghost.host.host import Host

_QUIET: Final = 2.0
"""After so many times ``retry_max`` without a launch a key's failures are forgotten."""


class Last(NamedTuple):
    """A key's last launch."""

    at: float  # monotonic seconds
    failures: int  # in a row


class Record:
    """An entry that is taken."""

    __slots__ = ("begun", "group", "index", "key", "over", "pool", "pool_name", "worker")

    def __init__(self, pool: "HostPool", index: int, key: bytes, group: str | None) -> None:
        self.pool = pool
        self.pool_name = pool.layout.name
        self.index = index
        self.key = key
        self.group = group
        self.worker: Registration | None = None
        self.begun = False  # the event that tells how it started is written
        self.over = 0  # the number of the event that tells how it ended

    def follow(self, worker: Registration) -> None:
        """Its worker's state has changed."""
        self.pool.follow(self, worker)


class HostPool:
    """One pool."""

    def __init__(self, host: "Host", table: PoolTable) -> None:
        self._host = host
        self.table = table
        self.layout: Layout = table.layout
        self.taken: dict[bytes, Record] = {}
        self.manager: Registration | None = None
        self._free = list(range(self.layout.capacity))  # a heap
        self._ended: deque[Record] = deque()  # in the order of their last events
        self._last: dict[bytes, Last] = {}
        self._acknowledged = 0  # the last event that a manager has read, as far as the host has noticed

    # What is asked for

    def launch(self, key: bytes, args: dict[str, Any], group: str | None) -> Record:
        """See ``Pool.launch``; a worker that cannot be forked is told of by an event."""
        self.collect()
        record = self.taken.get(key)
        if record is not None:
            if record.over:
                raise EventsPending(
                    f"key {key.hex()} of pool {self.layout.name} has events that its manager has not read"
                )
            return record
        now = time.monotonic()
        last = self._last.get(key)
        if last is not None and (left := last.at + self._retry_after(last.failures) - now) > 0:
            error = Throttled(f"key {key.hex()} of pool {self.layout.name} may be launched again in {left:.1f} s")
            error.seconds = left
            raise error
        self._check_room(group)
        # Before the launch: however that ends, the next one keeps its distance.
        self._note(key, Last(now, last.failures if last is not None else 0))
        index = heapq.heappop(self._free)
        record = self.taken[key] = Record(self, index, key, group)
        cells = self.table.entry(index)
        control = cells.control
        generation = control[p.GENERATION] + 1
        for word in p.CONTROL_WORDS:
            if word > p.GENERATION:
                control[word] = 0
        cells.reason.write("")
        self.table.data.clear(cells.place)
        cells.write_key(key)
        control[p.LAUNCHED] = time.monotonic_ns()
        control[p.GENERATION] = generation
        control[p.STATE] = EntryState.STARTING
        self.table.head[p.CHANGES] += 1
        spec = WorkerSpec(
            kind=self.layout.kind,
            name=f"{self.layout.name}.{index + 1}",
            args=args,
            restart=self.layout.restart,
            restart_after=self.layout.retry_after,
            restart_max=self.layout.retry_max,
            ready_timeout=self.layout.ready_timeout,
            user=self.manager.spec.user if self.manager is not None else None,
        )
        try:
            worker = self._host.launch(spec)
        except BghostError as error:
            self._over(record, EventKind.LAUNCH_FAILED, str(error), None)
            return record
        record.worker = worker
        worker.entry = record
        control[p.SLOT] = worker.slot.index
        control[p.SLOT_GENERATION] = worker.generation
        self._host.registry.start(worker)
        return record

    def _retry_after(self, failures: int) -> float:
        return doubled(self.layout.retry_after, failures, self.layout.retry_max)

    def _note(self, key: bytes, last: Last) -> None:
        if len(self._last) > 2 * self.layout.capacity:  # keys that come once must not be kept for ever
            quiet = last.at - _QUIET * max(self.layout.retry_max, self.layout.retry_after)
            self._last = {each: last for each, last in self._last.items() if each in self.taken or last.at > quiet}
        self._last[key] = last

    def _check_room(self, group: str | None) -> None:
        limit, name = self.layout.group_limit, self.layout.name
        if limit is not None and (members := sum(record.group == group for record in self.taken.values())) >= limit:
            raise PoolFull(f"group {group} of pool {name} has {members} entries, as many as it may")
        if not self._free:
            raise PoolFull(
                f"pool {name} is full",
                detail=f"{len(self.taken) - len(self._ended)} run, "
                f"{len(self._ended)} have events that its manager has not read",
                hint="raise its capacity",
            )

    def forget(self, key: bytes) -> None:
        """Let *key* be launched again at once."""
        self._last.pop(key, None)

    def running(self, key: bytes) -> Registration | None:
        """The worker of *key*, while it has one that is not over."""
        record = self.taken.get(key)
        return record.worker if record is not None and not record.over else None

    # What happens

    def follow(self, record: Record, worker: Registration) -> None:
        """The state of the worker of *record* has changed: write it down, and the event that it makes."""
        if record.over:
            return
        control = self.table.entry(record.index).control
        state = worker.state
        control[p.PID] = worker.slot.control[t.PID] or control[p.PID]
        if state is State.READY:
            control[p.STATE] = EntryState.READY
            if not record.begun:
                record.begun = True
                control[p.STARTED] = time.monotonic_ns()
                self._event(control, p.BEGUN_NUMBER, EventKind.STARTED)
        elif state is State.STOPPING:
            control[p.STATE] = EntryState.STOPPING
        elif state is State.STARTING or state is State.BACKOFF:
            control[p.STATE] = EntryState.STARTING
        else:
            exit = worker.exit
            why = worker.last_error or str(exit or "it was never started")
            orderly = state in (State.DONE, State.STOPPED) and not worker.recycled
            if not record.begun and not (orderly and exit is not None):
                kind = EventKind.LAUNCH_FAILED
            else:
                kind = EventKind.EXITED if orderly else EventKind.DIED
            self._over(record, kind, why, exit.status if exit is not None else None)

    def _over(self, record: Record, kind: EventKind, reason: str, status: int | None) -> None:
        worker = record.worker
        last = self._last.get(record.key)
        if worker is not None and (worker.stop_asked or worker.recycled):
            self.forget(record.key)  # what was wanted, or no fault of its own: nothing speaks against its return
        elif last is not None:
            healthy = worker is not None and worker.exit is not None and worker.exit.ready_for >= policy.HEALTHY_AFTER
            failures = 0 if kind is EventKind.EXITED else 1 if healthy else last.failures + 1
            self._last[record.key] = Last(last.at, failures)
        cells = self.table.entry(record.index)
        control = cells.control
        cells.reason.write(reason)
        control[p.EXIT] = 0 if status is None else status + 1000
        control[p.ENDED] = time.monotonic_ns()
        control[p.STATE] = EntryState.ENDED
        record.over = self._event(control, p.OVER_NUMBER, kind)
        self._ended.append(record)
        if self.layout.on_crash == "restart-all" and worker is not None and worker.crashed:
            for other in self.taken.values():
                if not other.over and other.worker is not None:
                    other.worker.recycle()

    def _event(self, control: memoryview, word: int, kind: EventKind) -> int:
        number = self.table.head[p.EVENTS] + 1
        control[word + 1] = kind
        control[word] = number
        self.table.head[p.EVENTS] = number
        self._tell()
        return number

    def _tell(self) -> None:
        if self.manager is not None:
            self.manager.slot.latch.nudge()

    def collect(self) -> None:
        """Free the entries that have ended and whose events the manager has read.

        Its word cannot go back, nor ahead of the events: one that does was written over, and is put right. What was
        read since the host last looked is then told of again, as redelivered.
        """
        marks, last = self.table.marks, self.table.head[p.EVENTS]
        acknowledged = marks[p.ACKNOWLEDGED]
        if not self._acknowledged <= acknowledged <= last:
            logger.error("pool {}: something has written over what its manager has read", self.layout.name)
            marks[p.DELIVERING] = last
            marks[p.ACKNOWLEDGED] = acknowledged = self._acknowledged
            self._tell()
        self._acknowledged = acknowledged
        while self._ended and self._ended[0].over <= acknowledged:
            record = self._ended.popleft()
            self.table.entry(record.index).control[p.STATE] = EntryState.FREE
            self.table.head[p.CHANGES] += 1
            del self.taken[record.key]
            heapq.heappush(self._free, record.index)

    # The manager

    def choose_manager(self, workers: Iterable[Registration]) -> None:
        """Keep the manager while it has a process; else the first worker of its kind that has one takes over."""
        candidates = [worker for worker in workers if worker.spec.kind == self.layout.manager]
        current = self.manager
        same = current is not None and self.table.head[p.MANAGER_STARTS] == current.slot.control[t.STARTS]
        if current is not None and same and current.process is not None and current in candidates:
            return
        ready = [worker for worker in candidates if worker.process is not None and worker.state is not State.STOPPING]
        ready.sort(key=lambda worker: worker.state is not State.READY)
        self.manager = ready[0] if ready else None
        head = self.table.head
        if self.manager is None:
            head[p.MANAGER_SLOT] = 0
            if self.layout.orphans == "stop" and all(worker.state in policy.OVER for worker in candidates):
                self._stop_orphans()
            return
        head[p.MANAGER_GENERATION] = self.manager.generation
        head[p.MANAGER_STARTS] = self.manager.slot.control[t.STARTS]
        head[p.MANAGER_SLOT] = self.manager.slot.index + 1
        if current is not self.manager:
            logger.info("worker {} manages pool {}", self.manager.name, self.layout.name)
        self._tell()

    def _stop_orphans(self) -> None:
        left = [record.worker for record in self.taken.values() if not record.over and record.worker is not None]
        left = [worker for worker in left if worker.state is not State.STOPPING]
        if left:
            logger.warning("pool {} has no manager any more: its {} workers stop", self.layout.name, len(left))
        for worker in left:
            worker.stop(StopMode.SMART)


class HostPools:
    """All pools of a host."""

    def __init__(self, host: "Host", layouts: Iterable[Layout]) -> None:
        self.tables = {layout.name: PoolTable(layout) for layout in layouts}
        self._host = host
        self._pools = {name: HostPool(host, table) for name, table in self.tables.items()}
        self._damage = Damage(host)

    def changed(self) -> None:
        """A worker's state has changed, or a manager has read events."""
        self.collect()
        for pool in self._pools.values():
            pool.choose_manager(self._host.registry)

    def collect(self) -> None:
        """A worker has rung: a manager may have read events, or somebody has found a lock that is damaged."""
        self._damage.look()
        for pool in self._pools.values():
            pool.collect()

    # Verbs

    def manager(self, args: dict[str, Any]) -> Registration | None:
        """The worker that manages the pool that is meant."""
        return self._of(args)[0].manager

    def _of(self, args: dict[str, Any]) -> tuple[HostPool, bytes]:
        pool = self._pools.get(str(args.get("pool")))
        if pool is None:
            raise UsageError(f"there is no pool {args.get('pool')!r}")
        try:
            key = bytes.fromhex(str(args.get("key")))
        except ValueError:
            raise UsageError("a key is given in hexadecimal digits") from None
        if len(key) != pool.layout.key_size:
            raise UsageError(f"a key of pool {pool.layout.name} has {pool.layout.key_size} bytes")
        return pool, key

    def launch(self, args: dict[str, Any]) -> Any:
        """Launch the worker of a key; which entry it has."""
        pool, key = self._of(args)
        worker_args, group = args.get("args", {}), args.get("group")
        if not isinstance(worker_args, dict):
            raise UsageError("args is an object")
        if group is not None and not isinstance(group, str):
            raise UsageError("group is a text")
        if self._host.stopping:
            raise LaunchError("the host is stopping, nothing is launched any more")
        record = pool.launch(key, worker_args, group)
        return {"index": record.index, "generation": pool.table.entry(record.index).control[p.GENERATION]}

    def forget(self, args: dict[str, Any]) -> Any:
        """Forget that a key was launched."""
        pool, key = self._of(args)
        pool.forget(key)
        return {}

    def stop(self, args: dict[str, Any]) -> Any:
        """Stop the worker of a key; with ``wait`` answered when it has ended."""
        pool, key = self._of(args)
        worker = pool.running(key)
        if worker is not None:
            worker.stop(StopMode.FAST if args.get("mode") == "fast" else StopMode.SMART)
        return self._when_gone(worker, args)

    def wait(self, args: dict[str, Any]) -> Any:
        """Answered when the worker of a key has ended."""
        pool, key = self._of(args)
        return self._when_gone(pool.running(key), args)

    @staticmethod
    def _when_gone(worker: Registration | None, args: dict[str, Any]) -> Any:
        if worker is None:
            return {"gone": True}
        if not args.get("wait", True):
            return {"gone": worker.state in policy.OVER}
        return lambda: {"gone": True} if worker.state in policy.OVER else None

    def dump(self, args: dict[str, Any]) -> Any:
        """What is in the tables of pools, and what is wrong with it."""
        names = args.get("names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError("names is a list of texts")
        for name in names:
            if name not in self._pools:
                raise NotFound(f"there is no pool {name!r}", detail=f"there are: {', '.join(self._pools) or 'none'}")
        self.collect()
        return [inspect(pool, self._host.table) for name, pool in self._pools.items() if not names or name in names]

"""A pool as workers see it: look-up by key, data, launch and stop, and the manager's events."""

import math
import signal as signals
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple

from bghost.shared import linux
from bghost.shared import pools as p
from bghost.shared.errors import EntryGone, EventsPending, LaunchError, PoolFull, Throttled, TimedOut, UsageError
from bghost.shared.handle import Handle
from bghost.shared.keys import canonical, is_plain
from bghost.shared.pools import EntryCells, EntryState, EventKind, PoolTable
from bghost.shared.poolspec import D, K, PoolSpec
from bghost.shared.publication import Writer, salt
from bghost.worker.locking import TIMEOUT, Lock
from bghost.worker.waiting import Steps

if TYPE_CHECKING:
    from bghost.worker.worker import Worker

HOOKS: Final = {
    EventKind.LAUNCH_FAILED: "pool_launch_failed",
    EventKind.STARTED: "pool_started",
    EventKind.EXITED: "pool_exited",
    EventKind.DIED: "pool_died",
}
_CHANGES: Final = p.CHANGES
_GENERATION: Final = p.GENERATION
_STATE: Final = p.STATE
_OVER: Final = ("ended", "free")  # of an entry; the host frees one that has ended at any moment


def manages(worker: "Worker[Any]", table: PoolTable) -> bool:
    """Whether *worker* is the manager of the pool of *table*."""
    head, handle = table.head, worker.handle
    return head[p.MANAGER_SLOT] == handle.slot + 1 and head[p.MANAGER_GENERATION] == handle.generation


class Event(NamedTuple):
    """Something that happened to an entry, told to the pool's manager.

    :param number: of the pool's events; they come in this order.
    :param key: the entry's, an instance of the pool's key type.
    :param generation: counts the launches in that entry.
    :param pid: of its process, for messages; ``None`` if there was none.
    :param data: the last data that was published whole; ``None`` if none was.
    :param reason: a text.
    :param exit: exit code, or minus the signal; ``None`` if no process has ended.
    :param redelivered: whether it may have been seen before: its manager died in this event's callback.
    """

    number: int
    kind: EventKind
    key: Any
    generation: int
    pid: int | None
    data: Any
    reason: str
    exit: int | None
    redelivered: bool


class Entry(Generic[K, D]):
    """One launch of one key. Good until the entry goes to another launch; then its use is refused."""

    __slots__ = (
        "_control",
        "_copy",
        "_live",
        "_place",
        "_pool",
        "_published",
        "_salt",
        "_seen",
        "_word",
        "_writer",
        "generation",
        "index",
        "key",
    )

    def __init__(self, pool: "Pool[K, D]", index: int, cells: EntryCells, generation: int, key: K) -> None:
        self._pool = pool
        self._control = cells.control
        self._published = pool._published
        self._place = cells.place
        self._salt = salt(generation)
        self._writer: Writer | None = None
        # What was read last stays what is read until its number is no longer the last.
        self._word = cells.place >> 3
        self._seen = -1
        self._copy: bytes | None = None
        self.index = index
        self.generation = generation
        self.key = key
        self._live: D = pool._live_at(cells.place)

    def __repr__(self) -> str:
        return f"<Entry {self.index} of {self._pool.spec.name}, generation {self.generation}>"

    def _gone(self) -> EntryGone:
        return EntryGone(f"{self!r} is over")

    @property
    def state(self) -> str:
        """starting, ready, stopping, ended, or free once it is over."""
        state = self._control[_STATE]
        if self._control[_GENERATION] != self.generation:
            return "free"
        return EntryState(state).name.lower()

    @property
    def pid(self) -> int | None:
        """Its worker's process, to be shown; ``None`` if there is none, or the entry is over."""
        pid = self._control[p.PID] or None
        return pid if self._control[_GENERATION] == self.generation else None

    @property
    def handle(self) -> Handle:
        """Its worker's address.

        :raises EntryGone: if the entry has gone to another launch.
        """
        control = self._control
        handle = self._pool.worker.handle_of(control[p.SLOT], control[p.SLOT_GENERATION])
        if control[_GENERATION] != self.generation:
            raise self._gone()
        return handle

    @property
    def data(self) -> D:
        """The live data: each word is read and written by itself, at any moment. What belongs together: update().

        :raises EntryGone: if the entry has gone to another launch.
        """
        if self._control[_GENERATION] != self.generation:
            raise self._gone()
        return self._live

    def update(self) -> AbstractContextManager[D]:
        """``with entry.update() as d:`` publishes the fields of *d* together, or not at all. Its worker alone.

        What *d* begins with is the live data, which it becomes. An error, or a death at any point, leaves what was
        published before: the new data goes to a shadow, with a checksum, and one word that is stored last makes it the
        one that is read.

        :raises EntryGone: if the entry has gone to another launch.
        :raises UsageError: in another worker than the entry's own.
        """
        return _Update(self)

    def publish(self, data: "D | bytes") -> None:
        """Make *data* the entry's, as a whole: as :meth:`update` does, for who has all of it. Its worker alone.

        :param data: of the pool's data type, or the bytes of one.
        :raises EntryGone: if the entry has gone to another launch.
        :raises UsageError: in another worker than the entry's own, or for what is no such data.
        """
        if self._control[_GENERATION] != self.generation:
            raise self._gone()
        writer = self._writer or self._make_writer()
        raw: bytes = data if data.__class__ is bytes else self._bytes_of(data)
        try:
            writer.write(raw)
        except ValueError:
            raise self._no_data(f"{len(raw)} bytes") from None

    def _bytes_of(self, data: object) -> bytes:
        if not isinstance(data, (type(self._live), bytes, bytearray, memoryview)):
            raise self._no_data(repr(data))
        return bytes(data)  # type: ignore[arg-type]

    def _no_data(self, what: str) -> UsageError:
        spec = self._pool.spec
        return UsageError(
            f"the data of an entry of pool {spec.name} is a {spec.data.__name__}, or its {self._published.size} bytes, "
            f"not {what}"
        )

    def _make_writer(self) -> Writer:
        if not self._pool._is_mine(self._control):
            raise UsageError(
                f"the data of {self!r} is published by its own worker alone",
                hint="others may write single words of entry.data",
            )
        self._writer = writer = Writer(self._published, self._place, self._salt)
        return writer

    def _take_over(self) -> None:
        """This process goes on with the data where the last one has ended."""
        self._make_writer().heal()

    def snapshot(self) -> D:
        """A copy of what was published last, whole, without a lock; zeros where nothing was.

        A copy is believed if its checksum, which covers its number, is right: so it can be trusted on every processor,
        in whatever order that shows another's stores.

        :raises EntryGone: if the entry has gone to another launch.
        """
        data = self.read()
        made: D = self._pool.spec.data() if data is None else self._pool.spec.data.from_buffer_copy(data)  # type: ignore[attr-defined]
        return made

    def read(self) -> bytes | None:
        """:meth:`snapshot` as bytes, which is quicker; ``None`` where nothing was published.

        :raises EntryGone: if the entry has gone to another launch.
        """
        data = self._copy if self._published.words[self._word] == self._seen else self._read_anew()
        if self._control[_GENERATION] != self.generation:
            raise self._gone()
        return data

    def _read_anew(self) -> bytes | None:
        """Read what was published since."""
        self._seen, self._copy = self._published.read_numbered(self._place, self._salt)
        return self._copy


class _Update(Generic[D]):
    """One ``with entry.update()`` block."""

    __slots__ = ("_draft", "_entry")

    def __init__(self, entry: Entry[Any, D]) -> None:
        self._entry = entry
        self._draft: D = type(entry._live).from_buffer_copy(entry.data)  # type: ignore[attr-defined]
        if entry._writer is None:
            entry._make_writer()  # whoever may not publish is told before the block

    def __enter__(self) -> D:
        return self._draft

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._entry.publish(self._draft)


class Pool(Generic[K, D]):
    """A pool, from its manager, from an entry's worker, or from any other worker of the host. Made by worker.pool()."""

    def __init__(self, worker: "Worker[Any]", spec: PoolSpec[K, D], table: PoolTable) -> None:
        layout = spec.layout(table.layout.manager)
        if (layout.key_size, layout.data_size) != (table.layout.key_size, table.layout.data_size):
            raise UsageError(f"pool {spec.name} has other types here than where its manager declares it")
        self.worker = worker
        self.spec = spec
        self._table = table
        self._head = table.head
        self._published = table.data
        self._words = table.data.words
        self._key: Final = spec.key
        self._is_plain = is_plain(spec.key)
        self._known: dict[bytes, Entry[K, D]] = {}
        self._changes = -1
        self._lock: Lock | None = None
        self._warnings: set[str] = set()  # of the last reconcile()

    # Looking

    @property
    def is_manager(self) -> bool:
        """Whether this worker is the pool's manager just now; another of its kind stands by."""
        return manages(self.worker, self._table)

    def get(self, key: K) -> Entry[K, D] | None:
        """The entry of *key*, if it is starting, running, stopping, or has events to be read.

        :raises UsageError: if *key* is of another type than the pool's keys.
        """
        if key.__class__ is not self._key:
            raise self._no_key(key)
        if self._head[_CHANGES] != self._changes:
            self._look_again()
        entry = self._known.get(bytes(key))  # type: ignore[call-overload]
        return entry if entry is not None or self._is_plain else self._known.get(canonical(key))  # type: ignore[arg-type]

    def read(self, key: K) -> bytes | None:
        """What the worker of *key* has published last, whole, as bytes; ``None`` if there is no such entry or data.

        :meth:`get` and :meth:`Entry.read` in one, as quick as Python allows: for who reads very often.

        :raises UsageError: if *key* is of another type than the pool's keys.
        """
        if key.__class__ is not self._key:
            raise self._no_key(key)
        if self._head[_CHANGES] != self._changes:
            self._look_again()
        # Most keys come in their canonical form; those that do not are looked up once more.
        entry = self._known.get(bytes(key))  # type: ignore[call-overload]
        if entry is None and (self._is_plain or (entry := self.get(key)) is None):
            return None
        if self._words[entry._word] == entry._seen:
            return entry._copy
        return entry._read_anew()

    def _raw(self, key: K) -> bytes:
        if key.__class__ is not self._key:
            raise self._no_key(key)
        return canonical(key)  # type: ignore[arg-type]

    def _no_key(self, key: object) -> UsageError:
        return UsageError(f"a key of pool {self.spec.name} is a {self._key.__name__}, not {key!r}")

    def _live_at(self, place: int) -> D:
        """The live data of an entry, to be read and written a word at a time."""
        data: D = self.spec.data.from_buffer(self._published.data, self._published.live_at(place))  # type: ignore[attr-defined]
        return data

    def _look_again(self) -> None:
        changes = self._head[_CHANGES]  # before the entries: what changes meanwhile is looked at again
        linux.order_reads()
        known = {}
        for index in range(self._table.layout.capacity):
            control = self._table.entry(index).control
            if not control[_STATE]:
                continue
            entry = self._entry(index, control[_GENERATION])
            if control[_GENERATION] == entry.generation:
                known[canonical(entry.key)] = entry  # type: ignore[arg-type]
        self._known = known
        self._changes = changes

    def _entry(self, index: int, generation: int) -> Entry[K, D]:
        cells = self._table.entry(index)
        key: K = self.spec.key.from_buffer_copy(cells.key(self._table.layout.key_size))  # type: ignore[attr-defined]
        return Entry(self, index, cells, generation, key)

    def __iter__(self) -> Iterator[Entry[K, D]]:
        if self._head[_CHANGES] != self._changes:
            self._look_again()
        return iter(list(self._known.values()))

    def __len__(self) -> int:
        if self._head[_CHANGES] != self._changes:
            self._look_again()
        return len(self._known)

    def mine(self) -> Entry[K, D]:
        """The entry whose worker this is; see ``PoolSpec.entry``."""
        for index in range(self._table.layout.capacity):
            control = self._table.entry(index).control
            if control[_STATE] and self._is_mine(control):
                entry = self._entry(index, control[_GENERATION])
                entry._take_over()
                return entry
        raise UsageError(f"worker {self.worker.name} is the worker of no entry of pool {self.spec.name}")

    def _is_mine(self, control: memoryview) -> bool:
        handle = self.worker.handle
        return (control[p.SLOT], control[p.SLOT_GENERATION]) == (handle.slot, handle.generation)

    # Doing

    def _ask(self, verb: str, key: K, timeout: float | None = None, **args: object) -> Steps[Any]:
        told = {"pool": self.spec.name, "key": self._raw(key).hex(), **args}
        return self.worker.asking(verb, told, timeout)

    def launch(self, key: K, args: Mapping[str, Any] | None = None) -> Entry[K, D]:
        """Have a worker run for *key*; one that runs already is what is returned.

        :raises PoolFull: if every entry is taken, or the key's group has as many as it may.
        :raises Throttled: if the key was launched less than ``retry_after`` ago.
        :raises EventsPending: if its last worker's events are still to be read.
        :raises LaunchError: if the host is stopping.
        """
        return self.worker.drive(self._launch(key, args))

    def _launch(self, key: K, args: Mapping[str, Any] | None) -> Steps[Entry[K, D]]:
        spec = self.spec
        group = None if spec.group is None else repr(spec.group(key))
        entry = yield from self._ask("pool_launch", key, args=dict(args or {}), group=group)
        return self._entry(entry["index"], entry["generation"])

    def forget(self, key: K) -> None:
        """Let *key* be launched again at once: its restart is an expected one."""
        self.worker.drive(self._ask("pool_forget", key))

    def stop(self, key: K, timeout: float | None = None, *, fast: bool = False) -> bool:
        """Stop the worker of *key*, and wait until it has ended.

        One that is launched again meanwhile is not waited for.

        :param timeout: seconds; 0 does not wait; ``None``: as long as it takes.
        :returns: whether it is gone, or never was there.
        """
        return self.worker.drive(self._gone("pool_stop", key, timeout, mode="fast" if fast else "smart"))

    def wait(self, key: K, timeout: float | None = None) -> bool:
        """Wait until the worker of *key* has ended; for how long and with which result, see :meth:`stop`."""
        return self.worker.drive(self._gone("pool_wait", key, timeout))

    def _gone(self, verb: str, key: K, timeout: float | None, **args: object) -> Steps[bool]:
        try:
            answer = yield from self._ask(verb, key, timeout or None, wait=timeout != 0, **args)
        except TimedOut:
            return False
        return bool(answer["gone"])

    def wake(self, key: K) -> bool:
        """End the sleep of the worker of *key*; whether there is one."""
        entry = self.get(key)
        return entry is not None and entry.handle.wake()

    def signal(self, key: K, signum: int = signals.SIGUSR1) -> bool:
        """Send a signal to the worker of *key*, as anybody else might; whether there is one."""
        entry = self.get(key)
        return entry is not None and entry.handle.signal(signum)

    def lock(self, timeout: float = TIMEOUT) -> Lock:
        """``with pool.lock() as lock:`` excludes other processes; readers need none.

        ``lock.inherited`` says that its last holder has died with it.

        :raises LockTimeout: after *timeout* seconds, naming the holder.
        :raises LockDamaged: if something has written over it; the host makes it anew.
        """
        lock = self._lock
        if lock is None:
            lock = self._lock = self._make_lock()
        lock.timeout = timeout
        return lock

    def _make_lock(self) -> Lock:
        return Lock(self.worker, self._table.mutex, f"pool {self.spec.name}")

    def reconcile(self, wanted: Mapping[K, Mapping[str, Any]]) -> float:
        """Launch, stop and throttle until the pool is what *wanted* says: key to args. The manager's loop body.

        :returns: the nap: seconds until something is due, or ``bghost.UNTIL_WOKEN``.
        """
        return self.worker.drive(self._reconcile(wanted))

    def _reconcile(self, wanted: Mapping[K, Mapping[str, Any]]) -> Steps[float]:
        nap = math.inf
        layout, warnings = self._table.layout, set[str]()
        by_key = {self._raw(key): (key, args) for key, args in wanted.items()}
        for entry in self:
            if self._raw(entry.key) not in by_key and entry.state in ("starting", "ready"):
                yield from self._gone("pool_stop", entry.key, 0, mode="smart")
        for key, args in by_key.values():
            running = self.get(key)
            if running is not None and running.state not in _OVER:
                continue
            try:
                yield from self._launch(key, args)
            except Throttled as error:
                nap = min(nap, error.seconds)
            except EventsPending:
                pass  # they end the wait of whoever is to read them
            except (PoolFull, LaunchError) as error:
                warnings.add(str(error))
                nap = min(nap, layout.retry_after)
                if len(self) >= layout.capacity:
                    break  # there is no room for any other, either; who makes some wakes the manager
        for text in warnings - self._warnings:  # not again and again, as long as nothing has changed
            self.worker.log.warning("{}", text)
        self._warnings = warnings
        return nap

    # The manager's events

    @property
    def pending(self) -> bool:
        """Whether there are events for this worker to be handed out."""
        return self.is_manager and self._head[p.EVENTS] > self._table.marks[p.ACKNOWLEDGED]

    def deliver(self) -> None:
        """Hand out the events, in order, each in a recovery of its own; acknowledged once its callback has returned."""
        marks = self._table.marks
        while self.pending:
            seen = min(marks[p.DELIVERING], self._head[p.EVENTS])
            events = sorted(self._unread(seen), key=lambda event: event.number)
            if not events:
                return
            for event in events:
                marks[p.DELIVERING] = max(event.number, seen)
                hook = getattr(self.worker.hooks, HOOKS[event.kind])
                self.worker.block.aside(partial(hook, self.worker, self, event))
                marks[p.ACKNOWLEDGED] = event.number
        self.worker.interrupts.ring_host()  # entries whose events are read can be given away

    def _unread(self, seen: int) -> Iterator[Event]:
        acknowledged, last = self._table.marks[p.ACKNOWLEDGED], self._head[p.EVENTS]
        linux.order_reads()
        for index in range(self._table.layout.capacity):
            cells = self._table.entry(index)
            control = cells.control
            if not control[_STATE]:
                continue
            for number, kind in (
                (control[p.BEGUN_NUMBER], control[p.BEGUN_KIND]),
                (control[p.OVER_NUMBER], control[p.OVER_KIND]),
            ):
                if acknowledged < number <= last:
                    data = self._table.published(index)
                    exit = control[p.EXIT]
                    yield Event(
                        number,
                        EventKind(kind),
                        self.spec.key.from_buffer_copy(cells.key(self._table.layout.key_size)),  # type: ignore[attr-defined]
                        control[_GENERATION],
                        control[p.PID] or None,
                        None if data is None else self.spec.data.from_buffer_copy(data),  # type: ignore[attr-defined]
                        cells.reason.read(),
                        exit - 1000 if exit else None,
                        number <= seen,
                    )

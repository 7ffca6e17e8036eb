"""What is in a pool's table, for ``bghost dump --pools``, and whether it agrees with what the host itself knows."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bghost.host import policy
from bghost.shared import pools as p
from bghost.shared import table as t
from bghost.shared.pools import EntryState, EventKind
from bghost.shared.replies import PoolDump, PoolEntry
from bghost.shared.spec import State

if TYPE_CHECKING:
    from bghost.host.pools import HostPool, Record

LIMIT = 1000  # entries that are shown of one pool: an answer has to fit into a frame

_STATES = {
    State.STARTING: EntryState.STARTING,
    State.BACKOFF: EntryState.STARTING,
    State.READY: EntryState.READY,
    State.STOPPING: EntryState.STOPPING,
}


def inspect(pool: "HostPool", table: t.Table) -> PoolDump:
    """The table of *pool*; takes no lock, changes nothing.

    :param table: the workers', for the name of the lock's holder.
    """
    head, marks, layout = pool.table.head, pool.table.marks, pool.layout
    records = sorted(pool.taken.values(), key=lambda record: record.index)
    mutex = pool.table.mutex
    return {
        "name": layout.name,
        "kind": layout.kind,
        "manager": pool.manager.name if pool.manager is not None else None,
        "size": layout.capacity,
        "used": len(records),
        "free": layout.capacity - len(records),
        "events": head[p.EVENTS],
        "acknowledged": marks[p.ACKNOWLEDGED],
        "lock": {"intact": mutex.intact, "holder": t.holder(table, mutex.owner)},
        "entries": [_entry(pool, record) for record in records[:LIMIT]],
        "left_out": len(records[LIMIT:]),
        "problems": list(_problems(pool, records)),
    }


def _entry(pool: "HostPool", record: "Record") -> PoolEntry:
    cells = pool.table.entry(record.index)
    control = cells.control
    state, exit = control[p.STATE], control[p.EXIT]
    return {
        "index": record.index,
        "key": record.key.hex(),
        "state": EntryState(state).name.lower() if state in _KNOWN else f"{state}?",
        "generation": control[p.GENERATION],
        "worker": record.worker.name if record.worker is not None else None,
        "pid": control[p.PID] or None,
        "launched": t.unix_time(control[p.LAUNCHED]),
        "started": t.unix_time(control[p.STARTED]),
        "ended": t.unix_time(control[p.ENDED]),
        "exit": exit - 1000 if exit else None,
        "unread": [
            {"number": number, "kind": EventKind(kind).name.lower() if kind in _KINDS else f"{kind}?"}
            for number, kind in _events(control)
            if number > pool.table.marks[p.ACKNOWLEDGED]
        ],
        "reason": cells.reason.read() or None,
        "published": pool.table.data.sequence(cells.place),
        "data": data.hex() if (data := pool.table.published(record.index)) is not None else None,
    }


def _events(control: memoryview) -> list[tuple[int, int]]:
    pairs = [(control[p.BEGUN_NUMBER], control[p.BEGUN_KIND]), (control[p.OVER_NUMBER], control[p.OVER_KIND])]
    return [pair for pair in pairs if pair[0]]


def _problems(pool: "HostPool", records: "list[Record]") -> Iterator[str]:
    """What does not agree. Data that makes no sense is its worker's affair, and none."""
    table, layout = pool.table, pool.layout
    if not table.mutex.intact:
        yield "the lock was written over"
    last, acknowledged = table.head[p.EVENTS], table.marks[p.ACKNOWLEDGED]
    if acknowledged > last:
        yield f"event {acknowledged} was read, and the last one is {last}"
    taken = {record.index: record for record in records}
    used = [index for index in range(layout.capacity) if table.entry(index).control[p.STATE] != EntryState.FREE]
    if used != sorted(taken) or len(taken) != len(pool.taken):
        yield f"entries {used} are used, and the host has given away {sorted(taken)}"
    numbers: set[int] = set()
    for index, record in taken.items():
        control = table.entry(index).control
        for number, kind in _events(control):
            if number > last or number in numbers or kind not in _KINDS:
                yield f"entry {index} has an event {number} of kind {kind}; the last one is {last}"
            numbers.add(number)
        if table.entry(index).key(layout.key_size) != record.key:
            yield f"entry {index} has another key than was given to it"
        worker = record.worker
        if record.over:
            if control[p.STATE] != EntryState.ENDED:
                yield f"entry {index} is over, and not ended"
        elif worker is None or worker.state in policy.OVER:
            yield f"entry {index} has no worker"
        elif (worker.slot.index, worker.generation) != (control[p.SLOT], control[p.SLOT_GENERATION]):
            yield f"entry {index} names another worker than {worker.name}"
        elif control[p.STATE] != _STATES[worker.state]:
            yield f"entry {index} is not {worker.state}, as its worker is"


_KNOWN = frozenset(EntryState)
_KINDS = frozenset(EventKind) - {EventKind.NONE}

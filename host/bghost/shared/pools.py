"""A pool's table in shared memory: an entry per key, its control words apart from what its worker writes.

Two mappings, like the worker table's. The host alone writes the control words, the key, and the events; the data is
the entry's worker's, the acknowledgements and the lock are the manager's and everybody's. No pointers, no names; fixed
from before the first fork.

How an entry's data is published whole says :mod:`bghost.shared.publication`; the owner of a place there is a launch of
the entry, its generation.
"""

import enum
import mmap
import os
from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec

from bghost.shared import linux
from bghost.shared.cells import TextCell
from bghost.shared.mutex import GUARDED, MUTEX_SIZE, RobustMutex
from bghost.shared.publication import Publications, salt, stride
from bghost.shared.spec import TIME_LIMIT

# Words in front of the entries' control words
EVENTS: Final = 0  # number of the last event
CHANGES: Final = 1  # how often an entry was taken or freed
MANAGER_SLOT: Final = 2  # + 1; 0: there is none
MANAGER_GENERATION: Final = 3
MANAGER_STARTS: Final = 4
_HEAD_SIZE: Final = 64

# Control words of an entry, behind its key
STATE: Final = 32  # an EntryState
GENERATION: Final = 33
SLOT: Final = 34  # of its worker
SLOT_GENERATION: Final = 35
PID: Final = 36
LAUNCHED: Final = 37  # monotonic ns
STARTED: Final = 38
ENDED: Final = 39
EXIT: Final = 40  # as os.waitstatus_to_exitcode has it, + 1000; 0: no process has ended
BEGUN_NUMBER: Final = 41  # of the event that tells how it started; 0: none yet
BEGUN_KIND: Final = 42
OVER_NUMBER: Final = 43  # of the event that tells how it ended
OVER_KIND: Final = 44
CONTROL_WORDS: Final = range(STATE, 48)
_REASON_AT: Final = 512
_REASON_SIZE: Final = 496
_CONTROL_SIZE: Final = 1024

# Words in front of the entries' data, written by the manager
ACKNOWLEDGED: Final = 0  # number of the last event whose callback has returned
DELIVERING: Final = 1  # up to this number events were handed to a callback; that of the last may be unfinished
_MUTEX_AT: Final = 64


class EntryState(enum.IntEnum):
    """The states of an entry."""

    FREE = 0
    STARTING = 1
    READY = 2
    STOPPING = 3
    ENDED = 4  # it has events that the manager has not read


class EventKind(enum.IntEnum):
    """What a pool's manager is told of."""

    NONE = 0
    LAUNCH_FAILED = 1
    STARTED = 2
    EXITED = 3
    DIED = 4


_Seconds = Annotated[float, msgspec.Meta(ge=0, le=TIME_LIMIT)]


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """All that the host has to know of a pool; can be asked for in another process."""

    name: str
    manager: str  # kind
    kind: str
    key_size: int
    data_size: int
    capacity: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    restart: Literal["on-failure", "always", "never"] = "never"
    retry_after: _Seconds = 5.0
    retry_max: _Seconds = 60.0
    ready_timeout: Annotated[float, msgspec.Meta(gt=0, le=TIME_LIMIT)] = 30.0
    orphans: Literal["stop", "keep"] = "stop"
    on_crash: Literal["restart", "restart-all"] = "restart"
    group_limit: Annotated[int, msgspec.Meta(ge=1)] | None = None


class EntryCells:
    """What the host writes of one entry, as this process sees it."""

    __slots__ = ("_control", "control", "place", "reason")

    def __init__(self, control: memoryview, place: int) -> None:
        self._control = control
        self.control = control.cast("Q")
        self.place: Final = place  # of its data
        self.reason = TextCell(self.control, control, _REASON_AT, _REASON_SIZE)

    def key(self, size: int) -> bytes:
        """The canonical bytes of its key."""
        return bytes(self._control[:size])

    def write_key(self, key: bytes) -> None:
        """The host gives it a key."""
        self._control[: len(key)] = key


class PoolTable:
    """The table of one pool; made by the host before its first fork.

    :param inherited: in a process that was exec'd, and so is a reader: the :meth:`fds` of the host's table.
    """

    def __init__(self, layout: Layout, inherited: Sequence[int] = ()) -> None:
        self.layout = layout
        control_size = _HEAD_SIZE + _CONTROL_SIZE * layout.capacity
        self._data_head = _MUTEX_AT + MUTEX_SIZE
        data_size = self._data_head + stride(layout.data_size) * layout.capacity
        if inherited:
            control, data = inherited
        else:
            control = linux.memfd("bghost-pool", control_size)
            data = linux.memfd("bghost-pool-data", data_size)
            self._writable = mmap.mmap(control, control_size)
            self._writable.madvise(mmap.MADV_DONTFORK)
            linux.seal_future_writes(control)
        self._files = control, data
        self._readable = mmap.mmap(control, control_size, prot=mmap.PROT_READ)
        self._data = memoryview(mmap.mmap(data, data_size))
        linux.register_membarrier()  # for readers on processors that do not keep the order of this process's stores
        self.data = Publications(self._data, layout.data_size)
        self.marks = self._data[:_MUTEX_AT].cast("Q")
        self.mutex = RobustMutex(self._data[_MUTEX_AT : self._data_head])
        self.title = f"pool {layout.name}"
        if not inherited:
            self.renew()
            GUARDED.add(self)
        self._look_through(self._readable if inherited else self._writable)

    def _look_through(self, mapping: mmap.mmap) -> None:
        self._control = memoryview(mapping)
        self.head = self._control[:_HEAD_SIZE].cast("Q")
        self._entries: list[EntryCells | None] = [None] * self.layout.capacity

    def renew(self) -> None:
        """Make its lock anew; what else workers write is looked after elsewhere."""
        self.mutex.initialise()

    def fds(self) -> list[int]:
        """What an exec'd process inherits to see the table."""
        return [*self._files]

    def become_reader(self) -> None:
        """In a child of the host; see :meth:`Table.become_reader`."""
        for fd in self._files:
            os.close(fd)
        self._look_through(self._readable)

    def entry(self, index: int) -> EntryCells:
        """The entry of that index; made when first asked for."""
        cells = self._entries[index]
        if cells is None:
            control = _HEAD_SIZE + _CONTROL_SIZE * index
            cells = self._entries[index] = EntryCells(
                self._control[control : control + _CONTROL_SIZE], self._data_head + self.data.stride * index
            )
        return cells

    def published(self, index: int) -> bytes | None:
        """What the worker of an entry has published last."""
        cells = self.entry(index)
        return self.data.read(cells.place, salt(cells.control[GENERATION]))

"""The worker table: a slot per worker, in two mappings that host and workers share.

Control words, and the config that the host has accepted, are written by the host alone; nobody else can map them for
writing. What a worker writes (its stats) lies in the other mapping; the host believes none of it.

A word is 64 bits, aligned, and stored at once; a text is a :class:`~bghost.shared.cells.TextCell`. Times are
nanoseconds of the monotonic clock, which all processes of a machine share; 0 is never.
"""

import mmap
import os
import time
from collections.abc import Sequence
from typing import Final

from bghost.shared import linux
from bghost.shared.cells import TextCell
from bghost.shared.latch import Latch
from bghost.shared.spec import Doing, State

# Control words of a slot
STATE: Final = 0  # index into STATES + 1; 0 is a free slot
GENERATION: Final = 1
STARTS: Final = 2
PID: Final = 3  # 0 while there is no process; cleared before the process is reaped
SINCE: Final = 4  # when the state began
STARTED: Final = 5  # when the process was forked
STOP_MODE: Final = 6
STOP_DEADLINE: Final = 7  # when the mode in force turns into the next
EXIT: Final = 8  # waitstatus of the last process that ended, + 1; 0: none has
DUE: Final = 9  # when the next start is due
CONFIG: Final = 10  # number of the config this slot is to run with
FLAGS: Final = 11
RESTARTS: Final = 12
WATCHED: Final = 13  # 1 while the host has a timer for the worker's tick
_CONTROL_TEXTS: Final = 256
CONTROL_SIZE: Final = 1024
CONFIG_SIZE: Final = 1 << 21  # two halves of the text of a config; pages that are never written cost nothing

# Words of the table as a whole, in front of slot 0's
RUN_ID: Final = 0
HOST_PID: Final = 1
SLOTS: Final = 2
CONFIG_NUMBER: Final = 3
LOG_NUMBER: Final = 4

# Stats words of a slot; those above PER_START are cleared for each new process
WAKE: Final = 0  # the generation that is to wake
TICKS: Final = 1
ERRORS: Final = 2
RECOVERIES: Final = 3
TICK_LAST: Final = 4  # ns
TICK_TOTAL: Final = 5  # ns
TICK_MAX: Final = 6  # ns
LAST_ERROR_AT: Final = 7
DROPPED: Final = 8  # cancels that came outside recovery()
EXTENSION_ERRORS: Final = 9
LOG_LOST: Final = 10  # records of its log that could not be written
PER_START: Final = 16
READY: Final = 16  # 1 once bghost_setup has returned
EXITING: Final = 17  # LEAVING once the process is on bghost's own way out, 1 at the end of it
LEAVING: Final = 2
DOING: Final = 18  # index into DOINGS
WAIT_ENDED: Final = 19  # when the last wait was over that has a name, or was in a tick
TICK_STARTED: Final = 20  # 0 between ticks: the heartbeat
BACKEND_PID: Final = 21
CONFIG_ACK: Final = 22
GAVE_UP: Final = 23  # 1 when a hook raised GiveUp
TERMINATED: Final = 24  # 1 when a SIGTERM that bghost did not send has stopped it
DUMP_FD: Final = 25  # of the memory file that a dump goes into
DUMPS: Final = 26  # how many have been written
EXECED: Final = 27  # 1 once the worker has become another program
STOP_SIGNAL: Final = 28  # what that program is stopped with
RELOAD_SIGNAL: Final = 29  # what it is told of a new config with; 0: nothing
_STATS_WORDS: Final = 32
_STATS_TEXTS: Final = 8 * _STATS_WORDS
STATS_SIZE: Final = 12288
_RECENT: Final = 4096  # where in them the last records of the log begin

DUMP_NAME: Final = "bghost-dump"  # of that memory file

STATES: Final = tuple(State)
DOINGS: Final = tuple(Doing)
DOING_INDEX: Final = {doing: index for index, doing in enumerate(DOINGS)}


def state_index(state: State) -> int:
    """The control word's value for *state*."""
    return STATES.index(state) + 1


class Slot:
    """One slot: its words and texts as this process sees them."""

    __slots__ = (
        "activity",
        "control",
        "index",
        "kind",
        "last_error",
        "latch",
        "name",
        "ready_output",
        "recent",
        "stats",
        "wait",
    )

    def __init__(self, index: int, control: memoryview, stats: memoryview, latch: Latch) -> None:
        self.index = index
        self.latch = latch
        self.control = control.cast("Q")
        self.stats = stats.cast("Q")
        self.name = TextCell(self.control, control, _CONTROL_TEXTS, 176)
        self.kind = TextCell(self.control, control, _CONTROL_TEXTS + 176, 176)
        self.wait = TextCell(self.stats, stats, _STATS_TEXTS, 176)
        self.activity = TextCell(self.stats, stats, _STATS_TEXTS + 176, 1072)
        self.last_error = TextCell(self.stats, stats, _STATS_TEXTS + 176 + 1072, 1584)
        self.ready_output = TextCell(self.stats, stats, _STATS_TEXTS + 176 + 1072 + 1584, 528)
        self.recent = TextCell(self.stats, stats, _RECENT, STATS_SIZE - _RECENT)

    @property
    def state(self) -> State | None:
        """The state that the host has set; ``None`` for a free slot."""
        word = self.control[STATE]
        return STATES[word - 1] if 0 < word <= len(STATES) else None

    @property
    def doing(self) -> Doing:
        """What the worker says that it is doing; in a tick it is active where it says nothing else."""
        word = self.stats[DOING]
        if 0 < word < len(DOINGS):
            return DOINGS[word]
        return Doing.ACTIVE if self.stats[TICK_STARTED] else Doing.IDLE

    def note_error(self, text: str) -> None:
        """Count an error of the worker's; whoever sees it counted finds its text."""
        self.last_error.write(text)
        self.stats[LAST_ERROR_AT] = time.monotonic_ns()
        self.stats[ERRORS] += 1

    def wake(self, generation: int) -> None:
        """Wake the worker of *generation* in this slot (SetLatch). From any process; never blocks."""
        self.stats[WAKE] = generation
        self.latch.set(generation)


class Table:
    """All slots, made by the host before its first fork.

    The host's writable mapping of the control words is not inherited (MADV_DONTFORK): a child that touched it would
    fault. Children see the words through a second mapping, made for reading; nobody can make another writable one.

    :param inherited: in a process that was exec'd, and so is a reader: the :meth:`fds` of the host's table.
    """

    def __init__(self, slots: int, inherited: Sequence[int] = ()) -> None:
        size = CONTROL_SIZE * (slots + 1) + CONFIG_SIZE
        if inherited:
            control, stats, *ends = inherited
            self.latches = tuple(Latch((near, far)) for near, far in zip(ends[::2], ends[1::2], strict=True))
            self._readable = mmap.mmap(control, size, prot=mmap.PROT_READ)
            self._stats = memoryview(mmap.mmap(stats, STATS_SIZE * slots))
            self._files = control, stats
            self._look_through(self._readable)
            return
        control = linux.memfd("bghost-control", size)
        stats = linux.memfd("bghost-stats", STATS_SIZE * slots)
        self._writable = mmap.mmap(control, size)
        self._writable.madvise(mmap.MADV_DONTFORK)
        linux.seal_future_writes(control)
        self._readable = mmap.mmap(control, size, prot=mmap.PROT_READ)
        self._stats = memoryview(mmap.mmap(stats, STATS_SIZE * slots))
        self._files = control, stats
        self.latches = tuple(Latch() for _ in range(slots))
        self._look_through(self._writable)
        self.head[RUN_ID] = int.from_bytes(os.urandom(8), "little")
        self.head[HOST_PID] = os.getpid()
        self.head[SLOTS] = slots

    def _look_through(self, mapping: mmap.mmap) -> None:
        self._control = memoryview(mapping)
        self._slots: list[Slot | None] = [None] * len(self.latches)
        self.head = self._control[:CONTROL_SIZE].cast("Q")
        self.config = TextCell(
            self._control.cast("Q"), self._control, CONTROL_SIZE * (len(self.latches) + 1), CONFIG_SIZE
        )

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, index: int) -> Slot:
        """The slot of that index; made when first asked for, since a worker asks for few.

        :raises IndexError: if there is none.
        """
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = Slot(
                index,
                self._control[CONTROL_SIZE * (index + 1) : CONTROL_SIZE * (index + 2)],
                self._stats[STATS_SIZE * index : STATS_SIZE * (index + 1)],
                self.latches[index],
            )
        return slot

    def fds(self) -> list[int]:
        """What an exec'd process inherits to see the table."""
        return [*self._files, *(fd for latch in self.latches for fd in (latch.read_fd, latch.write_fd))]

    def become_reader(self) -> None:
        """In a child of the host, before anything else of the table is touched: see the control words read-only.

        The writable mapping's object stays referenced for the life of the process: were it freed, its munmap would hit
        whatever the kernel has put at that address since.
        """
        for fd in self._files:
            os.close(fd)  # the mappings hold descriptors of their own
        self._look_through(self._readable)

    @property
    def run_id(self) -> int:
        """Which run of the host this is; part of every handle."""
        return self.head[RUN_ID]


def holder(table: Table, thread: int) -> str | None:
    """Who holds a lock, to be shown; ``None`` for nobody.

    :param thread: what the lock says of its owner; may be anything.
    """
    for slot in map(table.slot, range(len(table) if thread else 0)):
        if slot.control[PID] == thread:
            return f"worker {slot.name.read()}, pid {thread}, slot {slot.index}"
    return f"thread {thread}, which is no worker" if thread else None


def unix_time(monotonic_ns: int) -> float | None:
    """The wall clock's time (seconds) at a moment of the monotonic clock; ``None`` for never.

    Reckoned from now, so that what is shown stays right after the wall clock was set.
    """
    return time.time() - (time.monotonic_ns() - monotonic_ns) / 1e9 if monotonic_ns else None

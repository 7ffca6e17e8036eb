"""SharedQueue: messages from one worker to one other through shared memory (shm_mq.c)."""

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from bghost.shared import table as t
from bghost.shared.errors import BghostError, LockDamaged, LockTimeout, QueueDetached, TimedOut
from bghost.shared.handle import Handle
from bghost.shared.mutex import GUARDED, MUTEX_SIZE, SLICE, Acquired, RobustMutex
from bghost.shared.ring import BLIND, READER, WRITER, Data, Reader, Ring, Writer
from bghost.shared.spec import State
from bghost.worker import locking, waiting
from bghost.worker.waiting import Steps

if TYPE_CHECKING:
    from bghost.worker.tasks import AsyncWorker
    from bghost.worker.worker import Worker

T = TypeVar("T")

# An end's word: nobody yet, nobody any more, or which process of which worker.
_FREE: Final = 0
_GONE: Final = 1
_DETACHED: Final = -1
_MUTEX_AT: Final = 256  # bytes into the ring's head
_SPINS: Final = 40  # looks before a sleep
_NO_PROCESS: Final = 0.1  # seconds between two looks at a peer with no process yet, or no pidfd, to wait on
_OVER: Final = frozenset({State.DONE, State.STOPPED, State.FAILED})


class SharedQueue:
    """A bounded queue of messages from one sender to one receiver, both workers of one host.

    Made where both inherit it: when the kind's module is imported in the host, or in ``bghost_host_setup``. A message
    may be longer than the queue. When an end is detached, or its process ends in whatever way, the other end is told:
    a receiver after it has got everything that was sent whole. A queue that both ends have left can be attached to
    anew, as by workers that were started again; what was under way is gone then.

    :param size: bytes that can be under way, 64 or more, rounded up to a power of two; each message takes 8 to 15
        beside its own.
    :raises ValueError: if *size* is too small.
    """

    def __init__(self, size: int) -> None:
        self.ring: Final = Ring(size)
        self.mutex = RobustMutex(self.ring.view[_MUTEX_AT : _MUTEX_AT + MUTEX_SIZE])
        self.title = f"a queue of {self.ring.size} bytes"
        self.renew()
        GUARDED.add(self)
        self._made_in = os.getpid()

    def renew(self) -> None:
        """Make it as new; the host's affair, when something has written over it and all workers are gone."""
        self.ring.clear()
        self.ring.words[WRITER] = self.ring.words[READER] = _FREE
        self.mutex.initialise()

    @property
    def size(self) -> int:
        """Bytes that can be under way."""
        return self.ring.size

    @overload
    def sender(self, worker: "AsyncWorker[Any]", peer: Handle | None = None) -> "AsyncSender": ...
    @overload
    def sender(self, worker: "Worker[Any]", peer: Handle | None = None) -> "Sender": ...
    def sender(self, worker: "Worker[Any]", peer: Handle | None = None) -> "Sender":
        """Attach *worker* as the one that sends.

        :param peer: the worker that is to be the receiver; if it is over without having attached, that is a detach.
        :raises BghostError: if another worker is; if the receiver has not left the last sender yet; if the queue was
            made in this very worker; where processor and kernel allow no queues.
        """
        self._attach(worker, WRITER, READER)
        return (AsyncSender if worker.hooks.is_async else Sender)(self, worker, peer)

    @overload
    def receiver(self, worker: "AsyncWorker[Any]", peer: Handle | None = None) -> "AsyncReceiver": ...
    @overload
    def receiver(self, worker: "Worker[Any]", peer: Handle | None = None) -> "Receiver": ...
    def receiver(self, worker: "Worker[Any]", peer: Handle | None = None) -> "Receiver":
        """Attach *worker* as the one that receives; see :meth:`sender`."""
        self._attach(worker, READER, WRITER)
        return (AsyncReceiver if worker.hooks.is_async else Receiver)(self, worker, peer)

    @staticmethod
    def wait(*ends: "Sender | Receiver", timeout: float | None = None) -> bool:
        """Wait until one of *ends*, at each of which a ``try_`` method has found nothing to do, may have something.

        For a worker that sends and receives by turns; the ends are its own. Not for async workers, which have tasks.

        :param timeout: seconds; ``None``: for ever.
        :returns: False at the timeout.
        :raises bghost.Stop: if the worker is to stop; likewise Canceled.
        """
        worker = ends[0]._worker
        until = float("inf") if timeout is None else time.monotonic() + timeout
        _spin(worker, ends)

        def steps() -> Steps[bool]:
            while not any(end._ready() or end._is_left() for end in ends):
                if time.monotonic() >= until:
                    return False
                yield from _sleep(worker, ends, until, "queue")
            return True

        return worker.drive(steps())

    def _attach(self, worker: "Worker[Any]", mine: int, others: int) -> None:
        if os.getpid() == self._made_in:
            raise BghostError(
                "the queue was made in this worker, nobody shares it",
                hint="make it when the kind's module is imported, or in bghost_host_setup",
            )
        words = self.ring.words
        me = _word_of(worker)
        with self._locked(worker):
            my, other = words[mine], words[others]
            if _lives(worker, my):
                raise BghostError(f"the queue has its {_SIDE[mine]}", detail=_text_of(worker, my))
            if my != _FREE:
                if _lives(worker, other):
                    raise BghostError(
                        f"the queue's {_SIDE[others]} has not left its last {_SIDE[mine]} yet",
                        detail=_text_of(worker, other),
                    )
                if other == _FREE and self.ring.unread:
                    raise BghostError(f"the queue has messages of its last {_SIDE[mine]} that nobody has received yet")
                words[others] = _FREE
                self.ring.clear()
            words[mine] = me
        _nudge(worker, words[others])

    def _acquire(self, worker: "Worker[Any]") -> Acquired:
        try:
            return self.mutex.acquire_within(SLICE)
        except LockDamaged as error:
            worker.interrupts.ring_host()
            raise LockDamaged(
                "a queue's lock is damaged",
                detail=error.detail,
                hint="the host makes it anew, and restarts all workers",
            ) from None

    @contextmanager
    def _locked(self, worker: "Worker[Any]") -> Iterator[None]:
        """Alone among those who attach; that takes microseconds, so a wait for it need not be interruptible."""
        until = time.monotonic() + locking.TIMEOUT
        while self._acquire(worker) is Acquired.BUSY:
            if time.monotonic() > until:
                who = t.holder(worker._table, self.mutex.owner)
                raise LockTimeout("a queue is not free to be attached to", detail=f"held by {who or 'nobody'}")
        try:
            yield
        finally:
            self.mutex.release()


class _End:
    """An end of a queue as its worker holds it; see :class:`Sender` and :class:`Receiver`."""

    _verb: str
    _mine: int
    _others: int

    def __init__(self, queue: SharedQueue, worker: "Worker[Any]", peer: Handle | None) -> None:
        self._queue = queue
        self._worker = worker
        self._expected = peer
        self._words = queue.ring.words
        self._pidfd = -1
        self._other = _FREE  # the other end's word, as last seen; _DETACHED once this end has left
        self._attached = True
        # The word that says whether the other's process is there, where it is, and what it says then.
        self._pids, self._pid_at, self._pid = self._words, self._others, _FREE
        worker.on_exit(self.detach)

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of a queue of {self._queue.size} bytes, {self._worker.name}>"

    def detach(self) -> None:
        """Leave the queue; the other end sees it at once. Again: does nothing."""
        if self._attached:
            self._attached = False
            self._other = _DETACHED
            self._words[self._mine] = _GONE
            _nudge(self._worker, self._words[self._others])
            if self._pidfd >= 0:
                os.close(self._pidfd)
            exits = self._worker.exits
            if self.detach in exits:
                exits.remove(self.detach)

    def _rouse(self) -> None:
        _nudge(self._worker, self._words[self._others])

    def _check_attached(self) -> None:
        if not self._attached:
            raise QueueDetached(f"this end, the {_SIDE[self._mine]}'s, was detached")

    def _is_left(self) -> bool:
        """Whether the other end is there no more."""
        other = self._words[self._others]
        if other == _FREE:
            if self._expected is None:
                return False
            state = self._expected.state  # first: who attaches and ends meanwhile has left its word by then
            return (state is None or state in _OVER) and self._words[self._others] in (_FREE, _GONE)
        if other == _GONE:
            return True
        if other != self._other:
            self._other = other
            slot = self._worker._table.slot(_slot_of(other))
            self._pids, self._pid_at, self._pid = slot.control, t.PID, _pid_of(other)
            self._pidfd = _open(self._pid)
        if not _lives(self._worker, other):
            return True
        return self._pidfd >= 0 and _is_readable(self._pidfd)

    def _left(self) -> QueueDetached:
        word = self._words[self._others]
        return QueueDetached(
            f"the queue's {_SIDE[self._others]} is gone",
            detail=_text_of(self._worker, self._other) if word > _GONE else "",
        )

    def _steps(self, attempt: Callable[[], T | None], timeout: float | None) -> Steps[T]:
        """*attempt* until it gives something."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        _spin(self._worker, (self,))
        while (result := attempt()) is None:
            if self._is_left() and not self._ready():
                raise self._left()
            if time.monotonic() >= until:
                raise TimedOut(f"nothing to {self._verb} within {timeout:g} s")
            yield from _sleep(self._worker, (self,), until, f"queue {self._verb}")
        return result

    @property
    def _side(self) -> Reader | Writer:
        raise NotImplementedError

    def _ready(self) -> bool:
        """Whether there is something that was not there when it was last tried; looks only."""
        raise NotImplementedError


def _spin(worker: "Worker[Any]", ends: Sequence[_End]) -> None:
    """Give a peer that is about to act the time for it; that costs less than a sleep and a wake-up."""
    if not worker.hooks.is_async:
        for _ in range(_SPINS):
            if any(end._ready() for end in ends):
                break
            os.sched_yield()


def _sleep(worker: "Worker[Any]", ends: Sequence[_End], until: float, name: str) -> Steps[None]:
    """Sleep till something may have changed at one of *ends*, or till a monotonic moment."""

    def look() -> bool:
        if any(end._ready() for end in ends):
            return True
        for end in ends:
            end._side.nap()
        for end in ends:
            known = end._other
            if end._ready() or end._is_left() or end._other != known:  # attached by now: its process is to be watched
                return True
        return False

    now = time.monotonic()
    for end in ends:
        if not end._side.sees_sleepers:
            until = min(until, now + BLIND)
        if end._pidfd < 0 and (end._other or end._expected is not None):
            until = min(until, now + _NO_PROCESS)
    fds = tuple(end._pidfd for end in ends if end._pidfd >= 0)
    try:
        with worker.waiting(name):
            yield from waiting.sleep(worker, until, fds, wakes=False, reloads=False, event=look)
    finally:
        for end in ends:
            end._side.wake_up()


class Sender(_End):
    """The end that sends. A context manager: its end detaches."""

    _verb = "send"
    _mine, _others = WRITER, READER

    def __init__(self, queue: SharedQueue, worker: "Worker[Any]", peer: Handle | None) -> None:
        super().__init__(queue, worker, peer)
        self._writer = Writer(queue.ring, self._rouse)
        self._write = self._writer.try_write

    def try_send(self, data: Data) -> bool:
        """Send a message if there is room for it now.

        A message of more than half of the queue's size goes in pieces, and False may mean that it is partly sent: the
        next call has to be made with the same object, unless :meth:`withdraw` comes first.

        :raises QueueDetached: if the receiver is gone.
        :raises ValueError: if it is made with another.
        """
        if self._words[READER] != self._other or self._pids[self._pid_at] != self._pid:
            self._check()
        return self._write(data) or self._refused()

    def _check(self) -> None:
        self._check_attached()
        if self._is_left():
            raise self._left()

    def _refused(self) -> bool:
        if self._is_left():
            raise self._left()
        return False

    def send(self, data: Data, timeout: float | None = None) -> None:
        """Send a message; wait for room as long as it takes. When that is interrupted, none of it was sent.

        :param timeout: seconds; ``None``: for ever.
        :raises QueueDetached: if the receiver is gone.
        :raises TimedOut: at the timeout.
        :raises bghost.Stop: if the worker is to stop; likewise Canceled.
        """
        if self._words[READER] != self._other or self._pids[self._pid_at] != self._pid:
            self._check()
        if not self._write(data):
            self._worker.drive(self._sending(data, timeout))

    def send_many(self, messages: Sequence[Data], timeout: float | None = None) -> None:
        """Send messages in order; as many at once as there is room for. See :meth:`send`.

        :raises TimedOut: at the timeout; the first ones may have been sent. Likewise with an interrupt.
        """
        self._check()
        count = self._writer.write_many(messages)
        if count < len(messages):
            self._worker.drive(self._sending_many(messages[count:] if count else messages, timeout))

    def withdraw(self) -> None:
        """Take back a message that :meth:`try_send` has sent in part; the receiver never sees any of it."""
        self._writer.withdraw()

    def _sending(self, data: Data, timeout: float | None) -> Steps[None]:
        try:
            yield from self._steps(lambda: self._write(data) or None, timeout)
        except BaseException:
            self._writer.withdraw()
            raise

    def _sending_many(self, messages: Sequence[Data], timeout: float | None) -> Steps[None]:
        sent = 0

        def attempt() -> bool | None:
            nonlocal sent
            sent += self._writer.write_many(messages[sent:])
            return True if sent == len(messages) else None

        try:
            yield from self._steps(attempt, timeout)
        except BaseException:
            self._writer.withdraw()
            raise

    @property
    def _side(self) -> Writer:
        return self._writer

    def _ready(self) -> bool:
        return self._writer.has_room


class Receiver(_End):
    """The end that receives. A context manager: its end detaches. Iterating gives messages until the sender is gone."""

    _verb = "receive"
    _mine, _others = READER, WRITER

    def __init__(self, queue: SharedQueue, worker: "Worker[Any]", peer: Handle | None) -> None:
        super().__init__(queue, worker, peer)
        self._reader = Reader(queue.ring, self._rouse)
        self._read = self._reader.try_read

    def try_receive(self) -> bytes | None:
        """The next message, or ``None`` if it is not there, or not all of it.

        :raises QueueDetached: if the sender is gone, and everything that it has sent was received.
        """
        data = self._read()
        return data if data is not None else self._nothing(self._read)

    def receive(self, timeout: float | None = None) -> bytes:
        """The next message; waits as long as it takes.

        :param timeout: seconds; ``None``: for ever.
        :raises QueueDetached: if the sender is gone, and everything that it has sent was received.
        :raises TimedOut: at the timeout.
        :raises bghost.Stop: if the worker is to stop; likewise Canceled.
        """
        data = self._read()
        return data if data is not None else self._worker.drive(self._receiving(self._read, timeout))

    def receive_many(self, limit: int = 1000, timeout: float | None = None) -> list[bytes]:
        """All messages that are there, *limit* at most, one at least; see :meth:`receive`. Faster than one by one."""
        messages = self._reader.read_many(limit)
        if messages:
            return messages
        return self._worker.drive(self._receiving(lambda: self._reader.read_many(limit) or None, timeout))

    def receive_view(self, timeout: float | None = None) -> memoryview:
        """The next message without a copy, where it lies in one piece; to be looked at until the next call.

        See :meth:`receive`. Worth it for long messages.
        """
        view = self._reader.try_view()
        return view if view is not None else self._worker.drive(self._receiving(self._reader.try_view, timeout))

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                data = self.receive()
            except QueueDetached:
                return
            yield data

    def _nothing(self, attempt: Callable[[], T | None]) -> T | None:
        """Nothing is there: if nothing can come any more, say so."""
        self._check_attached()
        if not self._is_left():
            return None
        result = attempt()  # sent before it left
        if result is None:
            raise self._left()
        return result

    def _receiving(self, attempt: Callable[[], T | None], timeout: float | None) -> Steps[T]:
        self._check_attached()
        return self._steps(attempt, timeout)

    @property
    def _side(self) -> Reader:
        return self._reader

    def _ready(self) -> bool:
        return self._reader.has_more


class AsyncSender(Sender):
    """The end that sends, in an async worker: what waits is awaited."""

    async def send(self, data: Data, timeout: float | None = None) -> None:  # type: ignore[override]
        """See :meth:`Sender.send`; other tasks run meanwhile."""
        if not self.try_send(data):
            await _drive(self._worker, self._sending(data, timeout))

    async def send_many(self, messages: Sequence[Data], timeout: float | None = None) -> None:  # type: ignore[override]
        """See :meth:`Sender.send_many`; other tasks run meanwhile."""
        self._check()
        await _drive(self._worker, self._sending_many(messages, timeout))


class AsyncReceiver(Receiver):
    """The end that receives, in an async worker: what waits is awaited."""

    async def receive(self, timeout: float | None = None) -> bytes:  # type: ignore[override]
        """See :meth:`Receiver.receive`; other tasks run meanwhile."""
        data = self._read()
        return data if data is not None else await _drive(self._worker, self._receiving(self._read, timeout))

    async def receive_many(self, limit: int = 1000, timeout: float | None = None) -> list[bytes]:  # type: ignore[override]
        """See :meth:`Receiver.receive_many`; other tasks run meanwhile."""
        return await _drive(self._worker, self._receiving(lambda: self._reader.read_many(limit) or None, timeout))

    async def receive_view(self, timeout: float | None = None) -> memoryview:  # type: ignore[override]
        """See :meth:`Receiver.receive_view`; other tasks run meanwhile."""
        return await _drive(self._worker, self._receiving(self._reader.try_view, timeout))


async def _drive(worker: "Worker[Any]", steps: Steps[T]) -> T:
    from bghost.worker.tasks import AsyncWorker

    assert isinstance(worker, AsyncWorker)
    return await worker.tasks.drive(steps)


_SIDE: Final = {WRITER: "sender", READER: "receiver"}


# The word of an end that is attached, stored at once: pid, slot, the lower bits of the slot's generation and starts.
# The latter tell a process from another that has got its number. The host clears a slot's pid before it reaps.


def _word_of(worker: "Worker[Any]") -> int:
    pid = os.getpid()
    control = worker.slot.control
    until = time.monotonic() + 5.0
    while control[t.PID] != pid:  # the host notes it right after the fork, and others go by it
        if time.monotonic() > until:
            raise BghostError("only a worker itself can attach to a queue, not a child of it")
        time.sleep(0.001)
    return pid << 40 | worker.slot.index << 24 | (control[t.GENERATION] & 0xFFF) << 12 | control[t.STARTS] & 0xFFF


def _pid_of(word: int) -> int:
    return word >> 40


def _slot_of(word: int) -> int:
    return word >> 24 & 0xFFFF


def _lives(worker: "Worker[Any]", word: int) -> bool:
    """Whether that process, as the host knows, has not ended."""
    if word <= _GONE or _slot_of(word) >= len(worker._table):
        return False
    control = worker._table.slot(_slot_of(word)).control
    return (
        control[t.PID] == _pid_of(word)
        and control[t.GENERATION] & 0xFFF == word >> 12 & 0xFFF
        and control[t.STARTS] & 0xFFF == word & 0xFFF
    )


def _nudge(worker: "Worker[Any]", word: int) -> None:
    if word > _GONE and _slot_of(word) < len(worker._table):
        worker._table.slot(_slot_of(word)).latch.nudge()


def _text_of(worker: "Worker[Any]", word: int) -> str:
    name = worker._table.slot(_slot_of(word)).name.read() if _slot_of(word) < len(worker._table) else "?"
    return f"worker {name}, pid {_pid_of(word)}"


def _open(pid: int) -> int:
    """A pidfd, if there is one to be had; :func:`_lives` tells whether it is the right one."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))

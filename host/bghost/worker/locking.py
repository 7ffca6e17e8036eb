"""A lock of shared memory as a worker takes it: interruptible, never for long, given back however its block ends."""

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from bghost.shared import table as t
from bghost.shared.errors import LockDamaged, LockTimeout
from bghost.shared.mutex import CHECK, CHECK_2, INTACT, INTACT_2, SLICE, Acquired, RobustMutex, trylock, unlock
from bghost.worker import waiting
from bghost.worker.waiting import Steps

if TYPE_CHECKING:
    from bghost.worker.worker import Worker

L = TypeVar("L", bound="Lock")

TIMEOUT: Final = 1.0  # seconds
_DAMAGED: Final = -1  # no error has this number


class Lock:
    """``with lock:`` is exclusive between all processes. Not recursive.

    A holder that dies gives it up with its death. One that is stopped or stuck is named to whoever waits in vain. What
    a recovered error or the worker's end leaves held is released. One that something has written over is refused; the
    host sees that, and makes it anew once all workers are gone and started again.

    :param worker: whose this object is.
    :param mutex: what it stands for.
    :param name: what it is called in messages.
    :param timeout: seconds that a wait for it takes at most.
    """

    __slots__ = (
        "_cell",
        "_entered",
        "_mutex",
        "_pid",
        "_raw",
        "_worker",
        "inherited",
        "name",
        "timeout",
    )

    _stays: ClassVar = True  # enlisted, whether it is held or not

    def __init__(self, worker: "Worker[Any]", mutex: RobustMutex, name: str, timeout: float = TIMEOUT) -> None:
        self.name: Final = name
        self.inherited = False
        """Whether its last holder has died with it: what it protects may be half done."""
        self._worker = worker
        self._mutex = mutex
        self._raw = mutex.mutex
        self._cell = mutex.cell
        self.timeout = timeout
        self._pid = os.getpid()
        self._entered = False
        if self._stays:
            worker.enlist(self)

    def __repr__(self) -> str:
        return f"<Lock {self.name}>"

    def __enter__(self: L) -> L:
        """Take it.

        :raises bghost.LockTimeout: if it is not free in time; says who holds it.
        :raises bghost.LockDamaged: if something has written over it.
        :raises bghost.Stop: if the worker is to stop; likewise Canceled.
        """
        # As quick as Python allows: the mutex's own methods are for the ways that are rarer.
        if self._entered:
            raise RuntimeError(f"{self!r} is entered already")
        # First of all: wherever a signal breaks in, the mutex itself knows whether there is something to release.
        self._entered = True
        code = trylock(self._raw) if self._cell[CHECK] == INTACT else _DAMAGED
        if code:
            self._enter(code)
        else:
            self.inherited = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered:  # else the runtime has rolled it back
            if self._cell[CHECK_2] == INTACT_2 and not unlock(self._raw):
                self._entered = False
            else:
                self._leave()

    def _enter(self, code: int) -> None:
        """Take what could not be taken at once."""
        try:
            if code == _DAMAGED:
                raise self._damaged(self._mutex.damaged())
            if not self._took(self._mutex.judge(code)):
                self._worker.drive(self._wait(SLICE, time.monotonic() + self.timeout))
        except RuntimeError:  # this thread's already, through another Lock: not this one's to release
            self._entered = False
            raise
        except BaseException:
            self.roll_back(0.0)
            raise

    def _leave(self) -> None:
        """Release what could not be released at once."""
        self._entered = False
        try:
            self._mutex.release()
        except LockDamaged as error:
            raise self._damaged(error) from None
        except PermissionError:
            # A child that was forked inside of the block comes to its end; the lock is still its parent's.
            if os.getpid() == self._pid:
                raise

    def _damaged(self, error: LockDamaged) -> LockDamaged:
        """*error*, with this lock's name; the host is told to look."""
        self._worker.interrupts.ring_host()
        return LockDamaged(
            f"lock {self.name} is damaged", detail=error.detail, hint="the host makes it anew, and restarts all workers"
        )

    def _took(self, acquired: Acquired) -> bool:
        if acquired is Acquired.BUSY:
            return False
        self.inherited = acquired is Acquired.INHERITED
        if self.inherited:
            self._worker.log.warning("lock {} is taken over: its holder has died with it", self.name)
        return True

    def _wait(self, slice: float, until: float, nap: float = 0.0) -> Steps[None]:
        """Wait until it is free, or a monotonic moment.

        :param slice: seconds that are slept on the mutex at a time.
        :param nap: seconds that are slept on the latch between two looks, where nothing may sleep on the mutex.
        """
        worker = self._worker
        with worker.waiting("lock"):
            while (left := until - time.monotonic()) > 0:
                yield from waiting.sleep(worker, time.monotonic() + nap if nap else 0.0, wakes=False, reloads=False)
                try:
                    acquired = self._mutex.acquire_within(min(left, slice))
                except LockDamaged as error:
                    raise self._damaged(error) from None
                if self._took(acquired):
                    return
        raise self._timed_out()

    def _timed_out(self) -> LockTimeout | LockDamaged:
        if self._mutex.is_orphaned:
            return self._damaged(self._mutex.damaged("it is locked by nobody that lives"))
        holder = t.holder(self._worker._table, self._mutex.owner) or "nobody any more"
        return LockTimeout(
            f"lock {self.name} has not become free within {self.timeout:g} s",
            detail=f"held by {holder}",
            hint="a holder that is stopped or stuck has to be ended; 'bghost ps' shows it",
        )

    def left_open(self) -> str | None:
        """See :class:`~bghost.worker.recovery.Participant`."""
        return f"lock {self.name}" if self._entered else None

    def roll_back(self, timeout: float) -> None:
        """See :class:`~bghost.worker.recovery.Participant`."""
        if self._entered:
            self._entered = False
            try:
                self._mutex.release()
            except (PermissionError, LockDamaged):
                pass  # a signal broke in before it was taken, or after it was released; or there is no lock any more

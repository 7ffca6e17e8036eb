"""Error recovery: what follows an error of a tick, so that it need not end the process (sigsetjmp blocks, postgres.c).

The order is the contract: hold interrupts; drop timers, then a pending cancel; log; roll back; close scopes; stats;
ask the kind; let the exception go; resume, and leave if a stop is pending. An error in any of it ends the worker.
"""

import inspect
import signal
from collections.abc import Callable
from time import monotonic_ns
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from bghost.shared import table as t
from bghost.shared.backoff import doubled
from bghost.shared.errors import GiveUp, Stop
from bghost.shared.spec import Doing, Recovery
from bghost.shared.table import TICK_LAST, TICK_MAX, TICK_STARTED, TICK_TOTAL, TICKS

if TYPE_CHECKING:
    from bghost.worker.worker import Worker

DELAY_FIRST: Final = 1.0  # seconds
DELAY_MAX: Final = 60.0
CONFLICT_FIRST: Final = 0.01  # after a serialization failure or a deadlock, which are nobody's mistake
CONFLICTS: Final = frozenset({"40001", "40P01"})
ROLL_BACK_TIMEOUT: Final = 2.0
ACTIVITY: Final = "__bghost_activity__"  # attribute of an error: the text of the worker.activity() that it left
FORGOTTEN_AFTER: Final = 600.0  # seconds; an error that did not come for so long is told of in full again


class Participant(Protocol):
    """Something that a plugin enlists because it can be left half done: a database connection, say. Runs in: worker."""

    def left_open(self) -> str | None:
        """What is open, with the file and line that opened it, or ``None``; looks only, costs nearly nothing."""

    def roll_back(self, timeout: float) -> None:
        """Undo what is open, or give up what holds it, within *timeout* seconds.

        What is broken is only closed here, and replaced at its next use.
        """


class LeftOpen(RuntimeError):
    """A tick ended with a scope or a transaction still open, where the instance is strict."""


class RecoveryFailed(Exception):
    """An error came up while another was being recovered; the worker ends."""


class Restart(Exception):
    """``bghost_recover`` decided on a new process."""


def delay(failures: int, *, conflict: bool) -> float:
    """Seconds that the wait after the *failures*-th error in a row lasts at least."""
    first = CONFLICT_FIRST if conflict else DELAY_FIRST
    return doubled(first, failures, DELAY_MAX)


class RepeatedErrors:
    """Tells an error that is new from one that came before; those are counted and told of at growing intervals."""

    __slots__ = ("_count", "_key", "_last")

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._count = 0
        self._last = 0.0

    def count(self, error: BaseException, now: float) -> int:
        """How often *error* has come by now, with no other between and no long time without it.

        :param now: monotonic seconds.
        """
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = (frame.tb_frame.f_code.co_filename, frame.tb_lineno) if frame is not None else ("", 0)
        key = (type(error), describe(error), *place)
        again = key == self._key and now - self._last <= FORGOTTEN_AFTER
        self._count = self._count + 1 if again else 1
        self._key = key
        self._last = now
        return self._count


class RecoveryBlock:
    """``with worker.recovery():`` one round of work. Entered again for each; never nested.

    :param watch: whether the host is to see to it that no round takes too long.
    """

    __slots__ = (
        "_cell",
        "_interrupts",
        "_longest",
        "_started",
        "_stats",
        "_ticks",
        "_total",
        "_watch",
        "base",
        "delay",
        "failures",
        "repeated",
        "worker",
    )

    def __init__(self, worker: "Worker", *, watch: bool) -> None:
        self.worker = worker
        self.failures = 0  # in a row
        self.delay = 0.0  # seconds that the next wait lasts at least
        self.repeated = RepeatedErrors()
        self._watch = watch
        # The stats go on where the last process of this registration left them. This process alone writes them, so it
        # counts in objects of its own and stores the result: that costs half.
        self._interrupts = worker.interrupts
        self._stats = stats = worker.slot.stats
        self._ticks, self._total, self._longest = stats[TICKS], stats[TICK_TOTAL], stats[TICK_MAX]
        self._started = 0
        self._cell = worker.root_scope.cell
        self.base = self._cell[0]  # the scope that was current when the block began, and is again at its end

    def __enter__(self) -> None:
        if self._interrupts.ticking:
            raise RuntimeError("worker.recovery() is not to be nested")
        self.base = self._cell[0]
        self._interrupts.ticking = True
        self._started = self._stats[TICK_STARTED] = monotonic_ns()
        if self._watch and not self.worker.slot.control[t.WATCHED]:
            self._interrupts.ring_host()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if error is not None:
                return self._recovers(error)
            if self._is_clean() or self._settle():
                self.failures = 0
            return True
        finally:
            self._interrupts.ticking = False
            stats = self._stats
            took = monotonic_ns() - self._started
            self._ticks += 1
            self._total += took
            stats[TICKS] = self._ticks
            stats[TICK_LAST] = took
            stats[TICK_TOTAL] = self._total
            if took > self._longest:
                self._longest = stats[TICK_MAX] = took
            stats[TICK_STARTED] = 0
            del error

    @property
    def active(self) -> bool:
        """Whether the worker is inside of it."""
        return self.worker.interrupts.ticking

    def aside(self, call: Callable[[], object]) -> None:
        """Make *call* in a recovery of its own that is no tick: a reload hook, a callback.

        That it went well says nothing of the ticks that fail: their delays go on growing.
        """
        self.base = self._cell[0]
        self.worker.interrupts.ticking = True
        try:
            call()
        except BaseException as error:
            if not self._recovers(error):
                raise
        else:
            self._settle()
        finally:
            self.worker.interrupts.ticking = False

    def _recovers(self, error: BaseException) -> bool:
        """Recover from *error*, unless it is none that is recovered from."""
        if not isinstance(error, Exception) or isinstance(error, GiveUp | RecoveryFailed | Restart):
            return False
        self.recover(error)
        return True

    def _is_clean(self) -> bool:
        if self._cell[0] is not self.base:
            return False
        for participant in self.worker.participants:  # noqa: SIM110  a generator costs as much as the rest of a tick
            if participant.left_open() is not None:
                return False
        return True

    def _settle(self) -> bool:
        """At a good end: close the tick's scope, and undo what was left open; an error of that is the tick's.

        :returns: whether it was a good end.
        """
        worker = self.worker
        left = worker.left_open()
        try:
            if left:
                worker.roll_back()
            worker.close_tick_scope()
            for text in left:
                if worker.strict:
                    raise LeftOpen(f"left open at the end of the tick: {text}")
                worker.log.warning("left open at the end of the tick, and closed: {}", text)
        except Exception as error:
            if not self._recovers(error):
                raise
            return False
        return True

    def recover(self, error: Exception) -> None:
        """Do all that follows *error*.

        :raises RecoveryFailed: if something of it fails.
        :raises Restart: if the kind wants a new process.
        :raises Stop: if the kind wants to end, or a stop is due.
        """
        worker = self.worker
        stats = worker.slot.stats
        interrupts = worker.interrupts
        interrupts.holds += 1
        try:
            stats[t.DOING] = _RECOVERING
            self.drop_timers()
            interrupts.cancel = False  # after the timers: one that was about to cancel is gone by now
            self.failures += 1
            conflict = getattr(error, "sqlstate", None) in CONFLICTS
            self.delay = delay(self.failures, conflict=conflict)
            self._log(error, conflict=conflict)
            worker.roll_back()
            worker.close_tick_scope(error)
            worker.slot.wait.write("")
            worker.show("")
            stats[t.RECOVERIES] += 1
            decision = worker.hooks.recover(worker, error) or Recovery.CONTINUE
            if not isinstance(decision, Recovery):
                raise TypeError(f"bghost_recover returned {decision!r}, not a bghost.Recovery")
            worker.close_tick_scope()  # the hook may have used one
        except GiveUp:
            raise
        except Exception as second:
            raise RecoveryFailed(describe(second)) from second
        finally:
            interrupts.holds -= 1
            stats[t.DOING] = _IDLE
            release(error)
        if decision is Recovery.RESTART:
            raise Restart
        if decision is Recovery.STOP:
            worker.decided_to_stop = True
            raise Stop(0)
        interrupts.ticking = False  # what was to be cancelled is over; a stop that is pending ends the worker now
        worker.look()
        interrupts.attention = True  # the next turn looks whether the delay was slept

    def drop_timers(self) -> None:
        """End what the tick has set going and nobody waits for any more."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _log(self, error: Exception, *, conflict: bool) -> None:
        worker = self.worker
        sqlstate = getattr(error, "sqlstate", None)
        text = describe(error) + (f" (SQLSTATE {sqlstate})" if sqlstate else "")
        worker.slot.note_error(text)
        count = self.repeated.count(error, monotonic_ns() / 1e9)
        activity = getattr(error, ACTIVITY, "")
        during = f", during: {activity}" if activity else ""
        if count == 1 and not conflict:
            worker.log.opt(exception=error).error("{}{}", text, during)
        elif count & (count - 1) == 0:  # 1, 2, 4, 8, ...
            again = f" ({count} times by now)" if count > 1 else ""
            worker.log.log("WARNING" if conflict else "ERROR", "{}{}{}", text, during, again)


def describe(error: BaseException) -> str:
    """Its type and text; also of one that fails to give a text."""
    try:
        text = str(error)
    except Exception:
        text = "<no text, its __str__ fails>"
    return f"{type(error).__name__}: {text}"


def release(error: BaseException) -> None:
    """Let go of the frames that *error*, its causes and contexts, and errors that it groups hold, and of rows, files,
    connections in them."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if each.__traceback__ is not None:
            _clear(each.__traceback__)
            each.__traceback__ = None
        left += (each.__cause__, each.__context__)
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions


def _clear(trace: TracebackType | None) -> None:
    while trace is not None:
        # Not those of coroutines and generators: one that only waits, such as a main of the author's own, would be
        # closed by it, and one that is over holds nothing.
        if not trace.tb_frame.f_code.co_flags & _SUSPENDABLE:
            try:
                trace.tb_frame.clear()
            except RuntimeError:
                pass  # it still runs
        trace = trace.tb_next


_SUSPENDABLE: Final = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_IDLE: Final = t.DOING_INDEX[Doing.IDLE]
_RECOVERING: Final = t.DOING_INDEX[Doing.RECOVERING]

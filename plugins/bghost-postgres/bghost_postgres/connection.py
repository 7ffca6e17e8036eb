"""A psycopg connection whose waits end for a stop, a cancel and the host's death."""

import os
import re
import select
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg import errors, generators, pq
from psycopg.abc import Params, PQGen, PQGenConn, QueryNoTemplate
from psycopg.rows import TupleRow
from psycopg.sql import SQL, Composable, Composed

from bghost import Canceled, Stop
from bghost_postgres.blocks import caller
from bghost_postgres.errors import CommitUnknown, TransactionError
from bghost_postgres.session import DONE, Session

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

    from bghost import Worker

T = TypeVar("T")

CANCEL_AGAIN: Final = 0.1  # seconds until a query that has not ended is cancelled once more; doubles
SHOW_AFTER: Final = 0.001  # seconds that a query takes until its text is shown
CANCEL_LIMIT: Final = 2.0  # seconds for a query to end after it was cancelled, and for a late answer to COMMIT
INTRANS: Final = pq.TransactionStatus.INTRANS
_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_IDLE: Final = pq.TransactionStatus.IDLE
_BROKEN: Final = pq.ConnStatus.BAD
_R, _W, _RW = 1, 2, 3  # psycopg's Wait and Ready have the same values
_WANTED: Final = (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT)  # by the value of psycopg's Wait
_ENDS: Final = re.compile(r"\s*(commit|end|prepare\s+transaction|rollback|abort)\b", re.IGNORECASE)
_READABLE: Final = select.POLLIN | select.POLLPRI | select.POLLHUP | select.POLLERR | select.POLLNVAL
_WRITABLE: Final = select.POLLOUT | select.POLLHUP | select.POLLERR | select.POLLNVAL


class Watched(psycopg.BaseConnection[Any]):
    """What a worker's connection knows of itself, be it used by plain code or by coroutines."""

    session: Session[Any] = Session()
    """What blocks are open on it."""
    last_error = ""
    """Of a statement, for whoever finds the transaction failed later."""
    _owner = 0
    _idle: "select.poll | None" = None  # of the server's socket alone

    def check_owner(self) -> None:
        """Refuse use in a process that was forked from the one that connected.

        :raises psycopg.InterfaceError: with both pids.
        """
        if (pid := os.getpid()) != self._owner:
            raise psycopg.InterfaceError(
                f"this connection belongs to process {self._owner}, and process {pid} was forked from it: connect again"
            )

    def stale(self) -> bool:
        """Whether the server has ended this connection while it was idle; one system call if not."""
        if self._idle is None:
            self._idle = select.poll()
            self._idle.register(self.pgconn.socket, select.POLLIN)
        for _ in range(3):  # last words, then the end
            if not self._idle.poll(0):
                return False
            try:
                self.pgconn.consume_input()
            except psycopg.OperationalError:
                return True
        return self.pgconn.status == _BROKEN

    def note(self) -> None:
        """After a query: count it, and see whether it has ended the transaction of the block that is open."""
        session = self.session
        if session.queries is not None:
            session.queries += 1
        if session.innermost is not None and self.pgconn.transaction_status == _IDLE and not session.ended_at:
            session.ended_at = caller()


class Connection(psycopg.Connection[TupleRow], Watched):
    """psycopg's connection, with a ``wait`` that watches the worker's latch and its host beside the server.

    A stop or a cancel that comes in a query cancels it on the server, and leaves the connection usable. Runs in: the
    worker's process that made it; a forked child is refused.
    """

    def __init__(self, pgconn: "PGconn", worker: "Worker[Any]") -> None:
        super().__init__(pgconn)
        self._worker = worker
        self._owner = os.getpid()
        self._poll = select.poll()
        self._wakeups: tuple[int, ...] = ()  # what is polled beside the server's socket
        self._wanted = 0  # what the server's socket is polled for
        self.beginning = False
        """Whether the answer to BEGIN has not been read yet."""
        self._patient = False  # an interrupt is kept until the answer is there; see settle()
        self._driven: PQGen[Any] | None = None  # psycopg's generator that is under way
        self._late: BaseException | None = None  # the one that is kept
        self._late_until = 0.0  # monotonic seconds when the answer must be there
        self._unshown: QueryNoTemplate | None = None  # what runs, until it has taken a while
        self._show_at = 0.0  # monotonic seconds when it has
        self._shown: AbstractContextManager[None] | None = None  # the worker's activity that shows it from then on
        self._limit: float | None = None  # monotonic seconds when a rollback has to be over, else it is all closed

    def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:
        """Drive *gen* to its end, and return what it gives; psycopg calls it for whatever needs the server.

        :param interval: not used: nothing here looks again and again.
        :param timeout: seconds.
        :raises bghost.Stop: if the worker is to stop; a running query was cancelled.
        :raises bghost.Canceled: if what is running is to be cancelled; so it was.
        """
        if os.getpid() != self._owner:
            self.check_owner()
        if self.beginning:
            self._settle_begin()
        if self._limit is not None:
            return self._drive(gen, self._limit, watch=False)
        self._driven = gen
        try:
            result = self._drive(gen, None if timeout is None else time.monotonic() + timeout)
        except BaseException as error:
            late, self._late = self._late, None
            self._failed(error)
            if late is not None and self.pgconn.status == _BROKEN:
                raise CommitUnknown(f"there was no answer to what ends a transaction: {error}") from error
            raise
        finally:
            self._driven = None
            self.note()
        if self._late is not None:
            late, self._late = self._late, None
            raise late
        return result

    def run(self, query: QueryNoTemplate, params: Params | None) -> "psycopg.Cursor[TupleRow]":
        """Execute *query*; its text is the worker's activity from its first millisecond on.

        Most are over by then, and showing it would cost them a tenth of their time.
        """
        self._unshown, self._show_at = query, time.monotonic() + SHOW_AFTER
        try:
            return self.cursor_factory(self).execute(query, params)
        except BaseException:
            with self._worker.activity(query_text(query, self)):
                raise  # with the text, for the log
        finally:
            self._unshown = None
            if self._shown is not None:
                shown, self._shown = self._shown, None
                shown.__exit__(None, None, None)

    def _failed(self, error: BaseException) -> None:
        """After an error of a wait: remember what the server said, cancel what still runs."""
        if isinstance(error, psycopg.Error):
            if not isinstance(error, TransactionError):
                self.last_error = first_line(error)
        elif self.pgconn.transaction_status == _ACTIVE:
            with self._worker.hold_interrupts():
                self.cancel_running(CANCEL_LIMIT)

    def close(self) -> None:
        """Close the connection. In a forked child it is only let go of: the session is the parent's."""
        if os.getpid() == self._owner:
            super().close()

    def command(self, text: bytes) -> str:
        """Run commands that have no parameters; not counted as queries. The last one's tag."""
        self.check_owner()
        with self.lock:
            if self.beginning:
                self._settle_begin()
            self.pgconn.send_query(text)
            return self._answer(None)

    def begin(self, text: bytes) -> None:
        """Send what begins a transaction. Its answer, which comes while Python is at work, is read before anything
        else is sent."""
        with self.lock:
            self.pgconn.send_query(text)
            self.beginning = True

    def settle_begin(self) -> None:
        """Have the answer to BEGIN, if it was not read yet."""
        if self.beginning:
            with self.lock:
                self._settle_begin()

    def _settle_begin(self) -> None:
        self.beginning, self._patient = False, True
        try:
            self._answer(self._limit)
        finally:
            late, self._late, self._patient = self._late, None, False
        if late is not None:
            raise late

    def settle(self, text: bytes) -> tuple[str, BaseException | None]:
        """Run COMMIT or ROLLBACK: an interrupt waits for the answer, which must come in 2 s from then on.

        Cancelling a COMMIT that waits for a standby would return success without the standby.

        :returns: the command tag: COMMIT, or ROLLBACK; and the interrupt, which is the caller's to raise.
        """
        if os.getpid() != self._owner:
            self.check_owner()
        with self.lock:
            self._patient = True
            try:
                if self.beginning:
                    self.beginning = False
                    self._answer(None)
                self.pgconn.send_query(text)
                return self._answer(None), self._late
            finally:
                self._late, self._patient = None, False

    def _answer(self, deadline: float | None, *, watch: bool = True) -> str:
        """Read the answer to commands; the last one's tag. This costs a third of psycopg's generator."""
        pgconn = self.pgconn
        done, failed = b"", None
        try:
            while pgconn.flush():
                if self._ready(_RW, deadline, watch) & _R:
                    pgconn.consume_input()
            pgconn.consume_input()
            while True:
                while pgconn.is_busy():
                    self._ready(_R, deadline, watch)
                    pgconn.consume_input()
                result = pgconn.get_result()
                if result is None:
                    break
                if result.status in DONE:
                    done = result.command_status or b""
                else:
                    failed = failed or errors.error_from_result(result)
            if failed is not None:
                raise failed
        except BaseException as error:
            if failed is not None and error is not failed and isinstance(error, psycopg.Error):
                error = failed  # it was the server's last word
            self._failed(error)
            raise error
        return done.decode()

    def cancel_running(self, timeout: float) -> None:
        """Cancel what runs on the server and wait for its end; what does not end in *timeout* seconds is closed."""
        deadline, pause = time.monotonic() + timeout, CANCEL_AGAIN
        try:
            while True:
                # A request that overtakes the query finds nothing to cancel, and is lost.
                self.cancel_safe(timeout=max(0.001, deadline - time.monotonic()))
                try:
                    # What comes still, and is thrown away
                    self._drive(generators.execute(self.pgconn), time.monotonic() + pause, watch=False, close=False)
                    break
                except errors._WaitTimeout:
                    if time.monotonic() >= deadline:
                        raise
                    pause = min(pause * 2, max(0.001, deadline - time.monotonic()))
        except psycopg.Error:
            self.pgconn.finish()
        if self.pgconn.transaction_status == _ACTIVE:  # in a COPY or a pipeline
            self.pgconn.finish()

    @contextmanager
    def limited(self, timeout: float) -> Iterator[None]:
        """Whatever is done within the block has *timeout* seconds in all, else the connection is closed."""
        self._limit = time.monotonic() + timeout
        try:
            yield
        finally:
            self._limit = None

    def roll_back(self, timeout: float, reset: str, *, prepared: bool) -> bool:
        """Leave no query running, no pipeline and no transaction open, or close, in *timeout* seconds.

        :param reset: commands that follow the ROLLBACK.
        :param prepared: whether prepared statements stay.
        :returns: whether the connection can be used further.
        """
        self.check_owner()
        deadline = time.monotonic() + timeout
        try:
            if self.pgconn.pipeline_status != pq.PipelineStatus.OFF:
                self.pgconn.finish()  # who entered it has not left it, and what is in it is anybody's guess
            if self.beginning:
                self.beginning = False
                self._answer(deadline, watch=False)
            if self.pgconn.transaction_status == _ACTIVE:
                self.cancel_running(timeout)
            if self.pgconn.status != _BROKEN:
                text = (f"ROLLBACK; {reset}" if reset else "ROLLBACK").encode()
                if prepared:
                    self.pgconn.send_query(text)
                    self._answer(deadline, watch=False)
                else:
                    with self.limited(deadline - time.monotonic()):
                        self.execute(text, prepare=False)  # psycopg's own way: it forgets what it has prepared
        except psycopg.Error:
            self.pgconn.finish()
        return self.pgconn.status != _BROKEN

    def _drive(self, gen: PQGen[T], deadline: float | None, *, watch: bool = True, close: bool = True) -> T:
        try:
            wanted = next(gen)
            while True:
                wanted = gen.send(_READY[self._ready(wanted, deadline, watch, close)])
        except StopIteration as end:
            result: T = end.value
            return result

    def _ready(self, wanted: int, deadline: float | None, watch: bool, close: bool = True) -> int:
        """Sleep until the server's socket is as *wanted*, in the values of psycopg's Wait; what it is, in Ready's.

        :param deadline: monotonic seconds.
        :param watch: whether the worker is watched too.
        :param close: whether the connection is closed at the deadline, where that is not the caller's own timeout.
        """
        fd, poll = self.pgconn.socket, self._poll
        if watch is not bool(self._wakeups):
            self._watch(self._worker.wakeup_fds if watch else ())
        if wanted != self._wanted:
            poll.register(fd, _WANTED[wanted])
            self._wanted = wanted
        while True:
            if self._late is not None:
                deadline = self._late_until
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready, woken = _polled(poll, left if self._unshown is None else SHOW_AFTER * 1000, fd, wanted)
            if self._unshown is not None and (not ready or time.monotonic() >= self._show_at):
                self._shown = self._worker.activity(query_text(self._unshown, self))
                self._shown.__enter__()
                self._unshown = None
            if woken:
                self._interrupted()
            if ready:
                return ready
            if deadline is not None and time.monotonic() >= deadline:
                if (watch and self._late is None) or not close:
                    raise errors._WaitTimeout("wait timeout expired")
                self.pgconn.finish()
                raise psycopg.OperationalError("the server did not answer in time, and the connection was closed")

    def _interrupted(self) -> None:
        """After a wake-up: raise what is due, or keep it while an answer must come."""
        try:
            self._worker.handle_wakeup()
        except (Stop, Canceled) as interrupt:
            if not self._patient and not ends_transaction(self._driven, self):
                raise
            self._late, self._late_until = interrupt, time.monotonic() + CANCEL_LIMIT
        if (wakeups := self._worker.wakeup_fds) != self._wakeups:
            self._watch(wakeups)  # the host has died, and interrupts are held

    def _watch(self, wakeups: tuple[int, ...]) -> None:
        for fd in self._wakeups:
            self._poll.unregister(fd)
        for fd in wakeups:
            self._poll.register(fd, select.POLLIN)
        self._wakeups = wakeups


def _polled(poll: "select.poll", milliseconds: float | None, fd: int, wanted: int) -> tuple[int, bool]:
    """Sleep; of what is *wanted* of the server's *fd*, what it is ready for, and whether the worker was woken."""
    ready, woken = 0, False
    for got, events in poll.poll(milliseconds):
        if got == fd:
            ready = wanted & ((_R if events & _READABLE else 0) | (_W if events & _WRITABLE else 0))
        else:
            woken = True
    return ready, woken


def ends_transaction(gen: Any, connection: Any) -> bool:
    """Whether what *gen*, one of psycopg's that is under way, has sent is a COMMIT, PREPARE TRANSACTION or ROLLBACK.

    Only its frames know; they are looked into when there is an interrupt.
    """
    while (frame := getattr(gen, "gi_frame", None)) is not None:
        for name in ("query", "command"):
            query = frame.f_locals.get(name)
            if isinstance(query, bytes | str | SQL | Composed) and _ENDS.match(query_text(query, connection)):
                return True
        gen = gen.gi_yieldfrom
    return False


def query_text(query: QueryNoTemplate, connection: Any) -> str:
    """*query* as SQL, for people."""
    if isinstance(query, bytes):
        return query.decode(errors="replace")
    return query.as_string(connection) if isinstance(query, Composable) else query


def first_line(error: BaseException) -> str:
    """The first line of what *error* says."""
    return str(error).partition("\n")[0]


_READY: Final = tuple(psycopg.waiting.Ready(value) for value in range(4))


def establish(conninfo: str, worker: "Worker[Any]", timeout: float) -> Connection:
    """Connect to one server, interruptibly.

    :param timeout: seconds.
    :raises psycopg.OperationalError: if it fails; ConnectionTimeout, if it takes too long.
    :raises bghost.Stop: if the worker is to stop.
    :raises bghost.Canceled: if what is running is to be cancelled.
    """
    gen = generators.connect(conninfo)
    try:
        pgconn = _drive_connect(gen, worker, time.monotonic() + timeout)
    finally:
        gen.close()
    connection = Connection(pgconn, worker)
    connection.autocommit = True
    return connection


def _drive_connect(gen: PQGenConn["PGconn"], worker: "Worker[Any]", deadline: float) -> "PGconn":
    try:
        fd, wanted = next(gen)
        while True:
            poll = select.poll()  # the socket may be another one each time
            for wakeup in worker.wakeup_fds:
                poll.register(wakeup, select.POLLIN)
            poll.register(fd, _WANTED[wanted])
            ready, woken = _polled(poll, max(0.0, deadline - time.monotonic()) * 1000, fd, wanted)
            if woken:
                worker.handle_wakeup()
            if ready:
                fd, wanted = gen.send(_READY[ready])
            elif time.monotonic() >= deadline:
                raise errors.ConnectionTimeout("connection timeout expired")
    except StopIteration as end:
        pgconn: PGconn = end.value
        return pgconn

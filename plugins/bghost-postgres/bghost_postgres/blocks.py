"""Light transactions: a block begins one unless one is open, and only the block that began it ends it.

A block decides what to send and what that meant; its two shapes, for plain code and for coroutines, send it.
"""

import sys
from collections.abc import Callable
from enum import Enum
from functools import cache
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, NoReturn, TypeVar

import psycopg
from psycopg import IsolationLevel, errors, pq
from psycopg.abc import Params, QueryNoTemplate
from psycopg.rows import TupleRow

from bghost import Scope
from bghost_postgres.errors import CommitUnknown, TransactionError

if TYPE_CHECKING:
    from bghost_postgres.session import Session, SyncSession

C = TypeVar("C", bound="psycopg.Connection[Any] | psycopg.AsyncConnection[Any]")

_IDLE: Final = pq.TransactionStatus.IDLE
_INTRANS: Final = pq.TransactionStatus.INTRANS
_INERROR: Final = pq.TransactionStatus.INERROR
_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_UNKNOWN: Final = pq.TransactionStatus.UNKNOWN
_SHOWN: Final = {_IDLE: "idle", _ACTIVE: "running a query", _UNKNOWN: "broken"}
_BY_HAND: Final = "begun by hand"
_PACKAGES: Final = ("psycopg", "psycopg_c", "psycopg_binary", "bghost_postgres", "contextlib")


class _Began(Enum):
    """What a block has begun, and so has to end."""

    NOTHING = 0
    SAVEPOINT = 1
    TRANSACTION = 2


class Wanted(NamedTuple):
    """What a block asks for."""

    snapshot: bool
    read_only: bool
    savepoint: bool
    isolation: IsolationLevel | None
    least: IsolationLevel
    """The lowest isolation level that will do."""
    begin: bytes
    """What begins a transaction that is so."""


@cache
def wanted(snapshot: bool, read_only: bool, isolation: IsolationLevel | str | None, savepoint: bool) -> Wanted:
    """What ``transaction()`` was asked for.

    :raises ValueError: if *isolation* is none, or lower than a snapshot needs.
    """
    level: IsolationLevel | None = None
    if isolation is not None:
        try:
            level = (
                IsolationLevel(isolation)
                if isinstance(isolation, int)
                else IsolationLevel["_".join(isolation.upper().replace("_", " ").split())]
            )
        except (KeyError, ValueError):
            known = ", ".join(repr(_sql(each).lower()) for each in IsolationLevel)
            raise ValueError(f"isolation {isolation!r} is none of {known}") from None
        if snapshot and level < IsolationLevel.REPEATABLE_READ:
            raise ValueError(f"a snapshot needs REPEATABLE READ at least, not {_sql(level)}")
    least = level or (IsolationLevel.REPEATABLE_READ if snapshot else IsolationLevel.READ_COMMITTED)
    begin = f"BEGIN ISOLATION LEVEL {_sql(least)}{' READ ONLY' if read_only else ''}"
    if snapshot:
        begin += "; SELECT"  # the server takes the snapshot at the first statement, not at BEGIN
    return Wanted(snapshot, read_only, savepoint, level, least, begin.encode())


class Block(Generic[C]):
    """One block: what both shapes of a transaction share.

    :param frame: the one that opens it.
    """

    outer: "Block[C] | None" = None
    """The block around it that is open."""
    failure = ""
    """Why nothing of this block can be committed any more: a block that joined has failed."""
    _began = _Began.NOTHING
    _connection: C | None = None  # while it is open
    _level = IsolationLevel.READ_COMMITTED  # of the transaction; kept in the outermost
    _queries: int | None = None  # what the connection's count was when the transaction had begun; likewise
    _scope: Scope | None = None
    _outside: Scope | None = None  # the scope that is current again after it; None where nobody keeps a current one

    def __init__(self, session: "Session[C]", frame: FrameType, asked: Wanted, name: str | None) -> None:
        self._session = session
        self._place: tuple[CodeType, int] = frame.f_code, frame.f_lineno  # a text of them costs as much as the rest
        self._asked = asked
        self._name = name
        self.root: Block[C] = self
        """The outermost block."""
        self._unit: Block[C] = self  # the block that joined ones fail with: one with a savepoint, or the outermost
        self._callbacks: list[tuple[bool, Callable[[], Any]]] = []  # whether for commit or rollback; kept in the unit

    def __repr__(self) -> str:
        return f"<Transaction{self._named} opened at {self.opened_at}>"

    @property
    def opened_at(self) -> str:
        """File and line of the block."""
        code, number = self._place
        return f"{code.co_filename}:{number}"

    @property
    def _named(self) -> str:
        return f" {self._name!r}" if self._name else ""

    @property
    def described(self) -> str:
        """The transaction, for errors: its name, and the line that opened it."""
        return f"the transaction{self._named} opened at {self.opened_at}"

    @property
    def is_open(self) -> bool:
        """Whether the block has begun and not ended."""
        return self._connection is not None

    @property
    def connection(self) -> C:
        """The connection that the transaction is on.

        :raises TransactionError: outside the block.
        """
        connection = self.open_connection()
        self._session.settled(connection)
        return connection

    def open_connection(self) -> C:
        """The connection, for whatever is sent on it next; BEGIN may be under way still."""
        if self._connection is None:
            raise TransactionError(f"{self.described} is not open")
        return self._connection

    def forget(self) -> None:
        """The block is over, be it without its end."""
        self._connection = None

    @property
    def scope(self) -> Scope:
        """A scope that ends with this block: for server-side cursors, temporary files. Closed before COMMIT, so that
        what fails then is not committed. In a worker without coroutines it is the worker's current one meanwhile.

        :raises TransactionError: outside the block.
        """
        if self._scope is None:
            self.open_connection()  # refuses
            parent = self._session.scope
            if self._scope is None:  # it was not the current one that was made just now
                self._scope = self._new_scope(parent)
        return self._scope

    def _new_scope(self, parent: Scope | None) -> Scope:
        return Scope(self._name or "transaction", parent, opened_at=self.opened_at)

    def make_scope(self) -> None:
        """Called by the worker, of whose current scope this block's is a part, when that is asked for."""
        self._outside = self._session.entered
        self._scope = self._new_scope(self._outside)
        self._scope.__enter__()

    def on_commit(self, function: Callable[[], Any]) -> None:
        """Call *function* once the work of this block is committed, in the order of the calls.

        It comes too late to undo anything: what it raises, the block raises, and the work stays committed.

        :raises TransactionError: if the transaction was begun by hand: nobody is told then when it is committed.
        """
        self._on(True, function)

    def on_rollback(self, function: Callable[[], Any]) -> None:
        """Call *function* once the work of this block is rolled back; not after a :class:`CommitUnknown`.

        :raises TransactionError: if the transaction was begun by hand.
        """
        self._on(False, function)

    def _on(self, committed: bool, function: Callable[[], Any]) -> None:
        self.open_connection()  # refuses
        if self.root._began is not _Began.TRANSACTION:
            raise TransactionError(
                f"the transaction that {self.described} has joined was {_BY_HAND}: nobody is told how it ends"
            )
        self._unit._callbacks.append((committed, function))

    def check(self) -> C:
        """The connection, for a statement of this block.

        :raises TransactionError: if a block that joined this transaction has failed, or the block has ended.
        """
        if self._unit.failure:
            raise TransactionError(self._unit.failure)
        return self.open_connection()

    def refused(self, error: errors.ReadOnlySqlTransaction) -> NoReturn:
        """A statement of this block was refused: say whose wish that was.

        :raises TransactionError: if it was that of a block around it.
        """
        block: Block[C] | None = self
        while block is not None and not block._asked.read_only:
            block = block.outer
        if block is None or block is self:
            raise error
        raise TransactionError(
            f"a write in {self.described} inside the read-only one opened at {block.opened_at}: {error}"
        ) from error

    # Its start

    def opening(self, connection: C) -> bytes:
        """What has to be sent so that the block can begin.

        :raises TransactionError: if it cannot.
        """
        asked, outer = self._asked, self._session.innermost
        status = self._session.status(connection)
        self.outer = outer
        if connection.pgconn.pipeline_status:
            raise TransactionError("a transaction block cannot begin in a pipeline: open it around the pipeline")
        if outer is None:
            if status == _IDLE:
                self._began = _Began.TRANSACTION
                self._level = asked.least
                return asked.begin
            self._refuse_status(status, connection)
        else:
            if outer._unit.failure:
                raise TransactionError(outer._unit.failure)
            if problem := outer.root.lost(connection, status):
                raise TransactionError(problem)
            self._refuse_status(status, connection)
            self.root = outer.root
        send = self._upgrade()
        if asked.savepoint:
            self._began = _Began.SAVEPOINT
            send += (b"; " if send else b"") + b"SAVEPOINT " + self._savepoint
        elif outer is not None:
            self._unit = outer._unit
        return send

    def _refuse_status(self, status: int, connection: C) -> None:
        if status == _INERROR:
            raise TransactionError(f"the open transaction has failed already{_tail(connection)}")
        if status != _INTRANS:
            raise TransactionError(
                f"a transaction cannot be opened or joined while the connection is "
                f"{_SHOWN.get(pq.TransactionStatus(status), status)}"
            )

    def _upgrade(self) -> bytes:
        """What makes the open transaction as this block wants it; nothing where it wants no more than is there."""
        asked, root = self._asked, self.root
        by_hand = root._began is not _Began.TRANSACTION
        if asked.isolation is None and not asked.snapshot:
            return b""
        if by_hand:  # only the server knows what has happened in it
            return f"SET TRANSACTION ISOLATION LEVEL {_sql(asked.least)}; SELECT".encode()
        untouched = root._queries is not None and self._session.queries == root._queries
        if asked.least > root._level:
            more = (
                f"{self.described} asks for {_sql(asked.least)} inside the {_sql(root._level)} one "
                f"opened at {root.opened_at}"
            )
            if asked.isolation is not None:
                raise TransactionError(more)
            if root._queries is not None and not untouched:
                raise TransactionError(f"{more}, in which a statement has run already: a snapshot comes too late")
            block = self.outer
            while block is not None:
                if block._began is _Began.SAVEPOINT:
                    raise TransactionError(f"{more}, in which a savepoint is open: opened at {block.opened_at}")
                block = block.outer
            return f"SET TRANSACTION ISOLATION LEVEL {_sql(asked.least)}; SELECT".encode()
        return b"SELECT" if asked.snapshot and untouched else b""  # fixes it, unless a statement has

    def not_opened(self, error: psycopg.Error) -> NoReturn:
        """What :meth:`opening` said was sent, and refused."""
        if isinstance(error, errors.ActiveSqlTransaction):
            where = _BY_HAND if self.root._began is not _Began.TRANSACTION else f"opened at {self.root.opened_at}"
            raise TransactionError(
                f"{self.described} asks for {_sql(self._asked.least)} inside the one {where}, in "
                "which a statement has run or a savepoint is open"
            ) from error
        raise error

    def opened(self, connection: C) -> None:
        """What was to be sent was sent: the block has begun."""
        session, root = self._session, self.root
        self._connection = connection
        if session.scoped is not None:
            self._outside = session.entered
            session.scoped.append(self)
        if root is self:
            session.ended_at = ""
            self._queries = session.queries
        elif self._asked.snapshot and root._level < self._asked.least:
            root._level = self._asked.least
        session.innermost = self

    # Its end

    def left(self, error: BaseException | None) -> BaseException | None:
        """The body is over: close what was opened in it, and restore the scope; what is wrong with its end, if it is.

        Before anything is sent, since cursors are closed on a transaction that is open.
        """
        session = self._session
        problem = error
        while (block := session.innermost) is not self:  # left without its end: a generator that nobody has finished
            assert block is not None
            if problem is None:
                problem = TransactionError(f"{block.described} was left open inside {self.described}")
            block.close_scope(problem)
            self._unit._callbacks += block._callbacks
            block.forget()
            session.innermost = block.outer
        try:
            self.close_scope(problem)
        except Exception as failure:
            if error is None:
                problem = failure
        return problem

    def close_scope(self, error: BaseException | None) -> None:
        """Close the block's scope, and those that were entered in it and not left."""
        session = self._session
        outside, self._outside = self._outside, None
        try:
            if self._scope is not None:
                self._scope.close(error)
            elif outside is not None and session.scoped is not None:
                session.scoped.remove(self)
        finally:
            while outside is not None and (current := session.entered) is not outside:
                if current is None or outside.closed or not _within(current, outside):
                    break
                current.close(error)

    def ending(self, error: BaseException | None) -> tuple[bytes, BaseException | None]:
        """What ends the block, to be sent; and what is wrong, if anything is. It is open no more."""
        session = self._session
        connection = self._connection
        assert connection is not None
        session.innermost = self.outer
        self._connection = None
        status = session.status(connection)
        lost = "" if status == _INTRANS and not session.ended_at else self.root.lost(connection, status, inside=self)
        if error is None and (lost or status != _INTRANS or self.failure):
            error = self._problem(connection, status, lost)
        if self._began is _Began.NOTHING:
            if error is not None and self._unit is not self and not self._unit.failure:
                self._unit.failure = (
                    f"the transaction has failed in the block opened at {self.opened_at}: {_text(error)}"
                )
            return b"", error
        if lost:
            if not session.broken:
                self._callbacks.clear()  # how the transaction ended, only he knows who ended it
            return b"", error
        if status == _ACTIVE:  # nothing can be sent: the server is to see the end of it
            connection.pgconn.finish()
            return b"", error
        if self._began is _Began.TRANSACTION:
            return (b"COMMIT" if error is None else b"ROLLBACK"), error
        send = b"RELEASE SAVEPOINT " + self._savepoint
        if error is not None:
            send = b"ROLLBACK TO SAVEPOINT " + self._savepoint + b"; " + send
        return send, error

    def _problem(self, connection: C, status: int, lost: str) -> TransactionError | None:
        """What is wrong with a good end."""
        if lost:
            return TransactionError(lost)
        if status == _INERROR:
            return TransactionError(
                f"an SQL error was swallowed in {self.described}, and nothing is committed{_tail(connection)}"
            )
        if status == _ACTIVE:
            return TransactionError(f"a query still runs at the end of {self.described}")
        if self._unit is self and self.failure:
            return TransactionError(f"{self.failure}; that was swallowed, and nothing is committed")
        return None

    def lost(self, connection: C, status: int, inside: "Block[C] | None" = None) -> str:
        """Whether this transaction is not open any more, in words."""
        ended_at = self._session.ended_at
        if status != _IDLE and status != _UNKNOWN and not ended_at:
            return ""
        within = "" if inside is None or inside is self else f", in which the block opened at {inside.opened_at} ends,"
        described = (
            self.described if self._began is _Began.TRANSACTION else f"the transaction joined at {self.opened_at}"
        )
        if status == _UNKNOWN:
            return f"the connection was lost in {described}{_tail(connection)}"
        return f"{described}{within} was ended underneath its block{f', at {ended_at}' if ended_at else ''}"

    def not_ended(self, send: bytes, error: psycopg.Error, cause: BaseException | None) -> None:
        """What :meth:`ending` said failed. Beside a cause that is no news, and the server undoes it all.

        :raises CommitUnknown: if the answer to COMMIT did not come.
        :raises psycopg.Error: if COMMIT was refused.
        """
        connection_is_lost = isinstance(error, psycopg.OperationalError) and self._session.broken
        if cause is not None:
            cause.add_note(f"{send.decode()} failed too, and the connection was closed: {error}")
            self._session.finish()
            return
        if send == b"COMMIT" and connection_is_lost:
            raise CommitUnknown(f"there was no answer to COMMIT: {error}") from error
        raise error

    def ended(self, tag: str, cause: BaseException | None) -> list[Callable[[], Any]]:
        """What was sent was answered: the callbacks that are due.

        :raises TransactionError: if COMMIT was answered by something else.
        """
        if self._began is _Began.NOTHING:
            return []
        if self._began is _Began.SAVEPOINT and cause is None:
            assert self.outer is not None or not self._callbacks
            if self.outer is not None:
                self.outer._unit._callbacks += self._callbacks
            return []
        committed = self._began is _Began.TRANSACTION and tag == "COMMIT"
        return self.due(committed)

    @staticmethod
    def outcome(
        error: BaseException | None, problem: BaseException | None, late: BaseException | None, send: bytes, tag: str
    ) -> None:
        """Raise what is to be raised at the end of a block, unless *error* is on its way already."""
        if problem is not None and problem is not error:
            raise problem
        if late is not None:
            raise late
        if send == b"COMMIT" and tag != "COMMIT":
            raise TransactionError(f"COMMIT was answered by {tag}: nothing is committed")

    def due(self, committed: bool) -> list[Callable[[], Any]]:
        """The callbacks for what has happened; none is left."""
        callbacks, self._callbacks = self._callbacks, []
        return [function for wanted, function in callbacks if wanted is committed]

    @property
    def _savepoint(self) -> bytes:
        depth, block = 1, self.outer
        while block is not None:
            depth, block = depth + 1, block.outer
        return b"bghost_%d" % depth


class Transaction(Block["psycopg.Connection[Any]"]):
    """One ``with db.transaction() as txn:`` block.

    The outermost block begins the transaction, or joins one that was begun by hand on the connection; blocks inside it
    join. Only a block that began it commits (at its good end) or rolls back (when an exception leaves it).
    """

    _session: "SyncSession"

    def execute(self, query: QueryNoTemplate, params: Params | None = None) -> "psycopg.Cursor[TupleRow]":
        """Execute *query*; psycopg's cursor.

        :raises TransactionError: if a block that joined this transaction has failed, or the block has ended; if this
            is a write, and a block around this one is read-only.
        """
        connection = self._connection
        if connection is None or self._unit.failure:
            connection = self.check()
        try:
            return self._session.run(connection, query, params)
        except errors.ReadOnlySqlTransaction as error:
            self.refused(error)

    def __enter__(self) -> "Transaction":
        session = self._session
        outer = session.innermost
        connection = session.current if outer is None else outer.open_connection()
        send = self.opening(connection)
        if self._began is _Began.TRANSACTION:
            session.begin(connection, send)
            if self._asked.snapshot:
                session.settled(connection)  # it is to be of now
        elif send:
            try:
                session.command(connection, send)
            except psycopg.Error as error:
                self.not_opened(error)
        self.opened(connection)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session = self._session
        if not self.is_open:
            # The runtime has rolled it back already, at the end of the tick that left this block open.
            if error is None:
                raise TransactionError(f"{self.described} was rolled back underneath its block")
            return
        connection = self.open_connection()
        problem = self.left(error)
        send, problem = self.ending(problem)
        tag, late = "", None
        if send:
            try:
                tag, late = session.settle(connection, send)
            except psycopg.Error as failure:
                if problem is None and not session.broken:
                    _call(self.due(False))
                self.not_ended(send, failure, problem)
        if self._callbacks:
            _call(self.ended(tag, problem))
        if problem is not None or late is not None or send == b"COMMIT" != tag.encode():
            self.outcome(error, problem, late, send, tag)


def _call(functions: list[Callable[[], Any]]) -> None:
    """Call each, then raise what the first of them to fail has raised."""
    failed: BaseException | None = None
    for function in functions:
        try:
            function()
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _within(scope: Scope | None, outer: Scope) -> bool:
    while scope is not None and scope is not outer:
        scope = scope.parent
    return scope is outer


def _sql(level: IsolationLevel) -> str:
    return level.name.replace("_", " ")


def _tail(connection: Any) -> str:
    text = getattr(connection, "last_error", "")
    return f": {text}" if text else ""


def _text(error: BaseException) -> str:
    text: Any = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def line(frame: FrameType) -> str:
    """``file:line`` of *frame*."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def caller() -> str:
    """The line of the code that is outside of this package and psycopg."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        frame = frame.f_back
    return line(frame) if frame is not None else "?"

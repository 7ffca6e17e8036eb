"""A worker's database: the connection that it has just now, replaced at its next use after it broke."""

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg import Notify, pq, sql
from psycopg.abc import ConnParam, Params, QueryNoTemplate
from psycopg.conninfo import conninfo_attempts, conninfo_to_dict, make_conninfo, timeout_from_conninfo
from psycopg.rows import TupleRow

from bghost import ConfigError, NotFound, Scope, Stop
from bghost_postgres.blocks import Block
from bghost_postgres.connection import INTRANS, Connection, Watched, establish
from bghost_postgres.errors import TransactionError
from bghost_postgres.extension import Postgres, PostgresSettings, problem_of_dsn
from bghost_postgres.outage import Patience
from bghost_postgres.session import Session, SyncSession

if TYPE_CHECKING:
    from bghost import Worker

CONNECT_TIMEOUT: Final = 5  # seconds for one attempt, where dsn and environment do not say
CHECK_INTERVAL: Final = "500ms"  # in which the server notices that a client died in a query

# What a rollback does not undo, by the word that keeps it; in the order of DISCARD ALL, which has to be sent alone.
_RESETS: Final = {
    "cursors": "CLOSE ALL",
    "settings": "SET SESSION AUTHORIZATION DEFAULT; RESET ALL",
    "prepared": "DEALLOCATE ALL",
    "listen": "UNLISTEN *",
    "locks": "SELECT pg_advisory_unlock_all()",
    "temporary": "DISCARD TEMP",
}

C = TypeVar("C", bound="psycopg.Connection[Any] | psycopg.AsyncConnection[Any]")


def connect(
    worker: "Worker[Any]",
    dsn: str | None = None,
    *,
    keep: Collection[str] = (),
    on_connect: Callable[[Connection], object] | None = None,
    **params: ConnParam,
) -> "Database":
    """The database of *worker*; touches no network yet. Closed with the worker's current scope. Runs in: worker.

    :param dsn: a connection string or URI; where it is not given, ``[postgres] dsn``, PGHOST and its like, or the
        embedded server, in this order.
    :param keep: what of the session outlives an error of a tick, which else leaves it as it was after connecting: some
        of cursors (``WITH HOLD``), settings (``SET``), prepared (statements), listen (what :meth:`Database.listen` has
        asked for stays anyway), locks (advisory ones), temporary (tables).
    :param on_connect: is called with each new connection before it is used, and with one that was reset.
    :param params: libpq's connection parameters, over those of the dsn.
    :raises ConfigError: if these do not parse, or there is no server to use.
    :raises ValueError: if *keep* has an unknown word.
    """
    return Database(worker, dsn, keep, on_connect, params)


class BaseDatabase(Session[C], ABC):
    """What a worker's database is for plain code and for coroutines."""

    keeps_scope = False
    """Whether the scope of a block is the worker's current one: in a worker with one flow of control."""

    def __init__(
        self,
        worker: "Worker[Any]",
        dsn: str | None,
        keep: Collection[str],
        on_connect: Callable[[Any], Any] | None,
        params: dict[str, ConnParam],
    ) -> None:
        if unknown := sorted({*keep} - {*_RESETS}):
            raise ValueError(f"keep: {unknown[0]!r} is none of {', '.join(_RESETS)}")
        self._worker = worker
        self._conninfo, self._settings = _configured(worker, dsn, params)
        self._keep = frozenset(keep)
        self._on_connect = on_connect
        self._owner = os.getpid()
        self._scope = worker.scope
        self._connection: Any = None
        self._closed = False
        self._was_reset = False  # on_connect is due
        self._checks = True  # unless the server's system cannot look whether its client is there
        self._channels: dict[str, None] = {}
        self._arrived: deque[Notify] = deque()
        self._news = False  # notifications came, or may have been missed, and no wait has told of it
        self._lost = False  # the connection of the channels broke, and is not replaced yet
        self.queries = 0
        self.scoped = worker.scoped if self.keeps_scope else None
        worker.enlist(self)
        self._scope.callback(self.close)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._worker.name}>"

    # What blocks ask for

    @property
    def scope(self) -> Scope:
        """See :class:`Session`."""
        return self._worker.scope

    @property
    def broken(self) -> bool:
        """See :class:`Session`."""
        return self._connection is None or self._watched.pgconn.status == pq.ConnStatus.BAD

    @property
    def _watched(self) -> Watched:
        watched: Watched = self._connection
        return watched

    # Its end

    def close(self) -> None:
        """Close the connection; this database is of no use any more. A second call does nothing."""
        if not self._closed and os.getpid() == self._owner:
            self._closed = True
            self._worker.dismiss(self)
            if self._channels:
                self._worker.unwatch(self)
                self._channels.clear()
            self._worker.backend_pid = None
            if self._connection is not None:
                self._watched.pgconn.finish()

    # What the runtime asks for, at the end of each tick

    def left_open(self) -> str | None:
        """What is open, and the line that opened it."""
        connection = self._connection
        if connection is None or connection.pgconn.status == pq.ConnStatus.BAD:
            return None
        block = self.innermost
        if block is not None:
            while block.outer is not None:
                block = block.outer
            return f"a transaction, opened at {block.opened_at}"
        if connection.pgconn.transaction_status == pq.TransactionStatus.IDLE:
            return None
        return "a transaction that was begun by hand, or a query that still runs"

    @abstractmethod
    def roll_back(self, timeout: float) -> None:
        """Cancel and roll back what is open, in *timeout* seconds, else close the connection.

        What a rollback does not undo is reset, unless it is to be kept.
        """

    def _forget_blocks(self) -> list[Block[C]]:
        """Have no block open any more; those that were, innermost first, their scopes closed."""
        blocks = []
        block, self.innermost = self.innermost, None
        try:
            while block is not None:
                blocks.append(block)
                block.forget()
                block.close_scope(TransactionError("rolled back by the runtime"))
                block = block.outer
        except BaseException:
            self._watched.pgconn.finish()  # the rollback is not to be missed
            raise
        return blocks

    @property
    def _reset(self) -> str:
        """What undoes the things of a session that a rollback does not."""
        commands = [text for kept, text in _RESETS.items() if kept not in self._keep]
        if "listen" not in self._keep:
            commands += [listen_command(channel) for channel in self._channels]
        if "settings" not in self._keep:
            commands += [setting_command(name, value) for name, value in self._session_settings(self._watched)]
        return "; ".join(commands)

    # Notifications

    def fileno(self) -> int:
        """What becomes readable when a notification comes; -1 while there is no connection."""
        connection = self._connection
        return -1 if connection is None or connection.closed else int(connection.pgconn.socket)

    def _came(self, notify: Notify) -> None:
        self._arrived.append(notify)
        self._news = True

    def _take(self, connection: Any) -> None:
        """Take what the server has sent of its own accord."""
        pgconn = connection.pgconn
        try:
            pgconn.consume_input()
            while (pgn := pgconn.notifies()) is not None:
                self._came(Notify(pgn.relname.decode(), pgn.extra.decode(), pgn.be_pid))
        except psycopg.OperationalError:
            connection.pgconn.finish()

    def pending(self) -> bool:
        """Whether notifications came that no wait has told of, or may have been missed with a connection that broke."""
        connection = self._connection
        if connection is not None and not connection.closed and not connection.lock.locked():
            self._take(connection)  # under the lock, a query of another task's takes them
        if (connection is None or connection.closed) and not self._lost:
            self._lost = self._news = True
        news, self._news = self._news, False
        return news

    def _taken(self) -> list[Notify]:
        self._news = False
        taken = [*self._arrived]
        self._arrived.clear()
        return taken

    def _channel(self, channel: str) -> None:
        if self.innermost is not None:
            raise TransactionError(
                f"listen({channel!r}) inside the transaction opened at {self.innermost.opened_at}, "
                "with which it would be rolled back: listen outside of transactions"
            )

    # Connecting

    def _check_usable(self) -> None:
        if (pid := os.getpid()) != self._owner:
            raise psycopg.InterfaceError(
                f"this database belongs to process {self._owner}, and process {pid} was forked from it: connect again"
            )
        if self._closed:
            raise psycopg.InterfaceError(f"this database was closed with its scope, {self._scope.path!r}")

    def _attempts(self) -> Iterator[tuple[str, int]]:
        """The servers of the dsn, and how long each may take."""
        params = conninfo_to_dict(self._conninfo)
        timeout = timeout_from_conninfo(params)
        for attempt in conninfo_attempts(params):
            yield make_conninfo("", **attempt), timeout

    def _session_settings(self, connection: Watched) -> Iterator[tuple[str, str]]:
        settings = self._settings
        if settings.statement_timeout is not None:
            yield "statement_timeout", f"{round(settings.statement_timeout * 1000)}ms"
        if settings.search_path is not None:
            yield "search_path", settings.search_path
        if self._checks and connection.info.server_version >= 140000:
            yield "client_connection_check_interval", CHECK_INTERVAL

    def _adopt(self, connection: Any) -> None:
        """Make *connection* the one that is used."""
        connection.session = self
        connection.add_notify_handler(self._came)
        self._lost, self._news = False, self._news or bool(self._channels)
        self._connection = connection
        self._was_reset = False
        self._worker.backend_pid = connection.info.backend_pid


class Database(BaseDatabase["psycopg.Connection[Any]"], SyncSession):
    """What :func:`connect` gives. It outlives outages: a broken connection is replaced at its next use.

    Outside of transactions every statement commits by itself. Runs in: the worker's process that made it.
    """

    keeps_scope = True

    @property
    def connection(self) -> Connection:
        """The connection, made or replaced if need be: psycopg's, with waits that a stop or a cancel ends.

        While the server cannot be reached, this waits for it: 0.5 s before the second attempt, doubling to 30 s.

        :raises psycopg.OperationalError: if the server refuses (role, password, database).
        :raises psycopg.InterfaceError: if this database was closed, or belongs to the process this one was forked from.
        :raises bghost.Stop: if the worker is to stop.
        :raises bghost.Canceled: if what is running is to be cancelled.
        """
        connection: Connection | None = self._connection
        if connection is not None:
            if os.getpid() != self._owner:
                connection.check_owner()
            if self.innermost is not None:
                connection.settle_begin()
                return connection  # also when it broke: its transaction is lost, and nothing else may take its place
            if connection.pgconn.status != pq.ConnStatus.BAD:
                if connection.pgconn.transaction_status != pq.TransactionStatus.IDLE or not connection.stale():
                    if self._was_reset:
                        self._greet(connection)
                    return connection
                connection.close()
        self._check_usable()
        return self._connect()

    current = connection
    """See :class:`SyncSession`."""

    @property
    def entered(self) -> Scope:
        """See :class:`Session`."""
        return self._scope.cell[0]

    def status(self, connection: Any) -> int:
        """See :class:`Session`."""
        return INTRANS if connection.beginning else connection.pgconn.transaction_status

    # What a plain connection has done for it, this one does itself.
    begin = staticmethod(Connection.begin)  # type: ignore[assignment]
    settled = staticmethod(Connection.settle_begin)  # type: ignore[assignment]
    command = staticmethod(Connection.command)  # type: ignore[assignment]
    settle = staticmethod(Connection.settle)  # type: ignore[assignment]
    run = staticmethod(Connection.run)  # type: ignore[assignment]

    def finish(self) -> None:
        """See :class:`Session`."""
        self._watched.pgconn.finish()

    def execute(self, query: QueryNoTemplate, params: Params | None = None) -> "psycopg.Cursor[TupleRow]":
        """Execute *query*; psycopg's cursor. Inside a transaction block it belongs to that transaction."""
        if self.innermost is not None:
            block: Any = self.innermost
            cursor: psycopg.Cursor[TupleRow] = block.execute(query, params)
            return cursor
        return self.run(self.connection, query, params)

    def listen(self, channel: str) -> None:
        """Listen on *channel*, also after the connection was replaced.

        A notification ends the worker's wait (``notify`` in ``worker.woken``); :meth:`notifications` has it. So does
        the loss of the connection: what was sent meanwhile is missed, and whoever listens has to look for himself.

        :raises TransactionError: inside a transaction block.
        """
        self._channel(channel)
        connection = self.connection
        if not self._channels:
            self._worker.watch(self)
        self._channels[channel] = None
        connection.command(listen_command(channel).encode())

    def unlisten(self, channel: str) -> None:
        """Undo :meth:`listen`.

        :raises TransactionError: inside a transaction block.
        """
        self._channel(channel)
        if self._channels.pop(channel, 0) is None:
            if not self._channels:
                self._worker.unwatch(self)
            self.connection.command(b"UN" + listen_command(channel).encode())

    def notifications(self) -> list[Notify]:
        """The notifications that came since the last call; does not wait for any, but reconnects if need be."""
        if self._channels and self.innermost is None:
            self._take(self.connection)
        return self._taken()

    def roll_back(self, timeout: float) -> None:
        """See :class:`BaseDatabase`."""
        connection: Connection | None = self._connection
        if connection is None:
            return
        with connection.limited(timeout):
            blocks = self._forget_blocks()
        if not connection.closed:
            self._was_reset = True
            if not connection.roll_back(timeout, self._reset, prepared="prepared" in self._keep):
                self._worker.backend_pid = None
        for block in blocks:
            for function in block.due(False):
                function()

    # Connecting

    def _connect(self) -> Connection:
        worker, awake = self._worker, False
        with Patience(worker, self._conninfo) as patience:
            while True:
                try:
                    connection = self._attempt()
                    break
                except psycopg.OperationalError as error:
                    worker.backend_pid = None
                    with worker.waiting("database"):
                        passes = patience.passes(error)
                    seconds, fds = patience.pause(error, passes=passes)
                with worker.waiting("database"):
                    until = time.monotonic() + seconds
                    while (left := until - time.monotonic()) > 0:
                        woken = worker.wait(left, *fds)
                        awake = "wake" in woken or awake
                        if worker.stopping:
                            raise Stop  # nothing was begun that would have to be finished
                        if "fd" in woken:
                            break
        if awake:
            worker.wake()  # it was meant for the worker's own next wait
        return connection

    def _attempt(self) -> Connection:
        """Connect to the first server of the dsn that lets us, once each."""
        failure: psycopg.OperationalError | None = None
        for conninfo, timeout in self._attempts():
            try:
                with self._worker.waiting("database"):
                    connection = establish(conninfo, self._worker, timeout)
            except psycopg.OperationalError as error:
                failure = error
                continue
            try:
                self._adopt(connection)
                self._prepare(connection)
                self._greet(connection)
            except BaseException:
                connection.close()
                raise
            return connection
        raise failure or psycopg.OperationalError("the dsn names no server")

    def _prepare(self, connection: Connection) -> None:
        """Put the session's settings and channels in place."""
        for name, value in self._session_settings(connection):
            try:
                connection.command(setting_command(name, value).encode())
            except psycopg.errors.InvalidParameterValue:
                if name != "client_connection_check_interval":
                    raise
                self._checks = False
        for channel in self._channels:
            connection.command(listen_command(channel).encode())

    def _greet(self, connection: Connection) -> None:
        self._was_reset = False
        if self._on_connect is not None:
            try:
                self._on_connect(connection)
            except BaseException:
                self._was_reset = True
                raise


def _configured(worker: "Worker[Any]", dsn: str | None, params: dict[str, ConnParam]) -> tuple[str, PostgresSettings]:
    """What to connect to, and how a session is to be."""
    try:
        extension = worker.extension("postgres")
    except NotFound:  # installed, but not among the active ones
        extension = Postgres(PostgresSettings())
    given = extension.conninfo if dsn is None else dsn
    if problem := problem_of_dsn(given):
        raise ConfigError(f"worker {worker.name} cannot connect: its dsn is {problem}")
    try:
        wanted = conninfo_to_dict(given)
    except psycopg.ProgrammingError:
        raise ConfigError(f"worker {worker.name} cannot connect: its dsn is not a connection string") from None
    wanted["application_name"] = worker.identity.application_name
    if extension.settings.role is not None:
        wanted["user"] = extension.settings.role
    if "connect_timeout" not in wanted and "PGCONNECT_TIMEOUT" not in os.environ:
        wanted["connect_timeout"] = CONNECT_TIMEOUT
    try:
        return make_conninfo("", **(wanted | params)), extension.settings
    except psycopg.ProgrammingError as error:
        raise ConfigError(f"worker {worker.name} cannot connect: {error}") from None


def setting_command(name: str, value: str) -> str:
    """What sets *name* for the session."""
    return sql.SQL("select set_config({}, {}, false)").format(name, value).as_string()


def listen_command(channel: str) -> str:
    """What listens on *channel*; with UN before it, what listens no more."""
    return sql.SQL("LISTEN {}").format(sql.Identifier(channel)).as_string()

"""The same for coroutines: a worker's database over psycopg's AsyncConnection, and its transaction blocks.

Stop and cancel arrive as the cancellation of the task, as everywhere in an async worker.
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextvars import ContextVar
from functools import cached_property
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg import IsolationLevel, Notify, errors, generators, pq, waiting
from psycopg.abc import ConnParam, Params, PQGen, QueryNoTemplate
from psycopg.rows import TupleRow

from bghost_postgres.blocks import Block, Wanted, wanted
from bghost_postgres.connection import CANCEL_AGAIN, CANCEL_LIMIT, Watched, ends_transaction, first_line, query_text
from bghost_postgres.database import BaseDatabase, listen_command, setting_command
from bghost_postgres.errors import CommitUnknown, TransactionError
from bghost_postgres.outage import Patience
from bghost_postgres.session import command

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

    from bghost import AsyncWorker

T = TypeVar("T")

_NEVER: Final = 86_400.0  # seconds between two looks of psycopg's own for signals: there is nothing to look for
_BROKEN: Final = pq.ConnStatus.BAD
_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_inside: ContextVar["Block[Any] | None"] = ContextVar("bghost_postgres_block", default=None)
"""The outermost block that this task, or the one that started it, is in."""


def connect_async(
    worker: "AsyncWorker[Any]",
    dsn: str | None = None,
    *,
    keep: Collection[str] = (),
    on_connect: Callable[["AsyncConnection"], Awaitable[object]] | None = None,
    **params: ConnParam,
) -> "AsyncDatabase":
    """:func:`connect` for a worker whose hooks are coroutines: a plain function too, that touches no network.

    Parameters and errors are those of :func:`connect`; *on_connect* is a coroutine function. Runs in: worker.
    """
    return AsyncDatabase(worker, dsn, keep, on_connect, params)


class AsyncConnection(psycopg.AsyncConnection[TupleRow], Watched):
    """psycopg's connection for coroutines: what is cancelled in a query cancels it on the server, in 2 s at most."""

    def __init__(self, pgconn: "PGconn") -> None:
        super().__init__(pgconn)
        self._owner = os.getpid()

    async def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:
        """Drive *gen* to its end, and return what it gives; psycopg calls it for whatever needs the server.

        :param interval: not used: nothing here looks again and again.
        :param timeout: seconds.
        """
        try:
            return await self._guarded(gen, timeout)
        finally:
            self.note()

    async def _guarded(self, gen: PQGen[T], timeout: float | None = None) -> T:
        self.check_owner()
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, _NEVER, timeout)
        except psycopg.Error as error:
            self.last_error = first_line(error)
            raise
        except BaseException as error:
            if ends_transaction(gen, self):
                try:
                    await self._held(waiting.wait_async(gen, self.pgconn.socket, _NEVER), error)
                except psycopg.OperationalError as lost:
                    raise CommitUnknown(f"there was no answer to what ends a transaction: {lost}") from error
            elif self.pgconn.transaction_status == _ACTIVE:
                await self._cancel_running()
            raise

    async def close(self) -> None:
        """Close the connection. In a forked child it is only let go of: the session is the parent's."""
        if os.getpid() == self._owner:
            await super().close()

    async def command(self, text: bytes) -> str:
        """Run commands that have no parameters; not counted as queries. The last one's tag."""
        async with self.lock:
            return await self._guarded(command(self.pgconn, text))

    async def settle(self, text: bytes) -> tuple[str, BaseException | None]:
        """Run COMMIT or ROLLBACK: a cancellation waits for the answer, which must come in 2 s from then on.

        :returns: the command tag: COMMIT, or ROLLBACK; and the cancellation, which is the caller's to raise.
        """
        return await self._held(self.command(text))

    async def _held(
        self, awaitable: Coroutine[Any, Any, T], late: BaseException | None = None
    ) -> tuple[T, BaseException | None]:
        """Await it; a cancellation, or *late*, waits for that, 2 s at most, and is the caller's to raise."""
        task = asyncio.ensure_future(awaitable)
        try:
            if late is None:
                return await asyncio.shield(task), None
        except asyncio.CancelledError as cancelled:
            if task.cancelled():
                raise
            late = cancelled
        deadline = time.monotonic() + CANCEL_LIMIT
        while not task.done() and (left := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait({task}, timeout=left)
            except asyncio.CancelledError:
                pass  # once is enough
        if not task.done():
            self.pgconn.finish()
            task.cancel()
            raise psycopg.OperationalError("the server did not answer in time, and the connection was closed")
        return task.result(), late

    async def _cancel_running(self) -> None:
        """Cancel what runs on the server and wait for its end; what does not end in time is closed."""
        deadline, pause = time.monotonic() + CANCEL_LIMIT, CANCEL_AGAIN
        try:
            while True:
                # A request that overtakes the query finds nothing to cancel, and is lost.
                await self.cancel_safe(timeout=max(0.001, deadline - time.monotonic()))
                try:
                    await waiting.wait_async(generators.execute(self.pgconn), self.pgconn.socket, _NEVER, pause)
                    break
                except errors._WaitTimeout:
                    if time.monotonic() >= deadline:
                        raise
                    pause = min(pause * 2, max(0.001, deadline - time.monotonic()))
        except psycopg.Error:
            self.pgconn.finish()
        except BaseException:
            self.pgconn.finish()
            raise
        if self.pgconn.transaction_status == _ACTIVE:  # in a COPY or a pipeline
            self.pgconn.finish()

    async def roll_back(self, timeout: float, reset: str, *, prepared: bool) -> bool:
        """See :meth:`Connection.roll_back`."""
        try:
            async with asyncio.timeout(timeout):
                if self.pgconn.pipeline_status != pq.PipelineStatus.OFF:
                    self.pgconn.finish()
                if self.pgconn.transaction_status == _ACTIVE:
                    await self._cancel_running()
                if self.pgconn.status != _BROKEN:
                    text = (f"ROLLBACK; {reset}" if reset else "ROLLBACK").encode()
                    if prepared:
                        await self.command(text)
                    else:
                        await self.execute(text, prepare=False)  # psycopg's own way: it forgets what it has prepared
        except (psycopg.Error, TimeoutError):
            self.pgconn.finish()
        return self.pgconn.status != _BROKEN


class AsyncTransaction(Block["psycopg.AsyncConnection[Any]"]):
    """One ``async with db.transaction() as txn:`` block; see :class:`Transaction`.

    It belongs to the task that opened it, and to those that are started inside of it; others wait for its end.
    """

    def __init__(self, database: "AsyncDatabase", frame: FrameType, asked: Wanted, name: str | None) -> None:
        super().__init__(database, frame, asked, name)
        self._database = database

    async def execute(self, query: QueryNoTemplate, params: Params | None = None) -> "psycopg.AsyncCursor[TupleRow]":
        """See :meth:`Transaction.execute`."""
        try:
            return await self._database.run(self.check(), query, params)
        except errors.ReadOnlySqlTransaction as error:
            self.refused(error)

    async def __aenter__(self) -> "AsyncTransaction":
        database = self._database
        outer = database.own_block
        if outer is None:
            await database.take_turn()
        try:
            connection: Any = await database.connect() if outer is None else outer.connection
            send = self.opening(connection)
            if send:
                try:
                    await connection.command(send)
                except psycopg.Error as error:
                    self.not_opened(error)
            self.opened(connection)
        except BaseException:
            if outer is None:
                database.end_turn()
            raise
        if outer is None:
            _inside.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_open:
            if error is None:
                raise TransactionError(f"{self.described} was rolled back underneath its block")
            return
        try:
            await self._end(error)
        finally:
            if self.outer is None:
                _inside.set(None)
                self._database.end_turn()

    async def _end(self, error: BaseException | None) -> None:
        database = self._database
        connection: Any = self.connection
        send, problem = self.ending(self.left(error))
        tag, late = "", None
        if send:
            try:
                tag, late = await connection.settle(send)
            except psycopg.Error as failure:
                if problem is None and not database.broken:
                    await _call(self.due(False))
                self.not_ended(send, failure, problem)
        await _call(self.ended(tag, problem))
        self.outcome(error, problem, late, send, tag)


class AsyncDatabase(BaseDatabase["psycopg.AsyncConnection[Any]"]):
    """What :func:`connect_async` gives: :class:`Database`, awaited."""

    _holder: asyncio.Task[Any] | None = None  # the task that has a statement running or a block open
    _watch_fd = -1  # the socket again: two tasks may wait for it, and a loop knows a descriptor once

    @cached_property
    def _turn(self) -> asyncio.Lock:
        return asyncio.Lock()

    @property
    def own_block(self) -> "Block[psycopg.AsyncConnection[Any]] | None":
        """The innermost block that is open, if it is this task's."""
        block = self.innermost
        return block if block is not None and block.root is _inside.get() else None

    async def connect(self) -> AsyncConnection:
        """The connection, made or replaced if need be; see :attr:`Database.connection`, whose errors it raises."""
        connection: AsyncConnection | None = self._connection
        if connection is not None:
            connection.check_owner()
            if self.own_block is not None:
                return connection
            if not connection.closed:
                busy = connection.lock.locked() or connection.pgconn.transaction_status != pq.TransactionStatus.IDLE
                if busy or not connection.stale():
                    if self._was_reset:
                        await self._greet(connection)
                    return connection
                await connection.close()
        self._check_usable()
        return await self._connect()

    @property
    def connection(self) -> AsyncConnection:
        """The connection as it is just now; see :meth:`connect`.

        :raises psycopg.InterfaceError: if there is none yet.
        """
        if self._connection is None:
            raise psycopg.InterfaceError("there is no connection yet: await db.connect()")
        connection: AsyncConnection = self._connection
        return connection

    async def execute(self, query: QueryNoTemplate, params: Params | None = None) -> "psycopg.AsyncCursor[TupleRow]":
        """See :meth:`Database.execute`; while another task has a block open, this waits for its end."""
        block: Any = self.own_block
        if block is not None:
            cursor: psycopg.AsyncCursor[TupleRow] = await block.execute(query, params)
            return cursor
        await self.take_turn()
        try:
            return await self.run(await self.connect(), query, params)
        finally:
            self.end_turn()

    async def take_turn(self) -> None:
        """Wait until no other task has a block open."""
        await self._turn.acquire()
        self._holder = asyncio.current_task()

    def end_turn(self) -> None:
        """Let the next task use the connection."""
        self._holder = None
        self._turn.release()

    @property
    def _is_another_tasks(self) -> bool:
        """Whether a task that outlives ticks uses it just now: what it has open is not left open."""
        worker: Any = self._worker
        holder = self._holder
        return holder is not None and holder is not worker.tasks.main and not holder.done()

    async def run(
        self, connection: "psycopg.AsyncConnection[Any]", query: QueryNoTemplate, params: Params | None
    ) -> "psycopg.AsyncCursor[TupleRow]":
        """Execute *query* on *connection*, its text being the worker's activity while it runs."""
        with self._worker.activity(query_text(query, connection)):
            return await connection.execute(query, params)

    def transaction(
        self,
        snapshot: bool = False,
        read_only: bool = False,
        isolation: IsolationLevel | str | None = None,
        name: str | None = None,
        savepoint: bool = False,
    ) -> AsyncTransaction:
        """``async with db.transaction() as txn:``; see :meth:`Database.transaction`."""
        return AsyncTransaction(self, sys._getframe(1), wanted(snapshot, read_only, isolation, savepoint), name)

    async def listen(self, channel: str) -> None:
        """See :meth:`Database.listen`."""
        self._channel(channel)
        connection = await self.connect()
        if not self._channels:
            self._worker.watch(self)
        self._channels[channel] = None
        await connection.command(listen_command(channel).encode())

    async def unlisten(self, channel: str) -> None:
        """See :meth:`Database.unlisten`."""
        self._channel(channel)
        if self._channels.pop(channel, 0) is None:
            if not self._channels:
                self._worker.unwatch(self)
            await (await self.connect()).command(b"UN" + listen_command(channel).encode())

    async def notifications(self) -> list[Notify]:
        """See :meth:`Database.notifications`."""
        if self._channels and self.innermost is None:
            connection = await self.connect()
            if not connection.lock.locked():
                self._take(connection)
        return self._taken()

    def close(self) -> None:
        """See :meth:`Database.close`; not awaited, since nothing of it waits."""
        super().close()
        self._drop_watch()

    def finish(self) -> None:
        """See :class:`Session`."""
        self._watched.pgconn.finish()

    def fileno(self) -> int:
        """See :meth:`Database.fileno`."""
        connection = self._connection
        if connection is None or connection.closed:
            self._drop_watch()
        elif self._watch_fd < 0:
            self._watch_fd = os.dup(connection.pgconn.socket)
        return self._watch_fd

    def _drop_watch(self) -> None:
        fd, self._watch_fd = self._watch_fd, -1
        if fd >= 0:
            os.close(fd)

    def left_open(self) -> str | None:
        """See :meth:`Database.left_open`."""
        return None if self._is_another_tasks else super().left_open()

    def roll_back(self, timeout: float) -> None:
        """See :meth:`Database.roll_back`; called by the runtime with the event loop at rest."""
        if self._is_another_tasks:
            return
        blocks = self._forget_blocks()
        if blocks:
            self.end_turn()
        if self._connection is None or self._connection.closed:
            return
        worker: Any = self._worker
        worker.tasks.call(self._roll_back(timeout, blocks))

    async def _roll_back(self, timeout: float, blocks: list[Block["psycopg.AsyncConnection[Any]"]]) -> None:
        connection: AsyncConnection = self._connection
        self._was_reset = True
        if blocks:
            _inside.set(None)
        if not await connection.roll_back(timeout, self._reset, prepared="prepared" in self._keep):
            self._worker.backend_pid = None
        for block in blocks:
            await _call(block.due(False))

    # Connecting

    async def _connect(self) -> AsyncConnection:
        worker, loop = self._worker, asyncio.get_running_loop()
        with Patience(worker, self._conninfo) as patience:
            while True:
                try:
                    return await self._attempt()
                except psycopg.OperationalError as error:
                    worker.backend_pid = None
                    with worker.waiting("database"):
                        passes = await loop.run_in_executor(None, patience.passes, error)
                    seconds, fds = patience.pause(error, passes=passes)
                with worker.waiting("database"):
                    await _readable(fds, seconds)

    async def _attempt(self) -> AsyncConnection:
        failure: psycopg.OperationalError | None = None
        for conninfo, timeout in self._attempts():
            try:
                with self._worker.waiting("database"):
                    pgconn = await waiting.wait_conn_async(generators.connect(conninfo), _NEVER, timeout)
            except errors._WaitTimeout:
                failure = errors.ConnectionTimeout("connection timeout expired")
                continue
            except psycopg.OperationalError as error:
                failure = error
                continue
            connection = AsyncConnection(pgconn)
            try:
                await connection.set_autocommit(True)
                self._drop_watch()
                self._adopt(connection)
                await self._prepare(connection)
                await self._greet(connection)
            except BaseException:
                pgconn.finish()
                raise
            return connection
        raise failure or psycopg.OperationalError("the dsn names no server")

    async def _prepare(self, connection: AsyncConnection) -> None:
        for name, value in self._session_settings(connection):
            try:
                await connection.command(setting_command(name, value).encode())
            except errors.InvalidParameterValue:
                if name != "client_connection_check_interval":
                    raise
                self._checks = False
        for channel in self._channels:
            await connection.command(listen_command(channel).encode())

    async def _greet(self, connection: AsyncConnection) -> None:
        self._was_reset = False
        if self._on_connect is not None:
            try:
                await self._on_connect(connection)
            except BaseException:
                self._was_reset = True
                raise


async def _call(functions: list[Callable[[], Any]]) -> None:
    """Call each, await what is to be awaited, then raise what the first of them to fail has raised."""
    failed: BaseException | None = None
    for function in functions:
        try:
            result: Any = function()
            if asyncio.iscoroutine(result):
                await result
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed


async def _readable(fds: tuple[int, ...], timeout: float) -> None:
    """Sleep until one of *fds* can be read, *timeout* seconds at most."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    for fd in fds:
        loop.add_reader(fd, wake)
    try:
        await asyncio.wait({future}, timeout=timeout)
    finally:
        for fd in fds:
            loop.remove_reader(fd)

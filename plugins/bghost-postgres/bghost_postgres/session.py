"""What transaction blocks need to know of the connection they are on: a worker's database, or a plain connection."""

import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psycopg
from psycopg import IsolationLevel, errors, generators, pq
from psycopg.abc import Params, PQGen, QueryNoTemplate
from psycopg.rows import TupleRow

from bghost import Scope
from bghost_postgres.blocks import Block, Transaction, wanted

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

C = TypeVar("C", bound="psycopg.Connection[Any] | psycopg.AsyncConnection[Any]")

DONE = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)


def command(pgconn: "PGconn", text: bytes) -> PQGen[str]:
    """Run commands that have no parameters; gives the last one's tag."""
    pgconn.send_query(text)
    return tag((yield from generators.execute(pgconn)))


def tag(results: "list[PGresult]") -> str:
    """The last one's command tag.

    :raises psycopg.Error: if one of them is an error.
    """
    for result in results:
        if result.status not in DONE:
            raise errors.error_from_result(result)
    return (results[-1].command_status or b"").decode() if results else ""


class Session(Generic[C]):
    """The blocks that are open on one connection, and what is known of it."""

    innermost: Block[C] | None = None
    """The block that was opened last and is open."""

    queries: int | None = None
    """How many queries there were, but for those that begin and end blocks; ``None`` where nobody counts."""

    ended_at = ""
    """File and line that ended the transaction underneath the open blocks; empty where nobody did, or looks."""

    scoped: list[Any] | None = None
    """The worker's list of what makes a scope when the current one is asked for; ``None`` where blocks do not."""

    @property
    def scope(self) -> Scope | None:
        """The current scope, where a block's belongs."""
        return None

    @property
    def entered(self) -> Scope | None:
        """The scope that was entered last, and is restored by a block's end; none is made."""
        return None

    def status(self, connection: C) -> int:
        """Its transaction status, as it is once what a block has sent is answered."""
        return connection.pgconn.transaction_status

    def settled(self, connection: C) -> None:
        """Have the answer to what a block has sent."""

    @property
    def broken(self) -> bool:
        """Whether the connection is of no use any more."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close the connection without a word to the server."""
        raise NotImplementedError


class SyncSession(Session["psycopg.Connection[Any]"]):
    """A session of plain code."""

    @property
    def current(self) -> "psycopg.Connection[Any]":
        """The connection that an outermost block is to be on; it may have been broken while it was idle."""
        raise NotImplementedError

    def begin(self, connection: "psycopg.Connection[Any]", text: bytes) -> None:
        """Begin a transaction; the answer may be left for later."""
        self.command(connection, text)

    def command(self, connection: "psycopg.Connection[Any]", text: bytes) -> str:
        """Run commands without parameters."""
        with connection.lock:
            return connection.wait(command(connection.pgconn, text))

    def settle(self, connection: "psycopg.Connection[Any]", text: bytes) -> tuple[str, BaseException | None]:
        """Run COMMIT, or its like: the tag, and an interrupt that came meanwhile."""
        return self.command(connection, text), None

    def run(
        self, connection: "psycopg.Connection[Any]", query: QueryNoTemplate, params: Params | None
    ) -> "psycopg.Cursor[TupleRow]":
        """Execute *query* on *connection*."""
        return connection.execute(query, params)

    def transaction(
        self,
        snapshot: bool = False,
        read_only: bool = False,
        isolation: IsolationLevel | str | None = None,
        name: str | None = None,
        savepoint: bool = False,
    ) -> Transaction:
        """``with db.transaction() as txn:`` begins a transaction unless one is open; only its beginner ends it.

        It is READ COMMITTED unless asked for otherwise. A block inside another joins its transaction, which has to be
        as the inner one wants it: less is fine.

        :param snapshot: for a block that reads more than once: all of it sees the data as of its start (REPEATABLE
            READ). Inside an open transaction only while no statement has run there, and no savepoint is open.
        :param read_only: the server refuses writes.
        :param isolation: a level, or its name in SQL.
        :param name: what the transaction's scope is called, and what errors call it.
        :param savepoint: inside an open transaction: what fails in the block is undone with it, and the rest goes on.
        :raises TransactionError: at the block's start, if it asks for more than is open; at its end, if an SQL error
            was swallowed inside, or the transaction was ended underneath; nothing is committed then.
        :raises CommitUnknown: at its end, if there was no answer to COMMIT.
        :raises ValueError: if the isolation level is none.
        """
        return Transaction(self, sys._getframe(1), wanted(snapshot, read_only, isolation, savepoint), name)

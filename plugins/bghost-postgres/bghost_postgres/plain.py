"""Transaction blocks on a psycopg connection that is no worker's: in scripts, and in code that both share."""

import sys
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

import psycopg
from psycopg import IsolationLevel, pq

from bghost_postgres.blocks import Transaction, wanted
from bghost_postgres.session import SyncSession


class Plain(SyncSession):
    """What is open on one connection."""

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
        self._connection = ref(connection)  # which may go while its entry is still here

    @property
    def current(self) -> "psycopg.Connection[Any]":
        """See :class:`SyncSession`."""
        connection = self._connection()
        assert connection is not None
        return connection

    @property
    def broken(self) -> bool:
        """See :class:`Session`."""
        return self.current.pgconn.status == pq.ConnStatus.BAD

    def finish(self) -> None:
        """See :class:`Session`."""
        self.current.close()


_SESSIONS: Final["WeakKeyDictionary[psycopg.Connection[Any], Plain]"] = WeakKeyDictionary()


def transaction(
    connection: "psycopg.Connection[Any]",
    snapshot: bool = False,
    read_only: bool = False,
    isolation: IsolationLevel | str | None = None,
    name: str | None = None,
    savepoint: bool = False,
) -> Transaction:
    """``with bghost_postgres.transaction(conn) as txn:`` is ``db.transaction()`` for any psycopg connection.

    On one that is not in autocommit, a transaction that a statement has begun is one that was begun by hand: joined,
    and not ended. Nobody sees there who ended a transaction underneath a block, only that it is gone. Parameters and
    errors are those of :meth:`Database.transaction`. Runs in: any process.
    """
    session = _SESSIONS.get(connection)
    if session is None:
        session = _SESSIONS[connection] = Plain(connection)
    return Transaction(session, sys._getframe(1), wanted(snapshot, read_only, isolation, savepoint), name)

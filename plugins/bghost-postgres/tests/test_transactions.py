"""Transactions on a real server: who begins, who ends, and that no work is lost in silence."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import psycopg
import pytest
from support import SLOW

from bghost import Canceled, ConfigError
from bghost_postgres import (
    AsyncConnection,
    CommitUnknown,
    Database,
    Transaction,
    TransactionError,
    connect,
    transaction,
)
from bghost_postgres.connection import Connection
from bghost_postgres.extension import PostgresSettings

Session = psycopg.Connection[Any]
Worker = Any  # that of conftest.py


@pytest.fixture
def db(worker: Worker, database_uri: str) -> Database:
    """A database with a table ``t``, empty."""
    db = connect(worker, database_uri)
    db.execute("create table t (n int primary key)")
    return db


HOLD: Final = "select pg_advisory_lock(1)"
LET_GO: Final = "select pg_advisory_unlock(1)"


def later(function: Callable[..., object], *args: object) -> None:
    """Call *function* when what has seen an interrupt has had time to do the wrong thing, if that is what it does."""
    threading.Timer(0.1, function, args).start()


def rows(session: Session) -> list[int]:
    return [n for (n,) in session.execute("select n from t order by n")]


IDLE: Final = psycopg.pq.TransactionStatus.IDLE
INTRANS: Final = psycopg.pq.TransactionStatus.INTRANS


def test_connect_touches_no_network(worker: Worker) -> None:
    """The first use connects, not connect()."""
    connect(worker, "host=/nowhere")
    assert worker.participants


def test_a_connection_says_whose_it_is(db: Database, worker: Worker, other: Session) -> None:
    """Application name and backend pid are the worker's; the text of a query that takes a while is its activity."""
    worker.activities.clear()
    other.execute(HOLD)
    worker.on_activity = lambda: other.execute(LET_GO)  # it takes until it is shown
    (name, _) = db.execute("select current_setting('application_name'), pg_advisory_lock(1)").fetchall()[0]
    worker.on_activity = lambda: None
    assert name == "bghost: probe (test)"
    assert worker.activities == ["select current_setting('application_name'), pg_advisory_lock(1)"]
    with pytest.raises(psycopg.errors.DivisionByZero):
        db.execute("select 1 / 0")
    assert worker.activities[-1] == "select 1 / 0"  # what failed is named, be it ever so quick
    assert worker.backend_pid == db.connection.info.backend_pid
    assert db.execute("show client_connection_check_interval").fetchone() == ("500ms",)


def test_settings_are_the_sessions(database_uri: str, make_worker: Any) -> None:
    """[postgres] statement_timeout, search_path and role hold for each connection; keywords go over the dsn."""
    settings = PostgresSettings(dsn=database_uri, role="postgres", statement_timeout=1.5, search_path="a, b")
    with contextlib.closing(make_worker(settings)) as worker:
        db = connect(worker, options="-c work_mem=1MB")
        shown = db.execute(
            "select current_setting('statement_timeout'), current_setting('search_path'), current_setting('work_mem')"
        )
        assert shown.fetchone() == ("1500ms", "a, b", "1MB")


def test_outside_of_transactions_each_statement_commits(db: Database, other: Session) -> None:
    """Autocommit, always."""
    db.execute("insert into t values (1)")
    assert rows(other) == [1]


def test_a_block_commits_at_its_end(db: Database, other: Session) -> None:
    """Not before; and the connection is idle after it."""
    with db.transaction() as txn:
        txn.execute("insert into t values (%s)", [1])
        db.execute("insert into t values (2)")  # belongs to it
        assert rows(other) == []
    assert rows(other) == [1, 2]
    assert db.connection.info.transaction_status is IDLE


def test_a_block_that_an_exception_leaves_rolls_back(db: Database, other: Session) -> None:
    """The exception goes on, as it is."""
    with pytest.raises(ValueError, match="mine"), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        raise ValueError("mine")
    assert rows(other) == []
    assert db.connection.info.transaction_status is IDLE


def test_nested_blocks_join(db: Database, other: Session) -> None:
    """Only the outermost ends the transaction."""
    with db.transaction() as outer:
        outer.execute("insert into t values (1)")
        with db.transaction() as inner:
            inner.execute("insert into t values (2)")
        assert rows(other) == []
    assert rows(other) == [1, 2]


def test_a_swallowed_sql_error_is_raised_at_the_end(db: Database, other: Session) -> None:
    """psycopg's own block would end without exception and without rows."""
    with pytest.raises(TransactionError, match="swallowed.*division by zero"), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        with contextlib.suppress(psycopg.Error):
            txn.execute("select 1 / 0")
    assert rows(other) == []
    assert db.connection.info.transaction_status is IDLE


def test_a_swallowed_sql_error_is_raised_at_the_end_of_a_joined_block(db: Database) -> None:
    """The block in which it happened says so."""
    with pytest.raises(TransactionError, match="swallowed"), db.transaction():
        with db.transaction() as inner, contextlib.suppress(psycopg.Error):
            inner.execute("select 1 / 0")
        pytest.fail("not reached")


def test_a_failed_joined_block_fails_the_whole(db: Database, other: Session) -> None:
    """Caught outside of it, the transaction takes no more statements, and its end says why nothing is committed."""
    with pytest.raises(TransactionError, match="ValueError: inner; that was swallowed") as end, db.transaction() as txn:
        txn.execute("insert into t values (1)")
        with contextlib.suppress(ValueError), db.transaction():
            raise ValueError("inner")
        with pytest.raises(TransactionError, match=r"failed in the block opened at .*s.py:\d+: ValueError"):
            txn.execute("insert into t values (2)")
        with pytest.raises(TransactionError, match="ValueError: inner"):
            db.execute("insert into t values (3)")
        with pytest.raises(TransactionError, match="ValueError: inner"), db.transaction():
            pytest.fail("not reached")
    assert "nothing is committed" in str(end.value)
    assert rows(other) == []


def test_a_transaction_begun_by_hand_is_joined_and_left_open(db: Database, other: Session) -> None:
    """Who began it ends it: not the block."""
    db.execute("begin")
    with db.transaction() as txn:
        txn.execute("insert into t values (1)")
    assert rows(other) == []
    with pytest.raises(ValueError, match="x"), db.transaction():
        raise ValueError("x")
    assert db.connection.info.transaction_status is not IDLE
    db.execute("commit")
    assert rows(other) == [1]


def test_a_transaction_that_was_ended_underneath_is_an_error(db: Database, other: Session) -> None:
    """Somebody committed inside the block: its end names the block."""
    underneath = pytest.raises(TransactionError, match=r"opened at .*test_transactions.py:\d+ was ended underneath")
    with underneath, db.transaction() as txn:
        txn.execute("insert into t values (1)")
        db.connection.execute("commit")
    assert rows(other) == [1]


def test_a_constraint_that_fails_at_commit_is_raised(db: Database, other: Session) -> None:
    """As psycopg raises it, and nothing stays open."""
    db.execute("alter table t add column parent int references t deferrable initially deferred")
    with pytest.raises(psycopg.errors.ForeignKeyViolation), db.transaction() as txn:
        txn.execute("insert into t values (1, 99)")
    assert rows(other) == []
    assert db.connection.info.transaction_status is IDLE


def test_what_is_left_open_is_told_and_rolled_back(db: Database, other: Session) -> None:
    """The runtime asks at each tick's end: a block with its line, or a transaction begun by hand."""
    assert db.left_open() is None
    left = db.transaction().__enter__()
    left.execute("insert into t values (1)")
    assert "test_transactions.py:" in (db.left_open() or "")
    db.roll_back(2.0)
    assert db.left_open() is None
    with db.transaction() as txn:
        with pytest.raises(TransactionError, match="is not open"):
            left.execute("insert into t values (1)")
        left.__exit__(ValueError, ValueError(), None)  # as when its generator is collected at last: no affair of txn
        txn.execute("insert into t values (3)")
    db.execute("begin")
    assert "by hand" in (db.left_open() or "")
    db.roll_back(2.0)
    assert db.left_open() is None
    db.execute("insert into t values (2)")
    assert rows(other) == [2, 3]


def test_a_block_is_of_no_use_after_its_end(db: Database) -> None:
    """It refuses, and names the line that opened it."""
    with db.transaction() as txn:
        pass
    with pytest.raises(TransactionError, match="is not open"):
        txn.execute("select 1")


@pytest.mark.usefixtures("patient")
def test_a_cancel_ends_a_query_and_the_connection_lives(db: Database, worker: Worker) -> None:
    """What runs is cancelled on the server; the block rolls back; the same session goes on."""
    backend = worker.backend_pid
    with pytest.raises(Canceled), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        worker.ring(Canceled("canceled by SIGINT"))
        txn.execute("select pg_sleep(600)")
    assert db.execute("select count(*), pg_backend_pid() from t").fetchone() == (0, backend)


@pytest.mark.usefixtures("patient")
def test_a_cancel_waits_for_the_answer_to_commit(db: Database, worker: Worker, other: Session) -> None:
    """It is raised once the work is committed."""
    db.execute(LINGER.format("pg_advisory_xact_lock(1)"))
    db.execute(SLOW_COMMIT)
    other.execute(HOLD)
    worker.on_wakeup = lambda: later(other.execute, LET_GO)
    with pytest.raises(Canceled), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        worker.ring(Canceled("canceled by SIGINT"))
    assert rows(other) == [1]
    assert db.connection.info.transaction_status is IDLE


def test_a_broken_connection_is_replaced_at_its_next_use(db: Database, worker: Worker, other: Session) -> None:
    """The session was terminated while idle: nobody notices."""
    backend = worker.backend_pid
    other.execute("select pg_terminate_backend(%s, 5000)", [backend])
    db.execute("insert into t values (1)")
    assert worker.backend_pid not in (backend, None)
    other.execute("select pg_terminate_backend(%s, 5000)", [worker.backend_pid])
    with db.transaction() as txn:
        txn.execute("insert into t values (2)")
    assert rows(other) == [1, 2]


def test_each_new_connection_is_greeted(worker: Worker, database_uri: str, other: Session) -> None:
    """on_connect is called before it is used, also where it replaces a broken one."""
    greeted: list[int] = []
    db = connect(worker, database_uri, on_connect=lambda connection: greeted.append(connection.info.backend_pid))
    assert greeted == []
    for _ in range(2):
        db.execute("select 1")
        assert greeted[-1:] == [worker.backend_pid]
        other.execute("select pg_terminate_backend(%s, 5000)", [worker.backend_pid])
    assert len(set(greeted)) == 2


def test_psycopgs_own_block_inside_is_a_savepoint(db: Database, other: Session) -> None:
    """Also as the first thing in a block, on a connection that was had before, while BEGIN is under way."""
    connection = db.connection
    with db.transaction():
        with contextlib.suppress(ValueError), connection.transaction():
            connection.execute("insert into t values (1)")
            raise ValueError
        seen = [connection.info.transaction_status]
        connection.execute("insert into t values (2)")
    with db.transaction() as txn:
        seen.append(txn.connection.info.transaction_status)
    with db.transaction():
        seen.append(db.connection.info.transaction_status)
    with db.transaction():
        pass
    assert [*seen, connection.info.transaction_status] == [INTRANS, INTRANS, INTRANS, IDLE]
    assert rows(other) == [2]


def test_a_connection_that_breaks_in_a_block_loses_the_block(db: Database, worker: Worker, other: Session) -> None:
    """No other connection takes its place inside; the next block has one."""
    with pytest.raises(psycopg.OperationalError), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        other.execute("select pg_terminate_backend(%s, 5000)", [worker.backend_pid])
        with contextlib.suppress(psycopg.OperationalError):
            txn.execute("insert into t values (2)")
        db.execute("insert into t values (3)")
    assert rows(other) == []
    with db.transaction() as txn:
        txn.execute("insert into t values (4)")
    assert rows(other) == [4]


def test_a_lost_connection_is_not_a_good_end(db: Database, worker: Worker, other: Session) -> None:
    """Swallowed, it is raised at the block's end."""
    with pytest.raises(TransactionError, match="connection was lost"), db.transaction() as txn:
        other.execute("select pg_terminate_backend(%s, 5000)", [worker.backend_pid])
        with contextlib.suppress(psycopg.OperationalError):
            txn.execute("select 1")


def test_a_cursor_of_a_lost_connection_is_no_news(db: Database, worker: Worker, other: Session) -> None:
    """The block raises what has happened first; the runtime's rollback of a block that was left is no error."""
    terminate = "select pg_terminate_backend(%s, 5000)"
    with pytest.raises(psycopg.OperationalError), db.transaction() as txn:
        txn.scope.enter(db.connection.cursor("many")).execute("select generate_series(1, 10)")
        other.execute(terminate, [worker.backend_pid])
        txn.execute("select 1")
    left = db.transaction().__enter__()
    left.scope.enter(db.connection.cursor("many")).execute("select generate_series(1, 10)")
    other.execute(terminate, [worker.backend_pid])
    with contextlib.suppress(psycopg.OperationalError):
        left.execute("select 1")
    db.roll_back(2.0)
    assert db.execute("select 1").fetchone() == (1,)


def test_a_child_is_refused(db: Database, other: Session) -> None:
    """A forked process can use neither database nor connection, nor end the parent's session by closing them."""
    connection = db.connection
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        said = []
        for use in (lambda: db.execute("select 1"), lambda: connection.execute("select 1"), db.transaction().__enter__):
            try:
                use()
            except psycopg.InterfaceError as error:
                said.append(str(os.getppid()) in str(error) and str(os.getpid()) in str(error))
        connection.close()
        db.close()
        os.write(write, repr(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert answer.read() == "[True, True, True]"
    os.waitpid(pid, 0)
    db.execute("insert into t values (1)")
    assert rows(other) == [1]


def test_closed_with_the_scope(db: Database, worker: Worker, other: Session) -> None:
    """What belongs to the scope ends with it: session, backend pid, participant."""
    backend = worker.backend_pid
    worker.root.close()
    other.execute("select pg_terminate_backend(pid, 5000) from pg_stat_activity where pid = %s", [backend])
    assert worker.participants == []
    assert worker.backend_pid is None
    with pytest.raises(psycopg.InterfaceError, match="closed"):
        db.execute("select 1")


def test_what_the_server_refuses_is_an_error(worker: Worker, postgres_uri: str) -> None:
    """An unknown database or role is not waited for."""
    db = connect(worker, postgres_uri, dbname="nowhere")
    with pytest.raises(psycopg.OperationalError, match='database "nowhere" does not exist'):
        db.execute("select 1")
    db = connect(worker, postgres_uri, user="nobody_here")
    with pytest.raises(psycopg.OperationalError, match='role "nobody_here" does not exist'):
        db.execute("select 1")


@pytest.mark.parametrize(
    "dsn", ["postgresql://u:secret@[::1", "host=h password=secret x", "postgresql://u:secret@h:port/d"]
)
def test_a_dsn_that_does_not_parse_shows_no_password(worker: Worker, dsn: str) -> None:
    """The error names no word of it."""
    with pytest.raises(ConfigError) as refused:
        connect(worker, dsn)
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="dsn is not a connection string") as invalid:
        PostgresSettings(dsn=dsn)
    assert "secret" not in str(invalid.value)


def test_psycopgs_own_ways_work_on_the_connection(db: Database, other: Session) -> None:
    """Its transaction(), a server-side cursor, COPY, a pipeline: only the wait is another."""
    connection = db.connection
    assert isinstance(connection, Connection)
    with connection.transaction(), connection.cursor().copy("copy t from stdin") as copy:
        for n in range(1000):
            copy.write_row([n])
    with connection.transaction(), connection.cursor("many") as cursor:
        cursor.execute("select n from t order by n")
        assert [n for (n,) in cursor] == list(range(1000))
    with connection.pipeline():
        connection.execute("delete from t where n > 1")
        last = connection.execute("select count(*) from t")
    assert last.fetchone() == (2,)
    assert rows(other) == [0, 1]


# What a block asks for


def test_a_plain_block_is_read_committed(db: Database) -> None:
    """Whatever the server's default is."""
    db.execute("set default_transaction_isolation = 'serializable'")
    with db.transaction() as txn:
        assert txn.execute("show transaction_isolation").fetchone() == ("read committed",)
    with db.transaction(isolation="Repeatable  read") as txn:
        assert txn.execute("show transaction_isolation").fetchone() == ("repeatable read",)
    with db.transaction(isolation=psycopg.IsolationLevel.SERIALIZABLE) as txn:
        assert txn.execute("show transaction_isolation").fetchone() == ("serializable",)


def test_a_snapshot_is_as_of_the_blocks_start(db: Database, other: Session) -> None:
    """Not of its first statement; a plain block sees what is committed meanwhile."""
    with db.transaction(snapshot=True) as txn:
        other.execute("insert into t values (1)")
        assert txn.execute("select count(*) from t").fetchone() == (0,)
    with db.transaction() as txn:
        other.execute("insert into t values (2)")
        assert txn.execute("select count(*) from t").fetchone() == (2,)


def test_a_snapshot_is_taken_by_a_joined_block_that_comes_first(db: Database, other: Session) -> None:
    """No statement has run: the transaction is upgraded, for the outer block too."""
    with db.transaction() as outer:
        with db.transaction(snapshot=True):
            other.execute("insert into t values (1)")
        assert outer.execute("select count(*) from t").fetchone() == (0,)
        with db.transaction(snapshot=True) as again:
            assert again.execute("show transaction_isolation").fetchone() == ("repeatable read",)
    with db.transaction(isolation="repeatable read"), db.transaction(snapshot=True) as inner:
        other.execute("insert into t values (2)")
        assert inner.execute("select count(*) from t").fetchone() == (1,)


LINE: Final = r"opened at \S*test_transactions\.py:\d+"


def test_a_snapshot_that_comes_too_late_is_refused(db: Database, other: Session) -> None:
    """The error names both lines; the transaction goes on."""
    with db.transaction() as outer:
        outer.execute("insert into t values (1)")
        late = pytest.raises(TransactionError, match=f"{LINE} asks for REPEATABLE READ .*{LINE}, in which a statement")
        with late, db.transaction(snapshot=True):
            pytest.fail("not reached")
    assert rows(other) == [1]
    with db.transaction(), db.transaction(savepoint=True):
        late = pytest.raises(TransactionError, match=f"{LINE} asks for .* in which a savepoint is open: {LINE}")
        with late, db.transaction(snapshot=True):
            pytest.fail("not reached")


def test_a_block_that_asks_for_a_higher_level_is_refused(db: Database) -> None:
    """Both lines are named; a lower one joins."""
    with db.transaction(isolation="repeatable read"):
        more = pytest.raises(TransactionError, match=f"{LINE} asks for SERIALIZABLE inside the REPEATABLE.*{LINE}")
        with more, db.transaction(isolation="serializable"):
            pytest.fail("not reached")
        with db.transaction(isolation="read committed") as joined:
            assert joined.execute("show transaction_isolation").fetchone() == ("repeatable read",)
    with pytest.raises(ValueError, match="'strong' is none of 'read uncommitted'"):
        db.transaction(isolation="strong")
    with pytest.raises(ValueError, match="a snapshot needs REPEATABLE READ"):
        db.transaction(snapshot=True, isolation="read committed")


def test_a_writer_inside_a_read_only_block_is_refused(db: Database) -> None:
    """Reading joins; a write names both lines, or is the server's own error where the block itself is read-only."""
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), db.transaction(read_only=True) as txn:
        txn.execute("insert into t values (1)")
    both = pytest.raises(TransactionError, match=f"a write in .*{LINE} inside the read-only one {LINE}")
    with both, db.transaction(read_only=True), db.transaction() as inner:
        assert inner.execute("select count(*) from t").fetchone() == (0,)
        inner.execute("insert into t values (1)")
    with db.transaction() as txn, db.transaction(read_only=True):
        pass


def test_a_transaction_begun_by_hand_is_asked_by_the_server(db: Database) -> None:
    """Nobody else knows whether a snapshot comes too late."""
    db.execute("begin")
    with db.transaction(snapshot=True) as txn:
        assert txn.execute("show transaction_isolation").fetchone() == ("repeatable read",)
        with pytest.raises(TransactionError, match="begun by hand"):
            txn.on_commit(lambda: None)
    db.execute("commit")
    db.execute("begin")
    db.execute("select 1")
    with pytest.raises(TransactionError, match=f"{LINE} asks for REPEATABLE READ inside the one begun by hand"):
        db.transaction(snapshot=True).__enter__()
    db.execute("rollback")


# Savepoints


def test_a_savepoint_block_fails_alone(db: Database, other: Session) -> None:
    """What it did is undone, what is around it is committed; so with an SQL error, and with one that was swallowed."""
    with db.transaction() as txn:
        txn.execute("insert into t values (1)")
        with pytest.raises(psycopg.errors.UniqueViolation), db.transaction(savepoint=True) as job:
            job.execute("insert into t values (2)")
            job.execute("insert into t values (1)")
        with pytest.raises(TransactionError, match="swallowed"), db.transaction(savepoint=True) as job:
            job.execute("insert into t values (3)")
            with contextlib.suppress(psycopg.Error):
                job.execute("select 1 / 0")
        with db.transaction(savepoint=True) as job:
            job.execute("insert into t values (4)")
            with contextlib.suppress(ValueError), db.transaction(savepoint=True) as inner:
                inner.execute("insert into t values (5)")
                raise ValueError
    assert rows(other) == [1, 4]


def test_a_savepoint_block_heals_what_has_joined_it(db: Database, other: Session) -> None:
    """A joined block failed inside of it: it says so at its end, and the outermost goes on."""
    with db.transaction() as txn:
        txn.execute("insert into t values (1)")
        said = pytest.raises(TransactionError, match="ValueError: deep; that was swallowed")
        with said, db.transaction(savepoint=True) as middle:
            middle.execute("insert into t values (2)")
            with contextlib.suppress(ValueError), db.transaction():
                raise ValueError("deep")
        txn.execute("insert into t values (3)")
    assert rows(other) == [1, 3]


# Scope and callbacks


def test_the_scope_of_a_block_ends_with_it(db: Database, worker: Worker) -> None:
    """Before COMMIT; a scope that was entered inside and not left is closed, and the one of the start is current."""
    closed: list[str] = []
    with db.transaction(name="batch") as txn:
        txn.scope.callback(lambda: closed.append(db.execute("select 'scope'").fetchall()[0][0]))
        cursor = txn.scope.enter(db.connection.cursor("many"))
        cursor.execute("select generate_series(1, 10)")
        assert txn.scope.path == "probe/batch"
        assert worker.scope is txn.scope
        left = worker.scope.child("left")
        left.__enter__()
    assert closed == ["scope"]
    assert cursor.closed
    assert left.closed
    assert worker.scope is worker.root
    with pytest.raises(RuntimeError, match="a file belonged to scope 'probe/batch', which is closed"):
        txn.scope.check_open("a file")
    with contextlib.suppress(ValueError), db.transaction() as txn:
        worker.scope.child("left").__enter__()
        txn.scope.callback(closed.append, "again")
        raise ValueError
    assert worker.scope is worker.root
    assert closed == ["scope", "again"]


def test_the_scope_of_a_block_is_the_workers_current_one(db: Database, worker: Worker, other: Session) -> None:
    """One for each block, whichever is asked for first; a block that needs none has none."""
    closed: list[str] = []
    with db.transaction(name="outer") as outer:
        with db.transaction():
            pass
        with db.transaction(name="inner"):
            worker.scope.callback(closed.append, "inner")
            assert worker.scope.path == "probe/outer/inner"
        assert closed == ["inner"]
        assert worker.scope is outer.scope
        worker.scope.callback(closed.append, "outer")
    assert closed == ["inner", "outer"]
    with db.transaction(), db.transaction():
        db.execute("select 1")
    assert worker.root.children == []
    db.transaction().__enter__()
    db.roll_back(2.0)
    assert worker.scope is worker.root
    assert worker.root.children == []


def test_a_scope_that_does_not_close_is_an_error(db: Database, other: Session) -> None:
    """Nothing is committed then."""
    with pytest.raises(ExceptionGroup, match="did not close"), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        txn.scope.callback(lambda: 1 / 0)
    assert rows(other) == []


def test_callbacks_follow_the_outcome(db: Database, other: Session) -> None:
    """on_commit when the work can be seen, on_rollback when it is undone; a joined block's with the outermost."""
    said: list[object] = []

    def notes(txn: Transaction, name: str) -> None:
        txn.on_commit(lambda: said.append((name, rows(other))))
        txn.on_rollback(lambda: said.append((name, "undone")))

    with db.transaction() as txn:
        notes(txn, "outer")
        with db.transaction() as inner:
            inner.execute("insert into t values (1)")
            notes(inner, "joined")
        with contextlib.suppress(ValueError), db.transaction(savepoint=True) as job:
            notes(job, "job")
            raise ValueError
        assert said == [("job", "undone")]
        with db.transaction(savepoint=True) as job:
            notes(job, "good job")
    assert said[1:] == [("outer", [1]), ("joined", [1]), ("good job", [1])]
    said.clear()
    with contextlib.suppress(ValueError), db.transaction() as txn:
        notes(txn, "failed")
        raise ValueError
    assert said == [("failed", "undone")]
    said.clear()
    notes(db.transaction().__enter__(), "left")
    db.roll_back(2.0)
    assert said == [("left", "undone")]


def test_a_callback_that_fails_undoes_nothing(db: Database, other: Session) -> None:
    """All are called; the first error is the block's."""
    said: list[str] = []
    with pytest.raises(ZeroDivisionError), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        txn.on_commit(lambda: 1 / 0)
        txn.on_commit(lambda: said.append("second"))
    assert said == ["second"]
    assert rows(other) == [1]


def test_a_transaction_that_was_replaced_underneath_is_an_error(db: Database, other: Session) -> None:
    """Committed and begun anew: it is not the one that was joined; both places are named, the new one is not ended."""
    there = pytest.raises(
        TransactionError, match=rf"{LINE}, in which the block {LINE} ends, was ended .*, at \S*test_tr\S+:\d+"
    )
    with pytest.raises(TransactionError, match="ended underneath"), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        with there, db.transaction() as inner:
            inner.execute("insert into t values (2)")
            db.connection.execute("commit")
            db.connection.execute("begin")
    assert rows(other) == [1, 2]
    assert "by hand" in (db.left_open() or "")
    db.roll_back(2.0)


def test_a_block_that_was_left_open_inside_is_an_error(db: Database, other: Session) -> None:
    """A generator that nobody finished, say: nothing is committed, and the error names both."""
    with pytest.raises(TransactionError, match=f"{LINE} was left open inside .*{LINE}"), db.transaction():
        inner = db.transaction().__enter__()
        inner.execute("insert into t values (1)")
    assert rows(other) == []
    with pytest.raises(TransactionError, match="is not open"):
        inner.execute("select 1")
    with db.transaction() as txn:
        txn.execute("insert into t values (2)")
    assert rows(other) == [2]


def test_a_block_in_a_pipeline_is_refused(db: Database) -> None:
    """With a word on what to do; a pipeline inside a block is fine."""
    with db.connection.pipeline(), pytest.raises(TransactionError, match="open it around the pipeline"):
        db.transaction().__enter__()
    with db.transaction(), db.connection.pipeline():
        db.connection.execute("insert into t values (1)")


# Outside of bghost


def test_a_plain_connection_has_the_same_blocks(other: Session) -> None:
    """Nested, with savepoints, callbacks and a scope; swallowed errors are raised."""
    other.execute("create table u (n int)")
    said: list[str] = []
    with transaction(other) as txn:
        txn.execute("insert into u values (1)")
        txn.on_commit(lambda: said.append("committed"))
        txn.scope.callback(said.append, "closed")
        with contextlib.suppress(ValueError), transaction(other, savepoint=True) as job:
            job.execute("insert into u values (2)")
            raise ValueError
    assert said == ["closed", "committed"]
    with pytest.raises(TransactionError, match="swallowed"), transaction(other) as txn:
        txn.execute("insert into u values (3)")
        with contextlib.suppress(psycopg.Error):
            txn.execute("select 1 / 0")
    with pytest.raises(TransactionError, match="in which a statement has run"), transaction(other) as txn:
        txn.execute("select 1")
        transaction(other, snapshot=True).__enter__()
    assert other.execute("select n from u").fetchall() == [(1,)]


def test_a_plain_connection_without_autocommit(database_uri: str, other: Session) -> None:
    """A transaction that a statement has begun is joined, and not ended; without one the block commits."""
    other.execute("create table u (n int)")
    with psycopg.connect(database_uri) as mine:
        with transaction(mine) as txn:
            txn.execute("insert into u values (1)")
        assert other.execute("select n from u").fetchall() == [(1,)]
        mine.execute("insert into u values (2)")
        with transaction(mine) as txn:
            txn.execute("insert into u values (3)")
        assert other.execute("select count(*) from u").fetchone() == (1,)
        mine.commit()
    assert other.execute("select count(*) from u").fetchone() == (3,)


# The answer to COMMIT

LINGER: Final = """
    create function linger() returns trigger language plpgsql as 'begin perform {}; return null; end'
"""
SLOW_COMMIT: Final = """
    create constraint trigger slow after insert on t deferrable initially deferred
    for each row execute function linger()
"""


@pytest.fixture
def slow_commit(db: Database) -> Iterator[None]:
    """COMMIT of what was inserted into ``t`` takes ten minutes."""
    db.execute(LINGER.format("pg_sleep(600)"))
    db.execute(SLOW_COMMIT)
    yield


@pytest.mark.usefixtures("slow_commit")
def test_a_commit_without_an_answer_is_an_error_of_its_own(db: Database, worker: Worker, database_uri: str) -> None:
    """The session is ended in the COMMIT: nobody knows, and neither callback says otherwise."""
    said: list[str] = []
    backend = worker.backend_pid
    commits = "select pid from pg_stat_activity where pid = %s and (query, state) = ('COMMIT', 'active')"
    end = f"select pg_terminate_backend(pid) from ({commits}) as found"

    def terminate() -> None:
        with psycopg.connect(database_uri, autocommit=True) as session:
            while session.execute(end, [backend]).fetchone() is None:
                pass

    thread = threading.Thread(target=terminate)
    with pytest.raises(CommitUnknown, match="no answer to COMMIT"), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        txn.on_commit(lambda: said.append("committed"))
        txn.on_rollback(lambda: said.append("undone"))
        thread.start()
    thread.join()
    assert said == []
    assert db.execute("select count(*) from t").fetchone() == (0,)


ENDINGS: Final = ("commit", "END", "  prepare transaction 'x'", psycopg.sql.SQL("COMMIT"))


@pytest.mark.usefixtures("patient")
def test_a_cancel_waits_for_what_ends_a_transaction_by_hand(db: Database, worker: Worker, other: Session) -> None:
    """COMMIT and PREPARE TRANSACTION as a statement, psycopg's own commit() and blocks: each is answered first."""
    db.execute(LINGER.format("pg_advisory_xact_lock(1)"))
    db.execute(SLOW_COMMIT)
    worker.on_wakeup = lambda: later(other.execute, LET_GO)
    connection = db.connection

    def block() -> None:
        with connection.transaction():
            connection.execute("insert into t values (%s)", [number])
            worker.ring(Canceled("canceled by SIGINT"))

    for number, end in enumerate([*ENDINGS, connection.commit, block]):
        other.execute(HOLD)
        if end is not block:
            db.execute("begin")
            db.execute("insert into t values (%s)", [number])
            worker.ring(Canceled("canceled by SIGINT"))
        # PREPARE is refused where the server is not set up for it, after the triggers have run.
        with pytest.raises((Canceled, psycopg.errors.ObjectNotInPrerequisiteState)) as raised:
            end() if callable(end) else db.execute(end)  # type: ignore[arg-type]
        assert (raised.type is Canceled) == (end != ENDINGS[2])
        worker.calm()
        assert db.connection.info.transaction_status is IDLE
    assert rows(other) == [0, 1, 3, 4, 5]


@pytest.mark.usefixtures("patient")
def test_a_cancel_waits_for_the_answer_to_rollback(db: Database, worker: Worker) -> None:
    """It is raised then; the connection is neither closed nor is anything cancelled on it."""
    backend = worker.backend_pid
    assert backend is not None
    worker.on_wakeup = lambda: later(os.kill, backend, signal.SIGCONT)
    try:
        with pytest.raises(Canceled) as canceled, db.transaction() as txn:
            txn.execute("insert into t values (1)")
            worker.ring(Canceled("canceled by SIGINT"))
            os.kill(backend, signal.SIGSTOP)  # of this test's own server
            raise ValueError("mine")
    finally:
        os.kill(backend, signal.SIGCONT)
    assert isinstance(canceled.value.__context__, ValueError)
    assert db.execute("select count(*), pg_backend_pid() from t").fetchone() == (0, backend)


@pytest.mark.usefixtures("patient")
def test_a_cancelled_coroutine_waits_for_what_ends_a_transaction_by_hand(
    db: Database, database_uri: str, other: Session
) -> None:
    """The same for a task: it is cancelled once the answer is there; without one it is a CommitUnknown."""
    db.execute(LINGER.format("pg_advisory_xact_lock(1)"))
    db.execute(SLOW_COMMIT)
    other.execute(HOLD)
    waits = "select 1 from pg_locks join pg_stat_activity using (pid) where not granted and query = 'commit'"

    async def commit(number: int) -> None:
        async with await AsyncConnection.connect(database_uri, autocommit=True) as connection:
            await connection.execute("begin")
            await connection.execute("insert into t values (%s)", [number])
            task = asyncio.ensure_future(connection.execute("commit"))
            while not db.execute(waits).fetchall():
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)  # what would end it early has its time
            other.execute(LET_GO)
            await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(commit(1))
    assert db.execute("select n from t").fetchall() == [(1,)]


@pytest.mark.usefixtures("slow_commit")
def test_a_cancel_waits_two_seconds_for_the_answer_to_a_commit_by_hand(db: Database, worker: Worker) -> None:
    """Then it is a CommitUnknown as well."""
    db.execute("begin")
    db.execute("insert into t values (1)")
    worker.ring(Canceled("canceled by SIGINT"))
    with pytest.raises(CommitUnknown, match="did not answer in time"):
        db.execute("commit")
    worker.calm()
    assert db.execute("select count(*) from t").fetchone() == (0,)


@pytest.mark.usefixtures("slow_commit")
def test_a_cancel_waits_two_seconds_for_the_answer_to_commit(db: Database, worker: Worker) -> None:
    """Past that the connection is closed, and the outcome is unknown; the COMMIT is never cancelled."""
    began = time.monotonic()
    with pytest.raises(CommitUnknown, match="did not answer in time"), db.transaction() as txn:
        txn.execute("insert into t values (1)")
        worker.ring(Canceled("canceled by SIGINT"))
    assert 1.9 < time.monotonic() - began < 2 + 8 * SLOW

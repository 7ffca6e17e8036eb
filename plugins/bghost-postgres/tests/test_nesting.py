"""Random nestings of blocks, statements, errors and cancels on a real server, against a model in Python."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bghost import Canceled
from bghost_postgres import Database, TransactionError, connect

Session = psycopg.Connection[Any]
Worker = Any  # that of conftest.py
IDLE: Final = psycopg.pq.TransactionStatus.IDLE


class Boom(Exception):
    """An author's own error."""


@dataclass
class Block:
    """A block, what runs in it, and whether an error that leaves it is caught right outside."""

    snapshot: bool
    savepoint: bool
    caught: bool
    steps: "list[Any]" = field(default_factory=list)


STEPS: Final = st.sampled_from(["insert", "insert", "read", "boom", "swallowed", "sql error", "cancel"])


def blocks(steps: st.SearchStrategy[Any]) -> st.SearchStrategy[Block]:
    return st.builds(Block, st.booleans(), st.booleans(), st.booleans(), st.lists(STEPS | steps, max_size=4))


TREES: Final = st.recursive(blocks(st.nothing()), blocks, max_leaves=6)


class Model:
    """What has to become of a tree: the rows that are committed, and the error that leaves it."""

    def __init__(self) -> None:
        self.next = 0
        self.rows: list[int] = []
        self.touched = False  # a statement has run in the transaction
        self.repeatable = False
        self.broken = False  # the server takes no statement until a rollback
        self.failed = False  # a block that joined has failed: bghost takes none

    def run(self, block: Block, depth: int = 0, savepoints: int = 0) -> type[BaseException] | None:
        """The type of the error that leaves *block*."""
        if depth == 0:
            self.rows, self.touched, self.repeatable = [], block.snapshot, block.snapshot
            self.broken = self.failed = False
        else:
            if self.failed or self.broken:
                return TransactionError
            if block.snapshot and not self.repeatable:
                if self.touched or savepoints:
                    return TransactionError
                self.repeatable = True
        own = depth == 0 or block.savepoint
        before = [*self.rows]
        raised = self.steps(block, depth, savepoints + (depth > 0 and block.savepoint))
        if raised is None and (self.broken or (own and self.failed)):
            raised = TransactionError
        if raised is not None:
            if own:
                self.rows, self.broken, self.failed = before, False, False
            else:
                self.failed = True
        return raised

    def steps(self, block: Block, depth: int, savepoints: int) -> type[BaseException] | None:
        for step in block.steps:
            raised: type[BaseException] | None = None
            if isinstance(step, Block):
                raised = self.run(step, depth + 1, savepoints)
                if step.caught and raised is not None:
                    raised = None
            elif step == "boom":
                raised = Boom
            elif self.failed:
                raised = None if step == "swallowed" else TransactionError
                if step == "insert":
                    self.next += 1
            elif self.broken:
                refused = Canceled if step == "cancel" else psycopg.errors.InFailedSqlTransaction
                raised = None if step == "swallowed" else refused
                if step == "insert":
                    self.next += 1
            else:
                self.touched = True
                if step == "insert":
                    self.next += 1
                    self.rows.append(self.next)
                elif step == "swallowed":
                    self.broken = True
                elif step == "sql error":
                    self.broken = True
                    raised = psycopg.errors.DivisionByZero
                elif step == "cancel":
                    self.broken = True
                    raised = Canceled
            if raised is not None:
                return raised
        return None


class Real:
    """The same on a server."""

    def __init__(self, db: Database, worker: Worker) -> None:
        self.db = db
        self.worker = worker
        self.next = 0

    def run(self, block: Block) -> None:
        with self.db.transaction(snapshot=block.snapshot, savepoint=block.savepoint) as txn:
            for step in block.steps:
                if isinstance(step, Block):
                    with contextlib.suppress(*([psycopg.Error, Boom, Canceled] if step.caught else [])):
                        self.run(step)
                elif step == "insert":
                    self.next += 1
                    txn.execute("insert into t values (%s)", [self.next])
                elif step == "read":
                    self.db.execute("select count(*) from t")
                elif step == "boom":
                    raise Boom
                elif step == "swallowed":
                    with contextlib.suppress(psycopg.Error):
                        txn.execute("select 1 / 0")
                elif step == "sql error":
                    txn.execute("select 1 / 0")
                else:
                    self.worker.ring(Canceled("canceled by SIGINT"))
                    try:
                        txn.execute("select pg_sleep(600)")
                    finally:
                        self.worker.calm()


@pytest.fixture
def database(database_uri: str, worker: Worker) -> Iterator[tuple[Database, Worker, Session]]:
    with psycopg.connect(database_uri, autocommit=True) as other:
        other.execute("create table t (n int primary key)")
        yield connect(worker, database_uri), worker, other


@pytest.mark.usefixtures("patient")
@settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(tree=TREES)
def test_any_nesting_does_what_the_model_says(database: tuple[Database, Worker, Session], tree: Block) -> None:
    """What is committed, which error comes out, and a connection that is idle afterwards: the same one."""
    db, worker, other = database
    other.execute("truncate t")
    db.execute("select 1")
    backend = worker.backend_pid
    model = Model()
    expected = model.run(tree)
    raised: BaseException | None = None
    try:
        Real(db, worker).run(tree)
    except (psycopg.Error, Boom, Canceled) as error:
        raised = error
    assert type(raised) is (expected or type(None)), raised
    assert [n for (n,) in other.execute("select n from t order by n")] == ([] if expected else model.rows)
    assert db.connection.info.transaction_status is IDLE
    assert db.innermost is None
    assert worker.scope is worker.root
    assert worker.backend_pid == backend

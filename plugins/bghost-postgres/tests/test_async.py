"""Coroutines on a real server: the same blocks, awaited; a stop or a cancel is the task's cancellation."""

import os
import signal
import textwrap
from typing import Any, Final

import pgkit
import psycopg
from support import Host, Sandbox, until

Session = psycopg.Connection[Any]

TABLES: Final = "create table t (n int primary key)"

SETUP: Final = """\
@bghost.hookimpl
async def bghost_setup(self, worker):
    self.db = bghost_postgres.connect_async(worker)
    bghost_postgres.aio.CANCEL_LIMIT = 60.0  # the server may get no processor for longer than two seconds
    self.ticks = 0
    await self.more(worker)

async def more(self, worker):
    pass

"""


def start(sandbox: Sandbox, uri: str, body: str) -> Host:
    """A host with one async worker ``probe``; *body* is the rest of its class."""
    return pgkit.start(sandbox, SETUP + textwrap.dedent(body), "--set", f"postgres.dsn={uri}")


def rows(session: Session) -> list[int]:
    return [n for (n,) in session.execute("select n from t order by n")]


BLOCKS: Final = """
    @bghost.hookimpl
    async def bghost_tick(self, worker):
        db, said = self.db, []
        async with db.transaction(name="outer") as txn:
            await txn.execute("insert into t values (1)")
            async def note():
                said.append("committed")
            txn.on_commit(note)
            txn.scope.callback(said.append, "closed")
            with contextlib.suppress(psycopg.Error):
                async with db.transaction(savepoint=True) as job:
                    await job.execute("insert into t values (2)")
                    await job.execute("insert into t values (1)")
            async with db.transaction():
                await db.execute("insert into t values (3)")
        assert said == ["closed", "committed"], said
        try:
            async with db.transaction() as txn:
                await txn.execute("insert into t values (4)")
                with contextlib.suppress(psycopg.Error):
                    await txn.execute("select 1 / 0")
        except bghost_postgres.TransactionError as error:
            assert "swallowed" in str(error) and "probe_kind.py:" in str(error), error
        else:
            assert False
        async with db.transaction(snapshot=True) as txn:
            assert await (await txn.execute("show transaction_isolation")).fetchone() == ("repeatable read",)
            async def another():
                await db.execute("insert into t values (5)")
            task = asyncio.get_running_loop().create_task(another(), context=__import__("contextvars").Context())
            await asyncio.sleep(0.05)
            assert not task.done()
        await task
        worker.log.info("all is well")
        return bghost.UNTIL_WOKEN
"""


def test_blocks_of_coroutines(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """Nested, with savepoints, scope and callbacks; another task waits until the block is over."""
    host = start(sandbox, database_uri, BLOCKS)
    host.wait_line("all is well|Error")
    assert "AssertionError" not in host.text()
    assert rows(other) == [1, 3, 5]


QUERY: Final = """
    @bghost.hookimpl
    async def bghost_tick(self, worker):
        async with self.db.transaction() as txn:
            await txn.execute("insert into t values (1)")
            await txn.execute("select pg_sleep(600)")
"""


def test_a_cancel_and_a_stop_of_a_coroutine_in_a_query(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """The cancel is recovered on the same session; a stop ends it at once, it takes no harder one."""
    host = start(sandbox, database_uri, QUERY)
    row = host.wait_row("probe", lambda row: row["activity"] == "select pg_sleep(600)")
    assert row["pid"]
    os.kill(row["pid"], signal.SIGINT)
    host.wait_row("probe", lambda row: row["errors"] == 1)
    again = host.wait_row("probe", lambda row: row["activity"] == "select pg_sleep(600)")
    assert again["backend_pid"] == row["backend_pid"]
    host.signal(signal.SIGINT)
    assert host.wait() == 0
    assert "stopping, immediate" not in host.text()
    sleeping = "select 1 from pg_stat_activity where datname = current_database() and query ~ '^select pg_sleep'"
    until(lambda: other.execute(sleeping).rowcount == 0)
    assert rows(other) == []


LISTENER: Final = """
    async def more(self, worker):
        await self.db.listen("Jobs")

    @bghost.hookimpl
    async def bghost_tick(self, worker):
        for note in await self.db.notifications():
            worker.log.info("got {}, woken by {}", note.payload, sorted(worker.woken))
        return bghost.UNTIL_WOKEN
"""


def test_notifications_wake_a_coroutine(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """Also over another connection than the first."""
    host = start(sandbox, database_uri, LISTENER)
    host.wait_row("probe", lambda row: row["ticks"] == 1)  # before that it would have the notification unwoken
    other.execute("""notify "Jobs", 'one'""")
    host.wait_line(r"got one, woken by \['notify'\]")
    backend = host.row("probe")["backend_pid"]
    other.execute("select pg_terminate_backend(%s, 5000)", [backend])
    host.wait_row("probe", lambda row: row["backend_pid"] not in (None, backend))
    until(lambda: _heard(other, host), 10)


def _heard(session: Session, host: Host) -> bool:
    session.execute("""notify "Jobs", 'two'""")
    return "got two" in host.text()


LEFT: Final = """
    @bghost.hookimpl
    async def bghost_tick(self, worker):
        self.ticks += 1
        if self.ticks == 1:
            await self.db.transaction().__aenter__()
            await self.db.execute("insert into t values (1)")
        else:
            async with self.db.transaction() as txn:
                await txn.execute("insert into t values (2)")
            worker.log.info("all is well")
            return bghost.UNTIL_WOKEN
"""


def test_what_a_coroutine_leaves_open(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """It is rolled back at the tick's end, with a warning, and the next block has its turn."""
    host = start(sandbox, database_uri, LEFT)
    host.wait_line(r"a transaction, opened at .*probe_kind\.py:\d+")
    host.wait_line("all is well")
    assert rows(other) == [2]

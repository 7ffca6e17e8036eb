"""worker_spi as a user meets it: on a real server, through the commands. WS-n: cases of the original's behaviour."""

import os
import re
import signal
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import psycopg
import pytest
from psycopg import sql
from support import Host, Sandbox, until

from bghost_postgres.testing import Home


class Server(NamedTuple):
    """The embedded server below a data directory."""

    data_dir: str
    uri: str


class Database:
    """A database, and a session in it."""

    def __init__(self, name: str, uri: str) -> None:
        self.name: Final = name
        self.uri: Final = psycopg.conninfo.make_conninfo(uri, dbname=name)
        self.session: Final = psycopg.connect(self.uri, autocommit=True)

    def execute(self, query: str, *parameters: object) -> None:
        self.session.execute(query, parameters or None)

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self.session.execute(query, parameters or None).fetchall()

    def counted(self, index: int) -> list[tuple[str, int]]:
        """All rows of a worker's table."""
        table = sql.Identifier(f"schema{index}", "counted")
        return self.session.execute(
            sql.SQL("select type, value from {} order by type desc, value").format(table)
        ).fetchall()

    def add(self, index: int, type: str, value: int | None) -> None:
        table = sql.Identifier(f"schema{index}", "counted")
        self.session.execute(sql.SQL("insert into {} (type, value) values (%s, %s)").format(table), [type, value])

    def workers(self) -> list[tuple[str, str, str]]:
        """The sessions of workers in the whole server: application name, database, role."""
        return self.rows(
            "select application_name, datname, usename from pg_stat_activity"
            " where application_name like 'bghost: %%' order by 1"
        )


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """An embedded server, kept from the first test to the last, so that no host starts and stops it."""
    home = Home.make()
    with home.kept_server() as uri:
        yield Server(home.env["BGHOST_DATA_DIR"], uri)
    home.remove()


@pytest.fixture
def database(server: Server, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database of this test's own; dropped, sessions and all, at its end."""
    name = request.node.name.removeprefix("test_")[:40]
    with psycopg.connect(server.uri, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        database = Database(name, server.uri)
        try:
            yield database
        finally:
            database.session.close()
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


class Spi:
    """A sandbox whose hosts find the server of these tests, with a config file for worker_spi."""

    def __init__(self, sandbox: Sandbox, server: Server, database: Database) -> None:
        sandbox.env["BGHOST_DATA_DIR"] = server.data_dir
        self.sandbox: Final = sandbox
        self.database: Final = database
        self.configure()

    def configure(self, **settings: object) -> None:
        """Write the config file; naptime is an hour where nothing else is said, so that nothing happens by itself."""
        settings = {"database": self.database.name, "naptime": 3600, "total_workers": 1, **settings}
        lines = [f"{key} = {value!r}" for key, value in settings.items() if value is not None]
        self.sandbox.config("[kind.worker_spi]\n" + "\n".join(lines) + "\n")

    def start(self, *args: str) -> Host:
        """A host that runs worker_spi, all its workers ready."""
        host = self.sandbox.start_host("run", "worker_spi", *args)
        host.wait_answering()
        host.client.wait("worker_spi")
        return host


@pytest.fixture
def spi(database: Database, server: Server, sandbox: Sandbox) -> Spi:
    return Spi(sandbox, server, database)


def launch(host: Host, *args: str) -> str:
    """Launch one more worker and wait until it is ready; its name."""
    name = f"more{len(host.client.ps())}"
    done = host.bghost("launch", "worker_spi", "--name", name, "--wait", *args)
    assert done.code == 0, done.stderr
    return name


def test_launch_makes_schema_and_table(spi: Spi, database: Database) -> None:
    """WS-1: a worker launched for index 4 has a process, and makes schema4.counted with its check and unique index."""
    host = spi.start()
    name = launch(host, "--arg", "index=4")
    assert host.row(name)["pid"]
    assert database.counted(4) == []
    with pytest.raises(Exception, match="check constraint"):
        database.add(4, "other", 1)
    database.add(4, "total", 1)
    with pytest.raises(Exception, match="counted_unique_total"):
        database.add(4, "total", 1)


def test_reload_makes_a_cycle_at_once(spi: Spi, database: Database) -> None:
    """WS-2: however long naptime is, a reload is followed by a work cycle: deltas go, the total grows."""
    host = spi.start()
    launch(host, "--arg", "index=4")
    database.add(4, "total", 0)
    database.add(4, "delta", 1)
    assert host.bghost("reload").code == 0
    until(lambda: database.counted(4) == [("total", 1)], what="the delta counted")
    host.wait_line(r"worker_spi dynamic worker 4: count in schema4\.counted is now 1$")


def test_ps_shows_what_an_idle_worker_waits_for(spi: Spi) -> None:
    """WS-3: an idle worker waits for WorkerSpiMain, and has told the pid of its session in the server."""
    host = spi.start()
    row = host.wait_row("worker_spi.1", lambda row: row["wait"] == "WorkerSpiMain" and row["doing"] == "waiting")
    assert row["state"] == "ready"
    pids = spi.database.rows("select pid from pg_stat_activity where application_name like 'bghost: worker_spi.1 %%'")
    assert pids == [(row["backend_pid"],)]


def test_total_workers_says_how_many_start(spi: Spi, database: Database) -> None:
    """WS-4: total_workers = 3 starts worker_spi.1 to worker_spi.3, each with a session in the configured database."""
    spi.configure(total_workers=3)
    host = spi.start()
    names = [f"worker_spi.{n}" for n in (1, 2, 3)]
    assert [(row["name"], row["kind"]) for row in host.client.ps()] == [(name, "worker_spi") for name in names]
    for name in names:
        host.wait_row(name, lambda row: row["wait"] == "WorkerSpiMain")
    assert database.workers() == [(f"bghost: {name} (default)", database.name, "postgres") for name in names]


def test_database_and_role_of_one_worker(spi: Spi, database: Database) -> None:
    """WS-5: a launch may name database and role for its worker alone."""
    database.execute("create role myrole superuser login")
    host = spi.start()
    launch(host, "--arg", "index=10", "--set", "worker_spi.role=myrole")
    launch(host, "--arg", "index=11", "--set", "worker_spi.role=myrole", "--set", "worker_spi.database=postgres")
    assert [worker[1:] for worker in database.workers()] == [
        (database.name, "myrole"),
        ("postgres", "myrole"),
        (database.name, "postgres"),
    ]


def test_where_a_role_may_not_log_in_a_worker_fails_and_says_why(spi: Spi, database: Database) -> None:
    """WS-6 and WS-7, for a client: no way past the server's refusal; the launch tells it, and others go on."""
    database.execute("create role nologin_role nologin")
    host = spi.start()
    for refused, words in [
        ("worker_spi.role=nologin_role", "is not permitted to log in"),
        ("worker_spi.database=template0", "not currently accepting connections"),
    ]:
        done = host.bghost("launch", "worker_spi", "--name", "shut_out", "--wait", "--arg=index=4", "--set", refused)
        assert done.code == 1
        assert words in done.stderr
        host.wait_row("shut_out", lambda row: row["state"] == "backoff")
        assert host.bghost("stop", "shut_out").code == 0
    assert host.row("worker_spi.1")["state"] == "ready"


def test_deltas_without_a_total_make_it(spi: Spi, database: Database) -> None:
    """WS-13, mended: deltas that find no total row become the total; with nothing there, nothing is made or logged."""
    host = spi.start()
    host.wait_row("worker_spi.1", lambda row: row["wait"] == "WorkerSpiMain")
    assert database.counted(1) == []
    database.add(1, "delta", 3)
    database.add(1, "delta", 4)
    host.bghost("reload")
    host.wait_line(r"worker_spi worker 1: count in schema1\.counted is now 7$")
    assert database.counted(1) == [("total", 7)]
    assert "is now 0" not in host.text()


def test_overflow_loses_nothing_and_heals(spi: Spi, database: Database) -> None:
    """WS-14, mended: a total that does not fit is an error, shown and recovered; once it fits, deltas are counted."""
    spi.configure(naptime=1)
    host = spi.start()
    pid = host.row("worker_spi.1")["pid"]
    rows = [("total", 2147483647), ("delta", 1)]
    with database.session.transaction():
        for type, value in rows:
            database.add(1, type, value)
    row = host.wait_row("worker_spi.1", lambda row: row["errors"] > 0)
    assert "integer out of range" in (row["last_error"] or "")
    assert host.wait_line("integer out of range")
    assert database.counted(1) == rows
    database.execute("update schema1.counted set value = -2 where type = 'total'")
    until(lambda: database.counted(1) == [("total", -1)], what="the total, now that it fits")
    assert host.row("worker_spi.1")["pid"] == pid


def test_naptime_changes_at_reload_and_database_does_not(spi: Spi, database: Database) -> None:
    """WS-15: after a reload the worker sleeps the new naptime; it stays in the database that it is connected to."""
    host = spi.start()
    spi.configure(naptime=0.5, database="postgres")
    assert host.bghost("reload").code == 0
    database.add(1, "delta", 1)
    host.wait_line(r"schema1\.counted is now 1$")
    database.add(1, "delta", 1)
    host.wait_line(r"schema1\.counted is now 2$", timeout=3)
    assert [worker[1] for worker in database.workers()] == [database.name]


def test_sigterm_from_elsewhere_restarts_the_worker(spi: Spi, database: Database) -> None:
    """WS-16, mended: SIGTERM ends the worker with exit code 1; since nobody asked bghost to stop it, it comes back."""
    host = spi.start()
    pid = host.row("worker_spi.1")["pid"]
    assert pid
    os.kill(pid, signal.SIGTERM)
    row = host.wait_row("worker_spi.1", lambda row: row["state"] == "ready" and row["pid"] != pid)
    assert row["starts"] == 2
    host.wait_line(r"worker_spi\.1\b.*\b1\b")
    until(lambda: len(database.workers()) == 1, what="one session alone")


def test_workers_go_when_their_host_is_killed(spi: Spi, database: Database) -> None:
    """WS-17: after a SIGKILL of the host, workers and their sessions are gone within a second."""
    spi.configure(total_workers=3)
    host = spi.start()
    assert len(database.workers()) == 3
    host.signal(signal.SIGKILL)
    # A second, and what it takes to be scheduled; the guard would have ended them after stop_timeout, ten seconds.
    assert spi.sandbox.wait_empty(3.0) == {}
    until(lambda: database.workers() == [], timeout=3.0, what="sessions gone")


@pytest.mark.parametrize("args", [[], ["--arg", "index=null"], ["--arg", "index=0"], ["--arg", "index=four"]])
def test_a_launch_without_a_proper_index_starts_nothing(spi: Spi, args: list[str]) -> None:
    """WS-18: no index, null, or one that is no positive integer is refused in one line, and no worker is started."""
    host = spi.start()
    done = host.bghost("launch", "worker_spi", *args)
    assert done.code == 2
    assert "index" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [row["name"] for row in host.client.ps()] == ["worker_spi.1"]


def test_a_schema_without_its_table_is_completed(spi: Spi, database: Database) -> None:
    """Table and index are made where the schema is already there, and the index alone where only that is missing."""
    database.execute(
        "create schema schema1; create schema schema2; create table schema2.counted (type text, value int)"
    )
    spi.configure(total_workers=2)
    spi.start()
    for index in (1, 2):
        database.add(index, "total", 0)
        with pytest.raises(Exception, match="counted_unique_total"):
            database.add(index, "total", 0)


def test_workers_with_one_index_live_together(spi: Spi, database: Database) -> None:
    """Four workers that set up one schema at one moment are all ready at once, and count each delta once."""
    spi.configure(naptime=0.05)
    host = spi.start()
    for n in range(4):
        done = host.bghost("launch", "worker_spi", "--name", f"twin{n}", "--arg", "index=7")
        assert done.code == 0, done.stderr
    host.client.wait(*(f"twin{n}" for n in range(4)))
    for n in range(50):
        database.add(7, "delta", n)
    until(lambda: database.counted(7) == [("total", sum(range(50)))], what="the sum of all")
    for n in range(4):
        row = host.row(f"twin{n}")
        assert (row["starts"], row["errors"], row["state"]) == (1, 0, "ready")


def test_feed_gives_each_worker_something_to_count(spi: Spi, database: Database) -> None:
    """With worker_spi_feed beside it, each worker's count grows, second by second; Ctrl-C ends all with 0."""
    host = spi.start(
        "worker_spi_feed",
        *("--set", "worker_spi.naptime=0.2", "--set", "worker_spi.total_workers=2"),
        *("--set", "worker_spi_feed.naptime=0.2", "--set", f"worker_spi_feed.database={database.name}"),
    )
    for index in (1, 2):
        counted = rf"worker_spi worker {index}: count in schema{index}\.counted is now (\d+)$"
        line = first = host.wait_line(counted)
        while int(line.match[1]) < int(first.match[1]) + 2:  # one turn may take in several deltas
            line = host.wait_line(counted, after=line)
    host.signal(signal.SIGINT)
    assert host.wait() == 0
    assert not re.search("Traceback|ERROR", host.text())

"""Workers of a real host on a real server: stops and cancels in queries, outages, what a tick leaves behind."""

import contextlib
import os
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import pgkit
import psycopg
import pytest
from pgkit import HEAD, Door, forward, prober
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support import SLOW, Host, Sandbox, until

from bghost import HostError, WorkerSpec
from bghost_postgres.outage import LONGEST_DELAY
from bghost_postgres.testing import Home

Session = psycopg.Connection[Any]

TABLES: Final = "create table t (n int)"

SETUP: Final = """\
@bghost.hookimpl
def bghost_setup(self, worker):
    self.db = bghost_postgres.connect(worker)
    self.ticks = 0

"""
TICK: Final = "@bghost.hookimpl\ndef bghost_tick(self, worker):\n"


def start(sandbox: Sandbox, tick: str, *args: str, requires: bool = False) -> Host:
    """A host with one worker ``probe``, whose tick is *tick*; it answers, and may not be ready."""
    body = SETUP + TICK + textwrap.indent(textwrap.dedent(tick), "    ")
    return pgkit.start(sandbox, body, *args, requires=requires)


def backends(session: Session) -> int:
    """How many sessions of workers there are in this database."""
    [(count,)] = session.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'bghost: %'"
    )
    return int(count)


QUERY: Final = """
    with self.db.transaction() as txn:
        txn.execute("insert into t values (1)")
        txn.execute("select pg_sleep(600)")
"""


PATIENT: Final = """
    bghost_postgres.connection.CANCEL_LIMIT = 60.0  # the server may get no processor for longer than two seconds
"""


def in_query(host: Host) -> int:
    """The worker's pid, once ``ps`` shows it in the long query, with its backend."""
    row = host.wait_row("probe", lambda row: row["activity"] == "select pg_sleep(600)")
    assert row["backend_pid"]
    assert row["pid"]
    return row["pid"]


def test_a_fast_stop_leaves_a_query_at_once(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """Cancelled on the server, rolled back, exit code 0, no session left; it takes no harder stop."""
    host = start(sandbox, QUERY, "--set", f"postgres.dsn={database_uri}")
    in_query(host)
    host.signal(signal.SIGINT)
    assert host.wait() == 0
    assert "exit code 0" in host.text()
    assert "stopping, immediate" not in host.text()
    until(lambda: backends(other) == 0)
    assert other.execute("select count(*) from t").fetchone() == (0,)


def test_a_cancel_is_recovered_on_the_same_session(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """SIGINT to the worker: its tick is a recovered error, its backend the same as before."""
    host = start(sandbox, PATIENT + QUERY, "--set", f"postgres.dsn={database_uri}")
    pid = in_query(host)
    backend = host.row("probe")["backend_pid"]
    os.kill(pid, signal.SIGINT)
    host.wait_row("probe", lambda row: row["errors"] == 1)
    in_query(host)
    assert (host.row("probe")["pid"], host.row("probe")["backend_pid"]) == (pid, backend)
    assert other.execute("select count(*) from t").fetchone() == (0,)


def test_a_worker_in_a_query_goes_with_its_host(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """SIGKILL of the host: query and session end, long before the host's guard would end them."""
    host = start(sandbox, QUERY, "--set", f"postgres.dsn={database_uri}", "--set", "host.stop_timeout=600")
    in_query(host)
    host.signal(signal.SIGKILL)
    host.wait()
    until(lambda: backends(other) == 0)
    assert other.execute("select count(*) from t").fetchone() == (0,)


def test_a_tick_that_leaves_a_transaction_open(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """It is rolled back before the sleep, and the log names the line that opened it."""
    tick = """
        self.txn = self.db.transaction()
        self.txn.__enter__().execute("insert into t values (1)")
        return bghost.UNTIL_WOKEN
    """
    host = start(sandbox, tick, "--set", f"postgres.dsn={database_uri}")
    host.wait_line(r"a transaction, opened at .*probe_kind\.py:\d+")
    until(lambda: "idle in transaction" not in states(other))
    assert other.execute("select count(*) from t").fetchone() == (0,)


def states(session: Session) -> list[str]:
    """The states of this database's sessions."""
    return [
        state for (state,) in session.execute("select state from pg_stat_activity where datname = current_database()")
    ]


COUNT: Final = """
    with self.db.transaction() as txn:
        txn.execute("create table if not exists counted (n int)")
        txn.execute("insert into counted values (%s)", [self.ticks])
    self.ticks += 1
"""


RunCluster = Callable[..., contextlib.AbstractContextManager[Any]]  # that of conftest.py


def test_a_server_that_is_down_is_waited_for_and_one_that_crashes_costs_no_unit_of_work(
    sandbox: Sandbox, run_cluster: RunCluster
) -> None:
    """The host runs, ps shows what the worker waits for, the log says it once; then the work begins by itself. SIGKILL
    of the postmaster in the midst of ticks: the same worker goes on, each number is there once."""
    with run_cluster("embedded") as cluster:
        cluster.stop(signal.SIGINT)
        host = start(sandbox, COUNT, "--set", f"postgres.dsn={cluster.uri}")
        host.wait_line("the database cannot be reached, waiting for it: .*No such file")
        row = host.wait_row("probe", lambda row: row["wait"] == "database")
        assert row["errors"] == 0
        cluster.start()
        host.wait_line(r"the database can be reached again, after \d")
        assert host.wait_row("probe", lambda row: row["backend_pid"] and row["ticks"] > 3)["pid"] == row["pid"]
        assert host.text().count("cannot be reached") == 1
        cluster.stop(signal.SIGKILL)
        cluster.start()
        ticks = host.row("probe")["ticks"]
        again = host.wait_row("probe", lambda row: row["ticks"] > ticks + 3 and row["backend_pid"], 20 * SLOW)
        assert again["pid"] == row["pid"]
        host.signal(signal.SIGINT)
        assert host.wait() == 0
        with psycopg.connect(cluster.uri) as session:
            numbers = [n for (n,) in session.execute("select n from counted order by n")]
        assert numbers == list(range(len(numbers)))


def test_a_server_that_is_full_is_waited_for(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """No connection left is no error either; the log has the server's own words."""
    other.execute("create role few login connection limit 0")
    try:
        other.execute("grant create on schema public to few")
        host = start(sandbox, COUNT, "--set", f"postgres.dsn={database_uri}", "--set", "postgres.role=few")
        host.wait_line("the database cannot be reached, waiting for it: .*too many connections for role")
        other.execute("alter role few connection limit -1")
        host.wait_line("the database can be reached again")
        assert host.wait_row("probe", lambda row: row["ticks"] > 1)["errors"] == 0
        host.signal(signal.SIGINT)
        assert host.wait() == 0
    finally:
        other.execute("drop owned by few")
        other.execute("drop role few")


def test_a_stop_ends_the_wait_for_a_server(sandbox: Sandbox) -> None:
    """A smart stop too: nothing was begun."""
    host = start(sandbox, COUNT, "--set", "postgres.dsn=host=/nowhere connect_timeout=2")
    host.wait_line("the database cannot be reached, waiting for it")
    host.wait_row("probe", lambda row: row["wait"] == "database")
    host.signal(signal.SIGTERM)
    assert host.wait(20) == 0
    assert "stopping, fast" not in host.text()


def test_a_server_that_takes_no_more_connections_and_one_that_is_mute(
    sandbox: Sandbox, run_cluster: RunCluster
) -> None:
    """Full: workers wait for a slot, one of them looks now and then, and the log names the limit. A postmaster that
    takes connections and says nothing: each attempt has its time, and a stop ends it at once."""
    count = 6
    with run_cluster("embedded", "max_connections = 8") as cluster, ExitStack() as stack:

        def one() -> Session | None:
            with contextlib.suppress(psycopg.OperationalError):  # one that has just ended may count still
                return psycopg.connect(cluster.uri, autocommit=True)
            return None

        held = [stack.enter_context(session) for _ in range(8) if (session := until(one))]
        began = time.monotonic()
        door = Door(partial(forward, path=f"{cluster.path}/.s.PGSQL.5432"))
        stack.callback(door.close)
        host = start(sandbox, COUNT, "--count", str(count), "--set", f"postgres.dsn={door.dsn} connect_timeout=2")
        first = until(lambda: prober(host, count - 1), 60)
        assert host.text().count(f"too many clients already {LIMIT}") == count
        door.forget()
        until(lambda: door.pids.count(first) >= 4, 60)  # two probes, a ping with each
        others = sum(pid != first for pid in door.pids)
        assert others <= 2 * (count - 1) * int((time.monotonic() - began) / LONGEST_DELAY)
        for session in held[2:]:
            session.close()
        until(lambda: all(row["ticks"] > 1 for row in host.client.ps()), 40 * SLOW)
        assert host.text().count("can be reached again") == count
        assert cluster.process is not None
        cluster.process.send_signal(signal.SIGSTOP)
        try:
            held[0].execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name ~ '^bghost'")
            host.wait_line(r"cannot be reached, waiting for it: connection timeout expired", 10 * SLOW)
            until(lambda: sum(row["wait"] == "database" for row in host.client.ps()) == count, 30 * SLOW)
            host.signal(signal.SIGINT)
            assert host.wait() == 0
            assert "stopping, immediate" not in host.text()
        finally:
            cluster.process.send_signal(signal.SIGCONT)


LIMIT: Final = "(max_connections, or the connection limit of the role or the database)"


def test_a_server_that_comes_up_between_an_attempt_and_the_question_why(sandbox: Sandbox, database_uri: str) -> None:
    """The attempt that has failed was no refusal, though whoever asks then is answered: it is tried again."""
    real = conninfo_to_dict(database_uri)
    path = f"{real['host']}/.s.PGSQL.{real['port']}"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                listener.accept()[0].close()  # as if it were not there yet
                while True:
                    threading.Thread(target=forward, args=[listener.accept()[0], path], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        dsn = make_conninfo(database_uri, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        host = start(sandbox, COUNT, "--set", f"postgres.dsn={dsn}")
        row = host.wait_row("probe", lambda row: row["ticks"] > 1)
        assert (row["starts"], row["errors"]) == (1, 0), host.text()
        assert host.client.shutdown()["killed"] == []
        listener.shutdown(socket.SHUT_RDWR)


GETS_READY: Final = """\
import time
import bghost, bghost_postgres

class Kind:
    @bghost.hookimpl
    {}

    @bghost.hookimpl
    def bghost_tick(self, worker):
        return bghost.UNTIL_WOKEN
"""
HANGS: Final = "def bghost_setup(self, worker): time.sleep(600)"
READY: Final = {
    "plain": "def bghost_setup(self, worker): bghost_postgres.connect(worker).execute('select 1')",
    "awaited": "async def bghost_setup(self, worker): await bghost_postgres.connect_async(worker).execute('select 1')",
}


@pytest.mark.parametrize("sort", READY)
def test_the_time_to_get_ready_stands_still_while_a_server_is_mute(
    sandbox: Sandbox, database_uri: str, sort: str
) -> None:
    """An attempt that takes longer, and asking the server why one has failed, are waits for the database."""
    sandbox.kinds({"probe": GETS_READY.format(READY[sort]), "hangs": GETS_READY.format(HANGS)})
    real = conninfo_to_dict(database_uri)
    path = f"{real['host']}/.s.PGSQL.{real['port']}"
    limit = 2 * SLOW
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30 * SLOW)
        dsn = make_conninfo(
            database_uri, host="127.0.0.1", port=listener.getsockname()[1], connect_timeout=600, sslmode="disable"
        )
        sandbox.config(
            f'[host]\nkinds = ["hangs"]\n[[worker]]\nkind = "probe"\nready_timeout = {limit}\n'
            f'[postgres]\ndsn = "{dsn} gssencmode=disable"\n'
        )
        host = sandbox.start_host("run")
        host.wait_answering()
        listener.accept()[0].close()  # the attempt, as if there were no server yet
        with listener.accept()[0]:  # the question
            assert host.wait_row("probe", lambda row: row["pid"])["wait"] == "database"
        connection, _ = listener.accept()
        row = host.row("probe")
        assert (row["state"], row["starts"], row["wait"]) == ("starting", 1, "database")
        with pytest.raises(HostError, match="hangs did not become ready: not ready within"):  # whose limit came later
            host.client.launch(WorkerSpec(kind="hangs", restart="never", ready_timeout=limit), wait=True)
        assert "[probe] not ready within" not in host.text()
        answers = threading.Thread(target=forward, args=[connection, path])
        answers.start()
        host.client.wait("probe")
        assert host.row("probe")["pid"] == row["pid"]
        assert host.client.shutdown()["killed"] == []
        answers.join()


def test_an_attempt_to_connect_has_five_seconds(sandbox: Sandbox) -> None:
    """Where dsn and environment do not say."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        dsn = f"host=127.0.0.1 port={mute.getsockname()[1]} user=u dbname=d"
        began = time.monotonic()  # before the attempt
        host = start(sandbox, COUNT, "--set", f"postgres.dsn={dsn}")
        connection, _ = mute.accept()
        with connection:
            host.wait_line("cannot be reached, waiting for it: connection timeout expired", 5 + 10 * SLOW)
            assert time.monotonic() - began > 4.5
        host.signal(signal.SIGINT)
        assert host.wait() == 0


def test_a_stop_ends_the_connecting_to_a_mute_server(sandbox: Sandbox) -> None:
    """It accepts and says nothing: a stop is seen all the same, long before the attempt's time is over."""
    with socket.socket(socket.AF_INET) as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        host = start(sandbox, COUNT, "--set", f"postgres.dsn=host=127.0.0.1 port={port} connect_timeout=600")
        connection, _ = mute.accept()
        with connection:
            host.signal(signal.SIGINT)
            assert host.wait() == 0
            assert "stopping, immediate" not in host.text()


def test_a_kind_that_requires_it_gets_the_embedded_server(sandbox: Sandbox) -> None:
    """Without a dsn: started with the host, stopped with it, the directory's own data kept."""
    home = Home.make()
    sandbox.env["BGHOST_DATA_DIR"] = home.env["BGHOST_DATA_DIR"]
    try:
        host = start(sandbox, COUNT, requires=True)
        host.wait_row("probe", lambda row: row["ticks"] > 3)
        assert "using the embedded PostgreSQL" in host.text()
        pid = host.row("probe")["pid"]
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert held.count(str(home.cluster / "use.lock")) == 1  # the worker's share, should its host be killed
        host.signal(signal.SIGINT)
        assert host.wait() == 0
        assert "the embedded PostgreSQL is stopped" in host.text()
        assert home.bghost("postgres", "psql", "-XAtc", "select count(*) > 3 from counted").stdout == "t\n"
    finally:
        home.remove()


def test_a_kind_that_does_not_require_it_is_told_so(sandbox: Sandbox) -> None:
    """No server is started for it, and the worker's error says what to set."""
    host = start(sandbox, COUNT, "--set", "probe.naptime=1")
    host.wait_line("there is no database to connect to.*postgres.embedded")
    assert "using the embedded" not in host.text()


@pytest.mark.parametrize("dsn", ["postgresql://u:secret@h:port/d", "host=h password=secret x"])
def test_a_bad_dsn_ends_the_start(sandbox: Sandbox, dsn: str) -> None:
    """Exit 2, one line, the setting named, the password not."""
    sandbox.kinds({"other": HEAD + "    @bghost.hookimpl\n    def bghost_tick(self, worker): pass\n"})
    done = sandbox.bghost("run", "other", "--set", f"postgres.dsn={dsn}")
    assert done.code == 2
    assert "postgres: dsn is not a connection string" in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_an_embedded_server_that_cannot_be_ends_the_start(sandbox: Sandbox) -> None:
    """A kind needs it: exit 1 and one line, no traceback."""
    sandbox.distribution(
        "needy",
        {"needy": HEAD + "    @bghost.hookimpl\n    def bghost_tick(self, worker): pass\n"},
        {"bghost.kinds": {"needy": "needy:Kind"}},
        requires=("bghost", "bghost-postgres"),
    )
    done = sandbox.bghost("run", "needy", env={"BGHOST_DATA_DIR": "/proc/none"})
    assert done.code == 1
    assert "the embedded PostgreSQL has no directory to live in" in done.stderr
    assert "Traceback" not in done.stderr

"""What is left of a session after an error, and how many workers go through an outage."""

import contextlib
import os
import signal
import socket
import time
from typing import Any, Final

import psycopg
import pytest
from pgkit import HEAD, Door, prober, start
from support import SLOW, Sandbox, until

from bghost_postgres.outage import LONGEST_DELAY, Outage

Session = psycopg.Connection[Any]


TABLES: Final = "create table t (n int)"

KIND: Final = """\
@bghost.hookimpl
def bghost_setup(self, worker):
    self.ticks = 0
    self.greeted = 0
    self.db = bghost_postgres.connect(worker, keep={keep}, on_connect=self.greet)
    self.db.listen("kept")

def greet(self, connection):
    self.greeted += 1
    connection.execute("set work_mem = '2MB'")

@bghost.hookimpl
def bghost_tick(self, worker):
    db = self.db
    self.ticks += 1
    if self.ticks == 1:
        db.execute("set statement_timeout = '1h'")
        db.execute("select pg_advisory_lock(1)")
        db.execute("create temp table mine (n int)")
        db.execute("prepare one as select 1")
        db.execute("listen mine")
        for _ in range(8):
            db.execute("select count(*) from t")
        db.connection.pipeline().__enter__() if {pipeline} else None
        raise ValueError("a tick that fails")
    count = db.execute("select count(*) from t").fetchone()[0]
    state = [
        db.execute("show statement_timeout").fetchone()[0],
        db.execute("select count(*) from pg_locks where pid = pg_backend_pid() and objid = 1").fetchone()[0],
        db.execute("select to_regclass('pg_temp.mine') is not null").fetchone()[0],
        db.execute("select count(*) from pg_prepared_statements where name = 'one'").fetchone()[0],
        sorted(name for (name,) in db.execute("select pg_listening_channels()")),
        db.execute("show work_mem").fetchone()[0],
        self.greeted,
        count,
    ]
    worker.log.info("state {{}}", state)
    raise bghost.GiveUp("seen")
"""


@pytest.mark.parametrize(
    ("keep", "pipeline", "state"),
    [
        ((), False, ["0", 0, False, 0, ["kept"], "2MB", 2, 0]),
        ((), True, ["0", 0, False, 0, ["kept"], "2MB", 2, 0]),
        (
            ("cursors", "settings", "prepared", "listen", "locks", "temporary"),
            False,
            ["1h", 1, True, 1, ["kept", "mine"], "2MB", 2, 0],
        ),
    ],
    ids=["reset", "pipeline", "kept"],
)
def test_an_error_resets_the_session(
    sandbox: Sandbox, database_uri: str, other: Session, keep: tuple[str, ...], pipeline: bool, state: list[object]
) -> None:
    """Settings, locks, temporary tables, prepared statements, LISTEN by hand: gone, unless declared as kept."""
    host = start(sandbox, KIND.format(keep=keep, pipeline=pipeline), "--set", f"postgres.dsn={database_uri}")
    host.wait_line("state ")
    [line] = [line for line in host.text().splitlines() if "state [" in line]
    assert line.endswith(f"state {state}")


LISTENER: Final = """\
@bghost.hookimpl
def bghost_setup(self, worker):
    self.db = bghost_postgres.connect(worker, on_connect=lambda connection: worker.log.info("connected"))
    self.db.listen("Jobs")

@bghost.hookimpl
def bghost_tick(self, worker):
    for note in self.db.notifications():
        worker.log.info("got {} {}, woken by {}", note.channel, note.payload, sorted(worker.woken))
    if "notify" in worker.woken:
        self.db.execute("notify \\"Jobs\\", 'own'") if not getattr(self, "sent", False) else None
        self.sent = True
"""


def test_a_notification_wakes_the_worker(sandbox: Sandbox, database_uri: str, other: Session) -> None:
    """Also one that comes during a query and leaves the socket quiet, and one after the connection was replaced."""
    host = start(sandbox, LISTENER, "--set", f"postgres.dsn={database_uri}", "--set", "probe.naptime=600")
    backend = host.wait_row("probe", lambda row: row["ticks"] == 1)["backend_pid"]
    other.execute("""notify "Jobs", 'one'""")
    host.wait_line(r"got Jobs one, woken by \['notify'\]")
    line = host.wait_line(r"got Jobs own, woken by \['notify'\]")  # its own, there before its next wait
    other.execute("select pg_terminate_backend(%s, 5000)", [backend])
    host.wait_line("connected", after=line)  # and listens anew, which its pid in ps does not say yet
    assert host.row("probe")["backend_pid"] not in (None, backend)
    other.execute("""notify "Jobs", 'two'""")
    host.wait_line(r"got Jobs two, woken by \['notify'\]")
    assert host.row("probe")["errors"] == 0


TICK: Final = """\
@bghost.hookimpl
def bghost_setup(self, worker):
    self.db = bghost_postgres.connect(worker)

@bghost.hookimpl
def bghost_tick(self, worker):
    self.db.execute("select 1")
    return bghost.UNTIL_WOKEN
"""


def test_one_worker_of_many_probes_a_server_that_is_down(sandbox: Sandbox) -> None:
    """Each tries once; from then on there is one that does, though it be another one after the first was killed."""
    count, began = 20, time.monotonic()
    with contextlib.closing(Door(socket.socket.close)) as door:
        host = start(sandbox, TICK, "--count", str(count), "--set", f"postgres.dsn={door.dsn}")
        first = until(lambda: prober(host, count - 1), 60)
        assert host.text().count("cannot be reached") == count
        door.forget()
        until(lambda: door.pids.count(first) >= 6, 60)  # three probes, a ping with each
        others = sum(pid != first for pid in door.pids)
        assert others <= 2 * (count - 1) * int((time.monotonic() - began) / LONGEST_DELAY)
        os.kill(first, signal.SIGKILL)
        host.wait_line("killed by SIGKILL; started again")
        assert until(lambda: prober(host, count - 1), 60) != first
        host.signal(signal.SIGINT)
        assert host.wait() == 0


def test_who_waits_for_a_probe_is_told_of_its_end() -> None:
    """By a byte when the server is back, by the end of the stream when the prober has gone; then there is another."""
    name = f"host=server-of-{os.getpid()}"
    first, second, third = (Outage(f"{name} application_name={each}") for each in "abc")
    try:
        assert (first.follow(), first.probes) == (None, True)
        turn = second.follow()
        assert turn is not None
        assert third.follow() is not None
        first.leave(back=True)
        assert os.read(turn, 10) == b"1"
        assert (second.follow(), second.probes) == (None, True)
        again = third.follow()
        assert again is not None
        second.leave()
        with pytest.raises(ConnectionResetError):
            os.read(again, 10)
    finally:
        for each in (first, second, third):
            each.leave()


def test_an_outage_is_over_for_all_at_once(sandbox: Sandbox, database_uri: str, other: Session, tmp_path: Any) -> None:
    """Workers that wait for another's probe go on with it; each logs one line at the start, and one at the end."""
    directory, port = other.info.host, other.info.port
    dsn = f"host={tmp_path} port={port} user=postgres"
    host = start(sandbox, TICK, "--count", "5", "--set", f"postgres.dsn={dsn}")
    until(lambda: host.text().count("cannot be reached") == 5, 30)
    os.symlink(f"{directory}/.s.PGSQL.{port}", tmp_path / f".s.PGSQL.{port}")
    until(lambda: host.text().count("can be reached again") == 5, 40 * SLOW)
    assert host.text().count("cannot be reached") == 5
    host.signal(signal.SIGINT)
    assert host.wait() == 0


READY: Final = """
    @bghost.hookimpl
    def bghost_setup(self, worker):
        bghost_postgres.connect(worker).execute("select 1")

    @bghost.hookimpl
    def bghost_tick(self, worker):
        return bghost.UNTIL_WOKEN
"""


def test_the_time_to_get_ready_stands_still_while_a_worker_waits(sandbox: Sandbox) -> None:
    """A server that is down longer than ready_timeout is no reason to kill a worker in its set-up."""
    sandbox.kinds({"probe": HEAD + READY})
    sandbox.config('[[worker]]\nkind = "probe"\nname = "probe"\nready_timeout = 5\n[postgres]\ndsn = "host=/nowhere"\n')
    host = sandbox.start_host("run")
    host.wait_answering()
    row = host.wait_row("probe", lambda row: row["wait"] == "database")
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 6.0)
    assert "not ready within" not in host.text()
    now = host.wait_row("probe", lambda row: row["wait"] == "database")  # and not in an attempt to connect
    assert (now["pid"], now["state"]) == (row["pid"], "starting")
    host.signal(signal.SIGINT)
    host.wait()

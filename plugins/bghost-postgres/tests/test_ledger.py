"""The ledger: workers note each unit in the transaction that does it, while workers, backends and server are killed.

BGHOST_SOAK is how many seconds of that there are: minutes, by hand. Without it BGHOST_LEDGER is, a minute in CI, or 12.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from support import SLOW, Host, Sandbox, until

SOAK: Final = float(os.environ.get("BGHOST_SOAK") or os.environ.get("BGHOST_LEDGER") or "12")
SEED: Final = int(os.environ.get("BGHOST_SEED", "0")) or random.randrange(1, 1 << 31)
WORKERS: Final = 4

KIND: Final = """\
import os
import bghost, bghost_postgres, psycopg

class Settings(bghost.Settings):
    acks: str
    naptime: float = 0.002

class Kind:
    Settings = Settings

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.db = bghost_postgres.connect(worker)
        self.acks = os.open(worker.settings.acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.number, self.attempt, self.doubt = 0, 0, False

    @bghost.hookimpl
    def bghost_tick(self, worker):
        unit = f"{worker.name}-{os.getpid()}-{self.number}"
        if self.doubt:  # whether the last COMMIT came through, only the database knows
            there = self.db.execute("select 1 from ledger where unit = %s", [unit]).fetchone()
            self.doubt = False
            if there:
                self.acknowledge(unit)
            else:  # the dead session may be at it still: another unit, then
                self.number, self.attempt = self.number + 1, 0
            return None
        self.attempt += 1
        try:
            with self.db.transaction() as txn:
                txn.on_commit(lambda: self.acknowledge(unit))
                txn.execute("insert into ledger (unit, attempt) values (%s, %s)", [unit, self.attempt])
                txn.execute("update counted set n = n + 1 where name = %s", [worker.name])
                txn.execute("insert into effects (unit) values (%s)", [unit])
        except bghost_postgres.CommitUnknown:
            self.doubt = True
        return None

    def acknowledge(self, unit):
        os.write(self.acks, f"{unit}\\n".encode())
        self.number, self.attempt = self.number + 1, 0
"""


class Nemesis:
    """Does harm, at random from a seed, and counts it."""

    def __init__(self, host: Host, cluster: Any, seed: int) -> None:
        self.host = host
        self.cluster = cluster
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._admin: psycopg.Connection[Any] | None = None

    def work(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            harm = self.random.choices([self.worker, self.backend, self.server], weights=[6, 6, 1 if left > 2 else 0])[
                0
            ]
            harm()
            time.sleep(min(left, self.random.uniform(0.05, 0.5)))  # the one thing here that is about time itself

    def worker(self) -> None:
        signum = self.random.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
        rows = [row for row in self.host.client.ps() if row["pid"] and row["state"] == "ready"]
        if rows:
            pid = self.random.choice(rows)["pid"]
            assert pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)  # a worker of our own host's
            self.done[f"worker {signum.name}"] += 1
        for row in self.host.client.ps():
            if row["state"] == "failed":  # ten starts in a row that we did not let live
                self.host.client.restart(row["name"], timeout=30)

    def backend(self) -> None:
        try:
            if self._admin is None or self._admin.closed:
                self._admin = psycopg.connect(self.cluster.uri, autocommit=True)
            pids = [
                pid
                for (pid,) in self._admin.execute(
                    "select pid from pg_stat_activity where application_name like 'bghost: %' order by pid"
                )
            ]
            if pids:
                self._admin.execute("select pg_terminate_backend(%s)", [self.random.choice(pids)])
                self.done["backend"] += 1
        except psycopg.OperationalError:
            if self._admin is not None:
                self._admin.close()

    def server(self) -> None:
        how = self.random.choice([signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
        if self._admin is not None:
            self._admin.close()
        self.cluster.stop(how)
        self.cluster.start()
        self.done[f"server {how.name}"] += 1

    def close(self) -> None:
        if self._admin is not None:
            self._admin.close()


@pytest.mark.timeout(120 + 2 * SOAK)
@pytest.mark.parametrize("which", ["embedded", "installed"])
def test_no_unit_of_work_is_lost_halved_or_done_twice(
    sandbox: Sandbox, tmp_path: Path, run_cluster: Callable[[str], Any], which: str
) -> None:
    """Each that was acknowledged is there once; none half, none twice; no session is left idle in a transaction."""
    if which == "installed" and "BGHOST_SOAK" not in os.environ:
        pytest.skip("the ledger on the machine's own server is kept with BGHOST_SOAK only")
    acks = tmp_path / "acks"
    with run_cluster(which) as cluster:
        with psycopg.connect(cluster.uri, autocommit=True) as admin:
            admin.execute("create table ledger (unit text, attempt int)")
            admin.execute("create table effects (unit text)")
            admin.execute("create table counted (name text primary key, n int)")
            admin.execute("insert into counted select 'ledger.' || i, 0 from generate_series(1, %s) i", [WORKERS])
        sandbox.kinds({"ledger": KIND})
        sandbox.config(
            f'[[worker]]\nkind = "ledger"\nname = "ledger"\ncount = {WORKERS}\nrestart = "always"\n'
            f'restart_after = 0.05\nrestart_max = 0.2\n[kind.ledger]\nacks = "{acks}"\n'
            f'[postgres]\ndsn = "{cluster.uri}"\n'
        )
        host = sandbox.start_host("run")
        host.wait_answering()
        until(lambda: all(row["ticks"] > 3 for row in host.client.ps()), 20)
        nemesis = Nemesis(host, cluster, SEED)
        try:
            nemesis.work(SOAK)
        finally:
            nemesis.close()
            print(f"seed {SEED}: {dict(nemesis.done)}")
        for row in host.client.ps():
            if row["state"] == "failed":
                host.client.restart(row["name"], timeout=30)
        before = {row["name"]: row["ticks"] for row in host.client.ps()}

        def all_work() -> bool:
            return all(row["backend_pid"] and row["ticks"] != before[row["name"]] for row in host.client.ps())

        until(all_work, 40 * SLOW, "every worker works again")
        host.signal(signal.SIGTERM)
        assert host.wait() == 0
        acknowledged = Counter(acks.read_text().split())
        with psycopg.connect(cluster.uri, autocommit=True) as admin:
            # A killed worker's session may be at its COMMIT still; none stays, least of all idle in a transaction.
            sessions = "select state from pg_stat_activity where application_name like 'bghost: %'"
            until(lambda: admin.execute(sessions).rowcount == 0, 20 * SLOW, "the last session ends")
            ledger = Counter(unit for (unit,) in admin.execute("select unit from ledger"))
            effects = Counter(unit for (unit,) in admin.execute("select unit from effects"))
            counted = admin.execute("select sum(n) from counted").fetchone()
            again = admin.execute("select count(*) from ledger where attempt > 1").fetchone()
    print(f"{len(acknowledged)} acknowledged, {len(ledger)} there, {again} not at the first attempt")
    assert [unit for unit in acknowledged if ledger[unit] != 1] == []
    assert [unit for unit, count in (ledger + acknowledged).items() if ledger[unit] > 1 or count > 2] == []
    assert ledger == effects
    assert counted == (ledger.total(),)
    assert len(acknowledged) > 10 * WORKERS
    assert nemesis.done.total() > SOAK / 4

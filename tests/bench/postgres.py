"""A worker's ticks on a database next to plain psycopg and pgbench, on the same server, in the same run.

psycopg's are ``with connection.transaction(): connection.execute(...)``, which promises as much: a BEGIN and a COMMIT.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
from turn import make_worker

import bghost_postgres
from bghost import HostError
from bghost_postgres.embedded.binaries import find
from bghost_postgres.testing import Home

UPDATE = "update counted set n = n + 1 where id = 1"
ROWS = 100_000
FETCH = f"select i, i::text from generate_series(1, {ROWS}) i"


def ticks(worker: Any, db: bghost_postgres.Database, count: int) -> float:
    """Seconds for *count* ticks, each with one update in a transaction: the default loop, without the hook's call."""
    began = time.perf_counter()
    left = count
    for _ in worker.mainloop():
        if not left:
            break
        left -= 1
        with worker.recovery(), db.transaction() as txn:
            txn.execute(UPDATE)
        worker.wait(0)
    return time.perf_counter() - began


def plain(connection: psycopg.Connection[Any], count: int) -> float:
    """Seconds for the same without a worker."""
    began = time.perf_counter()
    for _ in range(count):
        with connection.transaction():
            connection.execute(UPDATE)
    return time.perf_counter() - began


def pgbench(program: str, uri: str, count: int) -> float:
    """Seconds for the same by pgbench's one client."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"begin;\n{UPDATE};\ncommit;\n")
        script.flush()
        argv = [program, "-n", "-c", "1", "-t", str(count), "-f", script.name, "-d", uri]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = re.search(r"tps = ([\d.]+) \(without", done.stdout)
    assert found is not None, done.stdout
    return count / float(found[1])


def fetch(execute: Callable[[str], Any]) -> float:
    """Seconds to have all rows."""
    began = time.perf_counter()
    assert len(execute(FETCH).fetchall()) == ROWS
    return time.perf_counter() - began


def keep_apart(uri: str) -> None:
    """Have this process and its children on one processor, and the server's new sessions on another.

    Left to itself the kernel has a session now on its client's processor and now on the other, for seconds on end, and
    where idle processors wake up slowly that changes a rate up to five times: what was measured was luck.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    with psycopg.connect(uri) as connection:
        status = Path(f"/proc/{connection.info.backend_pid}/stat").read_text()
    os.sched_setaffinity(int(status.rpartition(")")[2].split()[1]), others[:1] or [first])
    os.sched_setaffinity(0, [first])


def measure(uri: str, count: int, rounds: int) -> dict[str, float]:
    """Medians of *rounds* rounds, the subjects taking turns; rates as parts of the others'."""
    worker: Any = make_worker()
    db = bghost_postgres.connect(worker, uri)
    db.execute("create table if not exists counted (id int primary key, n int)")
    db.execute("insert into counted values (1, 0) on conflict do nothing")
    try:
        program = find().program("pgbench")
    except HostError:
        program = ""
    if not program or not os.access(program, os.X_OK):
        program = shutil.which("pgbench") or ""
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    def timed(name: str, subject: Callable[[], float]) -> None:
        began = time.process_time()
        note(name, subject())
        note(f"{name}'s processor", time.process_time() - began)

    with psycopg.connect(uri, autocommit=True) as connection:
        ticks(worker, db, 20)  # what is made once is made, and what is prepared after a few executions is
        plain(connection, 20)
        for _ in range(rounds):
            timed("worker", lambda: ticks(worker, db, count))
            timed("psycopg", lambda: plain(connection, count))
            if program:
                note("pgbench", pgbench(program, uri, count))
            note("worker's fetch", fetch(db.execute))
            note("psycopg's fetch", fetch(connection.execute))
    db.close()
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        f"{name}, ticks a second": count / median[name] for name in ("worker", "psycopg", "pgbench") if name in median
    }

    def compare(name: str, theirs: str, ours: str) -> None:
        if theirs in times:
            pairs = zip(times[theirs], times[ours], strict=True)
            result[name] = statistics.median(their / our for their, our in pairs)

    compare("rate, of psycopg's", "psycopg", "worker")
    compare("by processor time", "psycopg's processor", "worker's processor")
    compare("rate, of pgbench's", "pgbench", "worker")
    compare("fetch, of psycopg's", "psycopg's fetch", "worker's fetch")
    return result


def main() -> None:
    """Measure on the server that is given, or an embedded one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--dsn", help="the server; without it an embedded one")
    parser.add_argument("--count", type=int, default=500, help="ticks a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with ExitStack() as stack:
        uri = options.dsn
        if uri is None:
            home = Home.make()
            stack.callback(home.remove)
            uri = stack.enter_context(home.kept_server())
            with psycopg.connect(uri, autocommit=True) as admin:
                admin.execute("alter system set synchronous_commit = off")  # the disk is not what is measured
                admin.execute("select pg_reload_conf()")
            keep_apart(uri)
        result = measure(uri, options.count, options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:30} {value:10.2f}")


if __name__ == "__main__":
    main()

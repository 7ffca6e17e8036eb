"""The examples of the guide that use a database do what the guide says of them."""

from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from support import Host, Sandbox, until

WRITING: Final = Path(__file__).resolve().parents[3] / "docs/examples/writing"
Session = psycopg.Connection[Any]


def start(sandbox: Sandbox, session: Session, kind: str, attribute: str) -> Host:
    """A host with one worker of that example, which finds the database as every program of PostgreSQL's does."""
    sandbox.distribution(
        f"writing-{kind}",
        {f"writing_{kind}": (WRITING / f"{kind}.py").read_text()},
        {"bghost.kinds": {kind: f"writing_{kind}:{attribute}"}},
    )
    info = session.info
    sandbox.env |= {"PGHOST": info.host, "PGPORT": str(info.port), "PGUSER": info.user, "PGDATABASE": info.dbname}
    host = sandbox.start_host("run", kind)
    host.wait_answering()
    return host


@pytest.mark.parametrize(
    ("kind", "attribute", "left"), [("transfer_wrong", "TransferWrong", 90), ("transfer", "Transfer", 100)]
)
def test_the_transfer(sandbox: Sandbox, other: Session, kind: str, attribute: str, left: int) -> None:
    """The wrong one loses money where its second half fails; its counterpart does nothing then."""
    other.execute("create table notes (text text)")
    other.execute("create table accounts (name text primary key, balance int check (balance <= 100))")
    other.execute("insert into accounts values ('a', 100), ('b', 100)")
    host = start(sandbox, other, kind, attribute)
    host.wait_line("CheckViolation")
    assert other.execute("select balance from accounts order by name").fetchall() == [(left,), (100,)]


def test_the_jobs(sandbox: Sandbox, other: Session) -> None:
    """A poison row fails alone; a notification is enough to have the next job done at once."""
    other.execute("create table jobs (id serial primary key, payload text, state text default 'new', error text)")
    other.execute("create table results (id int primary key, result int)")
    other.execute("insert into jobs (payload) values ('1'), ('poison'), ('3')")
    host = start(sandbox, other, "jobs", "Jobs")
    done = "select id, state from jobs order by id"
    until(lambda: other.execute(done).fetchall() == [(1, "done"), (2, "failed"), (3, "done")])
    host.wait_row("jobs", lambda row: row["doing"] == "idle")
    other.execute("insert into jobs (payload) values ('4')")
    other.execute("notify jobs")
    until(lambda: other.execute("select result from results order by id").fetchall() == [(2,), (6,), (8,)])
    assert host.row("jobs")["errors"] == 0

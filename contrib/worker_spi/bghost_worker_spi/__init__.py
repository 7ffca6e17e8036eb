"""The kind ``worker_spi``: PostgreSQL's example worker (src/test/modules/worker_spi), ported.

It shows a worker with settings and arguments, several workers of one kind, a main loop of the author's own,
transactions, an activity text and a wait name for ``bghost ps``; and how little is left to write: connecting, signals,
reload, recovery from errors and the end are the host's.

Worker N looks after the table ``schemaN.counted(type, value)`` and makes it first if need be. In each cycle one
statement deletes the rows of type ``delta`` and adds their sum to the row of type ``total``; the new total is logged. A
cycle comes every ``naptime`` seconds, and at once after a reload. ``bghost run worker_spi`` starts workers 1 to
``total_workers``, ``bghost launch worker_spi --arg index=N`` one more.

Settings, texts, schema, table and the statement's effect are the original's. On purpose different are:

- The first cycle follows the set-up at once, not one ``naptime`` later. ``naptime`` may be a fraction.
- Deltas without a total row make the total row. In the original they are deleted and lost, and so are those that meet a
  total of NULL, which counts as 0 here.
- A total that no longer fits an integer is an error that is reported, and tried again; the deltas stay until it fits.
  In the original this, like any error, ends the worker for good; here a worker recovers, or is restarted.
- A schema without its table, or a table without its index, is completed. In the original the first cycle fails.
- Two workers with one index work side by side. In the original they race to create the schema, and the loser dies.
- The worker is a client of the server, and goes only where its role may log in. ``database`` and ``role`` are read when
  its process starts: after a reload, a worker that runs stays where it is.
"""

from typing import Annotated, Any, Final

from msgspec import Meta
from psycopg import sql

import bghost
import bghost_postgres

KIND: Final = "worker_spi"  # as the entry point says
MAX_INT: Final = 2**31 - 1

# Upsert alone would be shorter, but puts the sum of the deltas by itself into an integer, which is too narrow where the
# total is below zero. Here it is met only by whoever sees no total row while another worker is just making one.
_COUNT: Final = sql.SQL("""\
with deleted as (
    delete from {table} where type = 'delta' returning value
), delta as (
    select count(*) as rows, coalesce(sum(value), 0) as sum from deleted
), updated as (
    update {table} set value = coalesce({table}.value, 0) + delta.sum from delta where type = 'total'
    returning {table}.value
), inserted as (
    insert into {table} (type, value)
    select 'total', delta.sum from delta where delta.rows > 0 and not exists (select from updated)
    on conflict (type) where type = 'total' do update set value = coalesce({table}.value, 0) + excluded.value
    returning value
)
select value from updated union all select value from inserted""")

_FIND: Final = """\
select exists (select from pg_namespace where nspname = %(schema)s),
       exists (select from pg_tables where schemaname = %(schema)s and tablename = 'counted'),
       exists (select from pg_indexes where schemaname = %(schema)s and indexname = 'counted_unique_total')"""


class WorkerSpiSettings(bghost.Settings):
    """Settings of worker_spi, ``[kind.worker_spi]`` in bghost.toml."""

    database: Annotated[str, Meta(min_length=1, description="database that a worker connects to")] = "postgres"
    role: Annotated[str, Meta(min_length=1, description="role that a worker connects as")] | None = None
    naptime: Annotated[float, Meta(gt=0, le=MAX_INT, description="seconds between two cycles")] = 10.0
    total_workers: Annotated[
        int, Meta(ge=1, le=100, description="number of workers that start with the host"), bghost.start_only
    ] = 2


class WorkerSpiArgs(bghost.Args):
    """Arguments of one worker."""

    index: Annotated[int, Meta(ge=1, le=MAX_INT, description="N of schemaN, which the worker looks after")]


class WorkerSpi:
    """One worker of kind worker_spi."""

    Settings = WorkerSpiSettings
    Args = WorkerSpiArgs

    @staticmethod
    @bghost.hookimpl
    def bghost_workers(settings: WorkerSpiSettings) -> list[bghost.WorkerSpec]:
        return [
            bghost.WorkerSpec(kind=KIND, name=f"{KIND}.{index}", args={"index": index})
            for index in range(1, settings.total_workers + 1)
        ]

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker[WorkerSpiSettings]) -> None:
        settings, index = worker.settings, worker.args.index
        static = worker.name == f"{KIND}.{index}" and index <= settings.total_workers
        self.title = f"worker_spi worker {index}" if static else f"worker_spi dynamic worker {index}"
        self.schema = f"schema{index}"
        self.count = _COUNT.format(table=sql.Identifier(self.schema, "counted"))
        role: dict[str, Any] = {} if settings.role is None else {"user": settings.role}
        self.db = bghost_postgres.connect(worker, dbname=settings.database, **role)
        with worker.activity("initializing worker_spi schema"):
            self.initialize(index)

    def initialize(self, index: int) -> None:
        """Create what is missing of schema, table and index; where nothing is, no right to create is needed."""
        schema, table = sql.Identifier(self.schema), sql.Identifier(self.schema, "counted")
        with self.db.transaction() as txn:
            # Two sessions that create one name at one time collide, "if not exists" or not.
            txn.execute("select pg_advisory_xact_lock(hashtext('worker_spi'), %s)", [index])
            [(has_schema, has_table, has_index)] = txn.execute(_FIND, {"schema": self.schema}).fetchall()
            if not has_schema:
                txn.execute(sql.SQL("create schema {}").format(schema))
            if not has_table:
                columns = sql.SQL("type text check (type in ('total', 'delta')), value integer")
                txn.execute(sql.SQL("create table {} ({})").format(table, columns))
            if not has_index:
                index_of = sql.SQL("create unique index counted_unique_total on {} (type) where type = 'total'")
                txn.execute(index_of.format(table))

    @bghost.hookimpl
    def bghost_main(self, worker: bghost.Worker[WorkerSpiSettings]) -> None:
        for _ in worker.mainloop():
            with worker.recovery():
                self.cycle(worker)
            with worker.waiting("WorkerSpiMain"):
                worker.wait()

    def cycle(self, worker: bghost.Worker[WorkerSpiSettings]) -> None:
        with self.db.transaction() as txn:
            row = txn.execute(self.count).fetchone()
        if row is not None:
            worker.log.info("{}: count in {}.counted is now {}", self.title, self.schema, row[0])

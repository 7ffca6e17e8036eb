"""The kind ``worker_spi_feed``: gives worker_spi something to count, a delta of 1 for each table, again and again.

PostgreSQL has no such worker; there a person inserts the deltas. It is also about the shortest worker that is of use.
"""

from typing import Annotated, Final

from msgspec import Meta
from psycopg import sql

import bghost
import bghost_postgres
from bghost_worker_spi import MAX_INT

_TABLES: Final = "select schemaname from pg_tables where tablename = 'counted' and schemaname ~ '^schema[0-9]+$'"
_INSERT: Final = sql.SQL("insert into {} (type, value) values ('delta', 1)")


class FeedSettings(bghost.Settings):
    """Settings of worker_spi_feed, ``[kind.worker_spi_feed]`` in bghost.toml."""

    database: Annotated[str, Meta(min_length=1, description="database that the worker connects to")] = "postgres"
    naptime: Annotated[float, Meta(gt=0, le=MAX_INT, description="seconds between two deltas")] = 1.0


class Feed:
    """One worker of kind worker_spi_feed."""

    Settings = FeedSettings

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker[FeedSettings]) -> None:
        self.db = bghost_postgres.connect(worker, dbname=worker.settings.database)

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker[FeedSettings]) -> None:
        with self.db.transaction() as txn:
            for (schema,) in txn.execute(_TABLES).fetchall():
                txn.execute(_INSERT.format(sql.Identifier(schema, "counted")))

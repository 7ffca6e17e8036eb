"""PostgreSQL for bghost's workers: connections that mend, light transactions, an embedded server.

Names are resolved on first use, so that what reads only this package's settings does not import psycopg.
"""

from typing import TYPE_CHECKING, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bghost_postgres.aio import AsyncConnection, AsyncDatabase, AsyncTransaction, connect_async
    from bghost_postgres.blocks import Transaction
    from bghost_postgres.connection import Connection
    from bghost_postgres.database import Database, connect
    from bghost_postgres.errors import CommitUnknown, TransactionError
    from bghost_postgres.plain import transaction

__all__ = [
    "AsyncConnection",
    "AsyncDatabase",
    "AsyncTransaction",
    "CommitUnknown",
    "Connection",
    "Database",
    "Transaction",
    "TransactionError",
    "connect",
    "connect_async",
    "transaction",
]

_HOME: Final = {
    **dict.fromkeys(("AsyncConnection", "AsyncDatabase", "AsyncTransaction", "connect_async"), "aio"),
    "Connection": "connection",
    "Database": "database",
    "connect": "database",
    "CommitUnknown": "errors",
    "TransactionError": "errors",
    "Transaction": "blocks",
    "transaction": "plain",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

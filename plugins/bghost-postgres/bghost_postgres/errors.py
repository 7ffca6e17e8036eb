"""What can go wrong with a transaction beside what the server reports."""

import psycopg


class TransactionError(psycopg.DatabaseError):
    """A transaction block ended without its work being committed, though nothing was raised inside; or is misused.

    An SQL error was swallowed in the block, a joined block failed, somebody ended the transaction underneath.
    """


class CommitUnknown(psycopg.OperationalError):
    """The answer to COMMIT (or PREPARE TRANSACTION, or a ROLLBACK by hand) did not come: the work may be committed, or
    not; whoever must know has to look."""

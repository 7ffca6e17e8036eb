import psycopg

import bghost


class TransferWrong:
    """How not to do it."""

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker) -> None:
        self.conn = psycopg.connect()  # once it breaks, it stays broken; and a query keeps a stop waiting

    def note(self, text: str) -> None:
        self.conn.execute("insert into notes values (%s)", [text])
        self.conn.commit()  # whatever transaction is open, the caller's too

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker) -> float:
        self.conn.execute("update accounts set balance = balance - 10 where name = 'a'")
        self.note("10 from a to b")  # now the first half is committed
        self.conn.execute("update accounts set balance = balance + 10 where name = 'b'")  # if this fails, 10 are gone
        self.conn.commit()
        return bghost.UNTIL_WOKEN

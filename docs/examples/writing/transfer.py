import bghost
import bghost_postgres


class Transfer:
    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker) -> None:
        self.db = bghost_postgres.connect(worker)  # replaced when it breaks, interrupted when the worker is to stop

    def note(self, text: str) -> None:
        with self.db.transaction() as txn:  # joins its caller's, and leaves the end to that; alone it is one of its own
            txn.execute("insert into notes values (%s)", [text])

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker) -> float:
        with self.db.transaction() as txn:
            txn.execute("update accounts set balance = balance - 10 where name = 'a'")
            self.note("10 from a to b")
            txn.execute("update accounts set balance = balance + 10 where name = 'b'")  # if it fails, nothing is done
        return bghost.UNTIL_WOKEN

import psycopg

import bghost
import bghost_postgres

TAKE = "select id, payload from jobs where state = 'new' order by id limit 10 for update skip locked"


class JobsSettings(bghost.Settings):
    naptime: float = 60.0  # for what no notification told of


class Jobs:
    Settings = JobsSettings

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker[JobsSettings]) -> None:
        self.db = bghost_postgres.connect(worker)
        self.db.listen("jobs")  # a notification ends the worker's sleep; also after a new connection

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker[JobsSettings]) -> float | None:
        self.db.notifications()  # that there are some is enough: what is to be done stands in the table
        with self.db.transaction() as txn:
            jobs = txn.execute(TAKE).fetchall()  # other workers skip these until the end of this transaction
            for number, payload in jobs:
                try:
                    with self.db.transaction(savepoint=True) as job:  # one that fails is undone alone
                        job.execute("insert into results values (%s, %s::int * 2)", [number, payload])
                        job.execute("update jobs set state = 'done' where id = %s", [number])
                except (psycopg.DataError, psycopg.IntegrityError) as error:
                    txn.execute("update jobs set state = 'failed', error = %s where id = %s", [str(error), number])
        return 0 if jobs else None

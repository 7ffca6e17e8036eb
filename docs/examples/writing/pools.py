import ctypes
from collections.abc import Sequence

import bghost


class Key(ctypes.Structure):
    _fields_ = [("queue", ctypes.c_uint32)]


class Progress(ctypes.Structure):
    _fields_ = [("done", ctypes.c_uint64), ("failed", ctypes.c_uint64)]


CONSUMERS = bghost.PoolSpec[Key, Progress](
    "consumers", kind="consumer", key=Key, data=Progress, capacity=8, retry_after=1.0
)


class Dispatcher:
    """The manager: it keeps one consumer for each queue."""

    @staticmethod
    @bghost.hookimpl
    def bghost_pools(settings: bghost.Settings) -> Sequence[bghost.PoolSpec[Key, Progress]]:
        return [CONSUMERS]

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker) -> None:
        self.pool = worker.pool(CONSUMERS)

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker) -> float:
        queues = [1, 2, 3]  # from a table, say
        for entry in self.pool:
            worker.log.info("queue {} is {}, {} done", entry.key.queue, entry.state, entry.snapshot().done)
        return min(1.0, self.pool.reconcile({Key(queue): {"queue": queue} for queue in queues}))

    @bghost.hookimpl
    def bghost_pool_died(self, worker: bghost.Worker, pool: bghost.Pool[Key, Progress], event: bghost.Event) -> None:
        done = event.data.done if event.data is not None else 0
        worker.log.warning("the consumer of queue {} died after {} units: {}", event.key.queue, done, event.reason)


class Consumer:
    """An entry's worker: it shows how far it has come."""

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker) -> None:
        self.mine = CONSUMERS.entry(worker)

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker) -> float:
        with self.mine.update() as progress:  # published whole, or not at all
            progress.done += 1
            if progress.done == 3 and worker.args["queue"] == 2:
                raise SystemExit("queue 2 cannot be consumed")
        return 0.2

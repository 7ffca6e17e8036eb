import asyncio
import ctypes
from collections.abc import Sequence

import bghost


class Key(ctypes.Structure):
    _fields_ = [("queue", ctypes.c_uint32)]


class Progress(ctypes.Structure):
    _fields_ = [("done", ctypes.c_uint64)]


CONSUMERS = bghost.PoolSpec[Key, Progress](
    "quick",
    kind="quick_consumer",
    key=Key,
    data=Progress,
    capacity=8,
    group=lambda key: key.queue // 10,  # the tens share a server, say
    group_limit=2,
)


class AsyncDispatcher:
    """A manager with an event loop: it stops two consumers at once, and goes on meanwhile."""

    @staticmethod
    @bghost.hookimpl
    def bghost_pools(settings: bghost.Settings) -> Sequence[bghost.PoolSpec[Key, Progress]]:
        return [CONSUMERS]

    @bghost.hookimpl
    async def bghost_main(self, worker: bghost.AsyncWorker) -> None:
        pool = worker.pool(CONSUMERS)
        for queue in (1, 2, 3):
            try:
                await pool.launch(Key(queue))
            except bghost.PoolFull as error:
                worker.log.warning("{}", error)
        await asyncio.gather(*(pool.wait(Key(queue)) for queue in (1, 2)))
        for entry in pool:
            worker.log.info("queue {}: {} done", entry.key.queue, entry.snapshot().done)


class QuickConsumer:
    """Consumes what there is, and is done."""

    @bghost.hookimpl
    def bghost_main(self, worker: bghost.Worker) -> None:
        mine = CONSUMERS.entry(worker)
        for _ in range(5):
            with mine.update() as progress:
                progress.done += 1

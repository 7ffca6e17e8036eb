import asyncio

import bghost


class Fetcher:
    @bghost.hookimpl
    async def bghost_setup(self, worker: bghost.AsyncWorker) -> None:
        self.queue: asyncio.Queue[int] = asyncio.Queue()
        self.producer = asyncio.create_task(self.produce(), name="producer")  # lives between ticks

    async def produce(self) -> None:
        for number in range(3):
            await asyncio.sleep(0.05)
            await self.queue.put(number)

    @bghost.hookimpl
    async def bghost_tick(self, worker: bghost.AsyncWorker) -> float:
        number = await self.queue.get()  # a stop, or a cancel, ends this as any other await
        worker.log.info("fetched {}", number)
        if number == 2:
            raise SystemExit  # done
        return 0

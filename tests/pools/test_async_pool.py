"""Pools, locks and handles in async workers: what waits is awaited, in any number of tasks at once."""

import os
import signal

from poolkit import consistent, start
from support import StartHost, notes, pid_in, until

ASYNC_MANAGER = """
from test_pool import Key, POOL
import asyncio, bghost, os, time

class Kind:
    @classmethod
    @bghost.hookimpl
    def bghost_pools(cls, settings):
        return [POOL]

    @bghost.hookimpl
    async def bghost_setup(self, worker):
        self.note = lambda text, *args: worker.log.info("note: " + text, *args)
        self.pool = worker.pool(POOL)
        self.started = []

    @bghost.hookimpl
    async def bghost_tick(self, worker):
        return await self.pool.reconcile({Key(n): {"n": n} for n in (1, 2)} if len(self.started) < 3 else {})

    @bghost.hookimpl
    async def bghost_pool_started(self, worker, pool, event):
        await asyncio.sleep(0)
        assert pool is self.pool
        self.started.append(event.key.n)
        if len(self.started) == 2:
            turns = []
            async def count():
                while True:
                    turns.append(1)
                    await asyncio.sleep(0)
            counting = asyncio.create_task(count())
            entry = await pool.launch(Key(1))
            self.note("again: {} {}", entry.key.n, entry.state)
            self.note("wait: {} {}", await pool.wait(Key(1), 0.05), await pool.wait(Key(9)))
            stops = pool.stop(Key(1)), pool.stop(Key(2), fast=True)
            waits = asyncio.gather(pool.wait(Key(1)), pool.wait(Key(2)), *stops)
            self.note("stopped: {}, others ran: {}", await waits, len(turns) > 10)
            counting.cancel()
            await pool.forget(Key(1))
            handle = await worker.launch(bghost.WorkerSpec(kind="idle", restart="never"))
            self.note("launched: {} {}", await handle.wait_started(), await handle.wait_ready())
            found = worker.find("idle")
            self.note("found: {} {} {}", found == handle, await found.wait_stopped(0.05), await found.stop())

    @bghost.hookimpl
    async def bghost_pool_exited(self, worker, pool, event):
        self.note("exited {}", event.key.n)
"""


def test_an_async_manager(bghost_host: StartHost) -> None:
    """It launches, stops, waits for several keys at once, reconciles and is told, and its loop goes on meanwhile."""
    host = start(
        bghost_host,
        kinds={
            "manager": ASYNC_MANAGER,
            "idle": "import bghost\nclass Kind:\n  @bghost.hookimpl\n  def bghost_tick(self, worker): pass\n",
        },
    )
    host.wait_line("note: found: ")
    assert notes(host, "manager")[:5] == [
        "again: 1 ready",
        "wait: False True",
        "stopped: [True, True, True, True], others ran: True",
        "launched: True True",
        "found: True False True",
    ]
    host.wait_line("note: exited 1")
    host.wait_line("note: exited 2")
    until(lambda: consistent(host)["used"] == 0)


SLEEPERS = """
from test_pool import Key, POOL
import asyncio, bghost, os

read, write = os.pipe()

class Kind:
    rounds = 0

    @bghost.hookimpl
    async def bghost_setup(self, worker):
        self.note = lambda text, *args: worker.log.info("note: " + text, *args)
        self.pool = worker.pool(POOL)
        self.tasks = [asyncio.create_task(self.sleep(worker, n)) for n in range(3)]
        self.inside = 0
        self.lockers = [asyncio.create_task(self.locks()) for _ in range(3)]

    async def sleep(self, worker, n):
        self.note("{} {}", n, sorted(await worker.wait(600, read)))
        try:
            await worker.wait(600)
        finally:
            self.note("{} leaves", n)

    async def locks(self):
        for _ in range(20):
            async with self.pool.lock(60):
                self.inside += 1
                assert self.inside == 1
                await asyncio.sleep(0.001)
                self.inside -= 1

    @bghost.hookimpl
    async def bghost_tick(self, worker):
        self.rounds += 1
        if self.rounds == 1:
            await asyncio.gather(*self.lockers)
            assert worker.slot.wait.read() == ""  # what the tasks wait for is not what the worker does
            os.write(write, b"x")
            return 0.2
        self.note("waits")
        try:
            async with self.pool.lock():
                await worker.wait(600)
        except asyncio.CancelledError:
            self.note("cancelled, {} sleep on", sum(not task.done() for task in self.tasks))
            raise
"""


def test_tasks_that_sleep_at_once(bghost_host: StartHost) -> None:
    """Each of several tasks sleeps in waits of bghost's; what they wait for wakes all of them; a cancel and a stop are
    for the worker's own task, whoever sees them first; tasks exclude each other from a lock, too."""
    host = start(bghost_host, kinds={"sleepers": SLEEPERS}, args=("run", "manager", "sleepers"), wanted="()")
    host.wait_line("note: waits")
    assert sorted(notes(host, "sleepers")[:-1]) == ["0 ['fd']", "1 ['fd']", "2 ['fd']"]
    pid = pid_in(host.row("sleepers"))
    os.kill(pid, signal.SIGINT)
    host.wait_line("note: cancelled, 3 sleep on")
    row = host.wait_row("sleepers", lambda row: row["recoveries"] == 1)
    assert (row["dropped"], row["pid"]) == (0, pid)
    until(lambda: notes(host, "sleepers").count("waits") == 2)
    os.kill(pid, signal.SIGTERM)
    host.wait_line("note: 2 leaves")
    assert notes(host, "sleepers").count("cancelled, 3 sleep on") == 2


def test_an_async_worker_takes_a_lock_over(bghost_host: StartHost) -> None:
    """It waits for another process's lock while its loop goes on, and is told that it inherits it."""
    host = start(
        bghost_host,
        wanted="(1,)",
        options="'retry_after': 600",  # its successor would want the lock as well
        entry="""
    def work(self, worker, n):
        with worker.pool(POOL).lock():
            worker.log.info("note: holds")
            time.sleep(600)
""",
        kinds={
            "taker": """
from test_pool import Key, POOL
import asyncio, bghost

class Kind:
    @bghost.hookimpl
    async def bghost_tick(self, worker):
        try:
            async with worker.pool(POOL).lock(0.2):
                return 0.01
        except bghost.LockTimeout as error:
            worker.log.info("note: {}", error.detail)
        async with worker.pool(POOL).lock(30) as lock:
            worker.log.info("note: inherited {}", lock.inherited)
        return bghost.UNTIL_WOKEN
"""
        },
        args=("run", "manager", "taker"),
    )
    host.wait_line("note: holds")
    line = host.wait_line(r"note: held by worker apply.1, pid (\d+), slot \d+")
    host.wait_row("taker", lambda row: row["wait"] == "lock")
    os.kill(int(line.match[1]), signal.SIGKILL)
    host.wait_line("note: inherited True")

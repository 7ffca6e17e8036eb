"""Workers with ``async def`` hooks: one loop, one task, and the same guarantees as everybody's."""

import os
import signal

import pytest
from support import Host, StartHost, notes, until

HEAD = """
import asyncio, os, signal, time, bghost

def send(name):
    os.kill(os.getpid(), signal.Signals["SIG" + name])

class Kind:
    rounds = 0

    @bghost.hookimpl
    async def bghost_setup(self, worker):
        self.note = lambda text, *args: worker.log.info("note: " + text, *args)
        self.task = asyncio.current_task()
        await self.begin(worker)

    async def begin(self, worker):
        pass

    @bghost.hookimpl
    async def bghost_tick(self, worker):
        assert asyncio.current_task() is self.task, "a tick runs in the task that set-up ran in"
        self.rounds += 1
        return await self.work(worker)

    @bghost.hookimpl
    async def bghost_recover(self, worker, error):
        assert asyncio.current_task() is self.task
        await asyncio.sleep(0)
        self.note("recovers from {}: {}", type(error).__name__, error)

    @bghost.hookimpl
    async def bghost_cleanup(self, worker, reason):
        await asyncio.sleep(0)
        self.note("cleanup, {}", reason)
"""

CASES = {
    "a tick's result and nap": (
        """
    async def work(self, worker):
        if self.rounds == 3:
            raise SystemExit
        self.note("round {}, {}", self.rounds, sorted(worker.woken))
        return 0.01
""",
        ["round 1, []", "round 2, ['timeout']", "cleanup, done"],
    ),
    "a cancel inside an await that bghost does not know": (
        """
    async def work(self, worker):
        if self.rounds == 2:
            raise SystemExit
        send("INT")
        await asyncio.sleep(60)
""",
        ["recovers from Canceled: canceled by SIGINT", "cleanup, done"],
    ),
    "a stop inside an await that bghost does not know": (
        """
    async def work(self, worker):
        send("TERM")
        try:
            await asyncio.sleep(60)
        except Exception:
            self.note("never: a cancellation is no Exception")
        finally:
            self.note("unwound")
""",
        ["unwound", "cleanup, stop"],
    ),
    "a stop that the tick swallows comes again": (
        """
    async def work(self, worker):
        send("TERM")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.note("swallowed")
        await worker.wait(60)
        self.note("never")
""",
        ["swallowed", "cleanup, stop"],
    ),
    "a wait is cut short by a wake-up, a cancel, a stop": (
        """
    async def work(self, worker):
        if self.rounds == 1:
            worker.wake()
            self.note("{}", sorted(await worker.wait(60)))
            self.note("{}", sorted(await worker.wait(0.01)))
            send("INT")
            await worker.wait(60)
        send("TERM")
        await worker.wait(60)
""",
        ["['wake']", "['timeout']", "recovers from Canceled: canceled by SIGINT", "cleanup, stop"],
    ),
    "a descriptor ends a wait": (
        """
    async def work(self, worker):
        readable, writable = os.pipe()
        asyncio.get_running_loop().call_later(0.01, os.write, writable, b"x")
        self.note("{}", sorted(await worker.wait(60, readable)))
        raise SystemExit
""",
        ["['fd']", "cleanup, done"],
    ),
    "tasks of set-up live between ticks, those of a tick that failed are cancelled and named": (
        """
    async def begin(self, worker):
        self.beats = 0
        async def beat():
            while True:
                await asyncio.sleep(0.001)
                self.beats += 1
        self.beat = asyncio.create_task(beat(), name="beat")

    async def work(self, worker):
        if self.rounds == 1:
            async def stray():
                try:
                    await asyncio.sleep(60)
                finally:
                    self.note("stray ends")
            self.stray = asyncio.create_task(stray(), name="stray")
            await asyncio.sleep(0)
            raise ValueError("one")
        self.note("stray cancelled: {}, beat lives: {}", self.stray.cancelled(), not self.beat.done())
        before = self.beats
        while self.beats < before + 5:
            await worker.wait(0.01)
        raise SystemExit
""",
        ["stray ends", "recovers from ValueError: one", "stray cancelled: True, beat lives: True", "cleanup, done"],
    ),
    "a program is run, and ended with a stop": (
        """
    async def work(self, worker):
        done = await worker.run(["sh", "-c", "cat; exit 3"], input="in", text=True, capture_output=True)
        self.note("{} {}", done.returncode, done.stdout)
        asyncio.get_running_loop().call_later(0.05, send, "TERM")
        await worker.run(["sleep", "60"])
""",
        ["3 in", "cleanup, stop"],
    ),
    "interrupts are held": (
        """
    async def work(self, worker):
        with worker.hold_interrupts():
            send("TERM")
            await worker.wait(0.01)
            self.note("held")
        self.note("never")
""",
        ["held", "cleanup, stop"],
    ),
    "SystemExit in another task ends the worker in order": (
        """
    async def work(self, worker):
        async def leave():
            raise SystemExit(0)
        self.other = asyncio.create_task(leave())
        await asyncio.sleep(60)
""",
        ["cleanup, done"],
    ),
    "a tick that cancels itself is recovered": (
        """
    async def work(self, worker):
        if self.rounds == 2:
            raise SystemExit
        asyncio.current_task().cancel()
        await asyncio.sleep(60)
""",
        ["recovers from Canceled: the worker's task was cancelled by its own code", "cleanup, done"],
    ),
    "a timeout of asyncio's works after a cancel": (
        """
    async def work(self, worker):
        if self.rounds == 1:
            send("INT")
            await asyncio.sleep(60)
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            self.note("timed out")
        raise SystemExit
""",
        ["recovers from Canceled: canceled by SIGINT", "timed out", "cleanup, done"],
    ),
}

OWN_LOOP = """
    @bghost.hookimpl
    async def bghost_main(self, worker):
        async for _ in worker.mainloop():
            self.rounds += 1
            async with worker.recovery():
                self.note("round {}, same task: {}", self.rounds, asyncio.current_task() is self.task)
                if self.rounds == 1:
                    raise ValueError("one")
                if self.rounds == 2:
                    send("INT")
                    await asyncio.sleep(60)
                if self.rounds == 3:
                    send("TERM")
                    await asyncio.sleep(60)
            self.note("waits")
            await worker.wait(0)
"""


def first_life(host: Host) -> list[str]:
    """What the worker's first process has noted; one that a SIGTERM ends is started again."""
    host.wait_line("note: cleanup", 20)
    noted = notes(host, "tasks")
    return noted[: next(number for number, text in enumerate(noted) if text.startswith("cleanup")) + 1]


@pytest.mark.parametrize("case", CASES)
def test_hooks(bghost_host: StartHost, case: str) -> None:
    """Ticks, waits, cancels and stops of a kind with async hooks."""
    source, expected = CASES[case]
    host = bghost_host(kinds={"tasks": HEAD + source}, args=["run", "tasks"], answering=False)
    assert first_life(host) == expected


def test_a_main_of_its_own(bghost_host: StartHost) -> None:
    """``async for`` and ``async with`` give an author's own loop the same recovery, cancel and stop."""
    host = bghost_host(kinds={"tasks": HEAD + OWN_LOOP}, args=["run", "tasks"], answering=False)
    assert first_life(host) == [
        "round 1, same task: True",
        "recovers from ValueError: one",
        "waits",
        "round 2, same task: True",
        "recovers from Canceled: canceled by SIGINT",
        "waits",
        "round 3, same task: True",
        "cleanup, stop",
    ]


def test_extensions_see_results(bghost_host: StartHost) -> None:
    """A wrapper of an async tick gets its result, not a coroutine."""
    extension = """
    import bghost
    class Extension:
        @bghost.hookimpl(wrapper=True)
        def bghost_tick(self, worker):
            result = yield
            worker.log.info("note: the tick gave {}", result)
            return result
    """
    source = """
    async def work(self, worker):
        if self.rounds == 2:
            raise SystemExit
        return 0.25
"""
    host = bghost_host(
        kinds={"tasks": HEAD + source}, extensions={"seer": extension}, args=["run", "tasks"], answering=False
    )
    assert first_life(host) == ["the tick gave 0.25", "cleanup, done"]


def test_the_hosts_death(bghost_host: StartHost) -> None:
    """An async worker that awaits something of its own is gone soon after its host was killed, with its clean-up."""
    source = """
    async def work(self, worker):
        self.note("sleeps")
        await asyncio.sleep(600)
"""
    host = bghost_host(kinds={"tasks": HEAD + source}, args=["run", "tasks"])
    host.wait_line("note: sleeps")
    pid = host.row("tasks")["pid"]
    assert pid is not None
    os.kill(host.pid, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{pid}"), 30.0, "the worker's end")
    host.wait_line("note: cleanup, host_died")


def test_asyncio_is_imported_for_async_kinds_alone(bghost_host: StartHost) -> None:
    """A worker without async hooks does not pay for asyncio."""
    source = """
    import sys, bghost
    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("note: {}", "bghost.worker.tasks" in sys.modules)
            raise SystemExit
    """
    host = bghost_host(kinds={"plain": source}, args=["run", "plain"], answering=False)
    host.wait(20)
    assert notes(host, "plain") == ["False"]

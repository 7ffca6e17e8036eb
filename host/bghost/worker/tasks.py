"""The worker whose hooks are coroutines: one event loop, one task for hooks, ticks and waits.

The runtime stays outside: it hands a hook's coroutine to the task, runs the loop until that has its outcome, and goes
on like any other worker's. A stop or a cancel cancels the task; what is due is raised out here, where it cannot tear
through the loop and leave the task pending. asyncio is imported with this module, for kinds that need it alone.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bghost.shared.errors import Canceled, Stop
from bghost.shared.pools import PoolTable
from bghost.shared.poolspec import D, K, PoolSpec
from bghost.shared.spec import WorkerSpec
from bghost.worker import waiting
from bghost.worker.async_pool import AsyncHandle, AsyncPool
from bghost.worker.recovery import ROLL_BACK_TIMEOUT, RecoveryBlock
from bghost.worker.waiting import Steps
from bghost.worker.worker import S, T, Worker

if TYPE_CHECKING:
    import subprocess

    from bghost.shared.birth import Birth
    from bghost.shared.hooks import WorkerHooks
    from bghost.worker.interrupts import Interrupts

_LONGEST: Final = 86_400.0  # seconds of one sleep of the loop, which refuses much more


class _Job(NamedTuple):
    """What the task is given: a coroutine to run, or the answer to what it has asked for."""

    coroutine: Coroutine[Any, Any, Any] | None = None
    answer: Any = None


class Tasks:
    """The event loop of one worker, and the task that all its hooks run in."""

    def __init__(self, worker: "AsyncWorker[Any]") -> None:
        self._worker = worker
        self.loop = asyncio.new_event_loop()
        self._given: asyncio.Future[_Job] = self.loop.create_future()
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._asked: Callable[[], Any] | None = None
        self._due: BaseException | None = None
        self._depth = 0  # of coroutines that the task has begun; at 0 it waits for the next
        self._sleepers: list[_Sleeper] = []
        latch, host = worker.slot.latch.read_fd, worker.interrupts.host_pidfd
        self.loop.add_reader(latch, self._wakeup, latch)
        if host >= 0:
            self.loop.add_reader(host, self._wakeup, host)
        self.main = self.loop.create_task(self._serve(), name=f"bghost: {worker.name}")

    async def _serve(self) -> None:
        while True:
            await self._do(await self._next())

    async def _next(self) -> "_Job":
        try:
            return await self._given
        finally:
            self._given = self.loop.create_future()

    async def _do(self, job: "_Job") -> None:
        assert job.coroutine is not None
        try:
            self._outcome = await job.coroutine, None
        except BaseException as error:
            # Without this frame: recovery clears the frames of an error, and that would end this coroutine.
            trace = error.__traceback__
            self._outcome = None, error.with_traceback(trace.tb_next if trace is not None else None)
        while self.main.cancelling():
            self.main.uncancel()
        self.loop.stop()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run *coroutine* to its end, in the task. From outside the loop only, be it from within :meth:`outside`.

        :raises bghost.Stop: if a stop has cancelled it; likewise Canceled, and whatever it raised itself.
        """
        self._depth += 1
        self._given.set_result(_Job(coroutine))
        result, raised = self._run()
        self._depth -= 1
        due, self._due = self._due, None
        if due is not None and (isinstance(raised, asyncio.CancelledError) or not isinstance(due, Stop | Canceled)):
            raise due
        if isinstance(raised, asyncio.CancelledError):
            raise Canceled("the worker's task was cancelled by its own code")
        if raised is not None:
            try:
                raise raised
            finally:
                del raised
        outcome: T = result
        return outcome

    def _run(self) -> tuple[Any, BaseException | None]:
        while True:
            try:
                self.loop.run_forever()
                if self._asked is not None:
                    function, self._asked = self._asked, None
                    answer = function()  # may have coroutines of its own run meanwhile
                    self._given.set_result(_Job(answer=answer))
            except BaseException as error:  # a SystemExit of another task goes right through the loop
                self._interrupt(error)
            if self._outcome is not None:
                outcome, self._outcome = self._outcome, None
                return outcome

    def _interrupt(self, error: BaseException) -> None:
        self._due = error
        self.main.cancel()

    def take_canceled(self) -> Canceled | None:
        """From the task, when it was cancelled: the cancel that did it, if it was one; the task goes on then."""
        due = self._due
        if isinstance(due, Stop) or (due is not None and not isinstance(due, Canceled)):
            return None
        self._due = None
        while self.main.cancelling():
            self.main.uncancel()
        return due or Canceled("the worker's task was cancelled by its own code")

    async def outside(self, function: Callable[[], T]) -> T:
        """From the task: have *function* called with the loop at rest. What it raises cancels the task.

        Coroutines that *function* hands to :meth:`call` run here, in the task, while it waits.
        """
        self._asked = function
        self.loop.stop()
        while True:
            job = await self._next()
            if job.coroutine is None:
                answer: T = job.answer
                return answer
            await self._do(job)

    def _wakeup(self, fd: int) -> None:
        """The latch, the host, or a descriptor that a sleep watches became readable."""
        interrupts = self._worker.interrupts
        if fd == interrupts.host_pidfd:
            self.loop.remove_reader(fd)
            interrupts.host_died = interrupts.attention = True
        everybody = fd == interrupts.host_pidfd or fd == self._worker.slot.latch.read_fd
        for sleeper in self._sleepers:
            if everybody or fd in sleeper.fds:
                sleeper.wake(fd)
        if everybody and not any(sleeper.task is self.main for sleeper in self._sleepers):
            interrupts.reset()
            self._look()

    def is_another(self) -> bool:
        """Whether what runs is a task, and not the worker's own."""
        task = asyncio.current_task(self.loop)
        return task is not None and task is not self.main

    def look(self) -> None:
        """In another task: what is due, a stop or a cancel, is for the worker's own."""
        if self._due is None:
            self._look()

    def _look(self) -> None:
        if not self._depth or self._outcome is not None:
            return  # the task has nothing that could be cancelled; the runtime looks for itself
        try:
            Worker.look(self._worker)
        except (Stop, Canceled) as error:
            self._interrupt(error)

    async def sleep(self, seconds: float, fds: tuple[int, ...]) -> list[int]:
        """Sleep so long, or until a descriptor, the latch or the host can be read. Any number of tasks may."""
        sleeper = _Sleeper(self.loop.create_future(), asyncio.current_task(), fds)
        self._sleepers.append(sleeper)
        timer = None
        if seconds != math.inf:
            timer = self.loop.call_later(min(seconds, _LONGEST), sleeper.wake)
        try:
            for fd in fds:
                self.loop.add_reader(fd, self._wakeup, fd)
            await sleeper.future
            return sleeper.ready
        finally:
            self._sleepers.remove(sleeper)
            if timer is not None:
                timer.cancel()
            for fd in fds:
                if not any(fd in other.fds for other in self._sleepers):
                    self.loop.remove_reader(fd)

    async def drive(self, steps: Steps[T]) -> T:
        """:meth:`Worker.drive`, inside the task."""
        try:
            seconds, fds = next(steps)
            while True:
                seconds, fds = steps.send(await self.sleep(seconds, fds))
        except StopIteration as end:
            result: T = end.value
            return result
        except (Stop, Canceled) as error:
            self._due = error
            raise asyncio.CancelledError from None
        finally:
            steps.close()

    def others(self) -> set[asyncio.Task[Any]]:
        """The tasks that are not the worker's own."""
        return asyncio.all_tasks(self.loop) - {self.main}

    def cancel(self, tasks: set[asyncio.Task[Any]]) -> list[str]:
        """Cancel *tasks* and see them end; their names."""
        names = sorted(f"{task.get_name()} ({getattr(task.get_coro(), '__qualname__', '?')})" for task in tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            done, _ = self.loop.run_until_complete(asyncio.wait(tasks, timeout=ROLL_BACK_TIMEOUT))
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    self._worker.log.warning("task {} ended with {}: {}", task.get_name(), type(error).__name__, error)
        return names

    def close(self) -> None:
        """End every task and the loop."""
        self.cancel(self.others())
        self.main.cancel()
        self.loop.run_until_complete(asyncio.wait({self.main}))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


class _Sleeper:
    """A task that sleeps."""

    __slots__ = ("fds", "future", "ready", "task")

    def __init__(self, future: "asyncio.Future[None]", task: "asyncio.Task[Any] | None", fds: tuple[int, ...]) -> None:
        self.future = future
        self.task = task
        self.fds = fds
        self.ready: list[int] = []

    def wake(self, *ready: int) -> None:
        """End its sleep, for these descriptors."""
        self.ready += ready
        if not self.future.done():
            self.future.set_result(None)


class AsyncRecoveryBlock(RecoveryBlock):
    """``async with worker.recovery():`` in a main of the author's own; the default loop enters it as any other."""

    def __init__(self, worker: "AsyncWorker[Any]", *, watch: bool) -> None:
        super().__init__(worker, watch=watch)
        self._tasks = worker.tasks
        self._before: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> None:
        super().__enter__()
        self._before = self._tasks.others()

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, asyncio.CancelledError):
            # What cancelled the task: a cancel is recovered here, a stop goes on to the task's end.
            error = self._tasks.take_canceled() or error
        return await self._tasks.outside(lambda: self.__exit__(type(error) if error else None, error, trace))

    def drop_timers(self) -> None:
        super().drop_timers()
        names = self._tasks.cancel(self._tasks.others() - self._before)
        if names:
            self.worker.log.warning("tasks of the failed tick were cancelled: {}", ", ".join(names))


class AsyncWorker(Worker[S]):
    """The worker that ``async def`` hooks get: what waits is awaited. Everything else is as in :class:`Worker`."""

    def __init__(self, birth: "Birth", interrupts: "Interrupts", hooks: "WorkerHooks") -> None:
        super().__init__(birth, interrupts, hooks)
        self.tasks = Tasks(self)
        self.block = AsyncRecoveryBlock(self, watch=birth.spec.tick_timeout is not None)
        self.on_exit(self.tasks.close)

    async def wait(self, timeout: float | None = None, *fds: int) -> frozenset[str]:  # type: ignore[override]
        """See :meth:`Worker.wait`; other tasks run meanwhile."""
        self.woken = await self.tasks.drive(self._wait(self._naptime if timeout is None else timeout, fds))
        return self.woken

    async def launch(self, spec: WorkerSpec) -> AsyncHandle:  # type: ignore[override]
        """See :meth:`Worker.launch`; other tasks run meanwhile."""
        handle = await self.tasks.drive(self._launch(spec))
        assert isinstance(handle, AsyncHandle)
        return handle

    def find(self, name: str) -> AsyncHandle | None:
        """See :meth:`Worker.find`."""
        handle = super().find(name)
        assert handle is None or isinstance(handle, AsyncHandle)
        return handle

    def handle_of(self, slot: int, generation: int) -> AsyncHandle:
        """A handle from its parts."""
        return AsyncHandle(self, self._table, slot, generation)

    def pool(self, spec: PoolSpec[K, D]) -> AsyncPool[K, D]:
        """See :meth:`Worker.pool`."""
        pool = super().pool(spec)
        assert isinstance(pool, AsyncPool)
        return pool

    def _make_pool(self, spec: PoolSpec[K, D], table: PoolTable) -> AsyncPool[K, D]:
        return AsyncPool(self, spec, table)

    @property
    def shows_waits(self) -> bool:
        """See :attr:`Worker.shows_waits`."""
        return not self.tasks.is_another()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """See :meth:`Worker.waiting`; shown of the worker's own task alone, since others come and go in any order."""
        with super().waiting(name) if self.shows_waits else nullcontext():
            yield

    def look(self) -> None:
        """A safe point; in a task that is not the worker's own, what is due ends that one."""
        if self.tasks.is_another():
            self.tasks.look()
        else:
            super().look()

    async def run(self, argv: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[Any]":  # type: ignore[override]
        """See :meth:`Worker.run`; other tasks run meanwhile."""
        with self.waiting("subprocess"):
            return await self.tasks.drive(waiting.run(self, list(argv), options))

    def recovery(self) -> AsyncRecoveryBlock:
        """See :meth:`Worker.recovery`; ``async with worker.recovery():``."""
        assert isinstance(self.block, AsyncRecoveryBlock)
        return self.block

    async def mainloop(self) -> AsyncIterator[None]:  # type: ignore[override]
        """See :meth:`Worker.mainloop`; ``async for _ in worker.mainloop():``."""
        while True:
            if self.interrupts.pending:
                await self.tasks.outside(self.turn)
            yield

    def drive(self, steps: Steps[T]) -> T:
        """Sleep as *steps* say, outside of hooks, with the loop running."""
        return self.tasks.call(self.tasks.drive(steps))

"""A pool, its lock, and a handle as an async worker has them: what waits is awaited, and other tasks run meanwhile."""

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from bghost.shared.errors import LockDamaged, LockTimeout, TimedOut
from bghost.shared.handle import Handle
from bghost.shared.mutex import RobustMutex
from bghost.shared.pools import PoolTable
from bghost.shared.poolspec import D, K, PoolSpec
from bghost.shared.table import Table
from bghost.worker.locking import TIMEOUT, Lock
from bghost.worker.pool import Entry, Pool

if TYPE_CHECKING:
    from bghost.worker.tasks import AsyncWorker

_NAP: Final = 0.002  # seconds between two looks at a mutex, on which a process with an event loop must not sleep


class AsyncLock(Lock):
    """``async with lock:`` is exclusive between all processes, and between the tasks of this one. Not recursive.

    Each use has an object of its own; see :class:`~bghost.worker.locking.Lock`.

    :param tasks: what excludes the tasks; one for all that stand for *mutex* in this process.
    """

    __slots__ = ("_among_tasks", "_enlisted", "_tasks")

    _stays = False

    def __init__(
        self,
        worker: "AsyncWorker[Any]",
        mutex: RobustMutex,
        name: str,
        timeout: float = TIMEOUT,
        *,
        among_tasks: asyncio.Lock,
    ) -> None:
        super().__init__(worker, mutex, name, timeout)
        self._tasks = worker.tasks
        self._among_tasks = among_tasks
        self._enlisted = False

    async def __aenter__(self) -> "AsyncLock":
        """See :meth:`Lock.__enter__`."""
        until = time.monotonic() + self.timeout
        try:
            async with asyncio.timeout(self.timeout):
                await self._among_tasks.acquire()
        except TimeoutError:
            raise LockTimeout(
                f"lock {self.name} has not become free within {self.timeout:g} s",
                detail="held by another task of this worker",
            ) from None
        if asyncio.current_task() is self._tasks.main:  # another task may hold it from one tick to the next
            self._worker.enlist(self)
            self._enlisted = True
        self._entered = True
        try:
            if not self._took(self._mutex.try_acquire()):
                await self._tasks.drive(self._wait(0.0, until, _NAP))
        except LockDamaged as error:
            self.roll_back(0.0)
            raise self._damaged(error) from None
        except BaseException:
            self.roll_back(0.0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered:
            try:
                self._leave()
            finally:
                self._free()

    def roll_back(self, timeout: float) -> None:
        """See :class:`~bghost.worker.recovery.Participant`."""
        if self._entered:
            super().roll_back(timeout)
            self._free()

    def _free(self) -> None:
        self._among_tasks.release()
        if self._enlisted:
            self._enlisted = False
            self._worker.dismiss(self)


class AsyncPool(Pool[K, D]):
    """See :class:`~bghost.worker.pool.Pool`; made by the pool() of an async worker."""

    worker: "AsyncWorker[Any]"

    def __init__(self, worker: "AsyncWorker[Any]", spec: PoolSpec[K, D], table: PoolTable) -> None:
        super().__init__(worker, spec, table)
        self._among_tasks = asyncio.Lock()

    async def launch(self, key: K, args: Mapping[str, Any] | None = None) -> Entry[K, D]:  # type: ignore[override]
        """See :meth:`Pool.launch`."""
        return await self.worker.tasks.drive(self._launch(key, args))

    async def forget(self, key: K) -> None:  # type: ignore[override]
        """See :meth:`Pool.forget`."""
        await self.worker.tasks.drive(self._ask("pool_forget", key))

    async def stop(self, key: K, timeout: float | None = None, *, fast: bool = False) -> bool:  # type: ignore[override]
        """See :meth:`Pool.stop`."""
        return await self.worker.tasks.drive(self._gone("pool_stop", key, timeout, mode="fast" if fast else "smart"))

    async def wait(self, key: K, timeout: float | None = None) -> bool:  # type: ignore[override]
        """See :meth:`Pool.wait`."""
        return await self.worker.tasks.drive(self._gone("pool_wait", key, timeout))

    async def reconcile(self, wanted: Mapping[K, Mapping[str, Any]]) -> float:  # type: ignore[override]
        """See :meth:`Pool.reconcile`."""
        return await self.worker.tasks.drive(self._reconcile(wanted))

    def lock(self, timeout: float = TIMEOUT) -> AsyncLock:
        """``async with pool.lock() as lock:``; see :meth:`Pool.lock`."""
        return AsyncLock(
            self.worker, self._table.mutex, f"pool {self.spec.name}", timeout, among_tasks=self._among_tasks
        )


class AsyncHandle(Handle):
    """See :class:`~bghost.shared.handle.Handle`; what an async worker has of another worker."""

    __slots__ = ("_tasks",)

    def __init__(self, worker: "AsyncWorker[Any]", table: Table, slot: int, generation: int) -> None:
        super().__init__(table, slot, generation, worker.asking)
        self._tasks = worker.tasks

    async def stop(  # type: ignore[override]
        self, *, mode: Literal["smart", "fast", "immediate"] = "smart", timeout: float | None = None
    ) -> bool:
        """See :meth:`Handle.stop`."""
        return await self._awaited("stop", {"mode": mode}, timeout)

    async def wait_started(self, timeout: float | None = None) -> bool:  # type: ignore[override]
        """See :meth:`Handle.wait_started`."""
        return await self._awaited("wait", {"for": "started"}, timeout)

    async def wait_ready(self, timeout: float | None = None) -> bool:  # type: ignore[override]
        """See :meth:`Handle.wait_ready`."""
        return await self._awaited("wait", {"for": "ready"}, timeout)

    async def wait_stopped(self, timeout: float | None = None) -> bool:  # type: ignore[override]
        """See :meth:`Handle.wait_stopped`."""
        return await self._awaited("wait", {"for": "stopped"}, timeout)

    async def _awaited(self, verb: str, args: Mapping[str, object], timeout: float | None) -> bool:
        try:
            await self._tasks.drive(self._asked(verb, args, timeout))
        except TimedOut:
            return False
        return True

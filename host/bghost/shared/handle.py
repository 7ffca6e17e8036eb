"""A worker's address: good across its restarts, never good for its slot's next occupant or the next host."""

import errno
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from bghost.shared import table as t
from bghost.shared.errors import TimedOut
from bghost.shared.spec import State

Ask = Callable[[str, Mapping[str, object], float | None], Any]
"""Asks the host a verb with args, and waits for the answer so many seconds at most."""


class Handle:
    """Names one registration: the host's run, the slot, the slot's generation. In host and workers alike.

    A pid is no address: it may be somebody else's by the time it is used. A signal goes through a pidfd that is opened
    first and then compared with the table: the host clears the pid word before it reaps, so a word that still stands
    says that the descriptor is the worker's.
    """

    __slots__ = ("_ask", "_table", "generation", "run_id", "slot")

    def __init__(self, table: t.Table, slot: int, generation: int, ask: Ask | None = None) -> None:
        self._table = table
        self._ask = ask
        self.run_id = table.run_id
        self.slot = slot
        self.generation = generation

    def __repr__(self) -> str:
        return f"Handle(run_id={self.run_id:#x}, slot={self.slot}, generation={self.generation})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and (self.run_id, self.slot, self.generation) == (
            other.run_id,
            other.slot,
            other.generation,
        )

    def __hash__(self) -> int:
        return hash((self.run_id, self.slot, self.generation))

    @property
    def _current(self) -> t.Slot | None:
        slot = self._table.slot(self.slot)
        return slot if slot.control[t.GENERATION] == self.generation else None

    @property
    def state(self) -> State | None:
        """The worker's state; ``None`` once its slot has gone to somebody else."""
        slot = self._current
        state = slot.state if slot else None
        return state if self._current else None

    def pid(self) -> int | None:
        """The pid of its process, to be shown; ``None`` while there is none."""
        slot = self._current
        pid = slot.control[t.PID] if slot else 0
        return pid if pid and self._current else None

    def wake(self) -> bool:
        """Set the worker's latch: its wait ends, with ``wake`` in ``worker.woken``. Never blocks.

        A worker that is just being started, or started again, finds it when it first waits.

        :returns: whether there was a process to wake.
        """
        slot = self._current
        if slot is None:
            return False
        there = slot.state in _LIVE and slot.stats[t.EXECED] != 1  # a program has no latch
        slot.wake(self.generation)  # also where there is no pid: a process may run before the host has noted its pid
        return there  # as it was before: one that was woken may have ended since

    def stop(self, *, mode: Literal["smart", "fast", "immediate"] = "smart", timeout: float | None = None) -> bool:
        """Stop the worker, and wait until it has; it stays stopped until it is told otherwise. In a worker.

        :param timeout: seconds; ``None``: as long as it takes, for which the host has its limits.
        :returns: False if it has not stopped in that time (it still will).
        """
        return self._until("stop", {"mode": mode}, timeout)

    def wait_started(self, timeout: float | None = None) -> bool:
        """Wait until its process has been forked, or it is over (WaitForBackgroundWorkerStartup). In a worker.

        :param timeout: seconds; ``None``: as long as it takes.
        :returns: False at the timeout.
        """
        return self._until("wait", {"for": "started"}, timeout)

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until its ``bghost_setup`` has returned. In a worker.

        :param timeout: seconds; ``None``: as long as it takes.
        :returns: False at the timeout.
        :raises HostError: if it has stopped or failed instead; with its last error.
        """
        return self._until("wait", {"for": "ready"}, timeout)

    def wait_stopped(self, timeout: float | None = None) -> bool:
        """Wait until it is over and no restart is due (WaitForBackgroundWorkerShutdown). In a worker.

        :param timeout: seconds; ``None``: as long as it takes.
        :returns: False at the timeout.
        """
        return self._until("wait", {"for": "stopped"}, timeout)

    def _until(self, verb: str, args: Mapping[str, object], timeout: float | None) -> bool:
        try:
            self._asked(verb, args, timeout)
        except TimedOut:
            return False
        return True

    def _asked(self, verb: str, args: Mapping[str, object], timeout: float | None) -> Any:
        if self._ask is None:
            raise RuntimeError("only a worker can wait for another; the host waits for nobody")
        return self._ask(verb, {**args, "handles": [[f"{self.run_id:016x}", self.slot, self.generation]]}, timeout)

    def signal(self, signum: int) -> bool:
        """Send a signal to the worker's process.

        :returns: whether there was one.
        """
        pid = self.pid()
        if pid is None:
            return False
        pidfd = -1
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            # A kernel without pidfds, or one that allows none: the look at the word below has to do.
        try:
            if self.pid() != pid:
                return False
            if pidfd >= 0:
                signal.pidfd_send_signal(pidfd, signum)
            else:
                os.kill(pid, signum)
        except ProcessLookupError:
            return False
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        return True


_LIVE: Final = frozenset({State.STARTING, State.READY, State.STOPPING})
"""States with a process."""

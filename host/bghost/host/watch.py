"""The watch over ticks: a worker whose tick takes longer than its ``tick_timeout`` is found, dumped and stopped.

Nothing runs while such a worker sleeps: at its next tick it sees that no watch is kept and rings the host's bell. The
watch is given up in two steps: the word is cleared, then a last look follows one timeout later, so that a tick which
began while the word was being cleared, and so did not ring, is seen all the same.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from bghost.host.timers import Timer
from bghost.shared import table as t
from bghost.shared.spec import Doing

if TYPE_CHECKING:
    from bghost.host.workers import Registration

STARVED_SHARE = 0.5  # of a timeout spent running, below which a worker that could run is not to blame


class TickWatch:
    """Watches the ticks of one worker.

    :param timeout: seconds that a tick may take; in a wait of bghost's they stand still, and begin anew after it.
    :param on_stuck: called once, when a tick has taken longer.
    """

    def __init__(self, worker: "Registration", timeout: float, on_stuck: Callable[[], None]) -> None:
        self._worker = worker
        self._timeout = timeout
        self._on_stuck = on_stuck
        self._timer: Timer | None = None
        self._last_look = False
        self._tick = 0
        self._ran = 0  # nanoseconds of processor time when the timer was set
        self.starved = False

    def rung(self) -> None:
        """The bell has rung; perhaps this worker has begun a tick unwatched."""
        if self._timer is None and self._worker.slot.stats[t.TICK_STARTED]:
            self._arm()

    def cancel(self) -> None:
        """The process has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._worker.slot.control[t.WATCHED] = 0
        self.starved = False

    def _arm(self, *, watched: bool = True) -> None:
        worker = self._worker
        worker.slot.control[t.WATCHED] = int(watched)
        self._tick = worker.slot.stats[t.TICK_STARTED]
        self._ran = self._processor_time()
        self._timer = worker.host.timers.at(time.monotonic() + self._timeout, self._look)

    def _look(self) -> None:
        worker = self._worker
        self._timer = None
        stats = worker.slot.stats
        tick = stats[t.TICK_STARTED]
        if not tick:
            if worker.slot.control[t.WATCHED]:
                self._arm(watched=False)  # the last look
            return
        ran = (self._processor_time() - self._ran) / 1e9
        starved = ran < STARVED_SHARE * self._timeout and worker.process is not None and worker.process.state() == "R"
        if starved != self.starved:
            self.starved = starved
            if starved:
                worker.log.warning("starved: it could run, and gets no processor")
        stuck = tick == self._tick and worker.slot.doing is not Doing.WAITING and not starved
        now = time.monotonic_ns()
        began = max(tick, min(stats[t.WAIT_ENDED], now))  # of what it does since
        if stuck and now - began >= self._timeout * 1e9:
            self._on_stuck()
        else:
            self._arm()

    def _processor_time(self) -> int:
        """Nanoseconds that the process has run. Not what the kernel says of its waiting: that is told at its end."""
        process = self._worker.process
        try:
            with open(f"/proc/{process.pid if process else 0}/schedstat") as file:
                return int(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            return 0

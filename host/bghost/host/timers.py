"""Timers of the host's loop: what is to be called when, by the monotonic clock."""

import heapq
import itertools
import time
from collections.abc import Callable


class Timer:
    """A call that is due; can be called off."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Call it off; no harm if it has been."""
        self.call = None


class Timers:
    """A heap of timers. Times are seconds of ``time.monotonic()``."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def at(self, when: float, call: Callable[[], None]) -> Timer:
        """Have *call* called at *when*."""
        timer = Timer(when, call)
        heapq.heappush(self._heap, (when, next(self._order), timer))
        return timer

    def next(self) -> float | None:
        """When the next one is due, or ``None``."""
        while self._heap and self._heap[0][2].call is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def run(self, now: float, share: float = float("inf")) -> None:
        """Call what is due at *now*; what a call adds is left for the next time, like the rest if one raises.

        :param share: seconds after which the rest is left for the next time, too.
        """
        first_new = next(self._order)
        until = time.monotonic() + share
        while (when := self.next()) is not None and when <= now and self._heap[0][1] < first_new:
            call = heapq.heappop(self._heap)[2].call
            assert call is not None  # next() has dropped those that were called off
            call()
            if time.monotonic() > until:
                break

"""What the host sleeps on: descriptors, and what is called when there is something to be read or written.

An epoll, whose cost does not grow with the number of workers. What the kernel will not let into it (its memory or
``fs.epoll.max_user_watches`` is used up) is polled beside it: slower, but no descriptor goes unheard, and nobody who
registers one has to know what to do without. What the kernel will not let out of it is tried again when it comes up.
"""

import select
import time
from collections.abc import Callable
from typing import Final

from loguru import logger

SHARE: Final = 0.01
"""Seconds of one turn that each sort of the host's work has: what came up, what is due, forks, clients."""

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
_ENDED: Final = select.EPOLLERR | select.EPOLLHUP
EVENTS: Final = 256
"""Taken from the kernel in one turn; it hands out the rest in the next one, before those that come up again."""

FOREMOST, FIRST, LAST = range(3)
"""Ranks of what comes up in the same turn: the kernel's order does not tell what came up before what."""


class _Watch:
    __slots__ = ("call", "events", "polled", "rank")

    def __init__(self, call: Callable[[int], None], rank: int) -> None:
        self.call = call
        self.events = READ
        self.rank = rank
        self.polled = False  # it is not in the epoll, or not as it should be


class Poller:
    """The descriptors of one host.

    :raises OSError: if there is no descriptor for the epoll.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll(sizehint=-1)
        self._watches: dict[int, _Watch] = {}
        self._due: Final[tuple[dict[int, tuple[_Watch, int]], ...]] = ({}, {}, {})  # by rank
        self._polled = 0
        self._told = False

    def fileno(self) -> int:
        """The epoll's own descriptor."""
        return self._epoll.fileno()

    def __contains__(self, fd: int) -> bool:
        return fd in self._watches

    def register(self, fd: int, call: Callable[[int], None], *, rank: int = LAST) -> None:
        """Have *call* called, with READ or WRITE or both, when *fd* can be read, or what is at its other end has gone.

        :param rank: of those that come up in the same turn, it is called before all of a higher rank.
        """
        assert fd not in self._watches
        watch = self._watches[fd] = _Watch(call, rank)
        try:
            self._epoll.register(fd, READ)
        except FileExistsError:
            self._modify(fd, watch)  # epoll had not let go of it
        except OSError as error:
            self._refused(watch, error)

    def unregister(self, fd: int) -> None:
        """Nothing is called for *fd* any more."""
        self._polled -= self._watches.pop(fd).polled
        self._let_go(fd)

    def want(self, fd: int, events: int) -> None:
        """Have what was registered for *fd* called for *events*, READ or WRITE or both, from now on."""
        watch = self._watches[fd]
        if watch.events != events:
            watch.events = events
            self._modify(fd, watch)

    def _modify(self, fd: int, watch: _Watch) -> None:
        try:
            self._epoll.modify(fd, watch.events)
        except OSError as error:
            self._refused(watch, error)
        else:
            self._polled -= watch.polled
            watch.polled = False

    def _refused(self, watch: _Watch, error: OSError) -> None:
        if not watch.polled:
            watch.polled = True
            self._polled += 1
        if not self._told:
            self._told = True
            logger.warning(
                "epoll takes no further descriptor ({}; the limit is fs.epoll.max_user_watches), poll has to do",
                error.strerror,
            )

    def _let_go(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError:
            pass  # it was not in it; or it stays until it is closed, or comes up

    def turn(self, until: float | None) -> None:
        """Sleep until something comes up, then call what is registered for it.

        What has not been called when its :data:`SHARE` is over is left to the next turn, where it comes before what
        comes up later; each rank has as much for itself.

        :param until: the latest end of the sleep, monotonic seconds; ``None``: no end.
        """
        if any(self._due):
            until = 0.0
        ready = self._wait(None if until is None else max(0.0, until - time.monotonic()))
        for fd, watch, events in ready:
            self._due[watch.rank][fd] = watch, events
        for due in self._due:
            until = time.monotonic() + SHARE
            while due:
                fd = next(iter(due))
                watch, events = due.pop(fd)
                if self._watches.get(fd) is watch:  # what was called before it may have closed it
                    watch.call(events)
                if time.monotonic() > until:
                    break

    def _wait(self, seconds: float | None) -> list[tuple[int, _Watch, int]]:
        if not self._polled:
            return self._ready(self._epoll.poll(seconds, EVENTS))
        poll = select.poll()
        poll.register(self._epoll.fileno(), READ)
        for fd, watch in self._watches.items():
            if watch.polled:
                poll.register(fd, watch.events)
        found = dict(poll.poll(None if seconds is None else seconds * 1000))
        return self._ready([*(found | dict(self._epoll.poll(0, EVENTS))).items()])

    def _ready(self, found: list[tuple[int, int]]) -> list[tuple[int, _Watch, int]]:
        ready = []
        for fd, came in found:
            watch = self._watches.get(fd)
            events = 0 if watch is None else watch.events & (came | (READ | WRITE if came & _ENDED else 0))
            if watch is not None and events:
                ready.append((fd, watch, events))
            elif watch is not None:
                self._modify(fd, watch)
            elif fd != self._epoll.fileno():
                self._let_go(fd)
        return ready

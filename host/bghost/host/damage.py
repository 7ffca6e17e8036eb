"""Locks in shared memory that something has written over: found, and made anew once nobody can hold them.

The host takes no lock, and looks only. Every worker has inherited the memory, and may be inside of what the lock
protects without any word that could be believed, so all of them are ended at once and started again, as PostgreSQL
does after a crash. A process that is started meanwhile cannot have taken a lock whose check words are gone, so nothing
is waited for but those that lived when the damage was found.
"""

import time
from typing import TYPE_CHECKING, Final

from loguru import logger

from bghost.host.process import Process
from bghost.host.workers import Registration
from bghost.shared.backoff import doubled
from bghost.shared.mutex import GUARDED, Guarded

if TYPE_CHECKING:
    from bghost.host.host import Host

_RECENT: Final = 60.0  # seconds; damage that comes again within them is followed by a delay, which doubles
_DELAY_FIRST: Final = 1.0


class Damage:
    """Looks after all locks that the host has made."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        self._users: list[tuple[Registration, Process]] = []
        self._repairing = False
        self._last = float("-inf")  # when the last repair was over, monotonic seconds
        self._again = 0  # repairs that followed each other

    def look(self) -> None:
        """Called after whatever may have changed; costs two words of each lock."""
        damaged = [each for each in GUARDED if not each.mutex.intact]
        if damaged and not self._repairing:
            self._begin(damaged)
        if self._repairing and not any(user.process is process and not user.lost for user, process in self._users):
            self._finish(damaged)

    def _begin(self, damaged: list[Guarded]) -> None:
        host = self._host
        for each in damaged:
            logger.error("{}: something has written over its lock; all workers are started again", each.title)
        self._repairing = True
        host.registry.halted = True
        self._users = [
            (worker, worker.process) for worker in host.registry if worker.process is not None and not worker.is_program
        ]
        for worker, _ in self._users:
            worker.recycle()

    def _finish(self, damaged: list[Guarded]) -> None:
        for each in damaged:
            each.renew()
            logger.info("{}: its lock is made anew", each.title)
        self._repairing = False
        self._users = []
        now = time.monotonic()
        self._again = self._again + 1 if now - self._last < _RECENT else 0
        self._last = now
        if self._again:
            delay = doubled(_DELAY_FIRST, self._again, _RECENT)
            logger.warning("locks were written over again: workers are started in {:g} s", delay)
            self._host.timers.at(now + delay, self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        self._host.registry.halted = self._repairing
        self._host.changed = True

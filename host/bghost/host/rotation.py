"""Rotation of the log file: by the host alone; every process then opens the new one at its next line."""

import os
import re
import time
from datetime import datetime
from typing import Final

from loguru import logger

from bghost.host.config import LogTable
from bghost.host.timers import Timer, Timers
from bghost.shared import logs
from bghost.shared import table as t
from bghost.shared.errors import ConfigError

INTERVAL: Final = 1.0  # seconds between two looks at the file, where it is to be rotated
RETRY: Final = 0.1  # seconds between two tries to write what is kept back

_TIME: Final = re.compile(rb"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")


class Rotation:
    """Looks after the host's own log: what it has kept back, the file's size and age, and when it is opened anew.

    :param table: whose head says which log is the current one.
    """

    def __init__(self, table: t.Table, timers: Timers, config: LogTable) -> None:
        self._table = table
        self._timers = timers
        self._config = config
        self._look: Timer | None = None
        self._flush: Timer | None = None
        self._begun = _begun(config.file)
        self._watch()

    @property
    def lost(self) -> int:
        """Records of the host that could not be written."""
        sink = logs.sink()
        return sink.lost if sink is not None else 0

    def take(self, config: LogTable) -> None:
        """Have the log go where *config* says.

        :raises ConfigError: if it cannot; it goes where it went then.
        """
        logs.configure(config.level, config.file, config.format)
        self._config = config
        self._table.head[t.LOG_NUMBER] += 1
        self._begun = _begun(config.file)
        self._watch()

    def reopen(self) -> None:
        """Open the file anew, for somebody may have moved it away; workers do so at their next line."""
        sink = logs.sink()
        if sink is None or self._config.file is None:
            return
        try:
            sink.reopen(self._config.file)
        except ConfigError as error:
            logger.error("{}; it goes where it went", error)
        else:
            self._table.head[t.LOG_NUMBER] += 1
            self._begun = _begun(self._config.file)

    def turn(self) -> None:
        """Once in each turn of the loop: see that what is kept back is written later."""
        sink = logs.sink()
        if sink is not None and sink.behind and self._flush is None:
            self._flush = self._timers.at(time.monotonic() + RETRY, self._write_later)

    def _write_later(self) -> None:
        self._flush = None
        sink = logs.sink()
        if sink is not None:
            sink.flush()

    def _watch(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if self._config.file is not None and (self._config.rotate_size or self._config.rotate_age):
            self._look = self._timers.at(time.monotonic() + INTERVAL, self._look_at_it)

    def _look_at_it(self) -> None:
        self._look = None
        file, size, age = self._config.file, self._config.rotate_size, self._config.rotate_age
        assert file is not None
        try:
            found = os.stat(file).st_size
        except OSError:
            found = 0  # somebody has taken it away; a HUP makes a new one
        if found and ((size and found >= size) or (age and time.monotonic() - self._begun >= age)):
            self._rotate(file)
        self._watch()

    def _rotate(self, file: str) -> None:
        keep = self._config.keep
        try:
            if not keep:
                os.unlink(file)
            for number in range(keep, 0, -1):
                older = file if number == 1 else f"{file}.{number - 1}"
                if os.path.lexists(older):
                    os.replace(older, f"{file}.{number}")
        except OSError as error:
            logger.error("the log {} cannot be rotated: {}", file, error.strerror)
            self._begun = time.monotonic()
        else:
            self.reopen()


def _begun(file: str | None) -> float:
    """When the log was begun, in monotonic seconds: by its first record, perhaps an earlier host's; or else now."""
    now = time.monotonic()
    try:
        with open(file or os.devnull, "rb") as log:
            found = _TIME.search(log.read(64))
        return now - max(0.0, time.time() - datetime.fromisoformat(found[0].decode()).timestamp()) if found else now
    except (OSError, ValueError, OverflowError):
        return now

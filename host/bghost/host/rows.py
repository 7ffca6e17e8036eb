"""What ``ps`` shows of a worker: asked for by the thousand, so that what has not changed is not made anew."""

import time
from typing import TYPE_CHECKING

from bghost.host.policy import Exit
from bghost.shared import table as t
from bghost.shared.cells import TextCell
from bghost.shared.spec import State

if TYPE_CHECKING:
    from bghost.host.workers import Registration


class _Text:
    """The text of a cell, read anew when it has changed."""

    __slots__ = ("_cell", "_sequence", "_text")

    def __init__(self, cell: TextCell) -> None:
        self._cell = cell
        self._sequence = -1
        self._text = ""

    def read(self) -> str:
        sequence = self._cell.sequence
        if sequence != self._sequence:
            self._text = self._cell.read()
            self._sequence = sequence  # from before the text was read: one that is published meanwhile has another
        return self._text


class Shown:
    """One worker's row."""

    __slots__ = ("_activity", "_exit", "_exit_text", "_last_error", "_wait", "_worker")

    def __init__(self, worker: "Registration") -> None:
        self._worker = worker
        self._activity = _Text(worker.slot.activity)
        self._wait = _Text(worker.slot.wait)
        self._last_error = _Text(worker.slot.last_error)
        self._exit: Exit | None = None
        self._exit_text: str | None = None

    @property
    def last_error(self) -> str:
        """What the worker says went wrong last."""
        return self._last_error.read()

    def row(self) -> dict[str, object]:
        """The row as it is now."""
        worker = self._worker
        control, stats = worker.slot.control, worker.slot.stats
        wall = time.time() - time.monotonic_ns() / 1e9  # reckoned from now: right also after that clock was set
        since, ticks = control[t.SINCE], stats[t.TICKS]
        errors = stats[t.ERRORS]  # before the last one's time and text: those were written first
        error_at = stats[t.LAST_ERROR_AT]
        if worker.exit is not self._exit:
            self._exit, self._exit_text = worker.exit, None if worker.exit is None else str(worker.exit)
        return {
            "name": worker.name,
            "kind": worker.spec.kind,
            "pid": control[t.PID] or None,
            "state": worker.state,
            "doing": worker.slot.doing if worker.state is State.READY else None,
            "since": wall + since / 1e9 if since else None,
            "starts": control[t.STARTS],
            "generation": control[t.GENERATION],
            "ticks": ticks,
            "tick_last": stats[t.TICK_LAST] / 1e9,
            "tick_mean": stats[t.TICK_TOTAL] / ticks / 1e9 if ticks else 0.0,
            "tick_max": stats[t.TICK_MAX] / 1e9,
            "errors": errors,
            "recoveries": stats[t.RECOVERIES],
            "extension_errors": stats[t.EXTENSION_ERRORS],
            "dropped": stats[t.DROPPED],
            "restarts": control[t.RESTARTS],
            "exit": self._exit_text,
            "last_error": worker.last_error or None,
            "last_error_at": wall + error_at / 1e9 if error_at else None,
            "activity": self._activity.read() or None,
            "wait": self._wait.read() or None,
            "backend_pid": stats[t.BACKEND_PID] or None,
            "flags": worker.flags,
            "pool": worker.entry.pool_name if worker.entry is not None else None,
            "key": worker.entry.key.hex() if worker.entry is not None else None,
            "pending_restart": worker.pending if worker.process is not None else [],
        }

"""What becomes of a worker: its states and their transitions, and whether a process that ended is followed by another.

Nothing here touches a process or a clock.
"""

import enum
import signal
from dataclasses import dataclass
from typing import Final

from bghost.shared.backoff import doubled
from bghost.shared.spec import State, WorkerSpec

HEALTHY_AFTER: Final = 10.0  # seconds of being ready after which a run counts as healthy
UNHEALTHY_LIMIT: Final = 10  # unhealthy runs in a row, then the worker is failed
JITTER: Final = 0.2  # a delay is lengthened by up to this part of itself


class Event(enum.Enum):
    """What can happen to a worker."""

    READY = "bghost_setup returned"
    STOP = "a stop was asked for"
    DONE = "ended, and is done"
    STOPPED = "ended, as asked"
    RETRY = "ended, and is started again later"
    FAILED = "ended, and is not started again"
    START = "forked, or to be forked"


TRANSITIONS: Final = {
    (State.STARTING, Event.READY): State.READY,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.STARTING, Event.DONE): State.DONE,
    (State.STARTING, Event.RETRY): State.BACKOFF,
    (State.STARTING, Event.FAILED): State.FAILED,
    (State.READY, Event.STOP): State.STOPPING,
    (State.READY, Event.DONE): State.DONE,
    (State.READY, Event.RETRY): State.BACKOFF,
    (State.READY, Event.FAILED): State.FAILED,
    (State.STOPPING, Event.STOPPED): State.STOPPED,
    (State.STOPPING, Event.FAILED): State.FAILED,
    (State.BACKOFF, Event.START): State.STARTING,
    (State.BACKOFF, Event.STOPPED): State.STOPPED,
    (State.DONE, Event.START): State.STARTING,
    (State.STOPPED, Event.START): State.STARTING,
    (State.FAILED, Event.START): State.STARTING,
}
"""A pair that is missing cannot happen; that it did is a bug."""

LIVE: Final = frozenset({State.STARTING, State.READY, State.STOPPING})
"""States in which a worker has a process, or is about to have one."""

OVER: Final = frozenset({State.DONE, State.STOPPED, State.FAILED})
"""States that a worker leaves only when it is told to."""


def drawing() -> str:
    """The table as a Mermaid diagram, as docs/operations.md has it."""
    arrows = [f"    {before} --> {after}: {event.value}" for (before, event), after in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.STARTING}: launched", *arrows])


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended.

    :param status: as ``os.waitstatus_to_exitcode`` has it: the exit code, or minus the signal.
    :param orderly: whether it came through bghost's own way out.
    :param gave_up: whether a hook raised GiveUp.
    :param terminated: whether a SIGTERM from elsewhere had stopped it.
    :param overdue: whether it was on its way out and ended itself, because that took too long.
    :param ready_for: seconds that it had been ready; 0 if it never was.
    """

    status: int
    orderly: bool
    gave_up: bool = False
    terminated: bool = False
    overdue: bool = False
    ready_for: float = 0.0

    @property
    def crash(self) -> bool:
        """Whether it ended in a way that may have left something behind."""
        return self.status not in (0, 1) or not self.orderly

    @property
    def signal(self) -> str | None:
        """The name of the signal that ended it, if one did."""
        if self.status >= 0:
            return None
        try:
            return signal.Signals(-self.status).name
        except ValueError:
            return f"signal {-self.status}"

    def __str__(self) -> str:
        if self.status < 0:
            return f"killed by {self.signal}" + (", cleaning up for too long" if self.overdue else "")
        text = f"exit code {self.status}"
        return text if self.orderly else f"{text}, bypassing bghost"


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows an exit.

    :param event: of the table above.
    :param delay: seconds until the next start, where there is one.
    :param unhealthy: unhealthy runs in a row, this one included.
    """

    event: Event
    delay: float = 0.0
    unhealthy: int = 0


def decide(
    spec: WorkerSpec,
    exit: Exit,
    *,
    stop_asked: bool,
    unhealthy: int,
    chance: float,
    stuck: bool = False,
    recycled: bool = False,
) -> Decision:
    """What becomes of a worker whose process has ended.

    :param stop_asked: whether a stop was asked for through bghost.
    :param unhealthy: unhealthy runs in a row before this one.
    :param stuck: whether it was stopped because a tick took too long; a failure, however it ended.
    :param recycled: whether it was ended because another worker had crashed: no fault of its own.
    :param chance: from 0.0 to 1.0; spreads the delays of workers that fell together.
    """
    if stop_asked:
        return Decision(Event.STOPPED)
    if recycled:
        return Decision(Event.STOPPED if spec.restart == "never" else Event.RETRY, unhealthy=unhealthy)
    if exit.gave_up:
        return Decision(Event.FAILED, unhealthy=unhealthy)
    done = exit.status == 0 and exit.orderly and not stuck
    if done and spec.restart != "always":
        return Decision(Event.DONE)
    if spec.restart == "never":
        return Decision(Event.FAILED, unhealthy=unhealthy)
    healthy = exit.ready_for >= HEALTHY_AFTER and not stuck
    runs = 0 if healthy else unhealthy if exit.terminated else unhealthy + 1
    if runs >= UNHEALTHY_LIMIT:
        return Decision(Event.FAILED, unhealthy=runs)
    return Decision(Event.RETRY, delay(spec, runs) * (1.0 + JITTER * chance), runs)


def delay(spec: WorkerSpec, unhealthy: int) -> float:
    """Seconds from an exit to the next start, before jitter, after so many unhealthy runs."""
    return doubled(spec.restart_after, unhealthy, max(spec.restart_max, spec.restart_after))

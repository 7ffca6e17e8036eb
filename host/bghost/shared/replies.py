"""The forms of what a host answers to its clients."""

from typing import Literal, TypedDict

Mode = Literal["smart", "fast", "immediate"]
"""How workers are asked to stop: after their tick, at a safe point, at once; each in its time turns into the next."""


class Row(TypedDict):
    """What the host says of one worker."""

    name: str
    kind: str
    pid: int | None
    state: str
    doing: str | None
    since: float  # when the state began, seconds of the Unix clock
    starts: int
    generation: int
    ticks: int
    tick_last: float  # seconds
    tick_mean: float
    tick_max: float
    errors: int
    recoveries: int
    extension_errors: int
    dropped: int  # cancels that came between ticks, when there was nothing to cancel
    restarts: int
    exit: str | None  # how its last process ended
    last_error: str | None
    last_error_at: float | None  # seconds of the Unix clock
    activity: str | None
    wait: str | None
    backend_pid: int | None
    flags: list[str]
    pool: str | None
    key: str | None
    pending_restart: list[str]


class PoolLock(TypedDict):
    """A pool's lock."""

    intact: bool  # nothing has written over it, as far as can be seen
    holder: str | None  # who has it just now


class PoolEvent(TypedDict):
    """An event that a pool's manager has not read."""

    number: int
    kind: str


class PoolEntry(TypedDict):
    """An entry of a pool that is taken."""

    index: int
    key: str  # its canonical bytes, in hexadecimal digits
    state: str
    generation: int
    worker: str | None
    pid: int | None
    launched: float | None  # seconds of the Unix clock
    started: float | None
    ended: float | None
    exit: int | None  # exit code, or minus the signal
    unread: list[PoolEvent]
    reason: str | None  # of its end
    published: int  # how often its worker has published data
    data: str | None  # what was published last, in hexadecimal digits; None: nothing that makes sense


class PoolDump(TypedDict):
    """The table of one pool."""

    name: str
    kind: str
    manager: str | None
    size: int
    used: int
    free: int
    events: int  # the number of the last one
    acknowledged: int  # of the last that the manager has read
    lock: PoolLock
    entries: list[PoolEntry]  # those that are taken, a thousand at most
    left_out: int
    problems: list[str]  # what does not agree with what the host knows; none, if all is well


class Ended(TypedDict):
    """How a worker's last process ended."""

    at: float  # seconds of the Unix clock
    ran_for: float  # seconds
    state: str  # the worker's, when it ended
    doing: str | None
    activity: str | None
    wait: str | None
    exit: str  # in words
    code: int | None
    signal: str | None
    core_dumped: bool
    orderly: bool  # whether it went bghost's way out
    last_error: str | None
    evidence: list[str]  # what speaks for which cause
    decision: str  # what followed from it, by which rule
    lines: list[str]  # the last that it has logged or printed
    dump: str | None  # its stacks, if they were taken


class Why(TypedDict):
    """Why a worker is in the state that it is in."""

    name: str
    kind: str
    state: str
    since: float  # seconds of the Unix clock
    pid: int | None
    starts: int
    restarts: int
    unhealthy: int  # runs in a row
    next_try: float | None  # seconds of the Unix clock
    held_by: list[str]  # workers that it waits for before it starts
    lines: list[str]  # the last that it has logged or printed; of a process that runs
    ended: Ended | None


class Launched(TypedDict):
    """A worker that was launched."""

    name: str
    pid: int | None
    state: str
    slot: int
    generation: int
    run_id: str


class Reloaded(TypedDict):
    """What a reload has come to, or with ``dry_run`` would come to."""

    config: int  # the number of the config that is in force
    dry_run: bool
    start: list[str]  # workers that are new
    stop: list[str]  # workers that there are no longer
    restart: list[str]  # workers whose own table has changed
    revive: list[str]  # workers that had failed, and are started again
    settings: list[str]  # keys whose values have changed, such as kind.counter.naptime
    pending_restart: list[str]  # settings that take effect at the host's next start
    notes: list[str]  # what could not be checked, and why
    acknowledged: dict[str, int]  # by worker, the number of the config that it has taken
    failed: dict[str, str]  # workers that do not run by it, and why


class Stopped(TypedDict):
    """What a stop came to: the workers that have stopped, and those of them that had to be killed."""

    stopped: list[str]
    killed: list[str]


class Shutdown(TypedDict):
    """What a shutdown came to: the workers that had to be killed."""

    killed: list[str]

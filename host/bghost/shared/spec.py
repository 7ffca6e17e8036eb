"""What is said of a worker before it runs: its spec, the types its settings derive from, and the words for its life."""

import enum
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, dataclass_transform

import msgspec

from bghost.shared.units import Seconds

if TYPE_CHECKING:
    # So that type checkers know what msgspec does: a struct that derives from a frozen one is frozen without saying so.
    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class _FrozenMeta(msgspec.StructMeta): ...

    class _Frozen(msgspec.Struct, metaclass=_FrozenMeta): ...

else:

    class _Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """A struct that never changes and refuses what it does not know."""


class Settings(_Frozen):
    """The base of a kind's settings, ``[kind.NAME]`` in bghost.toml: fields with types, bounds and defaults.

    An instance never changes; a reload gives the worker a new one.
    """


class Args(_Frozen):
    """The base of a kind's typed arguments (``WorkerSpec.args``), for a kind that declares ``Args``."""


start_only: Final = msgspec.Meta(extra={"start_only": True})
"""``Annotated[int, bghost.start_only]``: a change of this setting takes effect at the worker's next start."""


class State(enum.StrEnum):
    """The states of a worker; the transitions are a table in :mod:`bghost.host.policy`."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Doing(enum.StrEnum):
    """What a ready worker is doing just now."""

    IDLE = "idle"
    ACTIVE = "active"
    WAITING = "waiting"
    RECOVERING = "recovering"


class StopMode(enum.IntEnum):
    """How a worker is asked to stop; each turns into the next when its time is over."""

    NONE = 0
    SMART = 1  # finishes its tick
    FAST = 2  # at its next safe point, a running query is cancelled
    IMMEDIATE = 3  # at once, no cleanup
    KILL = 4  # SIGKILL of its process group


class Recovery(enum.Enum):
    """What ``bghost_recover`` decides after an error."""

    CONTINUE = "continue"
    RESTART = "restart"
    STOP = "stop"


class Reason(enum.StrEnum):
    """Why a worker ends, told to ``bghost_cleanup``."""

    DONE = "done"
    STOP = "stop"
    RESTART = "restart"
    ERROR = "error"
    GIVE_UP = "give_up"
    HOST_DIED = "host_died"


RestartPolicy = Literal["on-failure", "always", "never"]
TIME_LIMIT: Final = 86_400.0  # seconds
Delay = Annotated[Seconds, msgspec.Meta(ge=0, le=TIME_LIMIT)]
TimeLimit = Annotated[Seconds, msgspec.Meta(gt=0, le=TIME_LIMIT)]


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker to run, from wherever it comes: config file, plugin, another worker, command line.

    :param kind: the kind's name, as its entry point says.
    :param name: unique in the instance; ``None`` lets the host choose (the kind's name, numbered if taken).
    :param args: what ``worker.args`` holds; plain data that JSON can carry.
    :param settings: settings for this worker alone, over those of its kind.
    :param restart: after which exits a new process is started.
    :param restart_after: seconds from a failed exit to the next start; doubles while failures follow each other.
    :param restart_max: seconds, the longest such delay.
    :param ready_timeout: seconds that ``bghost_setup`` may take, from the end of its last wait that has a name on.
    :param tick_timeout: seconds that a tick may take before the worker counts as stuck; ``None``: no limit.
    :param stop_timeout: seconds a smart stop may take; ``None``: the host's.
    :param after: names of workers that must be ready before this one is first started.
    :param start: ``fork`` from the host, or ``spawn`` a fresh interpreter.
    :param user: the user that the worker runs as, where the host is root.
    """

    kind: str
    name: str | None = None
    args: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    restart: RestartPolicy = "on-failure"
    restart_after: Delay = 1.0
    restart_max: Delay = 60.0
    ready_timeout: TimeLimit = 30.0
    tick_timeout: TimeLimit | None = None
    stop_timeout: TimeLimit | None = None
    after: tuple[str, ...] = ()
    start: Literal["fork", "spawn"] = "fork"
    user: str | None = None

    def __post_init__(self) -> None:
        check_times(self)


def check_times(spec: Any) -> None:
    """See that the times of a worker's spec are some that can be reckoned with.

    :raises ValueError: if one is not; names it.
    """
    for name in ("restart_after", "restart_max"):
        if not 0.0 <= getattr(spec, name) <= TIME_LIMIT:
            raise ValueError(f"{name} is a number of seconds from 0 to {TIME_LIMIT:g}")
    for name in ("ready_timeout", "tick_timeout", "stop_timeout"):
        seconds = getattr(spec, name)
        if seconds is not None and not 0.0 < seconds <= TIME_LIMIT:
            raise ValueError(f"{name} is a number of seconds above 0, at most {TIME_LIMIT:g}")

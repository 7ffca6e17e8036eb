"""The errors of bghost, and the exit codes that commands make of them."""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself is not imported: see bghost/__init__.py
if TYPE_CHECKING:
    from typing import Final

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_HOST: Final = 3
TIMED_OUT: Final = 4
NOT_FOUND: Final = 5
BUG: Final = 70


class BghostError(Exception):
    """An error that a person can act on: what happened, where, and how to mend it.

    :param message: the short fact, one line, no full stop.
    :param detail: more facts (who, which file and line), or empty.
    :param hint: what would mend it, or empty.
    """

    exit_code: int = FAILED

    def __init__(self, message: str, *, detail: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        text = self.message
        if self.detail:
            text += f": {self.detail}"
        if self.hint:
            text += f" ({self.hint})"
        return text


class HostError(BghostError):
    """The host could not do what it was asked, or could not start."""


class LaunchError(BghostError):
    """A worker could not be launched: no slot, a name that is taken, a kind that is refused."""


class UsageError(BghostError):
    """A command line or an argument that cannot be what was meant."""

    exit_code = USAGE


class ConfigError(BghostError):
    """A setting, or the config file, that is not valid."""

    exit_code = USAGE


class PluginError(BghostError):
    """A plugin that cannot be used: its import fails, a hook of it is not as it has to be, two offer one name."""


class NoHost(BghostError):
    """No host of that instance is running."""

    exit_code = NO_HOST


class TimedOut(BghostError):
    """Something did not happen in the time that was given."""

    exit_code = TIMED_OUT


class LockTimeout(TimedOut):
    """A lock did not become free in the time that was given; says who holds it."""


class LockDamaged(BghostError):
    """Something has written over a lock in shared memory; it is made anew once all its users are gone."""


class QueueDetached(BghostError):
    """The other end of a queue is there no more, or this one was detached."""


class PoolFull(BghostError):
    """Every entry of a pool is taken; says by what."""


class Throttled(BghostError):
    """A key was launched too short a time ago.

    :param seconds: until it may be launched again.
    """

    seconds = 0.0


class EventsPending(BghostError):
    """A key's last worker has events that the pool's manager has not read yet."""


class EntryGone(BghostError):
    """An entry of a pool has come to its end; what is in its place is not it."""


class NotFound(BghostError):
    """There is no worker or kind of that name."""

    exit_code = NOT_FOUND


class GiveUp(Exception):
    """Raised in any hook: this worker is failed at once (exit 1) and not restarted until somebody says so.

    :param reason: why; shown by ``bghost ps`` and ``bghost why``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Canceled(Exception):
    """What was running has been cancelled (SIGINT to the worker): an error like any other, and recovered as one."""


class Stop(SystemExit):
    """The worker is to stop; raised at a safe point of the worker.

    It derives from SystemExit, so that ``except Exception`` lets it pass, and so that psycopg, which cleans up for
    SystemExit and KeyboardInterrupt alone, cancels a running query.
    """


def to_wire(error: BaseException) -> dict[str, object]:
    """The form in which an error crosses the control socket: text and an exit code, never an object."""
    if isinstance(error, BghostError):
        told = {"code": error.exit_code, "message": error.message, "detail": error.detail, "hint": error.hint}
        if type(error).__name__ in _BY_NAME:
            told["type"] = type(error).__name__
        if isinstance(error, Throttled):
            told["seconds"] = error.seconds
        return told
    return {"code": BUG, "message": f"{type(error).__name__}: {error}", "detail": "", "hint": "this is a bug of bghost"}


_BY_NAME: Final[dict[str, type[BghostError]]] = {
    each.__name__: each for each in (LaunchError, ConfigError, PluginError, PoolFull, Throttled, EventsPending)
}
_BY_CODE: Final[dict[int, type[BghostError]]] = {
    FAILED: HostError,
    USAGE: UsageError,
    NO_HOST: NoHost,
    TIMED_OUT: TimedOut,
    NOT_FOUND: NotFound,
}


def from_wire(data: dict[str, object]) -> BghostError:
    """The error that *data* (of :func:`to_wire`) tells of; data of any other form gives a HostError that says so."""
    code = data.get("code")
    kind = _BY_CODE.get(code, HostError) if isinstance(code, int) else HostError
    kind = _BY_NAME.get(str(data.get("type")), kind)
    error = kind(
        str(data.get("message", "the host answered with an error of no form")),
        detail=str(data.get("detail", "")),
        hint=str(data.get("hint", "")),
    )
    if code == BUG:
        error.exit_code = BUG
    seconds = data.get("seconds")
    if isinstance(error, Throttled) and isinstance(seconds, int | float):
        error.seconds = float(seconds)
    return error

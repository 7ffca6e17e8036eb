"""The kind ``exec``: any program as a worker. The worker becomes the program, with no process between.

::

    [[worker]]
    kind = "exec"
    name = "web"
    args = { command = ["python3", "-m", "http.server"], stop_signal = "INT" }

The program is started, watched, restarted and stopped like any worker. What needs Python inside of it (wake-ups, dumps,
cancels, activity) is not for it.
"""

import signal
from typing import Annotated, Any

import msgspec

import bghost

READY_LIMIT = 200
Signal = Annotated[str, msgspec.Meta(pattern="^(SIG)?[A-Z]+[0-9]*$", description="such as TERM or SIGTERM")]


class ExecArgs(bghost.Args):
    """The arguments of an exec worker."""

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, description="the program and its arguments")]
    env: dict[str, str] = {}
    cwd: str | None = None
    stop_signal: Signal = "TERM"
    reload_signal: Signal | None = None
    death_signal: Signal = "TERM"
    notify: bool = False
    ready_output: str = ""

    def __post_init__(self) -> None:
        for name in (self.stop_signal, self.reload_signal, self.death_signal):
            if name is not None:
                number(name)
        if len(self.ready_output.encode()) > READY_LIMIT or "\n" in self.ready_output:
            raise ValueError(f"ready_output is part of a line, at most {READY_LIMIT} bytes")
        if self.notify and self.ready_output:
            raise ValueError("a program is ready when it notifies, or by its ready_output, not both")
        if any("\0" in word for word in (*self.command, *self.env, *self.env.values())):
            raise ValueError("a program's words have no NUL in them")


class Exec:
    """Becomes the program as soon as it is set up."""

    Args = ExecArgs

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker[Any]) -> None:
        args: ExecArgs = worker.args
        worker.become(
            args.command,
            env=args.env,
            cwd=args.cwd,
            stop_signal=number(args.stop_signal),
            reload_signal=number(args.reload_signal) if args.reload_signal is not None else 0,
            death_signal=number(args.death_signal),
            notify=args.notify,
            ready_output=args.ready_output,
        )

    @bghost.hookimpl
    def bghost_main(self) -> None:
        """Is not reached: there is no way back from becoming a program. Without it this were no kind."""
        raise AssertionError


def number(name: str) -> int:
    """The number of a signal's name.

    :raises ValueError: if there is no such signal.
    """
    try:
        return signal.Signals["SIG" + name.removeprefix("SIG")]
    except KeyError:
        raise ValueError(f"there is no signal {name!r}") from None

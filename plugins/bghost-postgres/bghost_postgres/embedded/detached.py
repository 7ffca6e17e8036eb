"""Processes that stay in the background: started from a host, and no descendants of it.

The starter runs ``python -m MODULE`` (a process that ends at once), which forks the process that stays: it has a new
session, no terminal, no descriptor but those that were handed over, and init (or the nearest subreaper) as its parent.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

from bghost import BghostError, HostError, TimedOut

_KEPT_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "TZ", "TMPDIR", "PYTHONHOME")


def spawn(module: str, argument: dict[str, Any], pass_fds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Start *module* with *argument*, and yield what it reports, until it has closed its report or is gone.

    :param pass_fds: descriptors that it keeps, under the same numbers.
    :raises BghostError: the one that it reported.
    """
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    # What this interpreter can import, that one can: it may be run from an environment that was put together by hand.
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if os.path.isdir(entry))
    environment["LC_ALL"] = "C.UTF-8"
    read, write = os.pipe()
    try:
        starter = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps({**argument, "report": write})],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(*pass_fds, write),
            start_new_session=True,
        )
    finally:
        os.close(write)
    try:
        starter.wait()
        with os.fdopen(read, "rb", closefd=False) as lines:
            for line in lines:
                message = json.loads(line)
                if "error" in message:
                    kind = TimedOut if message["timed_out"] else HostError
                    raise kind(message["error"], detail=message["detail"], hint=message["hint"])
                yield message
    finally:
        os.close(read)


class Report:
    """The way back to the starter, which may be gone: then nobody reads, and that is no error."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, **message: Any) -> None:
        if self._fd >= 0:
            try:
                os.write(self._fd, json.dumps(message).encode() + b"\n")
            except BrokenPipeError:
                pass

    def error(self, error: BghostError) -> None:
        """Report the error that ends this process."""
        timed_out = isinstance(error, TimedOut)
        self(error=error.message, detail=error.detail, hint=error.hint, timed_out=timed_out)

    def close(self) -> None:
        """The starter need not listen any longer."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def become() -> dict[str, Any]:
    """Become the process that stays; the one that was started ends here.

    :returns: the argument given to :func:`spawn`, ``report`` being a :class:`Report`.
    """
    argument: dict[str, Any] = json.loads(sys.argv[1])
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.set_inheritable(argument["report"], False)
    argument["report"] = Report(argument["report"])
    return argument

"""A worker that becomes another program: the last step of its life, in place of its end."""

import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bghost.shared import linux
from bghost.shared import table as t
from bghost.shared.errors import BghostError


@dataclass(frozen=True, slots=True)
class Program:
    """What a worker is to become.

    :param argv: the program, looked up on PATH, and its arguments.
    :param env: variables on top of the host's.
    :param cwd: where it starts; ``None``: where the host was started.
    :param stop_signal: what asks it to stop.
    :param reload_signal: what tells it of a new config; 0: nothing does.
    :param death_signal: what the kernel sends it when the host dies.
    :param notify: whether it says itself, by sd_notify, when it is ready; else it is at once.
    :param ready_output: it is ready when it has printed this.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    stop_signal: int = signal.SIGTERM
    reload_signal: int = 0
    death_signal: int = signal.SIGTERM
    notify: bool = False
    ready_output: str = ""


class Become(BaseException):
    """Unwinds the worker up to where it can become its program; nobody's ``except`` is to stop it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.program = program


class NotRun(BghostError):
    """The program could not be started."""


def become(
    program: Program,
    slot: t.Slot,
    notify_socket: str,
    inherit: Sequence[int],
    ready: Callable[[], None],
    stopping: Callable[[], bool],
) -> None:
    """Replace this process, or return where it was asked to stop meanwhile.

    Its scopes are closed, and nothing that would have to be undone is left.

    :param notify_socket: where a program that says itself when it is ready says so.
    :param ready: tells the host that the worker is ready; called last, where the program does not say so itself.
    :param inherit: descriptors that stay open: the instance's lock.
    :param stopping: whether the worker was asked to stop, as far as its handlers and the host's words tell.
    :raises NotRun: if there is no such program, or the kernel will not have it.
    """
    env = {**os.environ, **program.env}
    if program.notify:
        env["NOTIFY_SOCKET"] = notify_socket
    # A handler's note is lost with this program's memory. So what ends a process is held back, then nobody's to catch;
    # the host is told that from now on it is by the program's signal that it stops it; and only then is it seen whether
    # a stop was asked for before. One that comes later ends this process, or finds the program.
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, program.stop_signal, program.death_signal}
    ends &= signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}  # 0 is no signal at all, and these are nobody's
    handlers: dict[int, Any] = {}
    stats = slot.stats
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the handlers of what came before have run when this returns
    try:
        if program.cwd is not None:
            os.chdir(program.cwd)
        path = shutil.which(program.argv[0], path=env.get("PATH", os.defpath))
        if path is None:
            raise FileNotFoundError(2, "there is no such program on PATH")
        for fd in inherit:
            os.set_inheritable(fd, True)
        signal.set_wakeup_fd(-1)
        # What else is caught is reset by the kernel; what is ignored is not, and Python itself ignores two.
        for signum in {signal.SIGPIPE, signal.SIGXFSZ, *ends}:
            handlers[signum] = signal.signal(signum, signal.SIG_DFL)
        stats[t.STOP_SIGNAL], stats[t.RELOAD_SIGNAL] = program.stop_signal, program.reload_signal
        slot.ready_output.write(program.ready_output)
        stats[t.EXECED] = 1
        # A system call between that word and the look: the host, which writes first and then looks, makes one, too.
        linux.prctl(linux.PR_SET_PDEATHSIG, program.death_signal)
        if stopping():
            return
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        if not (program.notify or program.ready_output):
            ready()
        os.execve(path, list(program.argv), env)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise NotRun(f"{program.argv[0]!r} cannot be run", detail=reason) from None
    finally:  # this process is a worker still
        stats[t.EXECED] = 0
        for signum, handler in handlers.items():
            signal.signal(signum, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)

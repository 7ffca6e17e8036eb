"""Waits, as steps: each says how long to sleep on which descriptors, and is told which of them became readable.

The steps decide; who drives them sleeps: a worker with poll(2), an asyncio worker on its event loop. So both wait by
the same rules.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Generator
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from bghost.shared import linux
from bghost.shared.spec import Doing
from bghost.shared.table import DOING, DOING_INDEX, WAIT_ENDED

if TYPE_CHECKING:
    from bghost.worker.worker import Worker

T = TypeVar("T")
Steps = Generator[tuple[float, tuple[int, ...]], list[int], T]
"""Yields seconds and descriptors; is sent those that became readable, of the latch's and the host's as well."""

TIMEOUT: Final = frozenset({"timeout"})
_CLOCK: Final = frozenset({"clock"})
KILL_AFTER: Final = 2.0  # seconds from SIGTERM to SIGKILL of a subprocess that has to go
_CHUNK: Final = 1 << 16
_WAITING: Final = DOING_INDEX[Doing.WAITING]


class Source(Protocol):
    """Something of a plugin's that ends the worker's waits: a connection that gets notifications, say."""

    def fileno(self) -> int:
        """A descriptor that can be read when :meth:`pending` is to be asked again; -1 while there is none."""

    def pending(self) -> bool:
        """Whether there is something for the worker; asked before each sleep, and must not wait."""


class Until(float):
    """Seconds to a moment of the wall clock, as of now; a wait of so long follows when that clock is set."""

    moment: float

    def __new__(cls, moment: float) -> "Until":
        """*moment* in unix seconds."""
        self = super().__new__(cls, max(0.0, moment - time.time()))
        self.moment = moment
        return self


def sleep(
    worker: "Worker[Any]",
    until: float,
    fds: tuple[int, ...] = (),
    *,
    wakes: bool = True,
    reloads: bool = True,
    timer: int = -1,
    event: Callable[[], bool] | None = None,
    sources: Collection[Source] = (),
) -> Steps[frozenset[str]]:
    """Sleep until a monotonic moment, a descriptor, and, as asked for, a wake-up or a reload; see ``Worker.wait``.

    :param timer: a descriptor that ends the sleep with ``clock``.
    :param event: ends it with ``event`` when true; asked again whenever the latch was set, be it by a nudge.
    :param sources: end it with ``notify``.
    """
    interrupts = worker.interrupts
    stats = worker.slot.stats
    latch = worker.slot.latch.read_fd
    doing, shown = stats[DOING], worker.shows_waits and interrupts.ticking
    if shown:
        stats[DOING] = _WAITING
    woken: set[str] = set()
    watched = fds if timer < 0 else (*fds, timer)
    told: tuple[int, ...] = ()
    try:
        while True:
            interrupts.reset()  # before anything is read, so that no wake-up is lost
            worker.look()
            if reloads and interrupts.reload_is_news():
                woken.add("reload")
            if wakes and interrupts.woken:
                interrupts.woken = False
                woken.add("wake")
            if event is not None and event():
                woken.add("event")
            if sources:
                pending = [source.pending() for source in sources]  # all are asked: the asking takes in what has come
                if any(pending):
                    woken.add("notify")
                told = tuple({fd for source in sources if (fd := source.fileno()) >= 0 and fd not in watched})
            ready = yield 0.0 if woken else max(until - time.monotonic(), 0.0), (*watched, *told) if told else watched
            for fd in ready:
                if fd == interrupts.host_pidfd:
                    interrupts.host_died = interrupts.attention = True
                elif fd == timer:
                    woken.add("clock")
                elif fd != latch and fd not in told:
                    woken.add("fd")
            if woken:
                worker.look()
                return frozenset(woken)
            if not ready and time.monotonic() >= until:
                return TIMEOUT
    except BaseException:
        if "wake" in woken:
            interrupts.woken = interrupts.attention = True  # nobody was told; the next wait tells of it
        raise
    finally:
        if shown:
            stats[WAIT_ENDED] = time.monotonic_ns()  # first, as in Worker.waiting()
            stats[DOING] = doing


def sleep_until(
    worker: "Worker[Any]", until: Until, fds: tuple[int, ...], sources: Collection[Source] = ()
) -> Steps[frozenset[str]]:
    """Sleep until a moment of the wall clock, also when that is set meanwhile."""
    while True:
        timer = linux.wall_clock_timer(until.moment)
        try:
            woken = yield from sleep(worker, float("inf"), fds, timer=timer, sources=sources)
        finally:
            os.close(timer)
        if "clock" not in woken or len(woken) > 1:
            return woken - _CLOCK
        if time.time() >= until.moment:
            return TIMEOUT


def run(worker: "Worker[Any]", argv: list[str], options: dict[str, Any]) -> Steps[subprocess.CompletedProcess[Any]]:
    """Run a program to its end, in a process group of its own, which goes with whatever interrupts the wait."""
    check = options.pop("check", False)
    timeout = options.pop("timeout", None)
    data = options.pop("input", None)
    if options.pop("capture_output", False):
        options.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    text = any(options.pop(name, None) for name in ("text", "universal_newlines"))
    encoding, errors = options.pop("encoding", None), options.pop("errors", None)
    if text or encoding or errors:
        encoding = encoding or "utf-8"
    until = float("inf") if timeout is None else time.monotonic() + timeout
    if data is not None:
        spool = _spooled(data.encode(encoding or "utf-8", errors or "strict") if isinstance(data, str) else data)
        try:
            process = subprocess.Popen(argv, process_group=0, stdin=spool, **options)
        finally:
            os.close(spool)
    else:
        process = subprocess.Popen(argv, process_group=0, **{"stdin": subprocess.DEVNULL, **options})
    output: dict[int, bytearray] = {}
    pipes = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    try:
        pidfd = os.pidfd_open(process.pid)
        try:
            for stream in pipes:
                os.set_blocking(stream.fileno(), False)
                output[stream.fileno()] = bytearray()
            open_fds = [pidfd, *output]
            while open_fds:
                if (yield from sleep(worker, until, tuple(open_fds), wakes=False, reloads=False)) == TIMEOUT:
                    raise subprocess.TimeoutExpired(argv, timeout or 0.0)
                for fd in list(open_fds):
                    if fd == pidfd:
                        if process.poll() is not None:
                            open_fds.remove(fd)
                    elif _read(fd, output[fd]):
                        open_fds.remove(fd)
                if process.returncode is not None and open_fds:
                    # Ended; what it has left in the pipes is read, and nobody who inherited them is waited for.
                    for fd in open_fds:
                        _read(fd, output[fd])
                    break
        finally:
            os.close(pidfd)
    except BaseException:
        _end(process)
        raise
    finally:
        for stream in pipes:
            stream.close()
    results = [
        None if stream is None else bytes(data).decode(encoding, errors or "strict") if encoding else bytes(data)
        for stream, data in _outputs(process, output)
    ]
    completed: subprocess.CompletedProcess[Any] = subprocess.CompletedProcess(argv, process.returncode, *results)
    if check:
        completed.check_returncode()
    return completed


def _outputs(process: subprocess.Popen[Any], output: dict[int, bytearray]) -> list[tuple[Any, bytearray]]:
    found = list(output.values())
    return [
        (stream, found.pop(0) if stream is not None else bytearray()) for stream in (process.stdout, process.stderr)
    ]


def _spooled(data: bytes) -> int:
    fd = os.memfd_create("bghost-input", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _read(fd: int, into: bytearray) -> bool:
    """Take what is there; whether the other end is closed."""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(fd, _CHUNK):
            into += chunk
        return True
    return False


def _end(process: subprocess.Popen[Any]) -> None:
    """End the process's group; the leader is not reaped before the last signal, so that its number stays its own."""
    if process.returncode is not None:
        return
    _signal_group(process.pid, signal.SIGTERM)
    _signal_group(process.pid, signal.SIGCONT)
    _wait_gone(process.pid, KILL_AFTER)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def _wait_gone(pid: int, seconds: float) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(seconds * 1000)
    finally:
        os.close(pidfd)

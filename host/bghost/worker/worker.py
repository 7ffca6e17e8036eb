"""The worker as its author sees it: identity, settings, scope, waits, main loop, recovery."""

import datetime
import getpass
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, NoReturn

import msgspec
from loguru import logger

from bghost.shared import table as t
from bghost.shared.errors import NotFound
from bghost.shared.handle import Handle
from bghost.shared.names import NAME_LIMIT, near
from bghost.shared.pools import PoolTable
from bghost.shared.poolspec import D, K, PoolSpec
from bghost.shared.spec import Doing, Settings, WorkerSpec
from bghost.shared.table import WAKE
from bghost.worker import dumps, requests, waiting
from bghost.worker.interrupts import Hold, Interruptible, Interrupts
from bghost.worker.pool import Pool, manages
from bghost.worker.program import Become, Program
from bghost.worker.recovery import ACTIVITY, ROLL_BACK_TIMEOUT, Participant, RecoveryBlock
from bghost.worker.scope import Scope, Scoped
from bghost.worker.waiting import Source, Steps

if TYPE_CHECKING:
    from loguru import Logger
    from typing_extensions import TypeVar

    from bghost.shared.birth import Birth
    from bghost.shared.hooks import WorkerHooks

    S = TypeVar("S", bound=Settings, covariant=True, default=Settings)
else:
    from typing import TypeVar

    S = TypeVar("S")
T = TypeVar("T")

_LONGEST: Final = 1e6  # seconds of one poll; its milliseconds have to fit into 31 bits


class Identity(NamedTuple):
    """Who a worker is; each database connection carries it."""

    name: str
    kind: str
    instance: str
    user: str
    started: float  # unix seconds

    @property
    def application_name(self) -> str:
        """What its connections are called, cut where PostgreSQL would cut it."""
        return f"bghost: {self.name} ({self.instance})".encode()[:NAME_LIMIT].decode("utf-8", "ignore")


class Worker(Generic[S]):
    """One worker; made by the runtime before ``bghost_setup`` and handed to every hook. Runs in: worker.

    ``bghost.Worker[MySettings]`` types :attr:`settings`.
    """

    name: Final[str]
    kind: Final[str]
    args: Any
    """The arguments of its spec: a dict, or the kind's ``Args``."""
    log: "Final[Logger]"
    woken: frozenset[str]
    """Why the last wait ended: some of timeout, wake, reload, notify, fd, event."""

    def __init__(self, birth: "Birth", interrupts: Interrupts, hooks: "WorkerHooks") -> None:
        spec = birth.spec
        assert spec.name is not None
        self.name = spec.name
        self.kind = spec.kind
        self.hooks = hooks
        self.interrupts = interrupts
        self.slot = birth.table.slot(birth.slot)
        self._stats = self.slot.stats
        self._table = birth.table
        self._control_socket = birth.socket
        self.handle = Handle(birth.table, birth.slot, birth.generation, self.ask)
        self.identity = Identity(spec.name, spec.kind, birth.instance, _user(), time.time())
        self.log = logger.bind(worker=spec.name)
        self.args = spec.args
        self.strict = False
        self._pool_tables = birth.pools
        self._managed = tuple(table for table in birth.pools.values() if table.layout.manager == spec.kind)
        self._pools: dict[str, Pool[Any, Any]] = {}
        self.woken = frozenset()
        self.decided_to_stop = False
        self.tick_scope: Scope | None = None
        self.root_scope: Final = Scope(spec.name)
        self.scoped: list[Scoped] = []
        """What has begun within the current scope and makes one of its own when that is asked for; outermost first."""
        self.shown = ""  # the text of the innermost activity()
        self.participants: list[Participant] = []
        self.exits: list[Callable[[], object]] = []
        self.sources: list[Source] = []
        self.block = RecoveryBlock(self, watch=birth.spec.tick_timeout is not None)
        self._settings: Any = None
        self._naptime = math.inf
        self.take_config: Callable[[], None] = lambda: None
        """Takes what the host has accepted, with the reload hook if settings differ. Set by the runtime."""
        self._poll = select.poll()
        self._poll.register(self.slot.latch.read_fd, select.POLLIN)
        self._host_watched = birth.host_pidfd >= 0
        if self._host_watched:
            self._poll.register(birth.host_pidfd, select.POLLIN)

    def __repr__(self) -> str:
        return f"<Worker {self.name}>"

    # What it is

    @property
    def settings(self) -> S:
        """The kind's settings as of the last reload; never changed while a tick runs."""
        settings: S = self._settings
        return settings

    def use_settings(self, settings: Settings) -> None:
        """Make *settings* the worker's; the runtime's affair."""
        self._settings = settings
        naptime = getattr(settings, "naptime", None)
        self._naptime = float(naptime) if naptime is not None else math.inf

    @property
    def scope(self) -> Scope:
        """The current scope: in a transaction one that ends with it, else in a tick one that ends with that, else the
        worker's own, or one that is around the loop."""
        current = self.root_scope.current
        if current is self.block.base and self.block.active:
            current = self.tick_scope = Scope("tick", current)
            current.__enter__()
        if self.scoped:
            for each in self.scoped:
                each.make_scope()
            self.scoped.clear()
            current = self.root_scope.current
        return current

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for: a long tick may look here and come to its end."""
        return self.interrupts.stopping

    @property
    def backend_pid(self) -> int | None:
        """The database's process that serves this worker, shown by ``bghost ps``; set by database plugins."""
        return self.slot.stats[t.BACKEND_PID] or None

    @backend_pid.setter
    def backend_pid(self, pid: int | None) -> None:
        self.slot.stats[t.BACKEND_PID] = pid or 0

    def extension(self, name: str) -> Any:
        """The active extension of that name as it lives in this process.

        :raises NotFound: if there is none.
        """
        try:
            return self.hooks.extensions[name]
        except KeyError:
            known = sorted(self.hooks.extensions)
            raise NotFound(f"no extension {name!r} is active", hint=near(name, known)) from None

    # Other workers

    def launch(self, spec: WorkerSpec) -> Handle:
        """Have the host run another worker; it lives on when this one ends.

        :returns: its address; ``handle.wait_ready()`` waits until it works.
        :raises bghost.BghostError: if there is no slot, if the name is taken, or if something is wrong with *spec*.
        """
        return self.drive(self._launch(spec))

    def _launch(self, spec: WorkerSpec) -> Steps[Handle]:
        launched = yield from self.asking("launch", {"spec": msgspec.to_builtins(spec)}, None)
        return self.handle_of(launched["slot"], launched["generation"])

    def find(self, name: str) -> Handle | None:
        """The address of the worker of that name, if there is one."""
        for index in range(len(self._table)):
            slot = self._table.slot(index)
            generation = slot.control[t.GENERATION]
            taken = slot.state is not None and slot.name.read() == name
            if taken and slot.control[t.GENERATION] == generation:  # it has not changed hands meanwhile
                return self.handle_of(index, generation)
        return None

    def pool(self, spec: PoolSpec[K, D]) -> Pool[K, D]:
        """The pool that *spec* declares: for its manager, its entries' workers, and every other worker of the host.

        :raises NotFound: if no kind that was named at the host's start declares it.
        """
        pool = self._pools.get(spec.name)
        if pool is None:
            table = self._pool_tables.get(spec.name)
            if table is None:
                raise NotFound(
                    f"there is no pool {spec.name!r}",
                    hint="name the kind that declares it in [host] kinds: tables are made before the first fork",
                )
            pool = self._pools[spec.name] = self._make_pool(spec, table)
        return pool

    def _make_pool(self, spec: PoolSpec[K, D], table: PoolTable) -> Pool[K, D]:
        return Pool(self, spec, table)

    def handle_of(self, slot: int, generation: int) -> Handle:
        """A handle from its parts."""
        return Handle(self._table, slot, generation, self.ask)

    def _event(self) -> bool:
        """Whether pool callbacks are due at the next turn."""
        return any(pool.pending for pool in self._pools.values())

    def _takes_over(self) -> bool:
        return all(manages(self, table) for table in self._managed)

    def stand_by(self) -> None:
        """While another worker manages the pools of this kind: wait until it does not, and this one takes over."""
        while not self._takes_over():
            with self.waiting(f"pool {self._managed[0].layout.name}"):
                self.drive(waiting.sleep(self, math.inf, wakes=False, event=self._takes_over))
                if self.interrupts.reload:
                    return

    def ask(self, verb: str, args: Mapping[str, object], timeout: float | None) -> Any:
        """Ask the host; the runtime's affair."""
        return self.drive(self.asking(verb, args, timeout))

    def asking(self, verb: str, args: Mapping[str, object], timeout: float | None) -> Steps[Any]:
        """:meth:`ask`, to be driven."""
        with self.waiting("host"):
            return (yield from requests.request(self, self._control_socket, verb, args, timeout))

    def become(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stop_signal: int = signal.SIGTERM,
        reload_signal: int = 0,
        death_signal: int = signal.SIGTERM,
        notify: bool = False,
        ready_output: str = "",
    ) -> NoReturn:
        """Become another program: everything is closed as at the worker's end, then this process is replaced.

        The host goes on to watch, restart and stop it, by the signals given here. Called in ``bghost_setup``, the
        worker is ready when the program is; later, it has been ready before.

        :param argv: the program, looked up on PATH, and its arguments.
        :param env: variables on top of the host's.
        :param cwd: where it starts.
        :param stop_signal: what asks it to stop.
        :param reload_signal: what tells it of a new config; 0: nothing does.
        :param death_signal: what the kernel sends it when the host dies.
        :param notify: whether it says itself, by sd_notify, when it is ready; else it is at once.
        :param ready_output: it is ready when a line that it prints has this in it, at most 200 bytes.
        """
        raise Become(Program(argv, env or {}, cwd, stop_signal, reload_signal, death_signal, notify, ready_output))

    # Scopes, transactions, exit

    def enlist(self, participant: Participant) -> None:
        """Have *participant* looked after: what it left open is rolled back at each tick's end, and at exit."""
        self.participants.append(participant)

    def dismiss(self, participant: Participant) -> None:
        """Undo :meth:`enlist`."""
        self.participants.remove(participant)

    def watch(self, source: Source) -> None:
        """Have *source* end the worker's waits from now on, with ``notify`` in :attr:`woken`."""
        self.sources.append(source)

    def unwatch(self, source: Source) -> None:
        """Undo :meth:`watch`."""
        self.sources.remove(source)

    def on_exit(self, function: Callable[[], object]) -> None:
        """Call *function* at the worker's end, after ``bghost_cleanup``, last in first out."""
        self.exits.append(function)

    def left_open(self) -> list[str]:
        """What the tick has left open: a text for each, with the line that opened it."""
        left = [text for participant in self.participants if (text := participant.left_open()) is not None]
        if self.tick_scope is not None:
            left += [f"scope {child.path!r}, opened at {child.opened_at}" for child in self.tick_scope.children]
        scope = self.root_scope.current
        if scope not in (self.tick_scope, self.block.base) and scope.parent is not self.tick_scope:
            left.append(f"scope {scope.path!r}, opened at {scope.opened_at}")
        return left

    def roll_back(self) -> None:
        """Undo what every participant has open; each is tried, then the first failure is raised."""
        errors = []
        for participant in [*self.participants]:  # one that is rolled back may leave
            try:
                participant.roll_back(ROLL_BACK_TIMEOUT)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close_tick_scope(self, error: BaseException | None = None) -> None:
        """Close every scope that was entered since the tick began.

        :param error: what has ended the tick.
        """
        self.tick_scope = None
        scope = self.root_scope.current
        if scope not in (self.block.base, self.root_scope):
            try:
                scope.close(error)
            finally:
                self.close_tick_scope(error)

    # What it is doing

    def activity(self, text: str) -> AbstractContextManager[None]:
        """``bghost ps`` shows *text* for this worker within the block (pgstat_report_activity)."""
        return _Activity(self, text)

    def show(self, text: str) -> None:
        """Have ``bghost ps`` show *text* until :meth:`activity` shows another; the runtime's affair."""
        self.shown = text
        self.slot.activity.write(text)

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """``bghost ps`` shows this worker as waiting for *name* within the block (pgstat_report_wait_start).

        In set-up ``ready_timeout`` stands still meanwhile, and begins anew afterwards.
        """
        stats = self.slot.stats
        outer_doing, outer = stats[t.DOING], self.slot.wait.read()
        self.slot.wait.write(name)
        stats[t.DOING] = _WAITING
        try:
            yield
        finally:
            stats[t.WAIT_ENDED] = time.monotonic_ns()  # first: who sees the worker wait no more finds it
            stats[t.DOING] = outer_doing
            self.slot.wait.write(outer)

    @property
    def shows_waits(self) -> bool:
        """Whether what waits now is the worker itself, and not a task beside it; the runtime's affair."""
        return True

    # Interrupts

    def check_interrupts(self) -> None:
        """A safe point of the author's own, for long computations (CHECK_FOR_INTERRUPTS). No system call.

        :raises bghost.Stop: if the worker is to stop.
        :raises bghost.Canceled: if what is running is to be cancelled.
        """
        self.look()

    def hold_interrupts(self) -> AbstractContextManager[None]:
        """``with worker.hold_interrupts():`` puts off stop and cancel until the end of the block. Nests."""
        return Hold(self.interrupts)

    def interruptible(self) -> AbstractContextManager[None]:
        """``with worker.interruptible():`` lets stop and cancel break blocking Python code, where that is safe."""
        return Interruptible(self.interrupts)

    @property
    def wakeup_fds(self) -> tuple[int, ...]:
        """Descriptors that a plugin's own wait polls for reading; when one is readable, :meth:`handle_wakeup`.

        To be asked for again after each :meth:`handle_wakeup`: a dead host's descriptor stays readable for ever, and is
        left out then.
        """
        if self.interrupts.host_died or self.interrupts.host_pidfd < 0:
            return (self.slot.latch.read_fd,)
        return (self.slot.latch.read_fd, self.interrupts.host_pidfd)

    def handle_wakeup(self) -> None:
        """After one of :attr:`wakeup_fds` was readable: empty the latch, see to the host, and act as a safe point does.

        A wake-up or a reload is kept for the next :meth:`wait`.

        :raises bghost.Stop: if the worker is to stop.
        :raises bghost.Canceled: if what is running is to be cancelled.
        """
        interrupts = self.interrupts
        interrupts.reset()
        if not interrupts.host_died:
            interrupts.note_host()
        self.look()

    def wake(self) -> None:
        """Set the worker's own latch: its next, or running, wait ends. From any thread or signal handler."""
        self.slot.wake(self.handle.generation)

    # Waiting

    def until(self, moment: datetime.datetime) -> float:
        """A nap to *moment* of the wall clock, for :meth:`wait` or to return from a tick; it follows when that is set.

        :param moment: with a time zone.
        :returns: seconds from now, 0 for a moment that is past.
        :raises ValueError: if it has no time zone.
        """
        if moment.tzinfo is None:
            raise ValueError("worker.until() needs a datetime with a time zone")
        return waiting.Until(moment.timestamp())

    def wait(self, timeout: float | None = None, *fds: int) -> frozenset[str]:
        """Sleep on the latch (WaitLatch): until a wake-up, a signal, the host's death, or *timeout*.

        Between ticks a reload ends it too, and after an error it lasts at least the recovery's delay, which only a
        stop, a reload or the host's death cuts short; it ends with that delay if it has no other end, since what was
        to be done is not.

        :param timeout: seconds; ``None`` is the kind's naptime, or for ever where it has none; 0 looks only.
        :param fds: descriptors that end the wait when they can be read.
        :returns: why it ended; kept in :attr:`woken`.
        :raises bghost.Stop: if the worker is to stop.
        :raises bghost.Canceled: inside ``recovery()``, if what is running is to be cancelled.
        :raises ValueError: if *timeout* is negative or not a number.
        """
        return self.sleep(timeout, fds)

    def sleep(self, seconds: float | None, fds: tuple[int, ...] = ()) -> frozenset[str]:
        """:meth:`wait` for the runtime, which never awaits."""
        if seconds is None:
            seconds = self._naptime
        interrupts = self.interrupts
        looks = interrupts.attention or self._stats[WAKE] or fds or self.sources or self.block.delay
        if seconds == 0 and not looks:
            self.woken = waiting.TIMEOUT
        else:
            self.woken = self.drive(self._wait(seconds, fds))
        return self.woken

    def _wait(self, seconds: float, fds: tuple[int, ...]) -> Steps[frozenset[str]]:
        if not seconds >= 0:
            raise ValueError(f"a wait of {seconds!r} seconds")
        if fds:
            if min(fds) < 0:
                raise ValueError(f"a wait for descriptor {min(fds)}")
            # Each once, and none that every wait watches: it would be watched no more afterwards.
            fds = tuple({*fds} - {self.slot.latch.read_fd, self.interrupts.host_pidfd})
        now = time.monotonic()
        if self.block.delay and not self.block.active:
            delay, self.block.delay = self.block.delay, 0.0
            woken = yield from waiting.sleep(self, now + delay, wakes=False)
            if woken is not waiting.TIMEOUT or seconds == math.inf:
                return woken
        if isinstance(seconds, waiting.Until):
            return (yield from waiting.sleep_until(self, seconds, fds, self.sources))
        event = self._event if self._managed else None
        return (yield from waiting.sleep(self, now + seconds, fds, event=event, sources=self.sources))

    def run(self, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a program and wait for its end, like :func:`subprocess.run`, interruptibly.

        It is the leader of a process group, which is ended (SIGTERM, 2 s later SIGKILL) when a stop, a cancel or the
        timeout ends the wait. Its stdin is empty unless *options* say otherwise.

        :param options: as for :func:`subprocess.run`.
        :raises bghost.Stop: if the worker is to stop.
        :raises bghost.Canceled: inside ``recovery()``, if what is running is to be cancelled.
        :raises subprocess.TimeoutExpired: after ``timeout`` seconds.
        :raises subprocess.CalledProcessError: with ``check=True``, if it failed.
        """
        with self.waiting("subprocess"):
            return self.drive(waiting.run(self, list(argv), options))

    def drive(self, steps: Steps[T]) -> T:
        """Sleep as *steps* say, on the latch and the host; the runtime's affair."""
        poll = self._poll
        watched: tuple[int, ...] = ()
        try:
            seconds, fds = next(steps)
            while True:
                if fds is not watched:
                    for fd in watched:
                        poll.unregister(fd)
                    watched = fds
                    for fd in fds:
                        poll.register(fd, select.POLLIN)
                ready = poll.poll(min(seconds, _LONGEST) * 1000 if seconds != math.inf else None)
                seconds, fds = steps.send([fd for fd, _ in ready])
                if self.interrupts.host_died and self._host_watched:
                    self._host_watched = False  # held interrupts, or the way out: it would end every sleep at once
                    poll.unregister(self.interrupts.host_pidfd)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()
            for fd in watched:
                poll.unregister(fd)

    def look(self) -> None:
        """A safe point: outside of ``recovery()`` a smart stop counts too, and a cancel finds nothing to cancel."""
        if self.interrupts.pending:
            self.interrupts.look()
            if self.interrupts.dump:
                self.interrupts.dump = False
                dumps.add(self.slot, "\n".join(self._open()) + "\n")
                self.interrupts.tell_dump()

    def _open(self) -> Iterator[str]:
        yield "Scopes:"
        yield from self.root_scope.tree(1)
        yield "Open:"
        for participant in self.participants:
            yield f"  {participant.left_open() or 'nothing'} ({participant!r})"

    # The main loop

    def mainloop(self) -> Iterator[None]:
        """One turn each: interrupts, the host's death, a pending reload. ``for _ in worker.mainloop():``

        :raises bghost.Stop: when the worker is to end.
        """
        interrupts, stats, managed = self.interrupts, self.slot.stats, self._managed
        while True:
            if interrupts.attention or stats[WAKE] or managed:  # interrupts.pending, without the call
                self.turn()
            yield

    def turn(self) -> None:
        """What a turn does where something is due; the runtime's affair."""
        self.look()
        if self.block.delay:
            self.sleep(0)  # the author's loop has not waited since the error, and must not spin
        if self.interrupts.reload:
            self.take_config()
        if self._managed:
            self.stand_by()
            for pool in list(self._pools.values()):
                if pool.pending:
                    pool.deliver()
            self.look()

    def recovery(self) -> RecoveryBlock:
        """``with worker.recovery():`` makes an Exception inside a recovered error. Its end, good or bad, is followed
        by no open transaction and no open scope but the worker's own."""
        return self.block


class _Activity:
    """One ``with worker.activity(text):`` block."""

    __slots__ = ("_outer", "_text", "_worker")

    def __init__(self, worker: Worker[Any], text: str) -> None:
        self._worker = worker
        self._text = text
        self._outer = ""

    def __enter__(self) -> None:
        worker = self._worker
        self._outer, worker.shown = worker.shown, self._text
        worker.slot.activity.write(self._text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not hasattr(error, ACTIVITY):  # the innermost is the one
            setattr(error, ACTIVITY, self._text)
        worker = self._worker
        worker.shown = self._outer
        worker.slot.activity.write(self._outer)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


_WAITING: Final = t.DOING_INDEX[Doing.WAITING]

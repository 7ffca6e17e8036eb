"""The host: one thread, one loop, which forks workers, watches them, and answers clients (postmaster.c)."""

import gc
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NoReturn

import msgspec
import setproctitle
from loguru import logger

from bghost.host import process as processes
from bghost.host.accepted import Accepted
from bghost.host.channel import Channel
from bghost.host.child import be
from bghost.host.config import Config
from bghost.host.control import Control
from bghost.host.facade import HostView
from bghost.host.notify import Notify
from bghost.host.orphans import Orphans
from bghost.host.output import Output
from bghost.host.poller import FIRST, FOREMOST, SHARE, Poller
from bghost.host.pools import HostPools
from bghost.host.process import Process
from bghost.host.readiness import Readiness
from bghost.host.reading import Sources
from bghost.host.registry import SATISFIED, Registry
from bghost.host.reloads import Reload, Reloads
from bghost.host.rotation import Rotation
from bghost.host.timers import Timer, Timers
from bghost.host.verbs import Verbs
from bghost.host.verdict import judge
from bghost.host.workers import MODE_TIMES, Registration
from bghost.shared import logs
from bghost.shared import table as t
from bghost.shared.birth import Birth
from bghost.shared.environ import RUN
from bghost.shared.errors import BUG, DONE, FAILED, LaunchError
from bghost.shared.hooks import HostHooks
from bghost.shared.paths import Directories
from bghost.shared.plugins import Catalog, Found
from bghost.shared.pools import Layout
from bghost.shared.spec import State, StopMode, WorkerSpec

HOPELESS: Final = 3
"""Errors in the loop after which it is left: its end then ends the workers, as any death of the host does."""

PACE: Final = 0.02
"""Seconds between two bursts of orders, such as stops, to many workers."""

BURST: Final = 5 * len(os.sched_getaffinity(0))
"""Workers that get one at a time: the end of a process takes some 4 ms of a processor."""

GUARD_RETRY: Final = 1.0
"""Seconds after which another guard is tried."""

_SIGNALS: Final = {
    signal.SIGTERM: StopMode.SMART,
    signal.SIGINT: StopMode.FAST,
    signal.SIGQUIT: StopMode.IMMEDIATE,
}


class Host:
    """One run of an instance's host.

    :param directories: the instance's; the runtime directory is prepared and its lock held.
    :param config: what was read.
    :param sources: where it was read from, and is read from again.
    :param catalog: what is installed.
    :param kinds: the kinds that were named at the start.
    :param loaded: the objects of those that were imported in this process.
    :param extensions: those that workers are to have.
    :param hooks: the host's side of kinds and extensions.
    :param child: what a forked process does; never returns.
    :param pools: those that the kinds manage.
    :param lock: the descriptor that holds the instance's lock.
    :param guard: the process that outlives this one.
    :param guard_again: forks another guard, which knows this stop_timeout and closes these descriptors.
    :param stays: whether the host goes on when its last worker has ended.
    :param inherited: descriptors that whoever started the host has left open; not for workers.
    """

    def __init__(
        self,
        directories: Directories,
        config: Config,
        sources: Sources,
        catalog: Catalog,
        kinds: Mapping[str, Found],
        loaded: Mapping[str, object],
        extensions: Mapping[str, Found],
        hooks: HostHooks,
        child: Callable[[Birth], NoReturn],
        *,
        pools: Iterable[Layout] = (),
        lock: int,
        guard: Process,
        guard_again: Callable[[float, Iterable[int]], Process],
        stays: bool,
        inherited: Iterable[int] = (),
    ) -> None:
        self.directories = directories
        self.instance = directories.instance
        self.kinds = kinds
        self.table = t.Table(config.host.max_workers)
        self.accepted = Accepted(self.table, config, hooks, loaded)
        self.registry = Registry(self.table, lambda spec, slot: Registration(self, spec, slot))
        self.pools = HostPools(self, pools)
        self.timers = Timers()
        self.started = time.monotonic_ns()
        self.pid = os.getpid()
        self.changed = True  # there may be nothing to run, and systemd is told even so
        self.stop_mode = StopMode.NONE
        self._hooks = hooks
        self.catalog = catalog
        self._loaded = loaded
        self._extensions = extensions
        self._child = child
        self._lock = lock
        self._guard: Process | None = guard
        self._guard_again = guard_again
        self._guard_ended = False  # by this process, to be followed by another
        self.stays = stays
        self._inherited = inherited
        self._pidfd = processes.pidfd_of(self.pid)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = Poller()
        self._signals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.notify = Notify()
        self.told_ready = False
        self._control: Control | None = None
        self._readiness: Readiness | None = None
        self._orphans: Orphans | None = None
        self._dead: dict[int, str] = {}  # workers' process groups that have ended in this turn, and their names
        self._channels: dict[int, Channel] = {}  # by pid, of workers of other users
        self._handed_out = 0  # number of the log that those have been given
        self._orders: deque[tuple[Callable[[Registration], None], Registration]] = deque()
        self._orders_due: Timer | None = None
        self._pace = PACE
        self._escalation: Timer | None = None
        self._bugs = 0
        self._sources = sources
        self.reloads = Reloads(self, self._poller, self._judge)
        self.rotation = Rotation(self.table, self.timers, config.host.log)

    @property
    def run_id(self) -> str:
        """Which run this is, as clients are told."""
        return f"{self.table.run_id:016x}"

    # The run

    def run(self, specs: Sequence[WorkerSpec]) -> int:
        """Run *specs* and whatever else is launched, until stopped or, unless the host stays, until the last has ended.

        :returns: the exit code of ``bghost run``.
        """
        for spec in specs:
            self.accepted.check(spec)  # before anything is started that would have to be stopped again
        view = HostView(self)
        for signum in _SIGNALS:
            # A service that takes its time to start can be done without.
            signal.signal(signum, partial(_leave, self.accepted.config.host.stop_timeout))
        try:
            self._hooks.host_setup(view)
            with processes.needed("the host cannot start"):
                self._catch_signals()
            for spec in specs:
                self.launch(spec)
            self.registry.check_order()
            with processes.needed("the host cannot start"):
                self._open()
            for worker in self.registry:
                self.registry.start(worker)
            self._loop()
        finally:
            self._hooks.host_cleanup(view)
        return self._end()

    def _open(self) -> None:
        os.environ[RUN] = self.run_id
        # Only now: what plugins have started as daemons in their set-up has left, and is nobody's orphan.
        self._orphans = Orphans(self.timers, self.run_id, self._worker_pids)
        if self._guard is not None:
            self._watch_guard(self._guard)
        self._readiness = Readiness(self.directories.notify_socket, self._poller, self._said_ready)
        # Before the clients: whoever asks is told of what was rung before.
        self._poller.register(self._bell, self._rung, rank=FOREMOST)
        self._control = Control(
            self.directories.socket, self._poller, self.timers, Verbs(self).table(), len(self.table)
        )
        if self.notify.watchdog is not None:
            self._sign_of_life(self.notify.watchdog)
        gc.collect()
        gc.freeze()  # a collection in a child must not touch, and so copy, all that it shares with the host
        count = len(self.registry)
        logger.info(
            "host of instance {} runs, pid {}, {} worker{}", self.instance, self.pid, count, "" if count == 1 else "s"
        )

    def _loop(self) -> None:
        while not self._over and self._bugs < HOPELESS:
            try:
                self._turn()
            except Exception as error:
                self._bug(error)

    @property
    def _over(self) -> bool:
        left = self._orphans is not None and self._orphans.ending
        return not self.registry.live and (self.stopping or not self.stays) and not left

    def _turn(self) -> None:
        due = time.monotonic() if self.changed else self.timers.next()
        self._poller.turn(due)
        if self._dead and self._orphans is not None:
            dead, self._dead = self._dead, {}
            self._orphans.sweep(dead)
        if self.changed:
            self.changed = False
            self._follow()
        # Last: a death is told before the next start, which may be due by now. What changes here is followed next.
        self.timers.run(time.monotonic(), SHARE)
        self.rotation.turn()
        self._hand_out_log()

    def _hand_out_log(self) -> None:
        """Give those that cannot open the log what has been opened anew."""
        number, sink = self.table.head[t.LOG_NUMBER], logs.sink()
        if number != self._handed_out:
            self._handed_out = number
            if sink is not None and sink.file is not None:
                for channel in self._channels.values():
                    channel.hand_out(sink.fds()[-1])

    def _follow(self) -> None:
        """A worker's state has changed: see what that sets going."""
        self.pools.changed()
        if self.stopping:
            self._stop_next()
        else:
            self.reloads.changed()
            if self.registry.release():
                self.changed = True
            self._tell_systemd()
        if self._control is not None:
            self._control.changed()

    def _bug(self, error: Exception) -> None:
        """An error in the loop: nothing is known of the state of things, so the workers are stopped in order."""
        self._bugs += 1
        logger.opt(exception=error).critical("a bug of bghost; the host stops")
        self.stop(StopMode.FAST if self._bugs == 1 else StopMode.KILL)

    def _end(self) -> int:
        killed = [worker.name for worker in self.registry if worker.killed]
        failed = [worker.name for worker in self.registry if worker.state is State.FAILED]
        lost = [worker.name for worker in self.registry if worker.process is not None]
        if killed:
            logger.warning("had to be killed: {}", ", ".join(killed))
        self.reloads.close()
        if self._control is not None:
            self._control.changed()
            self._control.close()
        if self._readiness is not None:
            self._readiness.close()
        logger.info("host of instance {} ends", self.instance)
        logs.finish()
        if self._bugs:
            return BUG
        return FAILED if killed or lost or (failed and not self.stopping) else DONE

    # Signals

    def _catch_signals(self) -> None:
        for signum in (*_SIGNALS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
            signal.signal(signum, _noted)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
        self._poller.register(self._signals[0], self._signaled, rank=FIRST)

    def _signaled(self, events: int) -> None:
        numbers = set(os.read(self._signals[0], 1 << 16))
        for signum, stop_mode in _SIGNALS.items():
            if signum in numbers:
                # SIGINT again is somebody at a terminal who has no patience; SIGTERM again says nothing new.
                again = signum == signal.SIGINT and self.stopping
                self.stop(StopMode(min(max(stop_mode, self.stop_mode + again), StopMode.KILL)))
        if signal.SIGHUP in numbers:
            self.rotation.reopen()
        if signal.SIGHUP in numbers and not self.stopping:
            self.reloads.ask(Reload())
        if signal.SIGCHLD in numbers:
            self._look_at_children()

    def _look_at_children(self) -> None:
        """See which workers were stopped or continued; exits are the pidfds' affair, where there are any."""
        workers = {worker.process.pid: worker for worker in self.registry if worker.process is not None}
        for worker in workers.values():
            if worker.process is not None and worker.process.pidfd < 0:
                worker.look_ended()
        while True:
            try:
                result = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
            except ChildProcessError:
                break
            if result is None:
                break
            if result.si_pid in workers:
                workers[result.si_pid].note_stopped(result.si_code == os.CLD_STOPPED)
        self.reloads.look_ended()
        if self._orphans is not None:
            self._orphans.reap()
        if self._guard is not None and self._guard.pidfd < 0:
            self._look_at_guard()

    def _said_ready(self, pid: int) -> None:
        for worker in self.registry.live:
            if worker.process is not None and worker.process.pid == pid:
                worker.said_ready()

    def _rung(self, events: int) -> None:
        os.eventfd_read(self._bell)
        for worker in self.registry.live:
            worker.rung()
        self.pools.collect()

    # Workers

    def launch(self, spec: WorkerSpec) -> Registration:
        """Take up a worker: every way to launch one ends here. ``registry.start()`` then has its process forked.

        :raises LaunchError: no slot, a name that is taken, a host that stops.
        :raises NotFound: no such kind.
        :raises UsageError: a name that is none.
        :raises ConfigError: settings or args that do not fit.
        """
        if self.stopping:
            raise LaunchError("the host is stopping, nothing is launched any more")
        self.catalog.kind(spec.kind)
        self.accepted.check(spec)
        return self.registry.add(spec, alone=self._control is not None)

    def fork(self, worker: Registration) -> Process:
        """Fork a process for *worker* and watch it.

        :raises OSError: if it cannot be.
        """
        birth = Birth(
            spec=worker.spec,
            slot=worker.slot.index,
            generation=worker.generation,
            table=self.table,
            instance=self.instance,
            socket=self.directories.socket,
            notify_socket=self.directories.notify_socket,
            lock=self._lock,
            host_pid=self.pid,
            host_pidfd=self._pidfd,
            bell=self._bell,
            kind=self.catalog.kind(worker.spec.kind),
            loaded=self._loaded.get(worker.spec.kind),
            named=worker.spec.kind in self.kinds,
            extensions=self._extensions,
            pools=self.pools.tables,
            log_number=self.table.head[t.LOG_NUMBER],
        )

        def child() -> NoReturn:
            output.become()
            far = channel.become() if channel is not None else -1
            be(replace(birth, channel=far), user, self._child)

        user = self.user_of(worker.spec)
        channel = None
        output = Output(worker.name, self._poller, worker.heard)
        try:
            channel = None if user is None else Channel(self._poller, partial(self._connected, user))
            process = processes.fork(child, self.private_fds(), self.pid)
        except BaseException:
            output.close()
            if channel is not None:
                channel.close()
            raise
        output.watch()
        if channel is not None:
            channel.watch()
            self._channels[process.pid] = channel
        self.watch(process, worker.look_ended)
        worker.output = output
        return process

    def user_of(self, spec: WorkerSpec) -> str | None:
        """Whom its worker runs as; ``None``: as the host."""
        return spec.user or self.accepted.config.host.user

    def _connected(self, user: str, connection: socket.socket) -> None:
        if self._control is not None:
            self._control.welcome(connection, Verbs(self, user).table())

    def each(
        self, workers: Iterable[Registration], order: Callable[[Registration], None], *, urgent: bool = False
    ) -> None:
        """Give each of *workers* an order: about as many at a time as can end in that time, for the host runs too.

        :param urgent: as fast as can be.
        """
        self._orders.extend((order, worker) for worker in workers)
        self._pace = 0.0 if urgent else PACE
        if self._orders_due is not None:
            self._orders_due.cancel()
        self._give_orders()

    @property
    def giving_orders(self) -> bool:
        """Whether some have not been given yet."""
        return bool(self._orders)

    def _give_orders(self) -> None:
        now = time.monotonic()
        for _ in range(min(BURST, len(self._orders))):
            order, worker = self._orders.popleft()
            order(worker)
        self._orders_due = self.timers.at(now + self._pace, self._give_orders) if self._orders else None

    def watch(self, process: Process, ended: Callable[[], None]) -> None:
        """Have *ended* called when *process* has ended."""
        if process.pidfd >= 0:
            self._poller.register(process.pidfd, lambda events: ended())

    def forget(self, process: Process) -> None:
        """Watch it no more."""
        if process.pidfd >= 0:
            self._poller.unregister(process.pidfd)

    def spare(self, process: Process) -> None:
        """*process* is a child of the host's own, and nothing that a worker has left behind."""
        assert self._orphans is not None
        self._orphans.spare(process.pid)

    def spare_no_more(self, process: Process) -> None:
        """It has been reaped."""
        assert self._orphans is not None
        self._orphans.spare_no_more(process.pid)

    def _worker_pids(self) -> set[int]:
        return {worker.process.pid for worker in self.registry if worker.process is not None}

    def ended(self, worker: Registration, group: int) -> None:
        """A worker's process has ended: have the turn's end look for what it has left, and restart all where so set."""
        self._dead[group] = worker.name
        if group in self._channels:
            self._channels.pop(group).close()
        if worker.crashed and not self.stopping and self.accepted.config.host.on_crash == "restart-all":
            others = [other for other in self.registry.live if other is not worker and other.process is not None]
            if others:
                logger.warning("worker {} has crashed: all workers are started again", worker.name)
            for other in others:
                other.recycle()

    def private_fds(self) -> Iterable[int]:
        """The descriptors of the host that are not for workers."""
        yield from processes.inherited_fds(self._inherited)  # those that no plugin has closed meanwhile
        yield self._poller.fileno()
        yield from self._signals
        yield from self.notify.fds()
        if self._readiness is not None:
            yield from self._readiness.fds()
        if self._control is not None:
            yield from self._control.fds()
        yield from self.reloads.fds()
        for process in (self._guard, *(worker.process for worker in self.registry)):
            if process is not None and process.pidfd >= 0:
                yield process.pidfd
        for worker in self.registry:
            if worker.output is not None:
                yield from worker.output.fds()
        for channel in self._channels.values():
            yield from channel.fds()

    # The guard

    def _look_at_guard(self) -> None:
        if self._guard is not None and self._guard.status() is not None:
            self.forget(self._guard)
            self._guard.reap()
            self._guard = None
            self._new_guard()

    def _new_guard(self) -> None:
        try:
            guard = self._guard_again(self.accepted.config.host.stop_timeout, self.private_fds())
            self._watch_guard(guard)
        except OSError as error:
            logger.error("the guard has died, and there can be no new one: {}", processes.why_none(error))
            self.timers.at(time.monotonic() + GUARD_RETRY, self._new_guard)
        else:
            self._guard = guard
            if self._guard_ended:
                logger.info("there is a new guard, which knows the new stop_timeout")
                self._guard_ended = False
            else:
                logger.warning("the guard has died; there is a new one")

    def _watch_guard(self, guard: Process) -> None:
        assert self._orphans is not None
        self._orphans.spare(guard.pid)
        self.watch(guard, self._look_at_guard)

    # Stop

    @property
    def stopping(self) -> bool:
        """Whether a stop of the whole has begun; nothing is started any more."""
        return self.stop_mode is not StopMode.NONE

    def stop(self, mode: StopMode) -> None:
        """Stop everything, in the reverse of the order of ``after``; harder than before if *mode* says so.

        Each mode has one deadline for all; then the next one is for everybody at once.
        """
        if mode <= self.stop_mode:
            return
        late = self.stopping
        self.stop_mode = mode
        self.changed = True
        logger.info("stopping, {}", mode.name.lower())
        self.notify.stopping()
        self.reloads.close()
        seconds = self.accepted.config.host.stop_timeout if mode is StopMode.SMART else MODE_TIMES.get(mode, 0.0)
        self._stop_deadline = time.monotonic() + seconds
        if self._escalation is not None:
            self._escalation.cancel()
        if mode is not StopMode.KILL:
            self._escalation = self.timers.at(self._stop_deadline, lambda: self.stop(StopMode(mode + 1)))
        self._stop_each(self.registry.live if late else self.registry.last())
        for worker in self.registry.live:
            if worker.process is None:  # waits to be started, and is not going to be
                worker.stop(mode)

    def _stop_next(self) -> None:
        if not self.giving_orders:
            self._stop_each(self.registry.last())

    def _stop_each(self, workers: Iterable[Registration]) -> None:
        mode, deadline = self.stop_mode, self._stop_deadline
        self.each(workers, lambda worker: worker.stop(mode, deadline), urgent=mode >= StopMode.IMMEDIATE)

    # Config and systemd

    def take(self, config: Config) -> None:
        """Have *config* in force.

        :raises ConfigError: if it is too long, or its log cannot be had.
        """
        before = self.accepted.config.host
        if config.host.log != before.log:
            self.rotation.take(config.host.log)
        self.accepted.take(config)
        if config.host.stop_timeout != before.stop_timeout and self._guard is not None:
            self._guard_ended = True
            self._guard.signal(signal.SIGKILL)  # its end is seen in the next turn

    def _judge(self) -> Any:
        """What the child of a reload does; forked from here, it has the kinds that are imported in this process."""
        setproctitle.setproctitle(f"bghost: reading the config ({self.instance})")
        _, verdict = judge(
            self._sources,
            self.catalog,
            here={*self._loaded, *self._hooks.extensions},
            active=self._extensions,
            before=self.accepted.config,
            running=[worker.spec for worker in self.registry if not worker.gone],
            named=self.kinds,
            pools=[table.layout for table in self.pools.tables.values()],
        )
        return msgspec.to_builtins(verdict)

    def _tell_systemd(self) -> None:
        if not self.notify.heard:
            return
        live = self.registry.live
        ready = sum(worker.state is State.READY for worker in live)
        failed = sum(worker.state is State.FAILED for worker in self.registry)
        self.notify.status(f"{ready} of {len(live)} workers ready" + (f", {failed} failed" if failed else ""))
        if not self.told_ready and all(worker.state in (*SATISFIED, State.STOPPED) for worker in self.registry):
            self.told_ready = True
            self.notify.ready()

    def _sign_of_life(self, seconds: float) -> None:
        self.notify.alive()
        self.timers.at(time.monotonic() + seconds, lambda: self._sign_of_life(seconds))


def _leave(seconds: float, signum: int, frame: object) -> NoReturn:
    """A stop before there is a loop that could take it up: what was set up is cleaned up, and that is all.

    :param seconds: that there are for it; whatever a plugin's set-up is about, the host does not stay deaf.
    """
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    raise SystemExit(DONE)


def _noted(signum: int, frame: object) -> None:
    """The wake-up descriptor has the number; the loop acts on it."""

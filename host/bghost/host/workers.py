"""A worker as the host knows it: its registration, its process, and what follows when something happens to either."""

import random
import signal
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from loguru import logger

from bghost.host import dumps, policy, postmortem
from bghost.host.orphans import KILL_TIME
from bghost.host.output import Output
from bghost.host.policy import Event, Exit
from bghost.host.process import Process, why_none
from bghost.host.rows import Shown
from bghost.host.timers import Timer
from bghost.host.watch import TickWatch
from bghost.shared import table as t
from bghost.shared.handle import Handle
from bghost.shared.replies import Ended, Why
from bghost.shared.spec import Doing, State, StopMode, WorkerSpec

if TYPE_CHECKING:
    from bghost.host.host import Host

MODE_TIMES: Final = {StopMode.FAST: 5.0, StopMode.IMMEDIATE: 1.0}
"""Seconds that a mode has before it turns into the next; smart has ``stop_timeout``."""

DUMP_TIME: Final = 0.25
"""Seconds in which a worker that gets to a safe point has added its scopes to its stacks."""

DUMP_LIMIT: Final = 4.0  # of the five that a client waits for an answer
"""Seconds that one which could run, and gets no processor, has for its stacks."""


class Entry(Protocol):
    """What a pool keeps of one of its workers."""

    key: bytes
    pool_name: str

    def follow(self, worker: "Registration") -> None:
        """The worker's state has changed."""


class Registration:
    """One worker, from its launch until its slot is needed by another; it may see many processes.

    :param host: whose loop, timers and table it uses.
    :param spec: with its name set.
    """

    def __init__(self, host: "Host", spec: WorkerSpec, slot: t.Slot) -> None:
        assert spec.name is not None
        self.host = host
        self.spec = spec
        self.name: Final = spec.name
        self.slot = slot
        self.process: Process | None = None
        self.output: Output | None = None  # of its process
        self.entry: Entry | None = None  # of a pool
        self.state = State.STARTING
        self.stop_asked = False
        self.killed = False  # SIGKILL was needed to stop it
        self.restart_asked = False  # it is to be started again once it has stopped
        self.leaving = False  # the config has it no longer
        self.pending: list[str] = []  # start-only settings that it runs without
        self._next_spec: WorkerSpec | None = None  # by which it is to be started next
        self._fixed: dict[str, object] | None = None  # what its process keeps; None: as in the config in force
        self.late = False  # killed, for it was not ready in time
        self.ended: Ended | None = None  # the post-mortem of its last process
        self._oom_kills: int | None = None  # of the cgroup, when the process was forked
        self.recycled = False  # stopped because another one has crashed
        self.crashed = False  # how its last process ended
        self.lost = False  # it cannot even be killed
        self._acknowledged = 0  # the last config that it has said that it has taken
        self.exit: Exit | None = None
        self.unhealthy = 0  # runs in a row
        self.ready_at = 0.0
        self._due: Timer | None = None
        self._escalation: Timer | None = None
        self._ready_limit: Timer | None = None
        self._watch = None if spec.tick_timeout is None else TickWatch(self, spec.tick_timeout, self._stuck)
        self.stuck = False
        self._error = "", 0  # what the host itself has found wrong with it, and when (monotonic ns)
        self.suspended = False  # by SIGSTOP
        self.dump = ""  # the last one
        self._dumps = 0  # that were taken up
        self._dump_timer: Timer | None = None
        self._dump_limit = 0.0  # monotonic seconds
        self.log = logger.bind(worker=self.name)
        self._shown = Shown(self)
        words = slot.control
        generation = words[t.GENERATION] + 1
        for word in range(t.GENERATION + 1, 32):
            words[word] = 0
        if slot.name.read():  # it was another's, of which nothing is to be left
            slot.stats.cast("B")[:] = bytes(slot.stats.nbytes)
        slot.latch.reset(generation)
        slot.name.write(self.name)
        slot.kind.write(spec.kind)
        words[t.GENERATION] = generation
        self._set(State.STARTING)

    @property
    def generation(self) -> int:
        """Of this registration in its slot."""
        return self.slot.control[t.GENERATION]

    @property
    def handle(self) -> Handle:
        """Its address."""
        return Handle(self.host.table, self.slot.index, self.generation)

    @property
    def last_error(self) -> str:
        """What went wrong last: what the host has seen, or what the worker says, whose cell has no second writer."""
        text, at = self._error
        return text if text and self.slot.stats[t.LAST_ERROR_AT] <= at else self._shown.last_error

    def _note(self, error: str) -> None:
        self._error = error, time.monotonic_ns()

    @property
    def gone(self) -> bool:
        """Whether it is over, its process too; its slot can be another's."""
        return self.state in policy.OVER and self.process is None

    def _set(self, state: State) -> None:
        self.state = state
        self.slot.control[t.STATE] = t.state_index(state)
        self.slot.control[t.SINCE] = time.monotonic_ns()
        self.host.changed = True
        if self.entry is not None:
            self.entry.follow(self)

    def _happened(self, event: Event) -> None:
        self._set(policy.TRANSITIONS[self.state, event])

    # Starting

    def start(self) -> None:
        """Fork a process. A fork that fails counts as one that exited with 1."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        words, stats = self.slot.control, self.slot.stats
        if self.state is not State.STARTING:
            self._happened(Event.START)
        self._adopt()
        self.pending, self._fixed, self._acknowledged = [], None, 0
        self.leaving = False
        for word in range(32):
            # Counters go on where the last process left them; one that was written over, and is full, cannot.
            if word >= t.PER_START or stats[word] >> 62:
                stats[word] = 0
        self.slot.activity.write("")
        self.slot.wait.write("")
        words[t.STOP_MODE] = words[t.STOP_DEADLINE] = words[t.DUE] = 0
        words[t.STARTS] += 1
        words[t.STARTED] = time.monotonic_ns()
        self.stop_asked = self.killed = self.stuck = self.suspended = self.recycled = self.crashed = self.late = False
        self._oom_kills = postmortem.oom_kills()
        self.slot.recent.write("")
        self.dump = ""
        self._dumps = 0
        self.ready_at = 0.0
        try:
            self.process = self.host.fork(self)
        except OSError as error:
            text = f"no process can be forked: {why_none(error)}"
            self._note(text)
            self.log.error("{}", text)
            self._ended(Exit(1, orderly=True))
            return
        words[t.PID] = self.process.pid
        if self.entry is not None:
            self.entry.follow(self)
        self._ready_limit = self.host.timers.at(time.monotonic() + self.spec.ready_timeout, self._late)
        self.log.info("started, pid {}", self.process.pid)

    def _is_due(self) -> None:
        """The delay is over: it is forked in its turn, for many may be due at once."""
        self._due = None
        self.slot.control[t.DUE] = 0
        self._happened(Event.START)
        self.host.registry.start(self)

    def rung(self) -> None:
        """The bell has rung: see whether it is ready, has dumped, or has begun a tick that nobody watches."""
        if self.process is None:
            return
        if self._watch is not None:
            self._watch.rung()
        if self.slot.stats[t.CONFIG_ACK] != self._acknowledged:
            self._acknowledged = self.slot.stats[t.CONFIG_ACK]
            self.host.changed = True
        if self.slot.stats[t.DUMPS] != self._dumps and self._dump_timer is None:
            self._take_dump_later()
        self._look_ready()

    def _look_ready(self) -> None:
        if self.state is State.STARTING and self.slot.stats[t.READY] == 1:
            self._is_ready()

    def said_ready(self) -> None:
        """The program that it has become has said that it is ready."""
        if self.state is State.STARTING and self.is_program:
            self._is_ready()

    def heard(self, line: str) -> None:
        """Its process has written a line to stdout or stderr."""
        if self.state is State.STARTING and self.is_program:
            literal = self.slot.ready_output.read()
            if literal and literal in line:
                self._is_ready()

    def _is_ready(self) -> None:
        self.ready_at = time.monotonic()
        self._drop_timer("_ready_limit")
        self._happened(Event.READY)

    def _late(self) -> None:
        if self.state is State.STARTING and self.process is not None:
            # In a wait, for a database, say, the limit stands still, and after it begins anew: it is for set-up's own
            # work, of which each attempt in a long outage costs some. What the worker says of times to come is nothing.
            now, waits = time.monotonic(), self.slot.doing is Doing.WAITING
            began = now if waits else min(now, self.slot.stats[t.WAIT_ENDED] / 1e9)
            if (limit := began + self.spec.ready_timeout) > now:
                self._ready_limit = self.host.timers.at(limit, self._late)
                return
            text = f"not ready within {self.spec.ready_timeout:g} s, killed"
            self._note(text)
            self.log.error("{}", text)
            self.late = True
            self.process.kill_group()

    def ask_dump(self) -> None:
        """Have it dump its stacks, and its scopes if it gets to a safe point soon; :attr:`dump` is empty till then."""
        if self.is_program:
            self.dump = "it has become another program, which has no Python stack"
        elif self.process is not None and self._dump_timer is None:
            self.dump = ""
            self.process.signal(signal.SIGUSR2)
            self._dump_limit = time.monotonic() + DUMP_LIMIT
            self._take_dump_later()

    def _take_dump_later(self) -> None:
        self._dump_timer = self.host.timers.at(time.monotonic() + DUMP_TIME, self._take_dump)

    def _take_dump(self) -> None:
        self._dump_timer = None
        if self.process is None:
            return
        self._dumps = self.slot.stats[t.DUMPS]
        dump = dumps.take(self.process.pid, self.slot)
        if not dump and self.process.state() == "R" and time.monotonic() < self._dump_limit:
            self._take_dump_later()  # it could run, and has had no processor for it
            return
        self.dump = dump or "no stack could be had"
        self.log.bind(lines=self.dump.splitlines()).info("dump:")
        self.host.changed = True
        if self.stuck:
            self._stop_stuck()

    def _stuck(self) -> None:
        """A tick takes too long: dump, then stop it; it counts as a failure and is started again."""
        if self.stuck:
            return  # it is being stopped, and its dump is from when that began
        self.stuck = True
        self.host.changed = True
        assert self.spec.tick_timeout is not None
        activity = self.slot.activity.read()
        text = f"stuck: a tick has not ended within {self.spec.tick_timeout:g} s"
        text += f", during: {activity}" if activity else ""
        self._note(text)
        self.log.error("{}", text)
        self.ask_dump()

    def _stop_stuck(self) -> None:
        if self.process is not None and not self.stop_asked:
            self._press(StopMode.FAST)

    def note_stopped(self, stopped: bool) -> None:
        """SIGSTOP or SIGCONT has reached its process."""
        if stopped is not self.suspended:
            self.suspended = stopped
            self.host.changed = True
            self.log.log("WARNING" if stopped else "INFO", "suspended" if stopped else "goes on")

    # Stopping

    def stop(self, mode: StopMode, deadline: float | None = None) -> None:
        """Ask it to stop, or to stop in a harder way than before. Restarts are off until it is started again.

        :param deadline: monotonic seconds at which *mode* turns into the next; its usual time from now if ``None``.
        """
        if self.state in policy.OVER:
            return
        self.stop_asked = True
        if self._due is not None:
            self._due.cancel()
            self._due = None
            self.slot.control[t.DUE] = 0
        if self.process is None:
            if self.state is State.STARTING:
                self._happened(Event.STOP)
            self._happened(Event.STOPPED)
            return
        if self.state is not State.STOPPING:
            self._happened(Event.STOP)
        self._press(mode, deadline)

    def _press(self, mode: StopMode, deadline: float | None = None) -> None:
        """Give the order *mode*, and the next one when its time is over."""
        words = self.slot.control
        if self.process is None or words[t.STOP_MODE] >= mode:
            return
        if deadline is None:
            deadline = time.monotonic() + self.time_of(mode)
        words[t.STOP_DEADLINE] = int(deadline * 1e9)
        before = words[t.STOP_MODE]
        words[t.STOP_MODE] = mode  # last: a worker that sees the mode finds its deadline
        if mode is StopMode.IMMEDIATE and self.is_program and not before:
            self.log.info("killed, as a program is that is to stop at once")
            self.process.kill_group()
        elif mode is StopMode.KILL or (mode is StopMode.IMMEDIATE and self.is_program):
            self._kill()
        elif mode is StopMode.SMART:
            if not self.is_program:
                self.slot.wake(self.generation)
            if self.is_program:  # by now: it may have looked for a stop before there was one
                self._signal_program()
        elif self.is_program:
            self._signal_program()
        else:
            if mode is StopMode.IMMEDIATE and before:
                self.log.warning("did not stop in time, ended without cleanup")
            self.process.signal(signal.SIGTERM if mode is StopMode.FAST else signal.SIGQUIT)
        if mode is not StopMode.SMART:
            self.process.signal(signal.SIGCONT)
        self._drop_timer("_escalation")
        if mode is not StopMode.KILL:
            self._escalation = self.host.timers.at(deadline, lambda: self._press(StopMode(mode + 1)))
        else:
            self._escalation = self.host.timers.at(time.monotonic() + KILL_TIME, self._lose)

    def _signal_program(self) -> None:
        assert self.process is not None
        self.process.signal(self._signal_word(t.STOP_SIGNAL) or signal.SIGTERM)

    def _kill(self) -> None:
        assert self.process is not None
        self.killed = True
        self.log.warning("did not stop in time, killed")
        self.process.kill_group()

    def _lose(self) -> None:
        """SIGKILL did not end it: it hangs in the kernel. Nothing waits for it any more; its slot stays its own."""
        assert self.process is not None
        self.lost = True
        text = f"cannot be killed: pid {self.process.pid} is in state {self.process.state()}"
        self._note(text)
        self.log.error("{}", text)
        if self.state is not State.STOPPING:
            self._happened(Event.STOP)
        self._happened(Event.FAILED)

    @property
    def is_program(self) -> bool:
        """Whether the process has become another program, which has no latch and no handlers of bghost's."""
        return self.slot.stats[t.EXECED] == 1

    def _signal_word(self, word: int) -> int:
        number = self.slot.stats[word]
        return number if 0 < number <= signal.SIGRTMAX else 0

    def restart(self, mode: StopMode) -> None:
        """Stop it, if it runs, and start it again, be it over or not; an entry's worker is its manager's to start."""
        self.restart_asked = self.entry is None
        if self.state not in policy.OVER:
            self.stop(mode)
        self._start_again()

    def _start_again(self) -> None:
        if self.restart_asked and self.state in policy.OVER and self.process is None and not self.host.stopping:
            self.restart_asked = False
            self.unhealthy = 0
            self.start()

    def recycle(self) -> None:
        """Another worker has crashed, and all are to be started again: end this process at once."""
        self.recycled = True
        self._press(StopMode.IMMEDIATE)

    def signal(self, signum: int) -> bool:
        """Send a signal to its process; whether there is one."""
        if self.process is None:
            return False
        self.process.signal(signum)
        return True

    def reload(self) -> None:
        """A config was accepted: have it look at it."""
        number = self._signal_word(t.RELOAD_SIGNAL) if self.is_program else signal.SIGHUP
        if self.process is not None and number:
            self.process.signal(number)

    def note_fixed(self, old: Mapping[str, dict[str, object]], new: Mapping[str, dict[str, object]]) -> None:
        """A config was accepted: see what of it this worker's process does without until it is started again.

        :param old: by worker, what a process keeps from its start on, in the config before; under no name the same for
            all workers.
        :param new: in the one that is in force now.
        """
        if self.process is None:
            return
        if self._fixed is None:
            self._fixed = {**old.get("", {}), **old.get(self.name, {})}
        now = {**new.get("", {}), **new.get(self.name, {})}
        self.pending = [key for key, value in now.items() if self._fixed.get(key) != value]

    def change(self, spec: WorkerSpec) -> None:
        """Its own table has changed: have it run by *spec*; if somebody has stopped it, from its next start on.

        Until its process has ended it is the old spec that says how much time that has.
        """
        self._next_spec = spec
        if self.state is State.STARTING and self.process is None:
            self._adopt()  # it waits for others still
        elif self.state is not State.STOPPED and (self.state is not State.STOPPING or self.restart_asked):
            self.restart(StopMode.SMART)

    def leave(self) -> None:
        """The config has it no longer: end it."""
        self.leaving = True
        self.restart_asked = False
        self.stop(StopMode.SMART)

    def come_back(self, spec: WorkerSpec) -> None:
        """The config has it again, while its process still ends."""
        self.leaving = False
        self._next_spec = spec
        self.restart(StopMode.SMART)

    def _adopt(self) -> None:
        if self._next_spec is not None:
            self.spec, self._next_spec = self._next_spec, None
            self.slot.kind.write(self.spec.kind)
            self._watch = (
                None if self.spec.tick_timeout is None else TickWatch(self, self.spec.tick_timeout, self._stuck)
            )

    def time_of(self, mode: StopMode) -> float:
        """Seconds that *mode* has."""
        if mode is StopMode.SMART:
            return self.spec.stop_timeout or self.host.accepted.config.host.stop_timeout
        return MODE_TIMES.get(mode, 0.0)

    # Ending

    def look_ended(self) -> None:
        """See whether the process has ended; then clear up after it and decide what follows."""
        process = self.process
        if process is None:
            return
        status = process.status()
        if status is None:
            return
        self._look_ready()  # the bell that it rang may come up after its end
        stats = self.slot.stats
        exit = Exit(
            status,
            orderly=stats[t.EXITING] == 1 or self.is_program,
            gave_up=stats[t.GAVE_UP] == 1,
            terminated=stats[t.TERMINATED] == 1,
            overdue=stats[t.EXITING] == t.LEAVING and status == -signal.SIGALRM,
            ready_for=time.monotonic() - self.ready_at if self.ready_at else 0.0,
        )
        group = process.pid
        core = status < 0 and postmortem.core_dumped(process.pid)
        process.kill_group()  # before the leader is reaped, while its number still names the group
        self.slot.control[t.PID] = 0  # before it is reaped: who sees the pid knows that it is still this process
        self.process = None
        self.host.forget(process)
        process.reap()
        if self.output is not None:
            self.output.close()
        if not self.lost:
            self._ended(exit, core)
        self.host.ended(self, group)
        self._start_again()

    def _ended(self, exit: Exit, core: bool = False) -> None:
        for timer in ("_ready_limit", "_escalation", "_dump_timer"):
            self._drop_timer(timer)
        if self._watch is not None:
            self._watch.cancel()
        self.suspended = False
        self.exit = exit
        words = self.slot.control
        words[t.EXIT] = (exit.status & 0xFFFF) + 1
        decision = policy.decide(
            self.spec,
            exit,
            stop_asked=self.stop_asked or self.host.stopping,
            stuck=self.stuck,
            recycled=self.recycled,
            unhealthy=self.unhealthy,
            chance=random.random(),
        )
        self.crashed = exit.crash and not (self.stop_asked or self.stuck or self.recycled)
        self.unhealthy = decision.unhealthy
        oom = postmortem.oom_kills() if exit.status == -signal.SIGKILL else None
        since = oom - self._oom_kills if oom is not None and self._oom_kills is not None else None
        self.ended = postmortem.describe(self, exit, decision, self.row(), core, since)
        self.slot.stats[t.BACKEND_PID] = 0
        if decision.event is Event.STOPPED and self.state is not State.STOPPING:
            self._happened(Event.STOP)
        self._happened(decision.event)
        if decision.event is Event.RETRY:
            words[t.RESTARTS] += 1
            when = time.monotonic() + decision.delay
            words[t.DUE] = int(when * 1e9)
            self._due = self.host.timers.at(when, self._is_due)
            self.log.warning("{}; started again in {:.1f} s", exit, decision.delay)
        elif decision.event is Event.FAILED:
            self.log.error("{}; failed, not started again", exit)
        else:
            self.log.info("{}: {}", self.state, exit)

    def _drop_timer(self, name: str) -> None:
        timer: Timer | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    # Showing

    def why(self) -> Why:
        """Why it is in the state that it is in: its last end, or what it does now."""
        control = self.slot.control
        lines = postmortem.recent(self.slot.recent.read(), list(self.output.recent) if self.output else [])
        return {
            "name": self.name,
            "kind": self.spec.kind,
            "state": str(self.state),
            "since": t.unix_time(control[t.SINCE]) or 0.0,
            "pid": control[t.PID] or None,
            "starts": control[t.STARTS],
            "restarts": control[t.RESTARTS],
            "unhealthy": self.unhealthy,
            "next_try": t.unix_time(control[t.DUE]),
            "held_by": self.host.registry.held_by(self),
            "lines": lines if self.process is not None else [],
            "ended": self.ended,
        }

    @property
    def flags(self) -> list[str]:
        """What holds of it beside its state."""
        flags = []
        if self.suspended:
            flags.append("suspended")
        if self.stuck:
            flags.append("stuck")
        if self._watch is not None and self._watch.starved:
            flags.append("starved")
        return flags

    def row(self) -> dict[str, object]:
        """What ``ps`` shows of it."""
        return self._shown.row()

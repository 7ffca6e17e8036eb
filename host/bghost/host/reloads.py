"""Reloads: one at a time, each a transaction: what a verdict decides, what is done then, and how workers take it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loguru import logger

from bghost.host import difference, policy
from bghost.host.check import Check
from bghost.host.config import Config
from bghost.host.difference import Difference
from bghost.host.poller import Poller
from bghost.host.verdict import Values, Verdict
from bghost.host.workers import Registration
from bghost.shared import table as t
from bghost.shared.errors import BghostError, ConfigError, HostError
from bghost.shared.plugins import Found
from bghost.shared.spec import State, StopMode, WorkerSpec

if TYPE_CHECKING:
    from bghost.host.host import Host


class Reload:
    """One that was asked for, possibly by several.

    :param dry_run: whether it ends with what it would change.
    :param rollback: whether the old config comes back if a worker does not get along with the new one.
    :param within: seconds in which that is decided; ``None``: each worker has its own ``ready_timeout``.
    """

    def __init__(self, *, dry_run: bool = False, rollback: bool = False, within: float | None = None) -> None:
        self.dry_run = dry_run
        self.rollback = rollback
        self.within = within
        self.begun = False
        self.over = False
        self.error: BghostError | None = None
        self.number = 0  # of the config that is in force by it
        self.difference = Difference()
        self.revive: tuple[str, ...] = ()  # workers that had failed, and are started again
        self.pending: list[str] = []  # settings that take effect at the host's next start
        self.notes: list[str] = []
        self.workers: list[str] = []  # those that are to get along with it
        self.deadlines: dict[str, float] = {}  # monotonic seconds until which each has to

    def same(self, other: "Reload") -> bool:
        """Whether one can stand for the other."""
        return (self.dry_run, self.rollback, self.within) == (other.dry_run, other.rollback, other.within)


@dataclass
class Outcome:
    """How workers get along with a config.

    :param acknowledged: by name, the number of the config that a worker has taken last.
    :param wrong: what has become of those that have failed.
    :param waits_for: those of which it is not known yet.
    """

    acknowledged: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    waits_for: list[str] = field(default_factory=list)


class Reloads:
    """The reloads of one host.

    :param judge: reads the config and gives the verdict as plain data; called in the child.
    """

    def __init__(self, host: "Host", poller: Poller, judge: Callable[[], Any]) -> None:
        self._host = host
        self._check = Check(host, poller, judge, self._checked)
        self._waiting: list[Reload] = []
        self._current: Reload | None = None
        self._pools: list[str] = []  # those that the config in force would have otherwise, had the host not begun yet
        self._before: tuple[Config, list[str]] | None = None  # what a rollback goes back to, and those of then
        self._fixed: tuple[dict[str, Values], dict[str, Values]] = {}, {}  # likewise; by worker, before and now
        self._to_start: dict[str, WorkerSpec] = {}  # new workers that have no slot yet
        self._added: list[Registration] = []  # those that have, and are not started before all have
        self._extensions: Values | None = None  # their settings as this process has made them; None: as in force
        self._extensions_now: Values = {}  # those of the config in force, once that is not the same
        self._born = host.accepted.config.host

    def fds(self) -> list[int]:
        """The descriptors that a child must not keep."""
        return self._check.fds()

    def look_ended(self) -> None:
        """See whether the process that checks the config has ended."""
        self._check.look_ended()

    @property
    def pending(self) -> list[str]:
        """The settings, and pools, that are otherwise from the host's next start on."""
        return self._pending(self._host.accepted.config, self._extensions_now, self._pools)

    def _pending(self, config: Config, extensions: Values, pools: list[str]) -> list[str]:
        return [
            *difference.host_pending(self._born, config.host),
            *_differing(self._extensions or {}, extensions),
            *pools,
        ]

    def ask(self, reload: Reload) -> Reload:
        """Have a reload done, after those that were asked for before; one that still waits can stand for it.

        :raises HostError: if the host stops.
        """
        if self._host.stopping:
            raise _stopping()
        for other in self._waiting:
            if other.same(reload):
                return other
        self._waiting.append(reload)
        self._host.changed = True
        return reload

    def close(self) -> None:
        """The host stops, or ends: there is no reload any more."""
        for reload in (self._current, *self._waiting):
            if reload is not None and not reload.over:
                reload.error, reload.over = _stopping(), True
        self._waiting.clear()
        self._to_start.clear()
        self._added.clear()
        self._current = None
        self._check.kill()

    def changed(self) -> None:
        """Something has changed: do what can be done now."""
        if self._host.stopping:
            return
        self._start_new()
        if self._current is not None and self._current.number:
            self._look_at_trial(self._current)
        if self._current is None and not self._check.runs and self._waiting:
            self._begin(self._waiting.pop(0))

    def _begin(self, reload: Reload) -> None:
        self._current = reload
        reload.begun = True
        if self._host.told_ready:
            self._host.notify.reloading()
        try:
            self._check.begin()
        except HostError as error:
            self._refuse(reload, error)

    def _checked(self, found: Verdict | BghostError) -> None:
        reload = self._current
        if reload is None:
            return
        try:
            if isinstance(found, BghostError):
                raise found
            self._decide(reload, found)
        except BghostError as error:
            self._refuse(reload, error)

    def _refuse(self, reload: Reload, error: BghostError) -> None:
        if reload.dry_run:
            logger.warning("the config would be refused: {}", error)
        else:
            self._host.accepted.error = str(error)
            logger.error("config refused, the old one stays: {}", error)
        reload.error = error
        self._finish(reload)

    def _finish(self, reload: Reload) -> None:
        reload.over = True
        self._current = None
        self._host.changed = True
        if self._host.told_ready and not self._host.stopping:
            self._host.notify.ready()

    # What is decided, and done

    def _decide(self, reload: Reload, verdict: Verdict) -> None:
        host = self._host
        config = verdict.config
        before = host.accepted.config
        reload.difference = difference.compare(before, config, workers=host.stays)
        reload.revive = tuple(worker.name for worker in self._failed() if worker.name not in reload.difference.stop)
        reload.notes = verdict.notes
        self._check_room(config, reload.difference)
        old = {name: values[0] for name, values in verdict.fixed.items()}
        new = {name: values[1] for name, values in verdict.fixed.items()}
        if self._extensions is None:
            self._extensions = self._extensions_now = old.get("", {})
        if reload.dry_run:
            reload.pending = self._pending(config, new.get("", {}), verdict.pools)
            reload.number = host.accepted.number
            self._finish(reload)
            return
        for found in verdict.found:
            host.catalog.kinds[found["name"]] = Found(**found | {"requires": tuple(found["requires"])})
        self._before = before, self._pools
        self._apply(config, reload.difference, old, new)
        self._pools = verdict.pools
        for note in verdict.notes:
            logger.warning("{}", note)
        logger.info("config {} accepted", host.accepted.number)
        reload.pending = self.pending
        self._watch(reload)
        if reload.rollback:
            self._fixed = old, new
            self._look_at_trial(reload)
        else:
            self._finish(reload)

    def _failed(self) -> list[Registration]:
        return [
            worker
            for worker in self._host.registry
            if worker.state is State.FAILED and not (worker.lost or worker.leaving)
        ]

    def _check_room(self, config: Config, changes: Difference) -> None:
        """See that every new worker gets its name and, once those are gone that are to go, a slot.

        :raises ConfigError: if not.
        """
        workers = {worker.name: worker for worker in self._host.registry}
        for name in changes.start:
            other = workers.get(name)
            if other is not None and not other.gone and not other.leaving:
                raise ConfigError(
                    f"worker {name} is to be started, and there is one of that name",
                    detail="it was launched by other means than the config",
                    hint=f"bghost stop {name}",
                )
        ours = config.specs() if self._host.stays else {}
        others = [
            worker.name
            for worker in workers.values()
            if not worker.gone and not worker.leaving and worker.name not in (*ours, *changes.stop)
        ]
        room = len(self._host.table)
        if changes.start and len(ours) + len(others) > room:
            raise ConfigError(
                f"no slots for {len(ours) + len(others)} workers, of which the config has {len(ours)}",
                detail=f"there are {room}, until the host starts again",
                hint="raise max_workers in [host], and start the host again",
            )

    def _apply(self, config: Config, changes: Difference, old: dict[str, Values], new: dict[str, Values]) -> None:
        host = self._host
        host.take(config)
        self._extensions_now = new.get("", {})
        for worker in host.registry.live:
            worker.note_fixed(old, new)
        workers = {worker.name: worker for worker in host.registry}
        specs = config.specs()
        self._to_start = {}
        self._added = [worker for worker in self._added if worker.name not in changes.stop]
        for name in changes.stop:
            if name in workers:
                workers[name].leave()
        for name in changes.start:
            if name in workers and not workers[name].gone:
                workers[name].come_back(specs[name])  # it is about to leave still
            else:
                self._to_start[name] = specs[name]
        for name in changes.restart:
            if name in workers:
                workers[name].change(specs[name])
            else:
                self._to_start[name] = specs[name]  # it was over, and its slot has gone to another
        for worker in self._failed():
            if worker.name not in changes.stop:
                worker.restart(StopMode.SMART)
        for worker in host.registry.live:
            worker.reload()
        self._start_new()

    def _start_new(self) -> None:
        """Give new workers slots, as far as there are any; they start when all have theirs: some wait for others."""
        host = self._host
        if not self._to_start and not self._added:
            return
        for name, spec in list(self._to_start.items()):
            if host.registry.has_room(name):
                del self._to_start[name]
                try:
                    self._added.append(host.registry.add(spec, alone=False))
                except BghostError as error:  # somebody was quicker, and has the name
                    logger.error("{}", error)
        if not self._to_start:
            for worker in self._added:
                host.registry.start(worker)
            self._added = []
            host.changed = True

    # Whether the workers get along with it

    def _watch(self, reload: Reload) -> None:
        host = self._host
        reload.number = host.accepted.number
        # One that was to be started again later was in trouble before, and says nothing of the new config.
        live = {
            worker.name: worker
            for worker in host.registry.live
            if not worker.leaving and worker.state is not State.BACKOFF
        }
        reload.workers = list(dict.fromkeys([*live, *self._to_start]))
        if not reload.rollback:
            return
        now = time.monotonic()
        for name in reload.workers:
            timeout = live[name].spec.ready_timeout if name in live else self._to_start[name].ready_timeout
            if name not in (*reload.difference.start, *reload.difference.restart, *reload.revive):
                reload.deadlines[name] = now + timeout
        for deadline in {*reload.deadlines.values()}:
            host.timers.at(deadline, self._poke)
        if reload.within is not None:
            reload.deadlines[""] = now + reload.within
            host.timers.at(now + reload.within, self._poke)

    def _poke(self) -> None:
        self._host.changed = True

    def outcome(self, reload: Reload) -> "Outcome":
        """How the workers get along with *reload*, as far as it is known."""
        workers = {worker.name: worker for worker in self._host.registry}
        outcome = Outcome()
        for name in reload.workers:
            worker = workers.get(name)
            if worker is None:
                if name in self._to_start:
                    outcome.waits_for.append(name)
                continue
            number = worker.slot.stats[t.CONFIG_ACK]
            if worker.state in (State.FAILED, State.BACKOFF):
                outcome.wrong[name] = worker.last_error or str(worker.exit)
            elif worker.state in policy.OVER and not worker.restart_asked:
                pass  # done, or stopped by somebody
            elif worker.state is State.READY and (number >= reload.number or worker.is_program):
                outcome.acknowledged[name] = number
            elif time.monotonic() >= reload.deadlines.get(name, float("inf")):
                outcome.wrong[name] = f"has not taken it within {worker.spec.ready_timeout:g} s"
            else:
                outcome.waits_for.append(name)
        return outcome

    def _look_at_trial(self, reload: Reload) -> None:
        outcome = self.outcome(reload)
        if outcome.wrong:
            self._roll_back(reload, outcome.wrong)
        elif not outcome.waits_for:
            self._finish(reload)
        elif time.monotonic() >= reload.deadlines.get("", float("inf")):
            late = f"not ready within {reload.within:g} s"
            self._roll_back(reload, dict.fromkeys(outcome.waits_for, late))

    def _roll_back(self, reload: Reload, wrong: dict[str, str]) -> None:
        host = self._host
        assert self._before is not None
        refused, (back, self._pools) = reload.number, self._before
        changes = difference.compare(host.accepted.config, back, workers=host.stays)
        before, now = self._fixed
        self._apply(back, changes, now, before)
        workers = {worker.name: worker for worker in host.registry}
        for name in wrong:
            worker = workers.get(name)
            if worker is not None and not worker.leaving and worker.state is State.BACKOFF:
                worker.restart(StopMode.SMART)
        why = ", ".join(f"worker {name}: {text}" for name, text in wrong.items())
        error = HostError(
            f"config {refused} was taken back, config {host.accepted.number} is as the one before", detail=why
        )
        host.accepted.error = str(error)
        logger.error("{}", error)
        reload.error = error
        self._finish(reload)


def _stopping() -> HostError:
    return HostError("the host is stopping, no config is read any more")


def _differing(old: Values, new: Values) -> list[str]:
    return [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]

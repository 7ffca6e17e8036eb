"""The verbs of the control socket: what a client may ask, checked, and answered at once or when the time has come."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

import bghost
from bghost.host import policy
from bghost.host.reloads import Reload
from bghost.host.workers import Registration
from bghost.shared import settings as conversion
from bghost.shared import table as t
from bghost.shared.errors import HostError, UsageError
from bghost.shared.spec import TIME_LIMIT, State, StopMode, WorkerSpec

if TYPE_CHECKING:
    from bghost.host.host import Host

Verb = Callable[[dict[str, Any]], Any]

_MODES = {"smart": StopMode.SMART, "fast": StopMode.FAST, "immediate": StopMode.IMMEDIATE}


class Verbs:
    """The fixed table of them, each a method of its name that is given the request's args.

    :param user: who asks, where that is a worker which runs as another user than the host: it may look at all workers,
        and command those of its own user; what it launches runs as that user.
    """

    def __init__(self, host: "Host", user: str | None = None) -> None:
        self._host = host
        self._user = user
        self._registry = host.registry
        self._accepted = host.accepted

    def table(self) -> dict[str, Verb]:
        """Name to method; a method gives its result, or a :data:`Later`, or raises a BghostError."""
        verbs: dict[str, Verb] = {
            "dump": self.dump,
            "launch": self.launch,
            "pool_dump": self._host.pools.dump,
            "pool_forget": self._host.pools.forget,
            "pool_launch": self._host.pools.launch,
            "pool_stop": self._host.pools.stop,
            "pool_wait": self._host.pools.wait,
            "ps": self.ps,
            "reload": self.reload,
            "restart": self.restart,
            "shutdown": self.shutdown,
            "signal": self.signal,
            "status": self.status,
            "stop": self.stop,
            "wait": self.wait,
            "wake": self.wake,
            "why": self.why,
        }
        if self._user is None:
            return verbs
        anybody = {name: verbs[name] for name in ("ps", "status", "wait", "pool_wait")}
        own = {name: self._of_own(verbs[name]) for name in ("dump", "restart", "signal", "stop", "wake", "why")}
        pools = {
            name: self._of_own_pool(verbs[name]) for name in verbs if name.startswith("pool_") and name not in anybody
        }
        return {**anybody, **own, **pools, "launch": self._launch_own}

    def _of_own(self, call: Verb) -> Verb:
        def checked(args: dict[str, Any]) -> Any:
            for worker in self._find(args):
                self._see_own(worker)
            return call(args)

        return checked

    def _of_own_pool(self, call: Verb) -> Verb:
        def checked(args: dict[str, Any]) -> Any:
            manager = self._host.pools.manager(args)
            if manager is not None:
                self._see_own(manager)
            return call(args)

        return checked

    def _see_own(self, worker: Registration) -> None:
        if self._host.user_of(worker.spec) != self._user:
            raise HostError(
                f"worker {worker.name} does not run as {self._user}, whose workers alone this one may command"
            )

    def _launch_own(self, args: dict[str, Any]) -> Any:
        spec = args.get("spec")
        if isinstance(spec, dict):
            if spec.get("user") not in (None, self._user):
                raise HostError(f"a worker that runs as {self._user} launches others that do")
            args = {**args, "spec": {**spec, "user": self._user}}
        return self.launch(args)

    def _find(self, args: dict[str, Any]) -> list[Registration]:
        """The workers that args name, or that their handles mean; a handle whose worker has no slot means none."""
        names, handles = args.get("names", []), args.get("handles", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError("names is a list of texts")
        if not isinstance(handles, list) or not all(_is_handle(handle) for handle in handles):
            raise UsageError("handles is a list of run id, slot and generation")
        if not names and not handles:
            raise UsageError("which worker?")
        found = self._registry.find(names)
        for run_id, slot, generation in handles:
            worker = self._registry.at(slot, generation) if run_id == self._host.run_id else None
            if worker is not None:
                found.append(worker)
        return found

    def ps(self, args: dict[str, Any]) -> Any:
        """Rows of the workers that are named, or of all."""
        workers = self._find(args) if args.get("names") else self._registry
        return [worker.row() for worker in workers]

    def status(self, args: dict[str, Any]) -> Any:
        """The host itself."""
        host = self._host
        return {
            "instance": host.instance,
            "pid": host.pid,
            "since": t.unix_time(host.started),
            "version": bghost.__version__,
            "run_id": host.run_id,
            "config": self._accepted.number,
            "config_file": self._accepted.config.path,
            "config_error": self._accepted.error,
            "pending_restart": host.reloads.pending,
            "stopping": host.stop_mode.name.lower() if host.stopping else None,
            "workers": len(self._registry.live),
            "slots": len(self._registry),
            "max_workers": len(host.table),
            "log": self._accepted.config.host.log.file,
            "log_lost": host.rotation.lost + sum(worker.slot.stats[t.LOG_LOST] for worker in self._registry),
        }

    def launch(self, args: dict[str, Any]) -> Any:
        """Launch a worker; with ``wait`` the answer comes when it is ready, or is an error."""
        try:
            spec = msgspec.convert(args.get("spec"), WorkerSpec)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter of half a surrogate pair in a key
            raise UsageError(f"no spec of a worker: {error}") from None
        # A text may be what somebody typed: it is then meant as those of "run --set" are.
        worker = self._host.launch(msgspec.structs.replace(spec, settings=conversion.typed(spec.settings)))
        self._registry.start(worker)

        def answer() -> dict[str, Any] | None:
            if self._registry.is_due(worker):
                return None  # others are forked first
            if args.get("wait"):
                if worker.state is State.STARTING:
                    return None
                if worker.state not in (State.READY, State.DONE):
                    why = worker.last_error
                    raise HostError(f"worker {worker.name} did not become ready", detail=why or str(worker.exit))
            return {
                "name": worker.name,
                "pid": worker.slot.control[t.PID] or None,
                "state": str(worker.state),
                "slot": worker.slot.index,
                "generation": worker.generation,
                "run_id": self._host.run_id,
            }

        return answer

    def stop(self, args: dict[str, Any]) -> Any:
        """Stop workers; answered when the last of them has ended, be it that somebody has started it again by then."""
        mode = _mode(args)
        workers = self._find(args)
        starts = {worker.name: worker.slot.control[t.STARTS] for worker in workers}
        self._host.each(workers, lambda worker: worker.stop(mode), urgent=mode >= StopMode.IMMEDIATE)

        def answer() -> dict[str, list[str]] | None:
            if any(
                worker.state not in policy.OVER and worker.slot.control[t.STARTS] == starts[worker.name]
                for worker in workers
            ):
                return None
            return {
                "stopped": [worker.name for worker in workers],
                "killed": [worker.name for worker in workers if worker.killed],
            }

        return answer

    def restart(self, args: dict[str, Any]) -> Any:
        """Stop workers and start them again; answered when each is ready, or over."""
        mode = _mode(args)
        # What the config has no longer comes back only where somebody says its very name.
        workers = [worker for worker in self._find(args) if not worker.leaving or worker.name in args.get("names", ())]
        before = {worker.name: worker.slot.control[t.STARTS] for worker in workers}
        self._host.each(workers, lambda worker: worker.restart(mode), urgent=mode >= StopMode.IMMEDIATE)

        def answer() -> list[dict[str, object]] | None:
            if self._host.giving_orders:
                return None
            for worker in workers:
                started = worker.slot.control[t.STARTS] > before[worker.name]
                if not started or worker.state in (State.STARTING, State.STOPPING):
                    if worker.state in policy.OVER and not worker.restart_asked:
                        continue
                    return None
            return [worker.row() for worker in workers]

        return answer

    def shutdown(self, args: dict[str, Any]) -> Any:
        """Stop everything; answered when the last worker has ended."""
        self._host.stop(_mode(args))
        return lambda: (
            None if self._registry.live else {"killed": [worker.name for worker in self._registry if worker.killed]}
        )

    def signal(self, args: dict[str, Any]) -> Any:
        """Send a signal to workers' processes, as anybody else would."""
        number = args.get("signal")
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 64:
            raise UsageError("signal is a number from 1 to 64")
        return {"signaled": [worker.name for worker in self._find(args) if worker.signal(number)]}

    def wake(self, args: dict[str, Any]) -> Any:
        """Set workers' latches."""
        workers = self._find(args)
        for worker in workers:
            if worker.is_program:
                raise UsageError(f"worker {worker.name} has become another program, which has no latch to be set")
        return {"woken": [worker.name for worker in workers if worker.handle.wake()]}

    def why(self, args: dict[str, Any]) -> Any:
        """Why workers are in the state that they are in, and how their last processes ended."""
        return [worker.why() for worker in self._find(args)]

    def dump(self, args: dict[str, Any]) -> Any:
        """Stacks and scopes; answered when each is there."""
        workers = [worker for worker in self._find(args) if worker.process is not None]
        for worker in workers:
            worker.ask_dump()
        return lambda: (
            {worker.name: worker.dump for worker in workers}
            if all(worker.dump or worker.process is None for worker in workers)
            else None
        )

    def reload(self, args: dict[str, Any]) -> Any:
        """Read the config again; answered when that is done, or with ``wait`` when the workers have taken it."""
        for name in ("dry_run", "wait", "rollback"):
            if not isinstance(args.get(name, False), bool):
                raise UsageError(f"{name} is true or false")
        within = args.get("within")
        if within is not None and not (isinstance(within, (int, float)) and 0 < within <= TIME_LIMIT):
            raise UsageError(f"within is a number of seconds above 0, at most {TIME_LIMIT:g}")
        reloads = self._host.reloads
        reload = reloads.ask(
            Reload(dry_run=args.get("dry_run", False), rollback=args.get("rollback", False), within=within)
        )

        def answer() -> dict[str, Any] | None:
            if reload.error is not None:
                raise reload.error
            if not reload.over:
                return None
            outcome = reloads.outcome(reload)
            if args.get("wait") and outcome.waits_for and not self._host.stopping:
                return None
            return {
                "config": reload.number,
                "dry_run": reload.dry_run,
                "start": reload.difference.start,
                "stop": reload.difference.stop,
                "restart": reload.difference.restart,
                "revive": reload.revive,
                "settings": reload.difference.settings,
                "pending_restart": reload.pending,
                "notes": reload.notes,
                "acknowledged": outcome.acknowledged,
                "failed": outcome.wrong,
            }

        return answer

    def wait(self, args: dict[str, Any]) -> Any:
        """Answered when the workers are started, ready, or stopped for good."""
        workers = self._find(args)
        event = args.get("for", "stopped")
        if event not in ("started", "ready", "stopped"):
            raise UsageError("a worker can be waited for until it is started, ready or stopped")
        if event == "ready" and not workers:
            raise HostError("the worker is over, and its slot has gone to another")
        if event == "stopped":
            return lambda: (
                [worker.row() for worker in workers] if all(worker.state in policy.OVER for worker in workers) else None
            )

        def answer() -> list[dict[str, object]] | None:
            for worker in workers:
                if event == "ready" and worker.state in (State.STOPPED, State.FAILED):
                    raise HostError(f"worker {worker.name} is {worker.state}", detail=worker.last_error)
            over = policy.OVER
            if event == "started":
                there = all(worker.slot.control[t.STARTS] or worker.state in over for worker in workers)
            else:
                there = all(worker.state in (State.READY, State.DONE) for worker in workers)
            return [worker.row() for worker in workers] if there else None

        return answer


def _is_handle(handle: object) -> bool:
    return (
        isinstance(handle, list)
        and len(handle) == 3
        and isinstance(handle[0], str)
        and all(isinstance(number, int) and not isinstance(number, bool) for number in handle[1:])
    )


def _mode(args: dict[str, Any]) -> StopMode:
    try:
        return _MODES[args.get("mode", "smart")]
    except (KeyError, TypeError):
        raise UsageError("a stop is smart, fast or immediate") from None

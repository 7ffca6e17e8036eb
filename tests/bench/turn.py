"""What a turn of the default loop costs, next to a bare pluggy call and to checks written by hand, in one process."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping

import pluggy

import bghost
from bghost.shared import hooks as loader
from bghost.shared.birth import Birth
from bghost.shared.plugins import KINDS, Found
from bghost.shared.table import Table
from bghost.worker import life
from bghost.worker.interrupts import Interrupts
from bghost.worker.worker import Worker

hookspec = pluggy.HookspecMarker("bench")
hookimpl = pluggy.HookimplMarker("bench")


class Specs:
    @hookspec(firstresult=True)
    def tick(self, worker: object) -> object:
        """As ``bghost_tick`` is."""


class Bare:
    @hookimpl
    def tick(self, worker: object) -> object:
        return 0.0


class Done(BaseException):
    """Ends the loop that is measured."""


class Ticker:
    """A kind whose tick does nothing, so many times."""

    left = 0

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker) -> float | None:
        self.left -= 1
        if self.left < 0:
            raise Done
        return 0.0


def make_worker(table: Table | None = None, slot: int = 0) -> Worker:
    """A worker in this very process, with everything but the fork and the signal handlers."""
    table = table or Table(1)
    found = Found("ticker", KINDS, "turn:Ticker", "bench", "1")
    hooks = loader.worker_hooks(found, Ticker, {}, report=lambda *_: None, drive=lambda coroutine: None)
    birth = Birth(
        spec=bghost.WorkerSpec(kind="ticker", name="ticker"),
        slot=slot,
        generation=1,
        table=table,
        instance="bench",
        socket="",
        notify_socket="",
        lock=-1,
        host_pid=os.getppid(),
        host_pidfd=os.pidfd_open(os.getppid()),
        bell=os.eventfd(0),
        kind=found,
        named=True,
        loaded=Ticker,
        extensions={},
        pools={},
    )
    worker: Worker = Worker(birth, Interrupts(birth, table.slot(slot)), hooks)
    worker.use_settings(bghost.Settings())
    return worker


def turns(worker: Worker, count: int) -> float:
    """Seconds of processor time for *count* turns of the default loop."""
    worker.hooks.kind_object.left = count
    began = time.process_time()
    try:
        life.default_loop(worker)
    except Done:
        return time.process_time() - began
    raise AssertionError("the loop has ended by itself")


def pluggy_calls(count: int) -> float:
    """Seconds for *count* bare calls of a hook with one implementation."""
    manager = pluggy.PluginManager("bench")
    manager.add_hookspecs(Specs)
    manager.register(Bare())
    worker = object()
    tick = manager.hook.tick
    began = time.process_time()
    for _ in range(count):
        tick(worker=worker)
    return time.process_time() - began


def by_hand(count: int) -> float:
    """Seconds for *count* turns with the few checks that a hand-written loop makes."""
    stop = reload = False
    tick = Bare().tick
    worker = object()
    began = time.process_time()
    for _ in range(count):
        if stop:
            break
        if reload:
            reload = False
        try:
            tick(worker)
        except Exception:
            pass
    return time.process_time() - began


def measure(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a turn, interleaved round by round: median, 10th and 90th percentile."""
    worker = make_worker()
    subjects: Mapping[str, Callable[[int], float]] = {
        "bghost turn": lambda n: turns(worker, n),
        "bare pluggy call": pluggy_calls,
        "checks by hand": by_hand,
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            times[name].append(subject(count) / count * 1e6)
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(values * 2 if len(values) < 2 else values, n=10, method="inclusive")
    return {"p10": deciles[0], "median": statistics.median(values), "p90": deciles[-1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="turns a round")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.rounds), indent=2))

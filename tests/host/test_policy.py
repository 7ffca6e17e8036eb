"""The host's pure parts: delays, the table of transitions, the order of ``after``, timers.

What follows an exit is tested with the ends of workers, in tests/runtime/test_exits.py.
"""

import ast
import inspect
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bghost import State, WorkerSpec
from bghost.host import order, workers
from bghost.host.policy import JITTER, LIVE, OVER, TRANSITIONS, UNHEALTHY_LIMIT, Event, Exit, decide, delay, drawing
from bghost.host.timers import Timers
from bghost.shared.errors import ConfigError

specs = st.builds(
    WorkerSpec,
    kind=st.just("kind"),
    restart=st.sampled_from(["on-failure", "always", "never"]),
    restart_after=st.floats(0, 100),
    restart_max=st.floats(0, 1000),
)


# Delays


@given(specs, st.integers(0, UNHEALTHY_LIMIT))
def test_a_delay_doubles_up_to_its_limit(spec: WorkerSpec, unhealthy: int) -> None:
    """Never shorter than restart_after, never longer than restart_max unless restart_after is, and it never falls."""
    this, next = delay(spec, unhealthy), delay(spec, unhealthy + 1)
    most = max(spec.restart_max, spec.restart_after)
    assert spec.restart_after <= this <= next <= most
    assert next in (this, most, pytest.approx(2 * this))
    assert delay(spec, 0) == delay(spec, 1) == spec.restart_after


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60), st.randoms())
def test_the_delays_of_one_worker_never_touch_those_of_another(
    ends: list[tuple[int, bool]], rng: random.Random
) -> None:
    """Each of four workers, failing at random, is delayed as if it were alone."""
    spec = WorkerSpec(kind="kind")

    def run(which: int | None) -> dict[int, list[tuple[Event, float]]]:
        runs: dict[int, int] = {}
        found: dict[int, list[tuple[Event, float]]] = {}
        for worker, healthy in ends:
            if which in (None, worker) and runs.get(worker, 0) < UNHEALTHY_LIMIT:
                exit = Exit(1, orderly=True, ready_for=20.0 if healthy else 0.0)
                decision = decide(spec, exit, stop_asked=False, unhealthy=runs.get(worker, 0), chance=0.5)
                runs[worker] = decision.unhealthy
                found.setdefault(worker, []).append((decision.event, decision.delay))
        return found

    together = run(None)
    assert all(run(worker)[worker] == together[worker] for worker in together)


@given(specs, st.integers(0, UNHEALTHY_LIMIT - 2), st.floats(0, 1))
def test_a_worker_that_another_ones_crash_has_ended_is_back_at_once(
    spec: WorkerSpec, unhealthy: int, chance: float
) -> None:
    """Its own count of unhealthy runs stays; one that is never restarted is gone; a stop that was asked for holds."""
    exit = Exit(2, orderly=False)
    decision = decide(spec, exit, stop_asked=False, unhealthy=unhealthy, chance=chance, recycled=True)
    if spec.restart == "never":
        assert decision.event is Event.STOPPED
    else:
        assert (decision.event, decision.delay, decision.unhealthy) == (Event.RETRY, 0.0, unhealthy)
    stopped = decide(spec, exit, stop_asked=True, unhealthy=unhealthy, chance=chance, recycled=True)
    assert stopped.event is Event.STOPPED


@given(specs, st.integers(0, UNHEALTHY_LIMIT - 2))
def test_jitter_is_from_1_0_to_1_2_of_the_delay(spec: WorkerSpec, unhealthy: int) -> None:
    """Both ends are reached, and nothing beyond."""

    def after(chance: float) -> float:
        exit = Exit(3, orderly=True)
        return decide(
            WorkerSpec(kind="kind", restart_after=spec.restart_after, restart_max=spec.restart_max),
            exit,
            stop_asked=False,
            unhealthy=unhealthy,
            chance=chance,
        ).delay

    least = delay(spec, unhealthy + 1)
    assert after(0.0) == least
    assert after(1.0) == pytest.approx(least * (1 + JITTER)) == pytest.approx(1.2 * least)
    assert least <= after(0.5) <= 1.2 * least


# Transitions


def _pairs_of_the_code() -> set[tuple[State, Event]]:
    """Every (state, event) that the decisions can bring about, told from their own logic."""
    ended = {Event.DONE, Event.RETRY, Event.FAILED}
    pairs = {(state, event) for state in (State.STARTING, State.READY) for event in ended}
    pairs |= {(State.STARTING, Event.READY), (State.STARTING, Event.STOP), (State.READY, Event.STOP)}
    pairs |= {(State.STOPPING, Event.STOPPED), (State.STOPPING, Event.FAILED)}
    pairs |= {(State.BACKOFF, Event.START), (State.BACKOFF, Event.STOPPED)}
    return pairs | {(state, Event.START) for state in OVER}


def test_the_table_holds_each_pair_that_can_come_about_and_no_other() -> None:
    """A pair that is missing would be an error in the host's loop; one too many would say what never happens."""
    assert set(TRANSITIONS) == _pairs_of_the_code()
    assert {state for state, event in TRANSITIONS if event is Event.START} == OVER | {State.BACKOFF}
    for (before, event), after in TRANSITIONS.items():
        assert before is not after
        if event in (Event.DONE, Event.STOPPED, Event.FAILED):
            assert after in OVER
        if event is Event.RETRY:
            assert after is State.BACKOFF and before in LIVE


def test_the_drawing_in_the_docs_is_that_of_the_table() -> None:
    """Nobody draws it by hand."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    assert f"```mermaid\n{drawing()}\n```\n" in (docs / "operations.md").read_text()


def test_states_change_in_one_place_only() -> None:
    """Every change of a registration's state is an event of the table; only its birth sets a state outright."""
    tree = ast.parse(inspect.getsource(workers))
    sets = [
        (function.name, ast.unparse(call.args[0]))
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self._set"
    ]
    assert sets == [("__init__", "State.STARTING"), ("_happened", "policy.TRANSITIONS[self.state, event]")]


# Order

words = st.sampled_from(["a", "b", "c", "d", "e"])
graphs = st.dictionaries(words, st.lists(words, max_size=3), max_size=5)


def _has_cycle(after: dict[str, list[str]]) -> bool:
    left = dict(after)
    while free := [name for name, wanted in left.items() if not any(other in left for other in wanted)]:
        for name in free:
            del left[name]
    return bool(left)


@given(graphs)
def test_an_order_is_refused_exactly_when_it_cannot_be_kept(after: dict[str, list[str]]) -> None:
    """That is when it names nobody, or when workers wait for each other."""
    unknown = {wanted for names in after.values() for wanted in names} - after.keys()
    try:
        order.check(after)
    except ConfigError as error:
        assert unknown or _has_cycle(after), error
    else:
        assert not unknown and not _has_cycle(after)


def test_a_cycle_is_written_out() -> None:
    """Who waits for whom can be read from the message; a worker may not wait for itself either."""
    with pytest.raises(ConfigError, match="b after c after d after b"):
        order.check({"a": ["b"], "b": ["c"], "c": ["d"], "d": ["b"]})
    with pytest.raises(ConfigError, match="a after a"):
        order.check({"a": ["a"]})
    with pytest.raises(ConfigError, match="after 'cuonter', which there is not") as found:
        order.check({"counter": [], "b": ["cuonter"]})
    assert "counter" in str(found.value.hint)


def test_a_long_chain_is_no_cycle() -> None:
    """Nor does its length matter."""
    order.check({f"w{number}": [f"w{number + 1}"] for number in range(800)} | {"w800": []})
    wide = {f"w.{number}": ["base"] for number in range(1000)}
    order.check({"base": [], **wide, "last": ["w"]})


def test_a_name_means_its_worker_or_all_that_are_numbered_after_it() -> None:
    """The worker that is called so goes first; only numbers make a group."""
    names = ["counter.1", "counter.2", "counter.x", "count", "feed"]
    assert order.meant("counter", names) == ["counter.1", "counter.2"]
    assert order.meant("counter.1", names) == ["counter.1"]
    assert order.meant("counter", [*names, "counter"]) == ["counter"]
    assert order.meant("cou", names) == []
    with pytest.raises(ConfigError, match=r"counter\.1 after counter\.1"):
        order.check({"counter.1": ["counter"], "counter.2": []})


# Timers


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=30), st.lists(st.floats(0, 120), max_size=10))
def test_timers_run_once_each_in_their_order_and_never_early(
    timers: list[tuple[float, bool]], looks: list[float]
) -> None:
    """Those that were called off do not run."""
    heap = Timers()
    ran: list[tuple[float, int]] = []
    made = [
        heap.at(when, lambda when=when, number=number: ran.append((when, number)))  # type: ignore[misc]
        for number, (when, _) in enumerate(timers)
    ]
    for timer, (_, canceled) in zip(made, timers, strict=True):
        if canceled:
            timer.cancel()
            timer.cancel()
    for now in sorted(looks):
        heap.run(now)
        wanted = sorted((when, n) for n, (when, canceled) in enumerate(timers) if not canceled and when <= now)
        assert sorted(ran) == wanted
        left = [when for when, canceled in timers if not canceled and when > now]
        assert heap.next() == (min(left) if left else None)
    assert [when for when, _ in ran] == sorted(when for when, _ in ran)


def test_a_timer_that_a_timer_sets_runs_the_next_time() -> None:
    """A delay of 0 does not keep the loop in its timers."""
    heap = Timers()
    ran = []

    def again() -> None:
        ran.append(1)
        heap.at(0.0, again)

    heap.at(1.0, again)
    heap.run(1.0)
    assert len(ran) == 1
    heap.run(1.0)
    assert len(ran) == 2


def test_a_timer_can_be_called_off_by_one_that_runs_before_it() -> None:
    """Also when both are due at once."""
    heap = Timers()
    ran = []
    second = heap.at(2.0, lambda: ran.append("second"))
    heap.at(1.0, second.cancel)
    heap.run(3.0)
    assert ran == [] and heap.next() is None


def test_a_timer_that_fails_takes_no_other_with_it() -> None:
    """The rest is due still: a stop keeps its deadlines, whatever went wrong before them."""
    heap = Timers()
    ran = []
    heap.at(1.0, lambda: (_ for _ in ()).throw(ZeroDivisionError))
    heap.at(2.0, lambda: ran.append("second"))
    with pytest.raises(ZeroDivisionError):
        heap.run(3.0)
    assert heap.next() == 2.0
    heap.run(3.0)
    assert ran == ["second"]

"""How workers end, what follows each end, and what `bghost run` makes of it."""

import re
import signal

from hypothesis import given
from hypothesis import strategies as st
from support import Host, Sandbox, StartHost, notes

from bghost import State, WorkerSpec
from bghost.host.policy import HEALTHY_AFTER, LIVE, OVER, TRANSITIONS, UNHEALTHY_LIMIT, Event, Exit, decide

LEAVER = """
import os, signal, sys, time, bghost

class Kind:
    @bghost.hookimpl
    def bghost_setup(self, worker):
        worker.log.info("note: starts at {:.3f}", time.monotonic())

    @bghost.hookimpl
    def bghost_tick(self, worker):
        how = worker.args["how"]
        seen = f"{worker.name}.seen"  # in the host's working directory, the test's own
        if how != "always" and os.path.exists(seen):
            worker.log.info("note: is back")
            return bghost.UNTIL_WOKEN
        open(seen, "w").close()
        worker.log.info("note: ends at {:.3f}", time.monotonic())
        if how == "exits with 0":
            sys.exit()
        if how == "exits with 3":
            sys.exit(3)
        if how == "bypasses bghost":
            os._exit(0)
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "is terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "quits":
            os.kill(os.getpid(), signal.SIGQUIT)
        if how == "gives up":
            raise bghost.GiveUp("enough")
        if how == "always":
            if os.path.exists(f"{worker.name}.again"):
                return bghost.UNTIL_WOKEN
            open(f"{worker.name}.again", "w").close()
            sys.exit(0)
        if how in ("restarts", "stops itself"):
            raise ValueError(how)
        return 0

    @bghost.hookimpl
    def bghost_recover(self, worker, error):
        return bghost.Recovery.RESTART if worker.args["how"] == "restarts" else bghost.Recovery.STOP
"""

ENDS = {
    "exits with 0": ("done", "exit code 0", 1),
    "stops itself": ("done", "exit code 0", 1),
    "gives up": ("failed", "exit code 1", 1),
    "exits with 3": ("ready", "exit code 3", 2),
    "bypasses bghost": ("ready", "exit code 0, bypassing bghost", 2),
    "is killed": ("ready", "killed by SIGKILL", 2),
    "is terminated": ("ready", "exit code 1", 2),
    "quits": ("ready", "exit code 2, bypassing bghost", 2),
    "restarts": ("ready", "exit code 1", 2),
    "always": ("ready", "exit code 0", 2),
}
"""How it ends: the state that follows, how the exit is shown, and how often it has been started."""


def test_what_follows_each_way_to_end(bghost_host: StartHost) -> None:
    """Who is done or gives up stays so; everybody else comes back, after restart_after and a fifth of it at most."""
    names = {how: how.replace(" ", "-") for how in ENDS}
    config = "".join(
        f"[[worker]]\nkind = 'leaver'\nname = '{name}'\nrestart_after = 0.5\nargs.how = '{how}'\n"
        + ("restart = 'always'\n" if how == "always" else "")
        for how, name in names.items()
    )
    host = bghost_host(kinds={"leaver": LEAVER}, args=["run"], config=config)
    for how, name in names.items():
        state, exit, starts = ENDS[how]
        row = host.wait_row(name, lambda row, wanted=(state, starts): (row["state"], row["starts"]) == wanted)  # type: ignore[misc]
        assert (row["exit"], row["restarts"]) == (exit, starts - 1), how
        if starts == 2:
            times = [float(text.rpartition(" ")[2]) for text in notes(host, name) if " at " in text]
            assert times[2] - times[1] >= 0.5, (how, times)
            assert re.search(rf"\[{name}\] .*; started again in 0\.[56] s", host.text()), how
    assert host.row("gives-up")["last_error"] == "gave up: enough"
    assert host.client.shutdown() == {"killed": []}
    assert host.wait() == 0


def test_a_worker_that_was_stopped_stays_stopped(bghost_host: StartHost) -> None:
    """bghost stop ends it with 0, for good, also over a reload; one that waits to be started again, at once."""
    sleeper = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            if worker.args:
                raise bghost.GiveUp(worker.args["why"]) if worker.args["why"] == "over" else SystemExit(1)
            return bghost.UNTIL_WOKEN
    """
    config = "[[worker]]\nkind = 'sleeper'\ncount = 2\n"
    config += "[[worker]]\nkind = 'sleeper'\nname = 'late'\nrestart_after = 60\nargs.why = 'later'\n"
    host = bghost_host(kinds={"sleeper": sleeper}, args=["run"], config=config)
    host.client.wait("sleeper")
    host.wait_row("late", lambda row: row["state"] == "backoff")
    assert host.client.stop("sleeper.1", "late") == {"stopped": ["sleeper.1", "late"], "killed": []}
    host.client.reload()
    assert host.client.stop("sleeper.1") == {"stopped": ["sleeper.1"], "killed": []}  # it is, already
    rows = {row["name"]: (row["state"], row["exit"], row["starts"]) for row in host.client.ps()}
    assert rows == {
        "sleeper.1": ("stopped", "exit code 0", 1),
        "sleeper.2": ("ready", None, 1),
        "late": ("stopped", "exit code 1", 1),
    }


RUNNER = """
import os, sys, bghost

class Kind:
    @classmethod
    @bghost.hookimpl
    def bghost_workers(cls, settings):
        if "RESTART" in os.environ:
            return [bghost.WorkerSpec(kind="runner", restart=os.environ["RESTART"], restart_after=0.001)]

    @bghost.hookimpl
    def bghost_main(self, worker):
        eval(os.environ["DO"])
        for _ in worker.mainloop():
            worker.log.info("note: waits")
            worker.wait()
"""


def _run(sandbox: Sandbox, name: str, do: str, restart: str = "on-failure") -> Host:
    return sandbox.start_host("run", "runner", env={"BGHOST_INSTANCE": name, "DO": do, "RESTART": restart})


def test_the_exit_code_of_run(sandbox: Sandbox) -> None:
    """0 when every worker ended with 0, or a stop was asked for; 1 when one has failed for good."""
    sandbox.kinds({"runner": RUNNER})
    crash_once = "os.path.exists('seen') and sys.exit() or (open('seen', 'w').close(), os._exit(0))"
    hosts = {
        "done": (_run(sandbox, "done", "sys.exit()"), 0),
        "error": (_run(sandbox, "error", "sys.exit(3)", "never"), 1),
        "give_up": (_run(sandbox, "give_up", "(_ for _ in ()).throw(bghost.GiveUp('enough'))"), 1),
        "unhealthy": (_run(sandbox, "unhealthy", "1 / 0"), 1),
        "bypassing": (_run(sandbox, "bypassing", "os._exit(0)", "never"), 1),
        "crash": (_run(sandbox, "crash", crash_once), 0),
        "stopped": (_run(sandbox, "stopped", "None"), 0),
        "terminated": (_run(sandbox, "terminated", "None"), 0),
        "interrupted": (_run(sandbox, "interrupted", "None"), 0),
        "quit": (_run(sandbox, "quit", "None"), 0),
    }
    signals = {"terminated": signal.SIGTERM, "interrupted": signal.SIGINT, "quit": signal.SIGQUIT}
    for name in ("stopped", *signals):
        hosts[name][0].wait_line("note: waits")
        if name in signals:
            hosts[name][0].signal(signals[name])
        else:
            hosts[name][0].client.stop("runner")
    codes = {name: host.wait(20) for name, (host, _) in hosts.items()}
    assert codes == {name: code for name, (_, code) in hosts.items()}
    # ten runs that were not healthy, one after the other, are enough
    assert hosts["unhealthy"][0].text().count("[runner] started") == UNHEALTHY_LIMIT == 10
    assert "exit code 1; failed, not started again" in hosts["unhealthy"][0].text()
    assert hosts["crash"][0].text().count("[runner] started") == 2


# Policy: what becomes of a worker, as plain functions

exits = st.builds(
    Exit,
    status=st.sampled_from([0, 1, 2, 3, 70, 255, -9, -15, -11]),
    orderly=st.booleans(),
    gave_up=st.booleans(),
    terminated=st.booleans(),
    ready_for=st.one_of(st.just(0.0), st.floats(0, 1000)),
)
specs = st.builds(
    WorkerSpec,
    kind=st.just("kind"),
    restart=st.sampled_from(["on-failure", "always", "never"]),
    restart_after=st.floats(0.001, 100),
    restart_max=st.floats(0.001, 1000),
)
chances = st.floats(0, 1, exclude_max=True)


@given(specs, st.lists(st.tuples(exits, chances), min_size=1, max_size=40))
def test_restarts_follow_the_policy(spec: WorkerSpec, ends: list[tuple[Exit, float]]) -> None:
    """Never more restarts than allowed, never a shorter delay, jitter between 1.0 and 1.2, whatever the exits."""
    unhealthy = 0  # the model: runs in a row that ended before they were healthy, and not by a SIGTERM from elsewhere
    for exit, chance in ends:
        decision = decide(spec, exit, stop_asked=False, unhealthy=unhealthy, chance=chance)
        if exit.ready_for >= HEALTHY_AFTER:
            unhealthy = 0
        elif not exit.terminated:
            unhealthy += 1
        if exit.gave_up:
            assert decision.event is Event.FAILED
            return
        if exit.status == 0 and exit.orderly and spec.restart != "always":
            assert decision.event is Event.DONE
            return
        if spec.restart == "never" or unhealthy >= UNHEALTHY_LIMIT:
            assert decision.event is Event.FAILED
            return
        assert (decision.event, decision.unhealthy) == (Event.RETRY, unhealthy)
        least = spec.restart_after
        for _ in range(unhealthy - 1):
            least = min(2 * least, max(spec.restart_max, spec.restart_after))
        assert least <= decision.delay <= 1.2 * least * (1 + 1e-9)


@given(specs, exits, chances, st.integers(0, UNHEALTHY_LIMIT))
def test_a_stop_through_bghost_is_final(spec: WorkerSpec, exit: Exit, chance: float, unhealthy: int) -> None:
    """However a worker ends that was asked to stop, it is stopped, and no restart is due."""
    decision = decide(spec, exit, stop_asked=True, unhealthy=unhealthy, chance=chance)
    assert decision.event is Event.STOPPED


def test_states_and_transitions() -> None:
    """Each state is reached from the first, each that is not over can be stopped, what is over begins only anew."""
    reached, new = set(), {State.STARTING}
    while new:
        reached |= new
        new = {after for (before, _), after in TRANSITIONS.items() if before in new} - reached
    assert reached == set(State)
    assert {event for state, event in TRANSITIONS if state in OVER} == {Event.START}
    for state in State:
        if state not in OVER and state is not State.STOPPING:
            stops = (state, Event.STOP) in TRANSITIONS or (state, Event.STOPPED) in TRANSITIONS
            assert stops, f"{state} cannot be stopped"
    assert LIVE | OVER | {State.BACKOFF} == set(State)
    assert not LIVE & OVER


@given(st.integers(-64, 255), st.booleans())
def test_an_exit_is_told_in_words(status: int, orderly: bool) -> None:
    """A signal by its name, a code by its number, and whether the process left by bghost's own way."""
    text = str(Exit(status, orderly))
    if status >= 0:
        assert text == f"exit code {status}" + ("" if orderly else ", bypassing bghost")
    elif -status in {each.value for each in signal.Signals}:
        assert text == f"killed by {signal.Signals(-status).name}"
    else:
        assert text == f"killed by signal {-status}"
    assert Exit(status, orderly).crash == (status not in (0, 1) or not orderly)

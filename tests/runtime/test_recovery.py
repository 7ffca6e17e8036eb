"""Error recovery: its order, what an error or a signal at each step of it leads to, and how long it waits."""

import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SLOW, Host, StartHost, notes

from bghost.worker.recovery import DELAY_MAX, FORGOTTEN_AFTER, RepeatedErrors, delay


def workers_of(kind: str, names: Iterable[str], more: str = "") -> str:
    """The config of one worker for each case, named w1, w2, ..., with the case as its args."""
    return "".join(
        f"[[worker]]\nkind = '{kind}'\nname = 'w{number}'\nargs = {{ how = '{how}' }}\n{more}\n"
        for number, how in enumerate(names, 1)
    )


def records(host: Host, worker: str) -> list[str]:
    """The log records of one worker, each with its traceback."""
    found = re.findall(r"^\S+ \S+ (\w+ +\[(?:\S+)\] .*(?:\n\t.*)*)", host.text("stderr"), re.MULTILINE)
    return [re.sub(r"\[\S+\] ", "", text, count=1) for text in found if f"[{worker}]" in text.split("\n")[0]]


STEPS = """
import os, signal, bghost

class Settings(bghost.Settings):
    round: int = 1

class Conflict(Exception):
    sqlstate = "40001"  # recovered from without a delay to speak of

class Kind:
    Settings = Settings
    rounds = 0

    def at(self, step):
        self.note("note: {}", step)
        where, what = self.how.split(": ")
        if where == step:
            if what == "error":
                raise TypeError(f"at {step}")
            if what in ("INT", "TERM"):
                os.kill(os.getpid(), signal.Signals["SIG" + what])

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.how = worker.args["how"]
        self.note = worker.log.info
        worker.enlist(self)
        worker.on_exit(lambda: self.at("on_exit"))

    def left_open(self):
        return None

    def roll_back(self, timeout):
        self.at("roll back")

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        if self.rounds == 1:
            return bghost.UNTIL_WOKEN  # until the reload
        if self.rounds == 3:
            raise SystemExit
        worker.scope.callback(self.at, "scope")
        self.at("tick")
        raise Conflict("of the tick")

    @bghost.hookimpl
    def bghost_reload(self, worker):
        self.at("reload")

    @bghost.hookimpl
    def bghost_recover(self, worker, error):
        self.at("recover")
        if self.how == "recover: nonsense":
            return "continue"

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        self.note("note: {}", reason)
        self.at("cleanup")
"""

RECOVERY = ["roll back", "scope", "recover"]
LEAVE = ["roll back"]
OUT = ["cleanup", "on_exit"]
FINE = (["reload", "tick", *RECOVERY, *LEAVE, "done", *OUT], "done", "exit code 0")
OUTCOMES: dict[str, tuple[list[str], str, str]] = {
    "nowhere: nothing": FINE,
    # Errors. One of a reload is recovered like one of a tick; one in recovery ends the worker.
    "reload: error": (
        ["reload", "roll back", "recover", "tick", *RECOVERY, *LEAVE, "done", *OUT],
        "done",
        "exit code 0",
    ),
    "tick: error": FINE,
    "roll back: error": (["reload", "tick", "roll back", *LEAVE, "scope", "error", *OUT], "failed", "exit code 1"),
    "scope: error": (["reload", "tick", "roll back", "scope", *LEAVE, "error", *OUT], "failed", "exit code 1"),
    "recover: error": (["reload", "tick", *RECOVERY, *LEAVE, "error", *OUT], "failed", "exit code 1"),
    "recover: nonsense": (["reload", "tick", *RECOVERY, *LEAVE, "error", *OUT], "failed", "exit code 1"),
    "cleanup: error": (FINE[0], "failed", "exit code 1"),
    "on_exit: error": (FINE[0], "failed", "exit code 1"),
    # A cancel finds nothing that it could cancel.
    "reload: INT": FINE,
    "tick: INT": FINE,
    "roll back: INT": FINE,
    "scope: INT": FINE,
    "recover: INT": FINE,
    "cleanup: INT": FINE,
    "on_exit: INT": FINE,
    # A stop lets the reload hook or the recovery come to its end, and no more.
    "reload: TERM": (["reload", *LEAVE, "stop", *OUT], "failed", "exit code 1"),
    "tick: TERM": (["reload", "tick", *RECOVERY, *LEAVE, "stop", *OUT], "failed", "exit code 1"),
    "roll back: TERM": (["reload", "tick", *RECOVERY, *LEAVE, "stop", *OUT], "failed", "exit code 1"),
    "scope: TERM": (["reload", "tick", *RECOVERY, *LEAVE, "stop", *OUT], "failed", "exit code 1"),
    "recover: TERM": (["reload", "tick", *RECOVERY, *LEAVE, "stop", *OUT], "failed", "exit code 1"),
    "cleanup: TERM": FINE,
    "on_exit: TERM": FINE,
}
"""Step and what happens at it: the steps that run, the state and the exit of a worker that is not restarted."""


def test_an_error_a_cancel_and_a_stop_at_each_step(bghost_host: StartHost) -> None:
    """Recovery runs in its order; an error in it ends the worker with 1, a cancel in it is dropped, a stop waits."""
    host = bghost_host(kinds={"steps": STEPS}, args=["run"], config=workers_of("steps", OUTCOMES, "restart = 'never'"))
    names = {how: f"w{number}" for number, how in enumerate(OUTCOMES, 1)}
    host.client.wait("all")
    for name in names.values():
        host.wait_row(name, lambda row: row["ticks"] == 1)  # one that has not ticked takes the reload before it does
    host.sandbox.config(host.sandbox.config_file.read_text() + "[kind.steps]\nround = 2\n")
    host.client.reload()
    rows = {row["name"]: row for row in host.client.wait("all", until="stopped", timeout=20 * SLOW)}
    host.client.shutdown()
    assert host.wait() == 0
    assert {
        how: (notes(host, name), rows[name]["state"], rows[name]["exit"]) for how, name in names.items()
    } == OUTCOMES
    for step in ("roll back", "scope", "recover"):
        (record,) = (text for text in records(host, names[f"{step}: error"]) if "while another was being rec" in text)
        assert "Conflict: of the tick" in record, "the first cause is missing"
        assert f"TypeError: at {step}" in record, "the second cause is missing"
    (record,) = (text for text in records(host, names["recover: nonsense"]) if "while another was" in text)
    assert "bghost_recover returned 'continue', not a bghost.Recovery" in record


GIVING_UP = """
import bghost

class Settings(bghost.Settings):
    round: int = 1

class Kind:
    Settings = Settings

    def at(self, hook):
        if self.how == hook:
            raise bghost.GiveUp(f"enough of {hook}")

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.how = worker.args["how"]
        self.at("setup")

    @bghost.hookimpl
    def bghost_tick(self, worker):
        if worker.settings.round == 1:
            return bghost.UNTIL_WOKEN
        self.at("tick")
        if self.how == "recover":
            raise ValueError
        raise SystemExit

    @bghost.hookimpl
    def bghost_reload(self, worker):
        self.at("reload")

    @bghost.hookimpl
    def bghost_recover(self, worker):
        self.at("recover")

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        worker.log.info("note: {}", reason)
        self.at("cleanup")
"""


def test_give_up_in_any_hook(bghost_host: StartHost) -> None:
    """The worker is failed at once, exit code 1, with the reason shown, and is not restarted; cleanup runs."""
    hooks = {"setup": "give_up", "tick": "give_up", "reload": "give_up", "recover": "give_up", "cleanup": "done"}
    host = bghost_host(kinds={"quitter": GIVING_UP}, args=["run"], config=workers_of("quitter", hooks))
    for number in range(2, len(hooks) + 1):
        host.client.wait(f"w{number}")
    host.wait_row("w1", lambda row: row["state"] == "failed")
    host.sandbox.config(host.sandbox.config_file.read_text() + "[kind.quitter]\nround = 2\n")
    host.client.reload()
    rows = host.client.wait("all", until="stopped", timeout=20 * SLOW)
    host.client.shutdown()
    assert host.wait() == 0
    for (hook, reason), row in zip(hooks.items(), rows, strict=True):
        starts = 2 if hook == "setup" else 1  # it had failed before the reload, which revives what has failed
        assert (row["state"], row["exit"], row["starts"]) == ("failed", "exit code 1", starts), hook
        assert row["last_error"] == f"gave up: enough of {hook}"
        assert notes(host, row["name"]) == [reason] * starts, hook


def test_frames_of_a_failed_tick_are_let_go(bghost_host: StartHost) -> None:
    """No local of a failing tick lives on, without the help of the garbage collector, also of causes and groups."""
    keeper = """
    import gc, weakref, bghost

    class Local:
        pass

    def plain(refs):
        local = Local()
        refs.append(weakref.ref(local))
        raise ValueError("plain")

    def chained(refs):
        local = Local()
        refs.append(weakref.ref(local))
        try:
            plain(refs)
        except ValueError as error:
            raise TypeError("chained") from error

    def grouped(refs):
        errors = []
        for function in (plain, chained):
            try:
                function(refs)
            except Exception as error:
                errors.append(error)
        raise ExceptionGroup("grouped", errors)

    def generated(refs):
        def generator():
            local = Local()
            refs.append(weakref.ref(local))
            yield
            plain(refs)
        for _ in generator():
            pass

    class Conflict(Exception):
        sqlstate = "40001"

    class Kind:
        def __init__(self):
            gc.disable()
            self.failing = [plain, chained, grouped, generated]
            self.kept = []
            self.refs = []

        @bghost.hookimpl
        def bghost_tick(self, worker):
            alive = sum(ref() is not None for ref in self.refs)
            if self.refs:
                worker.log.info("note: {} of {} are alive", alive, len(self.refs))
                self.refs.clear()
            if not self.failing:
                raise SystemExit
            try:
                self.failing.pop(0)(self.refs)
            except Exception as error:
                raise Conflict from error

        @bghost.hookimpl
        def bghost_recover(self, worker, error):
            self.kept.append(error)
    """
    watcher = """
    import bghost

    class Extension:
        @bghost.hookimpl(wrapper=True)
        def bghost_tick(self, worker):
            return (yield)
    """
    host = bghost_host(
        kinds={"keeper": keeper}, extensions={"watcher": watcher}, args=["run", "keeper"], answering=False
    )
    assert host.wait() == 0
    assert notes(host, "keeper") == [f"0 of {count} are alive" for count in (1, 2, 3, 2)]


def test_repeated_errors_are_told_once_and_then_counted(bghost_host: StartHost) -> None:
    """The same error is logged in full once, then as a line with its count at growing intervals."""
    moaner = """
    import bghost

    class Unspeakable(Exception):
        def __str__(self):
            raise ValueError

    class Conflict(Exception):
        sqlstate = "40P01"

    class Kind:
        @bghost.hookimpl
        def bghost_main(self, worker):
            errors = [ValueError("same")] * 20 + [KeyError("other"), ValueError("same"), Unspeakable()]
            errors += [Conflict("dead\\nlock")] * 3
            turns = iter(errors)
            for _ in worker.mainloop():
                error = next(turns, None)
                if error is None:
                    return
                with worker.recovery():
                    with worker.activity("moaning"):
                        raise error
                worker.block.delay = 0.0  # nobody has the time for twenty of them
    """
    host = bghost_host(kinds={"moaner": moaner}, args=["run", "moaner"], answering=False)
    assert host.wait() == 0
    told = [text for text in records(host, "moaner") if not text.startswith("INFO")]
    assert [text.split("\n")[0].split(maxsplit=1) for text in told] == [
        ["ERROR", "ValueError: same, during: moaning"],
        *(["ERROR", f"ValueError: same, during: moaning ({count} times by now)"] for count in (2, 4, 8, 16)),
        ["ERROR", "KeyError: 'other', during: moaning"],
        ["ERROR", "ValueError: same, during: moaning"],
        ["ERROR", "Unspeakable: <no text, its __str__ fails>, during: moaning"],
        ["WARNING", "Conflict: dead\\nlock (SQLSTATE 40P01), during: moaning"],
        ["WARNING", "Conflict: dead\\nlock (SQLSTATE 40P01), during: moaning (2 times by now)"],
    ]
    assert ["Traceback" in text for text in told] == [True, *[False] * 4, *[True] * 3, *[False] * 2]


def test_an_error_that_is_long_past_is_told_in_full_again() -> None:
    """The count of an error starts anew after a long time without it, after another one, and at another place."""
    repeated = RepeatedErrors()
    assert [repeated.count(ValueError("a"), now) for now in (0.0, 600.0, 1200.0)] == [1, 2, 3]
    assert repeated.count(ValueError("a"), 1200.0 + FORGOTTEN_AFTER + 1) == 1
    assert repeated.count(ValueError("b"), 1801.0) == 1
    assert repeated.count(TypeError("b"), 1801.0) == 1
    errors = []
    for _ in range(2):
        try:
            raise TypeError("b")
        except TypeError as error:
            errors.append(error)
    try:
        raise TypeError("b")
    except TypeError as error:
        errors.append(error)
    assert [repeated.count(error, 1801.0) for error in errors] == [1, 2, 1]


@given(st.integers(1, 10**6), st.booleans())
def test_delays_double_up_to_a_minute(failures: int, conflict: bool) -> None:
    """The delay begins at a second, or 10 ms after a conflict, doubles with each further error, and stays at 60 s."""
    assert delay(1, conflict=conflict) == (0.01 if conflict else 1.0)
    assert delay(failures + 1, conflict=conflict) == min(2 * delay(failures, conflict=conflict), DELAY_MAX)
    assert delay(10**6, conflict=conflict) == DELAY_MAX == 60.0


def test_the_delay_is_slept(bghost_host: StartHost) -> None:
    """1, 2, 4 s after errors that follow each other, whatever wakes the worker, also in a loop of the author's own that
    does not wait; 1 s again after a good tick."""
    failing = """
    import time, bghost

    class Conflict(Exception):
        sqlstate = "40001"

    class Kind:
        rounds = 0
        last = None

        def round(self, worker):
            now = time.monotonic()
            if self.last is not None:
                worker.log.info("note: {:.3f}", now - self.last)
            self.last = now
            self.rounds += 1
            worker.wake()
            if self.rounds == 4:
                return 0
            if self.rounds == 6:
                raise SystemExit
            raise Conflict if worker.args["how"] == "conflict" else ValueError

        @bghost.hookimpl
        def bghost_recover(self, worker):
            worker.log.info("note: delay {}", worker.block.delay)
    """
    default_loop = """
        @bghost.hookimpl
        def bghost_tick(self, worker):
            return self.round(worker)
    """
    own_loop = """
        @bghost.hookimpl
        def bghost_main(self, worker):
            for _ in worker.mainloop():
                with worker.recovery():
                    self.round(worker)
    """
    host = bghost_host(
        kinds={"failing": failing + default_loop, "spinning": failing + own_loop},
        args=["run"],
        config="".join(
            f"[[worker]]\nkind = '{kind}'\nname = '{kind}-{how}'\nargs.how = '{how}'\n"
            for kind in ("failing", "spinning")
            for how in ("error", "conflict")
        ),
    )
    rows = host.client.wait("all", until="stopped", timeout=20 * SLOW)
    host.client.shutdown()
    host.wait()
    for row in rows:
        first = 1.0 if row["name"].endswith("error") else 0.01
        told = notes(host, row["name"])
        assert [text for text in told if "delay" in text] == [f"delay {first * n}" for n in (1, 2, 4, 1)]
        gaps = [float(text) for text in told if "delay" not in text]
        assert len(gaps) == 5
        least = (first, 2 * first, 4 * first, 0.0, first)
        assert all(gap >= delay for gap, delay in zip(gaps, least, strict=True)), (row["name"], gaps)


def test_the_timers_of_a_failed_tick_are_dropped(bghost_host: StartHost) -> None:
    """A timer that the tick has set does not go off in its recovery, nor later."""
    timed = """
    import signal, time, bghost

    class Kind:
        rounds = 0

        @bghost.hookimpl
        def bghost_tick(self, worker):
            self.rounds += 1
            if self.rounds == 2:
                raise SystemExit

            def late(signum, frame):
                worker.log.info("note: late")
                raise TimeoutError

            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, 600, 600)
            raise ValueError

        @bghost.hookimpl
        def bghost_recover(self, worker):
            worker.log.info("note: recovered, timer {}", signal.getitimer(signal.ITIMER_REAL))
    """
    host = bghost_host(kinds={"timed": timed}, args=["run", "timed"], answering=False)
    assert host.wait() == 0
    assert notes(host, "timed") == ["recovered, timer (0.0, 0.0)"]


OPENER = """
import bghost

class Kind:
    rounds = 0
    open = None

    def left_open(self):
        return self.open

    def roll_back(self, timeout):
        self.open = None

    @bghost.hookimpl
    def bghost_setup(self, worker):
        worker.enlist(self)

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        if self.rounds == 1:
            with worker.scope.child("closed in time"):
                pass
            self.scope = worker.scope.child("drawer")  # line 24
            self.scope.callback(worker.log.info, "note: drawer closed")
            self.tick_scope = worker.scope
            self.open = "a draft, opened at its line"
            return 0
        for scope in (self.scope, self.tick_scope):
            try:
                scope.callback(print)
            except RuntimeError as error:
                worker.log.info("note: {}", error)
        worker.log.info("note: current scope: {}", worker.root_scope.current.path)
        raise SystemExit

    @bghost.hookimpl
    def bghost_recover(self, worker, error):
        worker.log.info("note: recovers from {}", type(error).__name__)
"""


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_what_a_tick_leaves_open_is_closed(strict: bool, bghost_host: StartHost) -> None:
    """Scopes and participants are closed before any sleep, with the line that opened them; an error where strict."""
    host = bghost_host(
        kinds={"opener": OPENER},
        args=["run", "opener"],
        config=f"[host]\nstrict = {str(strict).lower()}\n",
        answering=False,
    )
    assert host.wait() == 0
    expected = [
        "drawer closed",
        "recovers from LeftOpen",
        "scope 'opener/tick/drawer' is closed",
        "scope 'opener/tick' is closed",
        "current scope: opener",
    ]
    assert notes(host, "opener") == [line for line in expected if strict or "recovers" not in line]
    told = [text for text in records(host, "opener") if "left open at the end of the tick" in text]
    if strict:
        assert len(told) == 1
        assert told[0].startswith("ERROR   LeftOpen: left open at the end of the tick: a draft, opened at its line")
    else:
        assert told[0] == "WARNING left open at the end of the tick, and closed: a draft, opened at its line"
        assert re.search(r"closed: scope 'opener/tick/drawer', opened at .*test_kind_opener.py:24$", told[1])


def test_errors_of_an_extension_end_nothing(bghost_host: StartHost) -> None:
    """What an extension raises, in any hook, before or after its yield, is logged and changes nothing for the kind."""
    kind = """
    import bghost

    class Settings(bghost.Settings):
        round: int = 1

    class Conflict(Exception):
        sqlstate = "40001"

    class Kind:
        Settings = Settings

        @bghost.hookimpl
        def bghost_setup(self, worker):
            worker.log.info("note: setup")

        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("note: tick")
            if worker.settings.round == 1:
                return bghost.UNTIL_WOKEN
            raise Conflict

        @bghost.hookimpl
        def bghost_reload(self, worker):
            worker.log.info("note: reload")

        @bghost.hookimpl
        def bghost_recover(self, worker):
            worker.log.info("note: recover")
            return bghost.Recovery.STOP

        @bghost.hookimpl
        def bghost_cleanup(self, worker, reason):
            worker.log.info("note: cleanup {}", reason)
    """
    broken = """
    import bghost

    class Extension:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            raise ValueError("in setup")

        @bghost.hookimpl(wrapper=True)
        def bghost_tick(self, worker):
            if worker.settings.round == 1:
                raise ValueError("before the tick")
            try:
                return (yield)
            except Exception:
                return 0  # swallows the error: that is not for it to decide
            finally:
                raise TypeError("after the tick")

        @bghost.hookimpl(wrapper=True)
        def bghost_recover(self, worker, error):
            yield
            raise ValueError("after recover")

        @bghost.hookimpl
        def bghost_reload(self, worker, old, new):
            raise ValueError("in reload")

        @bghost.hookimpl
        def bghost_cleanup(self, worker, reason):
            raise ValueError("in cleanup")
    """
    host = bghost_host(kinds={"calm": kind}, extensions={"broken": broken}, args=["run", "calm"], config="")
    host.client.wait("calm")
    host.wait_line("note: tick")
    host.sandbox.config("[kind.calm]\nround = 2\n")
    host.client.reload()
    assert host.wait() == 0
    assert notes(host, "calm") == ["setup", "tick", "reload", "tick", "recover", "cleanup stop"]
    told = [text for text in records(host, "calm") if "extension broken failed" in text]
    assert [re.findall(r"^\t\w+Error: (.*)", text, re.MULTILINE)[-1] for text in told] == [
        "in setup",
        "before the tick",
        "in reload",
        "after the tick",
        "after recover",
        "in cleanup",
    ]


def test_stats_of_recovery(bghost_host: StartHost) -> None:
    """Errors and ticks are counted apart; a reload is no tick; the last error stays in sight."""
    counted = """
    import bghost

    class Settings(bghost.Settings):
        round: int = 1

    class Conflict(Exception):
        sqlstate = "40001"

    class Kind:
        Settings = Settings
        rounds = 0

        @bghost.hookimpl
        def bghost_tick(self, worker):
            self.rounds += 1
            if self.rounds <= 2:
                raise Conflict(f"number {self.rounds}")
            worker.log.info("note: round {}", self.rounds)
            return bghost.UNTIL_WOKEN
    """
    host = bghost_host(kinds={"counted": counted}, args=["run", "counted"], config="")
    host.wait_line("note: round 3")
    host.sandbox.config("[kind.counted]\nround = 2\n")
    host.client.reload()
    host.wait_line("note: round 4")
    row = host.wait_row("counted", lambda row: row["ticks"] == 4 and row["doing"] == "idle")
    assert (row["ticks"], row["errors"]) == (4, 2)
    assert row["last_error"] == "Conflict: number 2 (SQLSTATE 40001)"

"""Interrupts: a stop and a cancel act at safe points, can be put off, and cannot be swallowed for ever."""

import os
import signal
import time

import pytest
from support import SLOW, StartHost, notes, until

TICKER = """
import os, signal, time, bghost
from bghost.shared.table import DROPPED

def send(name):
    os.kill(os.getpid(), signal.Signals["SIG" + name])

class Kind:
    rounds = 0

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.note = lambda text, *args: worker.log.info("note: " + text, *args)

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        if self.rounds == 2:
            raise SystemExit
        getattr(self, worker.args["how"])(worker)
        return 0

    @bghost.hookimpl
    def bghost_recover(self, worker, error):
        self.note("recovers from {}: {}", type(error).__name__, error)
        return bghost.Recovery.STOP

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        self.note("cleanup, {}", reason)
"""

CASES = {
    "check_stop": (
        """
    def check_stop(self, worker):
        worker.check_interrupts()
        send("TERM")
        self.note("goes on, stopping: {}", worker.stopping)
        try:
            worker.check_interrupts()
        except Exception:
            self.note("never: a Stop is no Exception")
        except SystemExit as stop:
            self.note("{}, code {}", type(stop).__name__, stop.code)
            raise
""",
        ["goes on, stopping: True", "Stop, code None", "cleanup, stop"],
    ),
    "check_cancel": (
        """
    def check_cancel(self, worker):
        send("INT")
        self.note("goes on, stopping: {}", worker.stopping)
        try:
            worker.check_interrupts()
        except bghost.Canceled:
            self.note("canceled")
        worker.check_interrupts()
        send("INT")
        worker.check_interrupts()
""",
        ["goes on, stopping: False", "canceled", "recovers from Canceled: canceled by SIGINT", "cleanup, stop"],
    ),
    "wait_stop": (
        """
    def wait_stop(self, worker):
        send("TERM")
        worker.wait(60)
""",
        ["cleanup, stop"],
    ),
    "wait_cancel": (
        """
    def wait_cancel(self, worker):
        send("INT")
        worker.wait(60)
""",
        ["recovers from Canceled: canceled by SIGINT", "cleanup, stop"],
    ),
    "run_cancel": (
        """
    def run_cancel(self, worker):
        worker.run(["sh", "-c", "kill -INT $PPID; exec sleep 60"])
""",
        ["recovers from Canceled: canceled by SIGINT", "cleanup, stop"],
    ),
    "hold_cancel": (
        """
    def hold_cancel(self, worker):
        with worker.hold_interrupts():
            with worker.hold_interrupts():
                send("INT")
                worker.check_interrupts()
            worker.check_interrupts()
            self.note("held, {}", worker.wait(0.01))
            try:
                raise ValueError
            except ValueError:
                self.note("an error inside is an error")
        self.note("never: the end of the outermost acts")
""",
        ["held, frozenset({'timeout'})", "an error inside is an error"]
        + ["recovers from Canceled: canceled by SIGINT", "cleanup, stop"],
    ),
    "hold_stop": (
        """
    def hold_stop(self, worker):
        with worker.hold_interrupts():
            send("TERM")
            self.note("held, {}", worker.wait(0.01))
            self.note("stopping: {}", worker.stopping)
        self.note("never")
""",
        ["held, frozenset({'timeout'})", "stopping: True", "cleanup, stop"],
    ),
    "hold_error": (
        """
    def hold_error(self, worker):
        with worker.hold_interrupts():
            send("TERM")
            raise ValueError("from inside")
""",
        # The error goes first, the stop follows its recovery: it does not hide what happened.
        ["recovers from ValueError: from inside", "cleanup, stop"],
    ),
    "interruptible_stop": (
        """
    def interruptible_stop(self, worker):
        import threading
        threading.Timer(0.05, send, ["TERM"]).start()
        with worker.interruptible():
            time.sleep(60)
        self.note("never")
""",
        ["cleanup, stop"],
    ),
    "interruptible_cancel": (
        """
    def interruptible_cancel(self, worker):
        import threading
        for _ in range(2):
            threading.Timer(0.05, send, ["INT"]).start()
            try:
                with worker.interruptible():
                    time.sleep(60)
            except bghost.Canceled:
                self.note("canceled")
        send("INT")
        self.note("outside of the block nothing breaks in")
        with worker.interruptible():
            self.note("never: what came before the block acts at its beginning")
""",
        ["canceled", "canceled", "outside of the block nothing breaks in"]
        + ["recovers from Canceled: canceled by SIGINT", "cleanup, stop"],
    ),
    "interruptible_hold": (
        """
    def interruptible_hold(self, worker):
        with worker.interruptible():
            with worker.hold_interrupts():
                send("INT")
                self.note("held")
            self.note("never")
""",
        ["held", "recovers from Canceled: canceled by SIGINT", "cleanup, stop"],
    ),
    "outside": (
        """
    def outside(self, worker):
        raise SystemExit

    @bghost.hookimpl
    def bghost_main(self, worker):
        for _ in worker.mainloop():
            send("INT")
            worker.check_interrupts()
            send("INT")
            worker.wait(0)
            with worker.hold_interrupts():
                send("INT")
            with worker.interruptible():
                send("INT")
            self.note("nothing was there to cancel, {} were dropped", worker.slot.stats[DROPPED])
            return
""",
        ["nothing was there to cancel, 4 were dropped", "cleanup, done"],
    ),
    "opted_out": (
        """
    def opted_out(self, worker):
        signal.signal(signal.SIGINT, lambda *args: self.note("a handler of the kind's own"))
        send("INT")
        worker.check_interrupts()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        send("TERM")
        worker.check_interrupts()
        self.note("goes on, stopping: {}", worker.stopping)
        signal.signal(signal.SIGUSR1, signal.default_int_handler)
""",
        ["a handler of the kind's own", "goes on, stopping: False", "cleanup, done"],
    ),
}
"""What a tick does, as the source of a method, and what is noted."""


def test_stop_and_cancel_act_at_safe_points_and_are_held_off(bghost_host: StartHost) -> None:
    """check_interrupts, waits, hold_interrupts, interruptible, own handlers: each as a worker of its own."""
    # One kind for each case, since the one that has a main of its own has no ticks.
    host = bghost_host(
        kinds={how: TICKER + source for how, (source, _) in CASES.items()},
        args=["run"],
        config="".join(f"[[worker]]\nkind = '{how}'\nrestart = 'never'\nargs = {{ how = '{how}' }}\n" for how in CASES),
    )
    rows = host.client.wait("all", until="stopped", timeout=20 * SLOW)
    host.client.shutdown()
    assert host.wait() == 0
    assert {how: notes(host, how) for how in CASES} == {how: expected for how, (_, expected) in CASES.items()}
    # A stop that bghost did not send is exit 1; a cancel is recovered, here with the decision to stop.
    assert {row["name"]: row["exit"] for row in rows} == {
        how: "exit code 1" if how.endswith("_stop") else "exit code 0" for how in CASES
    }


def test_a_smart_stop_lets_the_tick_finish(bghost_host: StartHost) -> None:
    """Under a smart stop worker.stopping is true, no safe point of the tick raises, and the tick is the last one."""
    finisher = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("note: tick")
            while not worker.stopping:
                worker.wait(60)
            worker.check_interrupts()
            with worker.hold_interrupts():
                pass
            worker.wait(0.05)
            worker.log.info("note: finished, {}", worker.stopping)
            return 0
    """
    host = bghost_host(kinds={"finisher": finisher}, args=["run", "finisher"])
    host.wait_line("note: tick")
    assert host.client.stop("finisher") == {"stopped": ["finisher"], "killed": []}
    assert host.wait() == 0
    assert notes(host, "finisher") == ["tick", "finished, True"]


@pytest.mark.parametrize("where", ["set-up", "own main"])
def test_a_smart_stop_ends_what_is_no_tick(where: str, bghost_host: StartHost) -> None:
    """Outside of recovery() there is no tick to wait for: each safe point ends the worker."""
    body = """
            worker.log.info("note: begins")
            while True:
                worker.check_interrupts()
    """
    hook = "bghost_setup" if where == "set-up" else "bghost_main"
    source = f"""
    import bghost

    class Kind:
        @bghost.hookimpl
        def {hook}(self, worker):
    {body}
    """
    if where == "set-up":
        source += """
        @bghost.hookimpl
        def bghost_tick(self, worker):
            return 0
        """
    host = bghost_host(kinds={"prober": source}, args=["run", "prober"])
    host.wait_line("note: begins")
    assert host.client.stop("prober", timeout=5 * SLOW) == {"stopped": ["prober"], "killed": []}
    assert host.wait() == 0


def test_a_cancel_leaves_no_interruptible_block_behind(bghost_host: StartHost) -> None:
    """However many signals arrive as a block begins or ends, code after it is never broken into."""
    blocks = """
    import os, signal, threading, time, bghost

    class Conflict(Exception):
        sqlstate = "40001"

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            ends = time.monotonic() + 1
            main, canceled, over = threading.main_thread().ident, 0, threading.Event()

            def pester():
                while not over.is_set():
                    signal.pthread_kill(main, signal.SIGINT)
                    time.sleep(0.0001)

            thread = threading.Thread(target=pester)
            thread.start()
            while time.monotonic() < ends or not canceled:
                try:
                    with worker.interruptible():
                        with worker.interruptible():
                            pass
                except bghost.Canceled:
                    canceled += 1
                for _ in range(20):
                    pass  # here a signal is noted only; one that raised would fail the tick
            over.set()
            thread.join()
            worker.log.info("note: {}, {} blocks are open", canceled > 0, worker.interrupts.breakable)
            raise SystemExit
    """
    host = bghost_host(kinds={"blocks": blocks}, args=["run", "blocks"], answering=False)
    assert host.wait() == 0
    assert notes(host, "blocks") == ["True, 0 blocks are open"]


SWALLOWER = """
import signal, bghost

class Kind:
    @bghost.hookimpl
    def bghost_setup(self, worker):
        if worker.name == "ignorer":
            for number in (signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)

    @bghost.hookimpl
    def bghost_tick(self, worker):
        worker.log.info("note: begins")
        while True:
            try:
                worker.wait(60)
            except BaseException:
                pass
"""


def test_a_worker_that_swallows_everything_is_ended_all_the_same(bghost_host: StartHost) -> None:
    """A kind that swallows BaseException in a loop ends when its time is over; one that had to be killed is named."""
    names = ("swallower", "ignorer")
    host = bghost_host(
        kinds={"swallower": SWALLOWER},
        args=["run"],
        config="".join(f"[[worker]]\nkind = 'swallower'\nname = '{name}'\nstop_timeout = 0.2\n" for name in names),
    )
    for name in names:
        host.wait_line(rf"\[{name}\] note: begins")
    began = time.monotonic()
    stop = host.sandbox.start("stop", *names)
    # 0.2 s smart, 5 s fast; then SIGQUIT, which is acted on at once wherever Python code runs, unless it is ignored
    row = host.wait_row("swallower", lambda row: row["state"] == "stopped", 30.0)
    assert row["exit"] == "exit code 2, bypassing bghost"
    assert time.monotonic() - began >= 5.2
    # 1 s immediate, then SIGKILL
    result = stop.result(30.0)
    assert time.monotonic() - began >= 6.2
    assert (host.row("ignorer")["state"], host.row("ignorer")["exit"]) == ("stopped", "killed by SIGKILL")
    assert result.code == 1
    told = result.stdout + result.stderr
    assert "ignorer" in told
    assert "swallower" not in told
    assert host.client.shutdown() == {"killed": ["ignorer"]}
    assert host.wait() == 1


def test_a_stop_ends_a_delay_and_a_wait_without_end(bghost_host: StartHost) -> None:
    """A worker that sleeps off an error, or sleeps for ever, is stopped at once, and says why its waits ended."""
    sleeper = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("note: {}", sorted(worker.woken))
            if worker.args["how"] == "error":
                raise ValueError
            return bghost.UNTIL_WOKEN

        @bghost.hookimpl
        def bghost_recover(self, worker):
            worker.block.delay = 60.0  # as after many errors
    """
    host = bghost_host(
        kinds={"sleeper": sleeper},
        args=["run"],
        config="".join(
            f"[[worker]]\nkind = 'sleeper'\nname = '{how}'\nargs.how = '{how}'\n" for how in ("error", "fine")
        ),
    )
    host.client.wait("error", "fine")
    until(lambda: host.row("error")["errors"] == 1 and host.row("fine")["ticks"] == 1)
    pid = host.row("fine")["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)
    until(lambda: host.row("fine")["ticks"] == 2)
    host.client.shutdown()
    assert host.wait() == 0
    assert "stopping, fast" not in host.text()
    assert notes(host, "fine") == ["[]", "['wake']"]

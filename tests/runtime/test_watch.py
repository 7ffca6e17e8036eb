"""The watch over ticks, dumps, and what ``ps`` tells apart: stuck, waiting, starved, suspended."""

import os
import signal
import time

from support import SLOW, StartHost, until

WEDGED = """
import ctypes, time, bghost

class Kind:
    rounds = 0

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.first = worker.slot.control[2] == 1  # its first process

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        with worker.scope.child("inner"):
            if self.first and self.rounds == 3:
                self.wedge(worker)
        return 0.05

    def wedge(self, worker):
        {wedge}
"""

CONFIG = """
[[worker]]
kind = "wedged"
tick_timeout = 0.5
restart_after = 0.1
"""


def test_a_tick_that_takes_too_long_is_dumped_and_stopped(bghost_host: StartHost) -> None:
    """A worker whose tick takes too long is stuck: dumped, stopped, and started again as one that failed."""
    source = WEDGED.format(wedge="time.sleep(600)")
    host = bghost_host(kinds={"wedged": source}, args=["run"], config=CONFIG)
    stuck = host.wait_line(r"\[wedged\] stuck: a tick has not ended within 0.5 s")
    host.wait_line(r"\[wedged\] dump:", after=stuck)
    host.wait_line(r'File ".*test_kind_wedged.py", line \d+ in wedge', after=stuck)
    row = host.row("wedged")
    assert row["flags"] == ["stuck"] or row["starts"] > 1
    host.wait_line(r"\[wedged\] exit code 2.*; started again in 0.1", after=stuck)
    row = host.wait_row("wedged", lambda row: row["starts"] == 2 and row["ticks"] > 5)
    assert (row["state"], row["restarts"]) == ("ready", 1) and "stuck" not in row["flags"]
    assert row["last_error"] == "stuck: a tick has not ended within 0.5 s"


def test_a_tick_that_holds_the_gil_in_c_is_dumped_and_killed(bghost_host: StartHost) -> None:
    """The stack is had though no Python code can run, and the process ends though it is deaf."""
    deadlock = "lock = ctypes.PyDLL(None).pthread_mutex_lock; mutex = (ctypes.c_long * 8)(); lock(mutex); lock(mutex)"
    source = WEDGED.format(wedge=deadlock)
    host = bghost_host(kinds={"wedged": source}, args=["run"], config=CONFIG)
    dump = host.wait_line(r"\[wedged\] dump:")
    host.wait_line(r'File ".*test_kind_wedged.py", line \d+ in wedge', after=dump)
    host.wait_line(r"\[wedged\] did not stop in time, killed", 15, after=dump)
    host.wait_row("wedged", lambda row: row["starts"] == 2 and row["state"] == "ready")


def test_a_tick_that_waits_is_not_stuck(bghost_host: StartHost) -> None:
    """Time that a tick spends in a wait of bghost's does not count: it can be stopped at any moment."""
    source = WEDGED.format(wedge="worker.log.info('note: waited, {}', sorted(worker.wait(1.5)))")
    host = bghost_host(kinds={"wedged": source}, args=["run"], config=CONFIG)
    host.wait_line(r"note: waited, \['timeout'\]")
    row = host.wait_row("wedged", lambda row: row["ticks"] > 5)
    assert row["starts"] == 1 and "stuck" not in row["flags"]  # starved it may be, on a busy machine


def test_the_time_of_a_tick_begins_anew_after_a_wait(bghost_host: StartHost) -> None:
    """Its own work has all of it, and no more than that, however long the tick has waited before."""
    wedge = """
        works = time.monotonic() + 0.7
        worker.wait(0.7)
        worker.log.info("note: {}", works)
        with worker.interruptible():
            time.sleep(600)
"""
    host = bghost_host(kinds={"wedged": WEDGED.format(wedge=wedge)}, args=["run"], config=CONFIG)
    works = host.wait_line(r"note: (.+)")
    host.wait_line(r"\[wedged\] stuck: a tick has not ended within 0.5 s", after=works)
    assert time.monotonic() - float(works.match[1]) > 0.5
    host.wait_row("wedged", lambda row: row["starts"] == 2)


def test_the_watch_sleeps_with_its_worker(bghost_host: StartHost) -> None:
    """While a worker with a tick_timeout is idle, nothing wakes the host."""
    source = """
    import bghost
    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            return bghost.UNTIL_WOKEN
    """
    host = bghost_host(kinds={"wedged": source}, args=["run"], config=CONFIG.replace("0.5", "0.1"))
    host.wait_row("wedged", lambda row: row["ticks"] == 1)

    def switches() -> int:
        with open(f"/proc/{host.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))

    deadline = time.monotonic() + 10 * SLOW
    while True:
        before = switches()
        time.sleep(0.5)  # the claim is about a stretch of time in which nothing happens
        if switches() == before:
            break
        assert time.monotonic() < deadline, "the host goes on waking"


def test_dump_shows_stacks_and_scopes(bghost_host: StartHost) -> None:
    """``bghost dump`` prints what a worker is in the middle of: its own stack, scopes, what is open."""
    source = """
    import bghost
    class Draft:
        def left_open(self):
            return "a draft, begun at line 1"
        def roll_back(self, timeout):
            pass
        def __repr__(self):
            return "<Draft>"
    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            if not worker.participants:
                worker.enlist(Draft())
            with worker.scope.child("inner") as inner:
                inner.callback(print)
                worker.wait(600)
    """
    host = bghost_host(kinds={"dumped": source}, args=["run", "dumped"])
    host.wait_row("dumped", lambda row: row["doing"] == "waiting")

    def dump() -> str:
        result = host.bghost("dump", "dumped")
        assert result.code == 0, result.stderr
        # Where there is no processor, the stacks come alone, and the scopes in front of the next ones.
        whole = "Scopes:" in result.stdout and not result.stdout.startswith("dumped:\nScopes:")
        return result.stdout if whole else ""

    lines = [line.strip() for line in until(dump, what="stacks with scopes").splitlines()]
    assert lines[0] == "dumped:"
    stack = lines[1 : lines.index("Scopes:")]
    assert any("in bghost_tick" in line for line in stack)
    assert stack[-1].endswith(" in live"), "a worker's stack begins with its life, not with its host's"
    scopes = lines[lines.index("Scopes:") :]
    assert [line.split(":")[0] for line in scopes[1:4]] == ["dumped", "tick", "inner"]
    assert "1 held, opened at" in scopes[3]
    assert "a draft, begun at line 1 (<Draft>)" in scopes
    assert host.bghost("dump", "dumped", "--json").json().keys() == {"dumped"}


def test_a_dump_waits_for_a_worker_that_can_run(bghost_host: StartHost) -> None:
    """A stack is not given up while its worker could run: it may have to share the processor with many."""
    source = """
    import signal, time, bghost
    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            worker.log.info("note: runs")
            while signal.SIGUSR2 not in signal.sigpending():
                pass
            until = time.monotonic() + 0.6
            while time.monotonic() < until:
                pass
            self.go_on(worker)
        def go_on(self, worker):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            worker.wait(600)
    """
    host = bghost_host(kinds={"busy": source}, args=["run", "busy"])
    host.wait_line("note: runs")
    assert "in go_on" in host.bghost("dump", "busy").stdout


def test_sigusr2_dumps_to_the_log(bghost_host: StartHost) -> None:
    """A SIGUSR2 from anywhere has the worker dumped, once for each time, and does it no harm."""
    source = """
    import bghost
    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.wait(600)
    """
    host = bghost_host(kinds={"dumped": source}, args=["run", "dumped"])
    pid = host.wait_row("dumped", lambda row: row["doing"] == "waiting")["pid"]
    assert pid is not None
    line = None
    for _ in range(2):
        os.kill(pid, signal.SIGUSR2)
        line = host.wait_line(r"\[dumped\] dump:", after=line)
        line = host.wait_line(r"in bghost_tick", after=line)
    assert host.row("dumped")["pid"] == pid


def test_a_suspended_worker_says_so(bghost_host: StartHost) -> None:
    """SIGSTOP is seen at once and shown as a flag; the others go on; SIGCONT takes it away."""
    source = """
    import bghost
    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            return 0.01
    """
    host = bghost_host(kinds={"still": source}, args=["run", "still", "--count", "2"])
    pid = host.wait_row("still.1", lambda row: row["ticks"] > 1)["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    host.wait_row("still.1", lambda row: row["flags"] == ["suspended"])
    ticks = host.row("still.2")["ticks"]
    until(lambda: host.row("still.2")["ticks"] > ticks)
    os.kill(pid, signal.SIGCONT)
    host.wait_row("still.1", lambda row: row["flags"] == [])


def test_a_starved_worker_is_not_stuck(bghost_host: StartHost) -> None:
    """A tick that gets no processor is starved, which is shown, and is not the worker's fault."""
    source = """
    import os, subprocess, sys, bghost

    HOG = "import os, time; end = time.monotonic() + 60\\nwhile time.monotonic() < end: pass"

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            cpu = min(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cpu})
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # it runs when nobody else wants to
            self.hogs = [
                subprocess.Popen(
                    [sys.executable, "-c", HOG],
                    preexec_fn=lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
                )
                for _ in range(2)
            ]

        @bghost.hookimpl
        def bghost_tick(self, worker):
            while True:
                pass
    """
    host = bghost_host(kinds={"wedged": source}, args=["run"], config=CONFIG)
    host.wait_line(r"\[wedged\] starved", 30)
    row = host.row("wedged")
    assert (row["flags"], row["starts"]) == (["starved"], 1)
    assert host.bghost("stop", "wedged", "--now").code in (0, 1)

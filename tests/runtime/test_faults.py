"""Faults of workers, seen from outside: processes that die, hang, leave things behind, or are signalled by others."""

import contextlib
import fcntl
import os
import re
import select
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable

import pytest
from processes import children, state, title
from support import SLOW, Host, StartHost, notes, pid_in, until

from bghost import HostError, WorkerSpec

CALM = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        worker.log.info("note: woken by {}", sorted(worker.woken))
        return bghost.UNTIL_WOKEN
"""


class Oracle:
    """What has to be true of a host after every fault, whatever it was. A calm worker that runs along is unharmed."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.client.wait("calm")
        self.calm = host.row("calm")["pid"]
        self.held = self._held()

    def _children(self) -> set[int]:
        """The host's children but for the guard; none of them a zombie."""
        return {pid for pid in children(self.host.pid) if not title(pid).startswith("bghost: guard")}

    def _held(self) -> Counter[str]:
        """What the host holds open, by sort, but for what it has of each worker that lives: a pidfd, its output.

        A client that has just hung up may still count, so of sockets there may be fewer later.
        """
        while True:
            pids = self._pids()
            held = Counter({"anon_inode:[pidfd]": -len(pids), "pipe": -len(pids)})
            for fd in os.listdir(f"/proc/{self.host.pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    held[re.sub(r":\[\d+\]$", "", os.readlink(f"/proc/{self.host.pid}/fd/{fd}"))] += 1
            # No worker has begun or ended meanwhile, nor closed its end of the pipe, which comes before that shows.
            if pids == self._pids() and all(map(_has_files, pids)):
                return held

    def _pids(self) -> set[int]:
        return {row["pid"] for row in self.host.client.ps() if row["pid"] is not None}

    def check(self) -> None:
        """What runs is what ps says, no zombie is left, nothing leaks, the calm worker is the same and awake."""
        host = self.host
        until(lambda: self._pids() == self._children(), what="ps and the host's children differ")
        until(lambda: not [pid for pid in children(host.pid) if state(pid) == "Z"], what="a zombie is left")
        until(lambda: self._held() <= self.held, what=f"it held {self.held} before, and now {self._held()}")
        assert host.alive
        row = host.row("calm")
        assert (row["pid"], row["starts"], row["errors"], row["flags"]) == (self.calm, 1, 0, [])
        assert self.calm is not None
        os.kill(self.calm, signal.SIGUSR1)
        host.wait_row("calm", lambda now: now["ticks"] > row["ticks"])

    def end(self, killed: tuple[str, ...] = ()) -> None:
        """Shut down: no process, socket or held lock is left, the exit code fits, stderr has no unseen error."""
        host = self.host
        assert host.client.shutdown() == {"killed": list(killed)}
        assert host.wait() == (1 if killed else 0)
        assert host.sandbox.processes() == {}
        assert not os.path.exists(host.directories.socket)
        with open(host.directories.lock) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not re.search("Exception ignored|RuntimeError|ResourceWarning", host.text())


def _has_files(pid: int) -> bool:
    try:
        return bool(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


Start = Callable[..., tuple[Host, Oracle]]


@pytest.fixture
def start(bghost_host: StartHost) -> Start:
    """Starts a host with a calm worker beside those of the test; ``late`` names kinds that are only installed."""

    def start(config: str = "", **kinds: str) -> tuple[Host, Oracle]:
        host = bghost_host(kinds={"calm": CALM, **kinds}, args=["run"], config="[[worker]]\nkind = 'calm'\n" + config)
        return host, Oracle(host)

    return start


def test_a_worker_that_dies_before_its_set_up(start: Start) -> None:
    """A1: whoever waits for it is told at once how it ended; it is started again like any other."""
    slow = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            worker.wait(60)

        @bghost.hookimpl
        def bghost_tick(self, worker):
            pass
    """
    host, oracle = start(slow=slow)
    for number in range(3):
        before = children(host.pid)
        launch = host.sandbox.start("launch", "slow", "--name", f"slow-{number}", "--wait")
        (pid,) = until(lambda before=before: children(host.pid) - before)  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)  # some milliseconds after the fork
        result = launch.result()
        assert result.code == 1
        assert "killed by SIGKILL" in result.stderr
        assert host.row(f"slow-{number}")["restarts"] == 1
        host.client.stop(f"slow-{number}")
    oracle.check()
    oracle.end()


IMPORTS = {
    "raising": ("raise ValueError('no use')", r"ValueError: no use.*test_kind_raising\.py:2", "exit code 1"),
    "exiting": ("import os; os._exit(3)", "exit code 3, bypassing bghost", "exit code 3, bypassing bghost"),
    "crashing": ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV", "killed by SIGSEGV"),
    "hanging": ("import time; time.sleep(600)", "not ready within 0.5 s", "killed by SIGKILL"),
}
"""The import of a kind's module, what whoever launched the worker is told, and how it ended."""


def test_a_kind_whose_import_fails_in_the_worker(start: Start) -> None:
    """A2: the host is unharmed; the error has module, exception and line; an import that hangs ends at its limit."""
    host, oracle = start(**{name: f"\n{source}" for name, (source, _, _) in IMPORTS.items()})
    for name, (_, told, exit) in IMPORTS.items():
        limit = 0.5 if name == "hanging" else 30.0
        with pytest.raises(HostError, match=f"worker {name} did not become ready: .*{told}"):
            host.client.launch(WorkerSpec(kind=name, restart="never", ready_timeout=limit), wait=True)
        row = host.row(name)
        assert (row["state"], row["exit"], row["starts"]) == ("failed", exit, 1)
    oracle.check()
    oracle.end()


def test_a_worker_that_fails_in_its_set_up(start: Start) -> None:
    """A3: cleanup runs if set-up began and the process lives; each run is unhealthy, and the delays double."""
    unready = """
    import os, signal, time, bghost

    class Kind:
        def __init__(self):
            if os.environ.get("TEST_UNMADE"):
                raise ValueError

        @bghost.hookimpl
        def bghost_setup(self, worker):
            worker.log.info("note: setup at {:.3f}", time.monotonic())
            if worker.args["how"] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("not today")

        @bghost.hookimpl
        def bghost_tick(self, worker):
            pass

        @bghost.hookimpl
        def bghost_cleanup(self, worker, reason):
            worker.log.info("note: cleanup, {}", reason)
    """
    unmade = """
    import bghost

    class Kind:
        def __init__(self):
            raise ValueError("cannot be made")

        @bghost.hookimpl
        def bghost_tick(self, worker):
            pass

        @bghost.hookimpl
        def bghost_cleanup(self, worker, reason):
            worker.log.info("note: never")
    """
    worker = "[[worker]]\nkind = 'unready'\nrestart_after = 0.1\nname = '{0}'\nargs.how = '{0}'\n"
    config = worker.format("raises") + worker.format("dies") + "[[worker]]\nkind = 'unmade'\nrestart = 'never'\n"
    host, oracle = start(config, unready=unready, unmade=unmade)
    for name, after in (("raises", ["cleanup, error"]), ("dies", [])):
        host.wait_row(name, lambda row: row["starts"] >= 4)
        host.client.stop(name)
        told = notes(host, name)
        starts = [float(text.rpartition(" ")[2]) for text in told if text.startswith("setup")]
        assert told == [line for start in starts for line in (f"setup at {start:.3f}", *after)]
        for earlier, later, delay in zip(starts, starts[1:], (0.1, 0.2, 0.4), strict=False):
            assert delay <= later - earlier, (name, starts)
        delays = [float(delay) for delay in re.findall(rf"\[{name}\] .*; started again in (\S+) s", host.text())]
        assert all(
            delay <= told + 0.05 and told - 0.05 <= 1.2 * delay
            for delay, told in zip((0.1, 0.2, 0.4), delays, strict=False)
        ), (name, delays)
    (row,) = host.client.wait("unmade", until="stopped")
    assert (row["state"], row["exit"]) == ("failed", "exit code 1")
    assert "ValueError: cannot be made" in (row["last_error"] or "")
    assert notes(host, "unmade") == []
    oracle.check()
    oracle.end()


LEDGER = """
import os, signal, sqlite3, bghost

class Conflict(Exception):
    sqlstate = "40001"  # recovered from without a delay to speak of

class Kind:
    fails = False

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.ledger = sqlite3.connect("ledger", isolation_level=None)  # its file is in the test's own directory
        self.ledger.execute("create table if not exists units (unit integer, worker text, pid integer)")
        worker.scope.callback(self.ledger.close)
        worker.enlist(self)

    def left_open(self):
        return "a transaction" if self.ledger.in_transaction else None

    def roll_back(self, timeout):
        if self.ledger.in_transaction:
            self.ledger.execute("rollback")

    @bghost.hookimpl
    def bghost_tick(self, worker):
        execute = self.ledger.execute
        execute("begin immediate")
        unit = execute("select count(*) + 1 from units").fetchone()[0]
        if unit > 30:
            execute("commit")
            raise SystemExit
        execute("insert into units values (?, ?, ?)", (unit, worker.name, os.getpid()))
        if unit % 4 == 0:
            if worker.args["how"] == "fails":
                self.fails = not self.fails
                if self.fails:
                    raise Conflict(f"at unit {unit}")
            elif not os.path.exists(f"tried {unit}"):
                open(f"tried {unit}", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        execute("commit")
        return 0
"""


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_work_that_fails_halfway_is_done_once(how: str, start: Start) -> None:
    """A4, A5: nothing half-done stays, each unit is there once: by the same process, or by its successor."""
    worker = f"[[worker]]\nkind = 'ledger'\nrestart_after = 0.001\nrestart_max = 0.001\nargs.how = '{how}'\n"
    if how == "dies":
        # ten runs that end like this in a row would be enough for the host, so several share the work
        worker += "count = 2\n"
    host, oracle = start(worker, ledger=LEDGER)
    rows = host.client.wait("ledger", until="stopped", timeout=20 * SLOW)
    assert [(row["state"], row["exit"]) for row in rows] == [("done", "exit code 0")] * len(rows)
    with sqlite3.connect(host.sandbox.root / "ledger") as ledger:
        units = ledger.execute("select unit, pid from units order by unit").fetchall()
    ledger.close()
    assert [unit for unit, _ in units] == list(range(1, 31))
    if how == "fails":
        assert len({pid for _, pid in units}) == 1
        assert [(row["errors"], row["starts"]) for row in rows] == [(7, 1)]
    else:
        assert sum(row["starts"] for row in rows) == 9
    oracle.check()
    oracle.end()


def test_a_recovery_that_fails_is_not_tried_again(start: Start) -> None:
    """A9: exit code 1 at once, once for each failed tick."""
    hopeless = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("note: tick")
            raise ValueError("first")

        @bghost.hookimpl
        def bghost_recover(self, worker, error):
            worker.log.info("note: recover")
            raise TypeError("second")
    """
    host, oracle = start("[[worker]]\nkind = 'hopeless'\nrestart_after = 0.01\nrestart_max = 0.05\n", hopeless=hopeless)
    host.wait_row("hopeless", lambda row: row["state"] == "failed")
    row = host.row("hopeless")
    assert (row["exit"], row["starts"]) == ("exit code 1", 10)
    assert notes(host, "hopeless") == ["tick", "recover"] * 10
    oracle.check()
    oracle.end()


CLEANER = """
import os, signal, time, bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        if worker.name.endswith("done"):
            raise SystemExit
        return bghost.UNTIL_WOKEN

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        worker.log.info("note: {}", reason)
        if worker.name.startswith("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass
"""


def test_a_clean_up_that_dies_or_hangs(start: Start) -> None:
    """A10: whatever bghost_cleanup does, the worker ends at its time limit, and its slot is free."""
    names = ["dies-stop", "hangs-stop", "dies-done", "hangs-done"]
    worker = "[[worker]]\nkind = 'cleaner'\nrestart = 'never'\nstop_timeout = 0.3\nname = '{}'\n"
    host, oracle = start("".join(map(worker.format, names)), cleaner=CLEANER)
    host.client.wait("dies-stop", "hangs-stop")
    began = time.monotonic()
    assert host.client.stop("dies-stop", "hangs-stop") == {"stopped": ["dies-stop", "hangs-stop"], "killed": []}
    assert time.monotonic() - began >= 0.3
    host.client.wait("dies-done", "hangs-done", until="stopped", timeout=20 * SLOW)
    assert {row["name"]: (row["state"], row["exit"]) for row in host.client.ps() if row["name"] != "calm"} == {
        "dies-stop": ("stopped", "killed by SIGKILL"),
        "hangs-stop": ("stopped", "killed by SIGALRM, cleaning up for too long"),
        "dies-done": ("failed", "killed by SIGKILL"),
        "hangs-done": ("failed", "killed by SIGALRM, cleaning up for too long"),
    }
    assert [notes(host, name) for name in names] == [["stop"], ["stop"], ["done"], ["done"]]
    oracle.check()
    oracle.end()


LEAVER = """
import os, signal, subprocess, bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        sleep = ["sleep", "600"]
        how = worker.args["how"]
        if how == "group":
            self.kept = subprocess.Popen(sleep)
        elif how == "session":
            self.kept = subprocess.Popen(sleep, start_new_session=True)
        elif how == "double":
            subprocess.run(["setsid", "--fork", *sleep])
        elif how == "daemon":
            if (pid := os.fork()) == 0:
                os.setsid()
                if os.fork() == 0:
                    worker.log.info("note: a daemon, pid {}", os.getpid())
                    while True:
                        signal.pause()
                os._exit(0)
            os.waitpid(pid, 0)
        worker.log.info("note: has started it")
        if how == "run":
            worker.run(sleep)
        return bghost.UNTIL_WOKEN
"""


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_what_a_worker_has_started_goes_with_it(end: str, start: Start) -> None:
    """A13: children, also in groups and sessions of their own, end with their worker, not before; those that left it
    are named."""
    names = ["group", "session", "double", "daemon", "run"]
    worker = "[[worker]]\nkind = 'leaver'\nrestart = 'never'\nname = '{0}'\nargs.how = '{0}'\n"
    host, oracle = start("".join(map(worker.format, names)), leaver=LEAVER)
    for name in names:
        host.wait_line(rf"\[{name}\] note: has started it")
    host.wait_line("note: a daemon")
    workers = {row["pid"]: row["name"] for row in host.client.ps()}

    def left() -> dict[int, str]:
        """What runs beside the host, its guard and its workers."""
        lines = host.sandbox.processes()
        return {pid: lines[pid] for pid in lines.keys() - workers if pid != host.pid and "guard" not in lines[pid]}

    # By their own command lines, which they have an instant after they were started.
    until(lambda: Counter(left().values()) == {"sleep 600": len(names) - 1, "bghost: daemon (default)": 1})
    for done, name in enumerate(names, 1):
        if end == "stop":
            assert host.client.stop(name, mode="fast") == {"stopped": [name], "killed": []}
        else:
            (pid,) = (pid for pid, other in workers.items() if other == name)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            host.client.wait(name, until="stopped")
        until(lambda done=done: len(left()) <= len(names) - done, what=f"what {name} has started still runs")  # type: ignore[misc]
        assert len(left()) == len(names) - done, f"with {name}, something of another worker has ended"
    for name, line in (("session", "sleep 600"), ("double", "sleep 600"), ("daemon", r"bghost: daemon \(default\)")):
        assert re.search(rf"left behind by worker {name}: pid \d+ \({line}\); killed", host.text()), name
    oracle.check()
    oracle.end()


def test_what_a_living_worker_has_in_the_background_is_reaped_when_it_ends(start: Start) -> None:
    """A process whose parent has ended comes to the host, which leaves it alone while it runs, and leaves no zombie."""
    brief = """
    import subprocess, bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            subprocess.run(["sh", "-c", "mkfifo gate; setsid --fork sh -c 'read line < gate'"])
            worker.log.info("note: has started it")
            return bghost.UNTIL_WOKEN
    """
    host, oracle = start("[[worker]]\nkind = 'brief'\n", brief=brief)
    host.wait_line("note: has started it")
    known = {row["pid"] for row in host.client.ps()}
    (pid,) = until(lambda: {pid for pid in children(host.pid) - known if "read line" in title(pid)})
    with open(host.sandbox.root / "gate", "w") as gate:
        gate.write("go on\n")
    until(lambda: not state(pid), what="it is not reaped")
    oracle.check()
    oracle.end()


def test_signals_straight_to_a_worker(start: Start) -> None:
    """D5: INT cancels, HUP and USR1 wake, USR2 harms nothing, TERM and QUIT end it, and it comes back."""
    signalled = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.wait(600)
            return 0
    """
    host, oracle = start("[[worker]]\nkind = 'signalled'\nrestart_after = 0.01\n", signalled=signalled)

    def send(number: signal.Signals) -> int:
        row = host.wait_row("signalled", lambda row: row["state"] == "ready" and row["doing"] == "waiting")
        assert row["pid"] is not None
        os.kill(row["pid"], number)
        return row["pid"]

    pid = send(signal.SIGINT)
    row = host.wait_row("signalled", lambda row: row["errors"] == 1)
    assert row["last_error"] == "Canceled: canceled by SIGINT"
    host.wait_row("signalled", lambda row: row["doing"] == "waiting")  # its delay is over
    assert send(signal.SIGUSR1) == pid
    host.wait_row("signalled", lambda row: row["ticks"] == 2)
    for harmless in (signal.SIGHUP, signal.SIGUSR2, signal.SIGPIPE, signal.SIGWINCH, signal.SIGCHLD):
        assert send(harmless) == pid
    row = host.row("signalled")
    assert (row["pid"], row["starts"], row["errors"]) == (pid, 1, 1)
    for starts, (number, exit) in enumerate(
        ((signal.SIGTERM, "exit code 1"), (signal.SIGQUIT, "exit code 2, bypassing bghost")), 2
    ):
        send(number)
        row = host.wait_row("signalled", lambda row, n=starts: row["starts"] == n and row["state"] == "ready")  # type: ignore[misc]
        assert row["exit"] == exit
    oracle.check()
    oracle.end()


def test_a_worker_that_is_stopped_by_a_signal(start: Start) -> None:
    """D6: SIGSTOP shows as the flag suspended, others go on; it can be stopped as it is, and goes on after SIGCONT."""
    worker = "[[worker]]\nkind = 'calm'\nname = '{}'\nstop_timeout = 0.2\n"
    host, oracle = start(worker.format("goes-on") + worker.format("ends"))
    host.client.wait("goes-on", "ends")
    pids = {name: host.row(name)["pid"] for name in ("goes-on", "ends")}
    for name, pid in pids.items():
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        row = host.wait_row(name, lambda row: row["flags"] == ["suspended"])
        assert (row["state"], row["pid"]) == ("ready", pid)
    oracle.check()
    assert host.client.stop("ends") == {"stopped": ["ends"], "killed": []}
    assert (host.row("ends")["exit"], host.row("ends")["flags"]) == ("exit code 0", [])
    assert pids["goes-on"] is not None
    os.kill(pids["goes-on"], signal.SIGCONT)
    row = host.wait_row("goes-on", lambda row: row["flags"] == [])
    os.kill(pids["goes-on"], signal.SIGUSR1)
    host.wait_row("goes-on", lambda now: now["ticks"] > row["ticks"])
    oracle.check()
    oracle.end()


def test_ticks_that_take_longer_than_their_interval(start: Start) -> None:
    """G8: ticks do not pile up: the nap begins at a tick's end."""
    late = """
    import time, bghost

    class Settings(bghost.Settings):
        naptime: float = 0.02

    class Kind:
        Settings = Settings
        rounds = 0
        ended = None

        @bghost.hookimpl
        def bghost_tick(self, worker):
            began = time.monotonic()
            if self.ended is not None:
                worker.log.info("note: {:.3f}", began - self.ended)
            time.sleep(0.1)
            self.rounds += 1
            if self.rounds == 6:
                raise SystemExit
            self.ended = time.monotonic()
    """
    host, oracle = start("[[worker]]\nkind = 'late'\n", late=late)
    (row,) = host.client.wait("late", until="stopped")
    naps = [float(nap) for nap in notes(host, "late")]
    assert len(naps) == 5
    assert min(naps) >= 0.02
    oracle.check()
    oracle.end()


def test_a_tick_that_never_ends(start: Start) -> None:
    """G8: with a tick_timeout it is found, its stack is in the log, it is stopped, counted, and started again."""
    stuck = """
    import os, time, bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            if os.path.exists("seen"):
                return bghost.UNTIL_WOKEN
            open("seen", "w").close()
            with worker.interruptible():
                self.wade_through_mud()

        def wade_through_mud(self):
            time.sleep(600)
    """
    host, oracle = start(stuck=stuck)
    launched = host.client.launch(WorkerSpec(kind="stuck", tick_timeout=0.2, restart_after=0.2), wait=True)
    assert launched["pid"] is not None
    host.wait_line("wade_through_mud")
    row = host.wait_row("stuck", lambda row: row["starts"] == 2 and row["state"] == "ready")
    assert row["pid"] != launched["pid"]
    assert row["restarts"] == 1
    assert "stuck: a tick has not ended within 0.2 s" in host.text()
    pidfd = os.pidfd_open(pid_in(row))
    try:
        assert select.select([pidfd], [], [], 0.5)[0] == []  # a wait without end is no tick that takes too long
    finally:
        os.close(pidfd)
    oracle.check()
    oracle.end()

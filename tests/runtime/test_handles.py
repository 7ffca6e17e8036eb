"""Handles: a worker's address, good across its restarts, never good for its slot's next occupant."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from support import StartHost, notes, until

from bghost.shared import table as t
from bghost.shared.handle import Handle
from bghost.shared.spec import State


@pytest.fixture
def table() -> Iterator[t.Table]:
    """A table in this very process, which is its host."""
    table = t.Table(2)
    yield table
    for latch in table.latches:
        os.close(latch.read_fd)
        os.close(latch.write_fd)


def occupy(table: t.Table, generation: int, state: State, pid: int = 0) -> t.Slot:
    """Say of slot 0 what the host says of one that is taken."""
    slot = table.slot(0)
    slot.control[t.GENERATION] = generation
    slot.control[t.STATE] = t.state_index(state)
    slot.control[t.PID] = pid
    return slot


def test_a_handle_is_a_value(table: t.Table) -> None:
    """Two handles of one registration are equal; one of another registration, slot or host is another."""
    handle = Handle(table, 0, 1)
    assert handle == Handle(table, 0, 1)
    assert len({handle, Handle(table, 0, 1)}) == 1
    assert handle not in (Handle(table, 0, 2), Handle(table, 1, 1), (table.run_id, 0, 1))
    assert repr(handle) == f"Handle(run_id={table.run_id:#x}, slot=0, generation=1)"


def test_a_handle_of_the_last_occupant_is_good_for_nothing(table: t.Table) -> None:
    """Once its slot has gone to another it tells of no state and no pid, signals nobody and wakes nobody."""
    slot = occupy(table, 1, State.READY, os.getpid())
    handle = Handle(table, 0, 1)
    assert (handle.state, handle.pid()) == (State.READY, os.getpid())
    occupy(table, 2, State.READY, os.getpid())
    assert (handle.state, handle.pid()) == (None, None)
    assert not handle.wake()
    assert not handle.signal(signal.SIGKILL)  # it would have been this process
    assert slot.stats[t.WAKE] == 0
    assert not slot.latch.reset(2)


@pytest.mark.parametrize("state", list(State))
def test_a_wake_up_for_a_worker_without_a_pid(state: State, table: t.Table) -> None:
    """It is there for a worker that runs before the host has noted its pid, and for its next process."""
    slot = occupy(table, 1, state)
    assert Handle(table, 0, 1).wake() == (state in ("starting", "ready", "stopping"))
    assert slot.stats[t.WAKE] == 1
    assert slot.latch.reset(1)


def test_a_signal_reaches_the_process_and_no_other(table: t.Table) -> None:
    """It goes to the worker's process as long as the host says that it is this one; True says that there was one."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        occupy(table, 1, State.READY, process.pid)
        handle = Handle(table, 0, 1)
        assert handle.signal(0)
        assert process.poll() is None
        assert handle.signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM
        assert not handle.signal(0)  # it is reaped, and so nobody is there
    occupy(table, 1, State.BACKOFF)
    assert handle.pid() is None
    assert not handle.signal(signal.SIGTERM)


def test_times_are_shown_by_the_wall_clock() -> None:
    """A moment of the monotonic clock is told in unix seconds; a word that says never is no moment."""
    assert t.unix_time(0) is None
    for ago in (0, 3600):

        def off(ago: int = ago) -> float:
            now, told = time.time(), t.unix_time(time.monotonic_ns() - ago * 10**9)
            assert told is not None
            return abs(told + ago - now)

        until(lambda off=off: off() < 1.0, what="the right time")  # type: ignore[misc]


SLEEPER = """
import os
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        worker.log.info("note: woken by {}", sorted(worker.woken))
        if os.path.exists("crash"):
            os.remove("crash")
            os._exit(3)
        return bghost.UNTIL_WOKEN
"""

WAKER = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.handle = worker.find("sleeper")
        assert worker.find("nobody") is None
        assert self.handle == worker.find("sleeper")
        worker.log.info("note: {}", self.handle.state)

    @bghost.hookimpl
    def bghost_tick(self, worker):
        if worker.woken:
            state = self.handle.state  # before the wake-up, upon which the test goes on to the next thing
            worker.log.info("note: wakes, {}, {}", self.handle.wake(), state)
        return bghost.UNTIL_WOKEN
"""

HOST = """
import signal
import bghost

class Extension:
    @bghost.hookimpl
    def bghost_host_setup(self, host):
        handle = host.launch(bghost.WorkerSpec(kind="sleeper", restart_after=0.01))
        signal.signal(signal.SIGALRM, lambda *args: handle.wake())
"""


def test_who_can_wake_a_worker(bghost_host: StartHost) -> None:
    """A handle wakes from the host's process and from another worker, before a restart of the worker and after it."""
    host = bghost_host(
        kinds={"sleeper": SLEEPER, "waker": WAKER},
        extensions={"alarm": HOST},
        config="host.kinds = ['sleeper']\nworker = [{kind = 'waker'}]",
        args=["run"],
    )
    line = host.wait_line(r"\[sleeper\] note: woken by \[\]")
    host.signal(signal.SIGALRM)
    line = host.wait_line(r"\[sleeper\] note: woken by \['wake'\]", after=line)

    host.client.wait("waker")
    waker = host.row("waker")["pid"]
    assert waker is not None
    os.kill(waker, signal.SIGUSR1)
    line = host.wait_line(r"\[sleeper\] note: woken by \['wake'\]", after=line)

    first = host.row("sleeper")
    (host.sandbox.root / "crash").touch()
    host.signal(signal.SIGALRM)
    line = host.wait_line(r"\[sleeper\] note: woken by \[\]", after=line)  # its next process
    second = host.wait_row("sleeper", lambda row: row["state"] == "ready" and row["pid"] != first["pid"])
    assert (second["generation"], second["starts"]) == (first["generation"], first["starts"] + 1)
    host.signal(signal.SIGALRM)
    line = host.wait_line(r"\[sleeper\] note: woken by \['wake'\]", after=line)
    os.kill(waker, signal.SIGUSR1)
    host.wait_line(r"\[sleeper\] note: woken by \['wake'\]", after=line)
    until(lambda: len(notes(host, "waker")) == 3, what="what the waker says after its second wake-up")

    assert host.client.stop("sleeper")["killed"] == []
    os.kill(waker, signal.SIGUSR1)
    host.wait_line(r"\[waker\] note: wakes, False, stopped")
    assert notes(host, "waker")[1:] == ["wakes, True, ready", "wakes, True, ready", "wakes, False, stopped"]


def test_a_launched_worker_can_be_woken_at_once(bghost_host: StartHost) -> None:
    """Who launches a worker can wake it before it is ready, and does not lose that wake-up."""
    launcher = """
        import bghost

        class Kind:
            @bghost.hookimpl
            def bghost_main(self, worker):
                for number in range(20):
                    handle = worker.launch(bghost.WorkerSpec(kind="woken", name=f"woken.{number}"))
                    assert handle.wake()
                    assert handle.wait_stopped(10.0), number
                    assert handle.state == "done"
                worker.log.info("note: passed")
    """
    woken = """
        import bghost

        class Kind:
            @bghost.hookimpl
            def bghost_main(self, worker):
                assert worker.wait() == {"wake"}
    """
    host = bghost_host(
        kinds={"launcher": launcher, "woken": woken}, config="host.kinds = ['woken', 'launcher']", args=["run"]
    )
    assert host.bghost("launch", "launcher").code == 0
    assert "passed" in host.wait_line("note: passed|Error").text

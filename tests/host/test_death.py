"""The host's death by SIGKILL: workers go, the guard ends the rest, and a new start never meets an old generation."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from chaos import BLOCKED, CHAOS, DEAF, table
from processes import children, guard_of, lives, title
from support import BGHOST, Host, Sandbox, StartHost, notes, until, within

from bghost import NoHost

GUARD_SIZE = 6 << 20
"""Bytes that a guard may have for itself; 3.7 MiB on Python 3.11."""

LATE = 0.5
"""Seconds after stop_timeout until the guard kills."""


def winner_of(hosts: list[Host]) -> Host:
    """The one that runs."""
    return until(lambda: [host for host in hosts if "host of instance default runs" in host.text()], 60.0)[0]


def kill(host: Host) -> float:
    """SIGKILL for the host; when. It is dead then: who comes next finds neither it nor its socket."""
    killed = time.monotonic()
    host.signal(signal.SIGKILL)
    until(lambda: not lives(host.pid), what="the host's death")
    return killed


def gone(pids: Collection[int]) -> float:
    """Wait until none of *pids* lives; when that was."""
    until(lambda: not any(map(lives, pids)), 30.0, f"the end of {pids}")
    return time.monotonic()


# Workers


def test_workers_that_wait_are_gone_at_once_with_their_cleanup(bghost_host: StartHost) -> None:
    """Within 100 ms of the host's death, whatever they wait for; nothing is left for the guard."""
    waits = {"idle": "pass", "naps": "worker.wait(60)", "asks": "worker.ask('wait', {'names': ['idle']}, None)"}
    cleanup = "note('cleanup {} {}', reason, time.monotonic())"
    tables = [table(name, tick=code, cleanup=cleanup) for name, code in waits.items()]

    def attempt() -> float:
        host = bghost_host(kinds={"chaos": CHAOS}, args=["run"], config="".join(tables))
        host.client.wait(*waits)
        until(lambda: all(row["doing"] != "active" for row in host.client.ps()), what="workers that wait")
        processes = children(host.pid)
        killed = kill(host)
        took = gone(processes) - killed
        host.wait()
        for name in waits:
            (said,) = notes(host, name)
            word, reason, when = said.split()
            assert (word, reason) == ("cleanup", "host_died")
            took = max(took, float(when) - killed)
        assert "killed pid" not in host.text()
        return took

    within(0.35, attempt)  # with what it takes to be scheduled, and to look


DEAF_TO_ALL = {
    "python": "note('is up')\nwhile True: pass",
    "deaf": DEAF,
    "blocked": BLOCKED,
    "session": """
if os.fork() == 0:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(1)
note('is up')
""",
    "program": """
kind.program = subprocess.Popen(['sh', '-c', 'trap "" TERM HUP INT; while :; do sleep 1; done'], start_new_session=True)
note('is up')
""",
}


def test_the_guard_ends_what_does_not_end_itself(bghost_host: StartHost) -> None:
    """After stop_timeout: endless Python code, the GIL held in C, all signals blocked, other sessions, programs."""
    tables = [table(name, tick=code) for name, code in DEAF_TO_ALL.items()]

    def attempt() -> float:
        config = "[host]\nstop_timeout = 1.0\n" + "".join(tables)
        host = bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=config)
        for name in DEAF_TO_ALL:
            host.wait_line(rf"\[{name}\] note: is up")
        before = host.sandbox.processes()
        guard = guard_of(host.pid)
        killed = kill(host)
        took = gone([pid for pid in before if pid != guard]) - killed
        assert took >= 1.0
        gone([guard])
        host.wait()
        told = r"guard \(default\): killed pid (\d+) \((.*)\), which the dead host had left behind"
        said = re.findall(told, host.text())
        assert len(said) >= 5, said
        assert {pid for pid in before if pid not in (guard, host.pid)} & {int(pid) for pid, _ in said}
        assert any("sh -c" in command for _, command in said), said
        return took - 1.0 - LATE

    within(1.0, attempt)


# The guard


def test_the_guard_is_small_and_has_nothing_of_plugins(bghost_host: StartHost) -> None:
    """It is a program of its own, whatever the host takes, whose memory it has nothing of."""
    big = "HEAP = b'x' * (64 << 20)\n" + textwrap.dedent(CHAOS)
    host = bghost_host(kinds={"chaos": big}, args=["run", "chaos"])
    host.client.wait("chaos")
    rollup = Path(f"/proc/{guard_of(host.pid)}/smaps_rollup").read_text()
    private = sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE)) << 10
    print(f"guard: {private / (1 << 20):.2f} MiB private")
    assert private < GUARD_SIZE, rollup
    maps = Path(f"/proc/{guard_of(host.pid)}/status").read_text()
    rss = int(re.search(r"VmRSS:\s+(\d+) kB", maps)[1]) >> 10  # type: ignore[index]
    assert rss < 64, maps


def test_a_guard_that_dies_is_renewed(bghost_host: StartHost) -> None:
    """The new one does the same work, and holds nothing that would make a dead host look alive."""
    host = bghost_host(
        kinds={"chaos": CHAOS},
        args=["run"],
        config="[host]\nstop_timeout = 0.5\n" + table("deaf", tick=DEAF_TO_ALL["deaf"]),
    )
    host.wait_line("note: is up")
    first = guard_of(host.pid)
    os.kill(first, signal.SIGTERM)  # it hears none of what is meant for everybody
    os.kill(first, signal.SIGKILL)
    host.wait_line("the guard has died; there is a new one")
    second = guard_of(host.pid)
    assert second != first
    assert host.row("deaf")["starts"] == 1
    workers = [pid for pid in children(host.pid) if pid != second]
    kill(host)
    with pytest.raises(NoHost):
        host.client.ps()
    gone([*workers, second])
    host.wait()


def test_a_host_that_dies_while_its_guard_is_renewed(bghost_host: StartHost) -> None:
    """From its fork on the new one sees that, though its program has not begun yet."""
    host = bghost_host(
        kinds={"chaos": CHAOS},
        args=["run"],
        config="[host]\nstop_timeout = 0.2\n" + table("deaf", tick=DEAF_TO_ALL["deaf"]),
    )
    host.wait_line("note: is up")
    before = children(host.pid)
    os.kill(guard_of(host.pid), signal.SIGKILL)
    while not children(host.pid) - before:
        pass  # as soon as can be
    kill(host)
    gone(before)
    host.wait_line(r"killed pid \d+ \(bghost: deaf")
    until(lambda: host.sandbox.processes() == {})
    host.wait()


def test_a_guard_whose_program_cannot_be_had(sandbox: Sandbox) -> None:
    """It does its work as it was forked."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config("[host]\nstop_timeout = 0.2\n" + table("deaf", tick=DEAF_TO_ALL["deaf"]))
    (sandbox.site / "sitecustomize.py").write_text("import sys\nsys.executable = '/nowhere/python'\n")
    host = sandbox.start_host("run")
    host.wait_line("note: is up")
    pids = children(host.pid)
    assert guard_of(host.pid) in pids
    kill(host)
    gone(pids)
    host.wait()


# The next start


def test_a_start_does_the_guards_work_when_that_is_dead_too(sandbox: Sandbox) -> None:
    """It says what it waits for, waits ten seconds beyond stop_timeout, then ends what is left, and runs."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config("[host]\nstop_timeout = 0.2\n" + table("deaf", tick=DEAF_TO_ALL["deaf"]))
    host = sandbox.start_host("run")
    host.wait_line("note: is up")
    (worker,) = (pid for pid in children(host.pid) if pid != guard_of(host.pid))
    os.kill(host.pid, signal.SIGSTOP)  # so that it does not renew the guard
    os.kill(guard_of(host.pid), signal.SIGKILL)
    kill(host)
    begun = time.monotonic()
    sandbox.config("[host]\nstop_timeout = 0.2\n" + table("new"))
    others = [sandbox.start_host("run") for _ in range(3)]
    winner = winner_of(others)
    took = time.monotonic() - begun
    assert took >= 10.2
    for other in others:
        other.wait_line("processes of the last host of instance default have not ended yet, waiting")
        if other is not winner:
            assert other.wait() == 1
            assert f"has a host already: pid {winner.pid}" in other.text()
    gone([worker])
    killed = "\n".join(other.text() for other in others)
    assert re.search(rf"left by the last host: pid {worker} \(.*\), killed", killed)
    winner.client.wait("new")
    assert winner.row("new")["starts"] == 1
    host.wait()


def start_with_program(sandbox: Sandbox) -> tuple[list[int], int]:
    """A run's guard, worker and host, and the worker's program, which is in a session of its own, without the lock."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("program", tick=DEAF_TO_ALL["program"]))
    host = sandbox.start_host("run")
    host.wait_line("note: is up")
    guard = guard_of(host.pid)
    (worker,) = (pid for pid in children(host.pid) if pid != guard)
    # exec closes Popen's pipe an instant before the new command line can be read.
    (program,) = until(lambda: [pid for pid in children(worker) if "sh -c" in title(pid)])
    return [guard, worker, host.pid], program


def kill_run(pids: list[int]) -> None:
    """Kill a run's processes, the host last: it sees none of the other ends."""
    os.kill(pids[-1], signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    gone(pids)


def test_what_a_dead_run_left_without_its_lock_is_ended_by_the_next(sandbox: Sandbox) -> None:
    """A program in a session of its own, its worker, guard and host all killed: nobody holds the lock any more."""
    run, program = start_with_program(sandbox)
    kill_run(run)
    assert lives(program)
    sandbox.config(table("new"))
    new = sandbox.start_host("run")
    new.wait_line("host of instance default runs")
    assert "have not ended yet, waiting" not in new.text()
    new.wait_line(rf"left by the last host: pid {program} \(sh -c .*\), killed")
    gone([program])
    new.client.shutdown()


@contextlib.contextmanager
def outlives_its_kill(pid: int) -> Iterator[None]:
    """As long as the block lasts *pid* does not end when it is killed: it stops on its way out, for its tracer."""
    seize, detach, trace_exit, wait_all = 0x4206, 17, 1 << 6, 1 << 30  # PTRACE_SEIZE, _DETACH, _O_TRACEEXIT, __WALL
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    if ptrace(seize, pid, None, trace_exit) != 0:
        pytest.skip(f"nothing can be traced here: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, wait_all)
            ptrace(detach, pid, None, None)


def test_no_host_starts_while_what_it_has_killed_lives(sandbox: Sandbox) -> None:
    """Though the lock is free: what does not end in time is named, and the start after its end succeeds."""
    run, program = start_with_program(sandbox)
    with outlives_its_kill(program):
        kill_run(run)
        sandbox.config(table("new"))
        new = sandbox.start_host("run")
        new.wait_line(rf"left by the last host: pid {program} \(sh -c .*\), killed")
        end = new.wait_line(rf"host of instance default runs|cannot be ended: pid {program} \(sh -c", 20.0)
        refused = "cannot be ended" in end.text
        assert refused or not lives(program)  # on older kernels another SIGKILL ends also what has stopped so
    gone([program])
    with contextlib.suppress(NoHost):
        new.client.shutdown()
    assert new.wait() == (1 if refused else 0)
    newer = sandbox.start_host("run")
    newer.wait_line("host of instance default runs")
    newer.client.shutdown()


LEDGER = """
kind.ledger = os.open(os.environ['LEDGER'], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(kind.ledger, f'{os.environ["BGHOST_RUN_ID"]} start {time.monotonic_ns()}\\n'.encode())
"""


SOAK: Final = os.environ.get("BGHOST_SOAK", "") not in ("", "0")
ROUNDS: Final = 25 if SOAK else 3
"""Of four instances at a time; a hundred in all with BGHOST_SOAK."""


@pytest.mark.timeout(180)
def test_kill_and_start_again_and_again(sandbox: Sandbox) -> None:
    """Never two generations at work: what one host's workers do ends before what the next one's do begins."""
    sandbox.kinds({"chaos": CHAOS})
    end = "os.write(kind.ledger, f'{os.environ[\"BGHOST_RUN_ID\"]} end {time.monotonic_ns()}\\n'.encode())"
    sandbox.config(
        "[host]\nstop_timeout = 0.3\n"
        + table("waits", count=2, setup=LEDGER, cleanup=end)
        + table("slow", setup=LEDGER, cleanup="time.sleep(0.03); " + end)
    )
    instances = [f"i{number}" for number in range(4)]

    def rounds(instance: str) -> int:
        env = {"BGHOST_INSTANCE": instance, "LEDGER": str(sandbox.root / instance)}
        host = sandbox.start_host("run", env=env)
        for number in range(ROUNDS):
            host.wait_line("host of instance .* runs", 20)
            if number % 3:
                host.wait_line(r"\] started", 20)
            if number % 3 == 2:
                host.client.wait("waits", "slow")
            kill(host)
            host = sandbox.start_host("run", env=env)
        host.wait_line("host of instance .* runs", 20)
        host.client.wait("waits", "slow")
        assert host.client.shutdown() == {"killed": []}
        return host.wait()

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(rounds, instances)) == [0] * 4
    for instance in instances:
        spans: dict[str, tuple[int, int]] = {}
        for line in (sandbox.root / instance).read_text().splitlines():
            run_id, _, when = line.split()
            first, last = spans.get(run_id, (1 << 63, 0))
            spans[run_id] = min(first, int(when)), max(last, int(when))
        assert len(spans) > ROUNDS // 3
        ordered = sorted(spans.values())
        for (_, last), (first, _) in zip(ordered, ordered[1:], strict=False):
            assert last < first, "two generations at once"


def test_of_many_starts_one_wins(sandbox: Sandbox) -> None:
    """The others end with 1, and name its pid; its files stay its own."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("one"))
    racers = [sandbox.start_host("run") for _ in range(50 if SOAK else 8)]
    winner = winner_of(racers)
    for racer in racers:
        if racer is not winner:
            assert racer.wait(60.0) == 1
            assert f"instance default has a host already: pid {winner.pid}" in racer.text(), racer.text()
    assert winner.client.wait("one")[0]["starts"] == 1
    assert winner.client.status()["pid"] == winner.pid
    assert json.loads(Path(winner.directories.lock).read_text())["pid"] == winner.pid
    winner.client.shutdown()
    assert winner.wait() == 0


def test_stale_text_in_the_locks_file_hurts_nobody(sandbox: Sandbox) -> None:
    """What it says decides nothing: a stranger's pid, the id of no run, or what is no text at all."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("one"))
    host = sandbox.start_host("run")
    host.wait_answering()
    host.client.shutdown()
    assert host.wait() == 0
    stranger = subprocess.Popen(["sleep", "60"], env={"BGHOST_RUN_ID": "0" * 16})
    try:
        for text in (
            json.dumps({"pid": stranger.pid, "since": 0, "run_id": "0" * 16}),
            json.dumps({"pid": stranger.pid, "since": "then", "run_id": ""}),
            "\0" * 100 + "{",
        ):
            Path(host.directories.lock).write_text(text)
            host = sandbox.start_host("run")
            host.wait_line("host of instance default runs")
            host.signal(signal.SIGINT)
            assert host.wait() == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


REUSE = """
import fcntl, os, signal, subprocess, sys, time
host = subprocess.Popen(sys.argv[1:], stdout=2)
lock = os.environ["LOCK"]
def wait(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
def children(pid):
    return open(f"/proc/{pid}/task/{pid}/children").read().split()
wait(lambda: os.path.exists("up"))
guard, worker = children(host.pid)
os.kill(host.pid, signal.SIGSTOP)
os.kill(int(guard), signal.SIGKILL)
host.kill()
host.wait()
open("/proc/sys/kernel/ns_last_pid", "w").write(str(host.pid - 1))
stranger = subprocess.Popen(["sleep", "60"])
assert stranger.pid == host.pid, (stranger.pid, host.pid)
os.unlink("up")
new = subprocess.Popen(sys.argv[1:], stdout=2)
wait(lambda: os.path.exists("up"))
assert stranger.poll() is None
new.send_signal(signal.SIGINT)
assert new.wait() == 0
assert stranger.poll() is None
stranger.kill()
print("reused")
"""


def test_a_reused_pid_is_not_taken_for_the_host(sandbox: Sandbox) -> None:
    """A worker of the dead host still holds the lock, whose number is a stranger's by now: a start waits and works."""
    isolate = ["unshare", "-pf", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*isolate, "true"], capture_output=True).returncode != 0:
        pytest.skip("no PID namespace can be made here")
    sandbox.kinds({"chaos": CHAOS})
    setup = f"open('{sandbox.root}/up', 'w').close()"
    sandbox.config("[host]\nstop_timeout = 0.2\n" + table("one", setup=setup, tick="deaf_sleep(2)"))
    script = sandbox.root / "reuse.py"
    script.write_text(REUSE)
    env = sandbox.environ({"LOCK": sandbox.directories.lock})
    result = subprocess.run(
        [*isolate, sys.executable, str(script), *BGHOST, "run"],
        env=env, cwd=sandbox.root, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "reused\n"), result.stderr

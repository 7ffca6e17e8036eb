"""Stops: smart, fast, immediate, their deadlines whatever the workers do, their order, and what comes in between."""

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from chaos import BLOCKED, CHAOS, DEAF, SWALLOW, is_deaf, table
from support import SLOW, Host, Sandbox, StartHost, notes, pid_in, until, within
from wire import answer, ask, connected

from bghost.shared.errors import BghostError

TERM, INT, QUIT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP


def start(bghost_host: StartHost, *tables: str, head: str = "") -> Host:
    config = f"[host]\nkinds = ['chaos']\n{head}\n" + "".join(tables)
    return bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=config)


def numbers(host: Host, *patterns: str) -> list[int]:
    """In which line each pattern is first found."""
    return [host.wait_line(pattern).number for pattern in patterns]


# Modes

TICK = """
note('ticks')
while not os.path.exists('go'):
    time.sleep(0.01)
note('half')
worker.wait(0.3)
note('whole')
"""


@pytest.mark.parametrize("by", ["request", "signal"])
def test_three_modes(by: str, sandbox: Sandbox) -> None:
    """Smart lets a tick end, fast stops it at its next safe point, immediate at once and without cleanup."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("one", tick=TICK, cleanup="note('cleanup {}', reason)"))
    modes = {"smart": TERM, "fast": INT, "immediate": QUIT}
    hosts = {mode: sandbox.start_host("run", env={"BGHOST_INSTANCE": mode}) for mode in modes}
    for host in hosts.values():
        host.wait_line("note: ticks")
    for mode, host in hosts.items():
        if by == "signal":
            host.signal(modes[mode])
        else:
            threading.Thread(target=host.client.shutdown, args=[mode]).start()
    hosts["immediate"].wait()
    for mode in ("smart", "fast"):
        hosts[mode].wait_row("one", lambda row: row["state"] == "stopping")
    (sandbox.root / "go").touch()
    codes = {mode: host.wait() for mode, host in hosts.items()}
    assert codes == dict.fromkeys(modes, 0)
    assert notes(hosts["smart"], "one") == ["ticks", "half", "whole", "cleanup stop"]
    assert notes(hosts["fast"], "one") == ["ticks", "half", "cleanup stop"]
    assert notes(hosts["immediate"], "one") == ["ticks"]
    for mode, exit in (
        ("smart", "exit code 0"),
        ("fast", "exit code 0"),
        ("immediate", "exit code 2, bypassing bghost"),
    ):
        assert f"[one] stopped: {exit}" in hosts[mode].text()
        assert f"stopping, {mode}" in hosts[mode].text()


ZOO: Mapping[str, str] = {
    "deaf": DEAF,
    "blocked": BLOCKED,
    "stopped": "note('is up'); os.kill(os.getpid(), signal.SIGSTOP)",
    "swallows": SWALLOW.replace("swallows", "is up"),
    "bomb": """
first = os.getpid()
for depth in range(3):
    if os.fork() == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if depth == 1:
            os.setsid()
if os.getpid() == first:
    note('is up')
else:
    while True:
        time.sleep(1)
""",
    "escape": """
program = 'import signal, time; signal.pthread_sigmask(0, signal.valid_signals()); time.sleep(120)'
kind.program = subprocess.Popen([sys.executable, '-c', program], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(120)
    os._exit(0)
os.wait()
note('is up')
""",
    "obeys": "note('is up')",
}
"""Workers that stop badly, and one that does well. The bomb has eight processes, some of them in other sessions."""

PROGRAM = table(
    "program",
    kind="exec",
    args={"command": ["sh", "-c", "trap '' TERM INT HUP; echo program is up; while :; do sleep 1; done"]},
)


def zoo(sandbox: Sandbox, instance: str, *, stop_timeout: float = 10.0) -> Host:
    sandbox.kinds({"chaos": CHAOS}) if not list(sandbox.site.iterdir()) else None
    tables = "".join(table(name, tick=code) for name, code in ZOO.items())
    sandbox.config(f"[host]\nstop_timeout = {stop_timeout}\n" + tables + PROGRAM)
    return sandbox.start_host("run", env={"BGHOST_INSTANCE": instance})


def test_deadlines_are_kept_whatever_the_workers_do(sandbox: Sandbox) -> None:
    """One second after the last deadline nothing is alive; who had to be killed is named, and the exit code is 1."""
    within(1.0, lambda: lateness(sandbox))


def lateness(sandbox: Sandbox) -> float:
    """How many seconds after its last deadline the slowest of three hosts is gone, that are stopped in each mode."""
    # seconds from the request to the last deadline, and the modes that it passes through
    ways = {"immediate": 1.0, "fast": 5.0 + 1.0, "smart": 0.5 + 5.0 + 1.0}
    hosts = {mode: zoo(sandbox, mode, stop_timeout=0.5) for mode in ways}
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    said: dict[str, list[str]] = {}

    def stop(mode: str) -> None:
        begun[mode] = time.monotonic()
        said[mode] = hosts[mode].client.shutdown(mode)["killed"]  # type: ignore[arg-type]
        ended[mode] = time.monotonic()

    for host in hosts.values():
        for name in ZOO:
            host.wait_line(rf"\[{name}\] note: is up", 30)
        host.wait_line("program is up")
        until(lambda host=host: is_deaf(host.row("deaf")["pid"]))  # type: ignore[misc]
    stoppers = [threading.Thread(target=stop, args=[mode]) for mode in ways]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join(40 * SLOW)
    late = {mode: ended[mode] - begun[mode] - seconds for mode, seconds in ways.items()}
    assert min(late.values()) >= -0.1, late
    for mode, host in hosts.items():
        assert host.wait() == 1
        # An immediate stop kills a program in any case: that was asked for.
        assert set(said[mode]) == {"deaf", "blocked", *(["program"] if mode != "immediate" else [])}, mode
        assert re.search(r"had to be killed: (.*)", host.text())[1].split(", ") == said[mode]  # type: ignore[index]
        left = re.findall(r"left behind by worker (\S+): pid", host.text())
        assert len(left) >= 3, (mode, left)  # the names are sure only where one ends at a time
        for name in ("stopped", "swallows", "obeys", "escape"):
            assert re.search(rf"\[{name}\] stopped: exit code", host.text()), (mode, name)
    assert not sandbox.processes()
    return max(late.values())


FREEZER: Final = Path("/sys/fs/cgroup/freezer")
"""Of cgroups of the first version: what is frozen there hangs in the kernel, and outlives SIGKILL until it thaws."""


@pytest.mark.skipif(not os.access(FREEZER, os.W_OK), reason="there is no freezer here that lets processes hang")
def test_a_worker_that_hangs_in_the_kernel(bghost_host: StartHost) -> None:
    """It is given up two seconds after SIGKILL, with its state; the host goes on, and ends with 1; the lock stays."""
    host = start(bghost_host, table("hangs"), table("other"))
    host.client.wait("hangs", "other")
    pid = host.row("hangs")["pid"]
    cgroup = FREEZER / f"bghost-test-{pid}"
    cgroup.mkdir()
    try:
        (cgroup / "cgroup.procs").write_text(str(pid))
        (cgroup / "freezer.state").write_text("FROZEN")
        begun = time.monotonic()
        assert host.client.stop("hangs", mode="immediate")["killed"] == ["hangs"]
        assert time.monotonic() - begun > 2.9
        host.wait_line(rf"\[hangs\] cannot be killed: pid {pid} is in state D")
        assert host.row("other")["state"] == "ready"
        assert host.client.request("shutdown", mode="fast") == {"killed": ["hangs"]}
        until(lambda: not host.alive, what="the host's end")
        assert host.code == 1
        second = host.sandbox.start_host("run", "--set", "host.stop_timeout=0.1")
        second.wait_line("processes of the last host of instance default have not ended yet, waiting")
    finally:
        (cgroup / "freezer.state").write_text("THAWED")
        until(lambda: not (cgroup / "cgroup.procs").read_text(), what="its end")
        cgroup.rmdir()
    second.wait_line("host of instance default runs")


def test_a_stop_of_one_worker_kills_only_that_one(bghost_host: StartHost) -> None:
    """Its deadline is its own; the command says whom it had to kill."""
    host = start(bghost_host, table("deaf", tick=ZOO["deaf"]), table("obeys"))
    up = host.wait_line(r"\[deaf\] note: is up")
    pid = host.client.wait("obeys")[0]["pid"]
    begun = time.monotonic()
    result = host.bghost("stop", "--now", "deaf", "obeys")
    assert time.monotonic() - begun >= 1.0
    assert (result.code, "had to be killed: deaf" in result.stderr) == (1, True), result
    rows = {row["name"]: (row["state"], row["exit"]) for row in host.client.ps()}
    assert rows == {"deaf": ("stopped", "killed by SIGKILL"), "obeys": ("stopped", "exit code 2, bypassing bghost")}
    assert pid is not None
    assert host.client.request("restart", names=["deaf"], timeout=5.0)[0]["state"] in ("ready", "starting")
    host.wait_line(r"\[deaf\] note: is up", after=up)
    until(lambda: is_deaf(host.row("deaf")["pid"]))  # before that it obeys
    assert host.client.shutdown("immediate") == {"killed": ["deaf"]}
    assert host.wait() == 1


# What comes in between


def test_ctrl_c_again_is_harder_and_nothing_else_is(sandbox: Sandbox) -> None:
    """INT, INT: fast, then immediate. TERM, TERM and HUP after TERM change nothing. TERM after INT changes nothing."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("one", tick=SWALLOW))

    def stopping(host: Host) -> list[str]:
        return re.findall(r"stopping, (\w+)", host.text())

    def impatience() -> float:
        impatient = sandbox.start_host("run", env={"BGHOST_INSTANCE": "a"})
        impatient.wait_line("note: swallows")
        begun = time.monotonic()
        impatient.signal(INT)
        impatient.wait_line("stopping, fast")
        impatient.signal(TERM)
        impatient.signal(HUP)
        impatient.signal(INT)
        assert impatient.wait() == 0
        assert stopping(impatient) == ["fast", "immediate"]
        assert "accepted" not in impatient.text()
        return time.monotonic() - begun

    within(3.0, impatience)  # which by itself is five seconds
    patient = sandbox.start_host("run", env={"BGHOST_INSTANCE": "b"})
    patient.wait_line("note: swallows")
    patient.signal(TERM)
    patient.wait_line("stopping, smart")
    for number in (TERM, HUP, TERM, HUP):
        patient.signal(number)
        patient.client.status()
    assert patient.client.status()["config"] == 1
    assert patient.client.status()["stopping"] == "smart"
    assert stopping(patient) == ["smart"]
    assert patient.client.shutdown("immediate") == {"killed": []}
    assert stopping(patient) == ["smart", "immediate"]
    assert "accepted" not in patient.text()


def test_all_that_is_asked_while_it_stops_is_answered(bghost_host: StartHost) -> None:
    """ps and status as ever; launch, restart and reload are refused; a worker that crashes stays down."""
    host = start(bghost_host, table("slow", tick=SWALLOW), table("crashes", tick=TICK + "os._exit(9)"))
    host.wait_line("note: swallows")
    host.wait_line("note: ticks")
    host.signal(TERM)
    host.wait_line("stopping, smart")
    assert host.client.status()["stopping"] == "smart"
    assert host.bghost("launch", "chaos", "--name", "late").code == 1
    for verb, args in (("reload", {}), ("launch", {"spec": {"kind": "chaos"}})):
        with pytest.raises(BghostError, match="the host is stopping"):
            host.client.request(verb, **args)  # type: ignore[arg-type]
    (host.sandbox.root / "go").touch()
    row = host.wait_row("crashes", lambda row: row["pid"] is None)
    assert (row["state"], row["exit"], row["starts"]) == ("stopped", "exit code 9, bypassing bghost", 1)
    host.signal(QUIT)
    assert host.wait() == 0
    assert len(re.findall(r"\] started, pid", host.text())) == 2


def starts_after_stop(host: Host) -> list[str]:
    text = host.text()
    return re.findall(r"\[(\S+)\] started, pid", text[text.index("stopping, ") :])


def test_no_worker_is_born_once_a_stop_has_begun(sandbox: Sandbox) -> None:
    """Not those that wait for others, not those that wait for their restart, not those that are next in a long row."""
    sandbox.kinds({"chaos": CHAOS})
    tables = {
        "held": table("slow", setup="note('up'); worker.wait(60)") + table("many", count=100, after=["slow"]),
        # it comes back 0.3 s after its crash, and the one after it takes 1 s to stop
        "backoff": table("first", setup="note('up')", tick="worker.wait(60); os._exit(3)", restart_after=0.3)
        + table("second", setup="note('up')", cleanup="time.sleep(1)", after=["first"]),
        "row": table("many", setup="note('up')", count=100, tick="worker.wait(60)"),
        "setup": table("one", setup="note('up')\nwhile not worker.stopping: time.sleep(0.01)"),
    }
    hosts = {}
    for name, text in tables.items():
        sandbox.config("[host]\nkinds = ['chaos']\nmax_workers = 120\n" + text)
        path = sandbox.root / f"{name}.toml"
        path.write_text(sandbox.config_file.read_text())
        hosts[name] = sandbox.start_host("run", env={"BGHOST_INSTANCE": name, "BGHOST_CONFIG": str(path)})
    with ExitStack() as stack:
        for name, host in hosts.items():
            host.wait_line(r"\[second\] note: up" if name == "backoff" else "note: up", 20)
            if name == "backoff":
                host.client.wait("second")
                host.client.request("wake", names=["first"])
                host.wait_line(r"\[first\] exit code 3.*started again")
            if name == "held":
                waiter = stack.enter_context(connected(host))
                ask(waiter, "wait", names=["many"], **{"for": "stopped"})
                host.client.ps()  # by the answer to which the host has been asked
            host.signal(INT)
        for name, host in hosts.items():
            assert host.wait(30) == 0, name
            assert starts_after_stop(host) == [], name
        # Who waits for one that never starts is told.
        assert [row["state"] for row in answer(waiter)["result"]] == ["stopped"] * 100
        assert len(re.findall(r"\[many\.\d+\] started", hosts["held"].text())) == 0


# Order


def test_workers_start_by_readiness_and_stop_in_reverse(bghost_host: StartHost) -> None:
    """Those of one layer together; a worker that is over keeps nobody from starting or stopping."""
    up, down = "note('up')", "note('down')"
    slow = "time.sleep(0.3); note('up')"
    host = start(
        bghost_host,
        table("c", setup=up, cleanup=down, after=["b", "done"]),
        table("b", count=2, setup=slow, cleanup=down, after=["a"]),
        table("done", setup=up, tick="sys.exit()", after=["a"]),
        table("a", setup=slow, cleanup=down),
    )
    host.client.wait("c")
    lines = numbers(host, *(rf"\[{name}\] note: up" for name in ("a", r"b\.1", r"b\.2", "c")))
    assert lines[0] < min(lines[1:3]) and max(lines[1:3]) < lines[3]
    os.kill(pid_in(host.row("a")), signal.SIGKILL)  # at first start only: its end changes nothing for the others
    host.wait_row("a", lambda row: row["starts"] == 2 and row["state"] == "ready")
    assert [row["starts"] for row in host.client.ps("b", "c")] == [1, 1, 1]
    assert host.client.shutdown() == {"killed": []}
    lines = numbers(host, *(rf"\[{name}\] note: down" for name in ("c", r"b\.1", r"b\.2", "a")))
    assert lines[0] < min(lines[1:3]) and max(lines[1:3]) < lines[3]
    assert "stopping, fast" not in host.text()


def test_the_layers_share_one_deadline(bghost_host: StartHost) -> None:
    """When the first one's stop has used it up, the next mode is for everybody at once."""

    def attempt() -> float:
        host = start(
            bghost_host,
            table("a", cleanup="note('down')"),
            table("b", tick=SWALLOW, after=["a"]),
            table("c", tick=SWALLOW, after=["b"]),
            head="stop_timeout = 0.4",
        )
        host.wait_line(r"\[c\] note: swallows")
        begun = time.monotonic()
        assert host.client.shutdown(timeout=60 * SLOW) == {"killed": []}
        took = time.monotonic() - begun
        assert took >= 5.4
        fast, down = numbers(host, "stopping, fast", r"\[a\] note: down")
        assert fast < down
        assert host.wait() == 0
        return took - 5.4

    within(1.0, attempt)  # not once for each layer


def test_an_order_that_cannot_be_is_a_config_error(sandbox: Sandbox) -> None:
    """A cycle is written out, a name that is nobody's has its neighbours named; nothing has been started."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("a", after=["b"]) + table("b", after=["c"]) + table("c", after=["a"]))
    result = sandbox.bghost("run")
    assert result.code == 2 and "a after b after c after a" in result.stderr
    sandbox.config(table("first") + table("b", after=["frist"]))
    result = sandbox.bghost("run")
    assert result.code == 2 and "first" in result.stderr and "started" not in result.stderr

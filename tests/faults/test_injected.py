"""System calls of the host that fail at the Nth call, N = 1, 2, 3, until none does: strace has them fail."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import poolkit
import pytest
from chaos import CHAOS, table
from oracle import ended, oracle, pid_of, quiet, usage
from processes import guard_of
from support import Host, Sandbox, StartHost, notes, pid_in, until

from bghost import WorkerSpec
from bghost.shared.errors import BghostError


def _strace() -> str:
    """Why system calls cannot be made to fail here, if so."""
    if shutil.which("strace") is None:
        return "there is no strace here"
    done = subprocess.run(
        ["strace", "-qq", "-e", "inject=getppid:error=EPERM", "-o", os.devnull, "true"], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else f"strace does not work here: {done.stderr.strip()}"


pytestmark = pytest.mark.skipif(bool(_strace()), reason=_strace() or "it works")


SOAK: Final = os.environ.get("BGHOST_SOAK", "") not in ("", "0")


class Injection:
    """A strace that is attached to a process, and what it has logged."""

    def __init__(self, log: Path) -> None:
        self._log = log

    @property
    def fired(self) -> int:
        """How many calls have been made to fail."""
        return self._log.read_text().count("(INJECTED)")


@contextlib.contextmanager
def injected(pid: int, what: str, log: Path, *, path: str | None = None) -> Iterator[Injection]:
    """Have system calls of *pid* alone, not of its children, fail as *what* says, as long as the block lasts."""
    calls = what.partition(":")[0]
    only = ["-P", path] if path else []
    argv = ["strace", "-p", str(pid), "-o", str(log), *only, "-e", f"trace={calls}", "-e", f"inject={what}"]
    strace = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert strace.stderr is not None
    try:
        line = strace.stderr.readline()
        assert "attached" in line, line
        yield Injection(log)
    finally:
        strace.send_signal(signal.SIGINT)
        strace.communicate(timeout=10)


def life(host: Host, name: str) -> None:
    """A worker is launched, crashes, comes back, and is stopped; clients see all of it."""
    spec = WorkerSpec(kind="chaos", name=name, restart_after=0.05, restart_max=0.05)
    try_again(lambda: host.client.launch(spec))
    pid = settled(host, name)
    os.kill(pid, signal.SIGKILL)
    # Not until that exit is told: a fork that fails may be the newer one by then.
    until(lambda: try_again(lambda: host.client.ps(name))[0]["pid"] != pid)
    settled(host, name)
    try_again(lambda: host.client.stop(name))


def settled(host: Host, name: str) -> int:
    """The pid of the worker once it is ready."""
    return (
        until(
            lambda: next(
                (row["pid"] for row in try_again(lambda: host.client.ps(name)) if row["state"] == "ready"), None
            )
        )
        or 0
    )


T = TypeVar("T")


def try_again(ask: Callable[[], T]) -> T:
    """What a client does whose connection the host could not take."""
    for _ in range(20):
        try:
            return ask()
        except BghostError as error:
            if "already" in str(error):
                return None  # type: ignore[return-value]
            last = error
    raise last


def start(bghost_host: StartHost, *tables: str) -> Host:
    host = bghost_host(kinds={"chaos": CHAOS}, args=["run"], config="[host]\nkinds = ['chaos']\n" + "".join(tables))
    host.client.ps()
    return host


SWEEPS: Final = {
    "clone,clone3,fork,vfork:error=EAGAIN": "no process can be forked: .*RLIMIT_NPROC",
    "clone,clone3,fork,vfork:error=ENOMEM": "no process can be forked: .*memory",
    "pidfd_open:error=EMFILE": "no process can be forked: .*RLIMIT_NOFILE",
    "epoll_ctl:error=ENOSPC": "epoll takes no further descriptor .*max_user_watches.*poll has to do",
    "openat:error=EMFILE": "",
    "kill,pidfd_send_signal:error=EPERM": "",
    "sendto:error=ENOBUFS": "",
    "pipe2:error=EMFILE": "no process can be forked: .*RLIMIT_NOFILE",
}
"""Calls of the host that fail, and what it says of that, if anything."""


def turns(step: int = 2) -> Iterator[tuple[str, bool]]:
    """Which calls are to fail in one life after the other, and whether there may be no more of them.

    Every second one, from the first and from the second: all of them in two lives. With BGHOST_SOAK each by itself, up
    to the first life in which there is none.

    :param step: not 2 where what fails is tried again by two calls.
    """
    if SOAK:
        yield from ((f"{number}", number > 1) for number in range(1, 100))
    else:
        yield from ((f"{number}+{step}", number > 1) for number in range(1, step + 1))


@pytest.mark.timeout(1_800 if SOAK else 120)
def test_calls_that_fail(bghost_host: StartHost, tmp_path: Path) -> None:
    """A worker that could not be started is started again, what was said names the limit; all others are unharmed."""
    host = start(bghost_host, table("bystander"))
    (bystander,) = host.client.wait("bystander")
    life(host, "w")
    before = usage(host)
    lives = 0
    for what, said in SWEEPS.items():
        fired = 0
        for when, last in turns(3 if what.startswith("sendto") else 2):
            lives += 1
            with injected(host.pid, f"{what}:when={when}", tmp_path / f"strace-{lives}") as injection:
                life(host, "w")
            fired += injection.fired
            if last and not injection.fired:
                break
            oracle(host, before, faults=lives)
        assert fired, f"{what}: nothing has failed"
        assert not SOAK or not injection.fired, f"{what}: there is no end of it"
        assert re.search(said, host.text()), f"{what}: {host.text()}"
    assert (host.row("bystander")["pid"], host.row("bystander")["starts"]) == (bystander["pid"], 1)
    assert "a bug of bghost" not in host.text()
    assert host.client.shutdown() == {"killed": []}
    ended(host)


def test_no_process_for_a_while(bghost_host: StartHost, tmp_path: Path) -> None:
    """A launch answers with the limit's name, what runs goes on, and a guard that dies is renewed when that can be."""
    host = start(bghost_host, table("bystander"))
    host.client.wait("bystander")
    before = usage(host)
    with injected(host.pid, "clone,clone3,fork,vfork:error=EAGAIN", tmp_path / "strace") as injection:
        spec = WorkerSpec(kind="chaos", name="one", restart_after=1.0, restart_max=1.0)
        with pytest.raises(BghostError, match="did not become ready") as refused:
            host.client.launch(spec, wait=True)
        assert "Resource temporarily unavailable; the limits are RLIMIT_NPROC" in str(refused.value.detail)
        os.kill(guard_of(host.pid), signal.SIGKILL)
        host.wait_line("the guard has died, and there can be no new one: .*RLIMIT_NPROC")
        until(lambda: injection.fired >= 4)
        assert host.row("bystander")["starts"] == 1
    host.client.wait("one")
    host.client.stop("one")
    oracle(host, before)
    assert host.client.shutdown() == {"killed": []}
    ended(host)


def test_no_process_for_a_pools_worker(bghost_host: StartHost, tmp_path: Path) -> None:
    """Its manager is told with the limit's name, and the key is tried again until there is one."""
    go = tmp_path / "go"
    manage = f"""
    def manage(self, worker):
        return self.pool.reconcile({{Key(1): {{"n": 1}}}}) if os.path.exists({str(go)!r}) else 0.05
"""
    host = poolkit.start(bghost_host, manager=manage)
    host.client.wait("manager")
    with injected(host.pid, "clone,clone3,fork,vfork:error=EAGAIN", tmp_path / "strace") as injection:
        go.touch()
        host.wait_line(r"note: 2 launch_failed key 1 generation 2")
        assert injection.fired >= 2
    host.wait_line(r"note: \d+ started key 1")
    told = notes(host, "manager")
    assert told[0] == "1 launch_failed key 1 generation 1"
    assert re.match("why: no process can be forked: .*RLIMIT_NPROC", told[1])
    assert host.row("manager")["starts"] == 1
    assert host.client.shutdown() == {"killed": []}
    ended(host)


# Without pidfds


def test_a_life_without_pidfds(sandbox: Sandbox, tmp_path: Path) -> None:
    """SIGCHLD has to do where seccomp denies pidfds: said once; births, deaths, waits, stops and the guard as ever."""
    sandbox.kinds({"chaos": CHAOS})
    boss = """
worker.wait(60)
handle = worker.launch(WorkerSpec(kind='chaos', name='child', restart_after=0.05))
note('ready {}', handle.wait_ready(10))
note('kills {}', handle.signal(signal.SIGKILL))
worker.wait(0.5)
note('again {}', handle.wait_ready(10))
note('stops {}', handle.stop())
"""
    sandbox.config(
        "[host]\nstop_timeout = 0.5\n" + table("boss", tick=boss) + table("one", count=3, restart_after=0.05)
    )
    inject = "inject=pidfd_open:error=EPERM"
    host = sandbox.start_host_under("strace", "-f", "-qq", "--seccomp-bpf", "-o", os.devnull, "-e", inject)
    host.wait_answering()
    host.client.wait("boss", "one")
    before = usage(host)
    for row in host.client.ps("one"):
        os.kill(pid_in(row), signal.SIGKILL)
    for number in (1, 2, 3):
        host.wait_row(f"one.{number}", lambda row: row["starts"] == 2 and row["state"] == "ready")
    host.client.request("wake", names=["boss"])
    host.wait_line("note: stops")
    assert notes(host, "boss") == ["ready True", "kills True", "again True", "stops True"]
    pid = pid_of(host)
    os.kill(guard_of(pid), signal.SIGKILL)
    host.wait_line("the guard has died; there is a new one")
    oracle(host, before)
    assert host.text().count("there are no pidfds here (Operation not permitted), SIGCHLD has to do") == 1
    host.client.launch(WorkerSpec(kind="chaos", name="deaf", args={"tick": "note('is up'); deaf_sleep(60)"}))
    host.wait_line(r"\[deaf\] note: is up")
    pids = [row["pid"] for row in host.client.ps() if row["pid"]]
    os.kill(pid, signal.SIGKILL)
    host.wait_line(r"guard \(default\): killed pid \d+ \(bghost: deaf", 30)
    host.wait()
    assert len(pids) == 5
    quiet(host)


# The loop itself


def test_a_bug_in_the_loop_ends_the_host_in_order(bghost_host: StartHost, tmp_path: Path) -> None:
    """It is logged, the workers are stopped with their cleanup, and the exit code is 70."""
    host = start(bghost_host, table("w", count=3, cleanup="note('cleanup {}', reason)"))
    host.client.wait("w")
    with injected(host.pid, "epoll_wait,epoll_pwait,epoll_pwait2:error=EINVAL:when=1", tmp_path / "strace"):
        with contextlib.suppress(BghostError):
            host.client.status()
        host.wait_line("CRITICAL .*a bug of bghost; the host stops")
    assert host.wait() == 70
    assert host.text().count("a bug of bghost") == 1
    assert "Invalid argument" in host.text()
    for number in (1, 2, 3):
        assert notes(host, f"w.{number}") == ["cleanup stop"]
    assert host.sandbox.processes() == {}


def test_a_loop_that_does_nothing_but_fail_is_left(bghost_host: StartHost, tmp_path: Path) -> None:
    """Its end is then what ends the workers; nothing goes on half-dead."""
    host = start(bghost_host, table("w", count=3))
    host.client.wait("w")
    with injected(host.pid, "epoll_wait,epoll_pwait,epoll_pwait2:error=EINVAL", tmp_path / "strace"):
        with contextlib.suppress(BghostError):
            host.client.status()
        assert host.wait() == 70
    assert host.text().count("a bug of bghost") == 3
    until(lambda: host.sandbox.processes() == {})


def test_a_log_that_cannot_be_written_stops_nobody(bghost_host: StartHost, tmp_path: Path) -> None:
    """Lines may be lost then; workers, requests and the exit code are not."""
    host = start(bghost_host, table("bystander"))
    host.client.wait("bystander")
    life(host, "w0")
    before = usage(host)
    stderr = os.readlink(f"/proc/{host.pid}/fd/2")
    for number, (when, last) in enumerate(turns(), 1):
        log = tmp_path / f"strace-{number}"
        with injected(host.pid, f"write:error=ENOSPC:when={when}", log, path=stderr) as injection:
            life(host, "w0")
        if last and not injection.fired:
            break
        oracle(host, before, faults=number)
    assert number > 1
    with injected(host.pid, "write:error=EPIPE", tmp_path / "strace", path=stderr):
        life(host, "w0")
    assert host.row("bystander")["starts"] == 1
    assert host.client.shutdown() == {"killed": []}
    ended(host)


def test_files_that_cannot_be_renamed_or_removed_stop_nobody(bghost_host: StartHost, tmp_path: Path) -> None:
    """The log goes on where it went, the host ends as ever, and the next one takes away what was left."""
    log = tmp_path / "bghost.log"
    config = f"[host.log]\nfile = '{log}'\nrotate_size = 1024\n"
    config += table("talks", tick="worker.wait(60)\nnote('x' * 2000)")
    host = bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=config)
    host.client.wait("talks")
    with injected(host.pid, "rename,renameat,unlink,unlinkat:error=EACCES", tmp_path / "strace"):
        host.client.request("wake", names=["talks"])  # not before: it would be rotated
        until(lambda: "cannot be rotated: Permission denied" in log.read_text())
        assert host.client.shutdown() == {"killed": []}
        assert host.wait() == 0
    assert "xxx" in log.read_text() and os.path.exists(host.directories.socket)
    again = host.sandbox.start_host("run")
    again.wait_answering()
    until(lambda: (tmp_path / "bghost.log.1").exists())
    again.client.wait("talks")
    assert again.client.shutdown() == {"killed": []}
    ended(again)


# The start

AT_START: Final = ("memfd_create:error=ENOMEM", "mmap:error=ENOMEM", "pipe2:error=EMFILE") + (
    (
        "epoll_create1:error=EMFILE",
        "eventfd2:error=EMFILE",
        "socket:error=EMFILE",
        "bind:error=EACCES",
        "pidfd_open:error=EMFILE",
        "flock:error=ENOLCK",
        "clone,clone3,fork,vfork:error=EAGAIN",
        "unlink:error=EACCES",
    )
    if SOAK
    else ()
)


@pytest.mark.timeout(600 if SOAK else 120)
@pytest.mark.parametrize("what", AT_START, ids=lambda value: value.replace(",clone3,fork,vfork", ""))
def test_calls_that_fail_at_the_start(what: str, sandboxes: Callable[[], Sandbox], tmp_path: Path) -> None:
    """The host runs, or ends with one clear line; nothing is left of it."""
    # Of the maps only those that are shared: the interpreter's own come by the hundred, and are its own affair.
    only = ["-P", "/memfd:bghost-control"] if what.startswith("mmap") else []
    fired = False
    for number in range(1, 100 if SOAK else 2):
        box = sandboxes()
        box.kinds({"chaos": CHAOS})
        box.config(table("one", restart_after=0.1))
        log = tmp_path / f"strace-{number}"
        calls = what.partition(":")[0]
        inject = [*only, "-e", f"trace={calls}", "-e", f"inject={what}:when={number}"]
        host = box.start_host_under("strace", "-D", "-qq", "-o", str(log), *inject)
        ready_or_over(host)
        fired = "(INJECTED)" in log.read_text()
        if host.alive:
            assert host.client.shutdown() == {"killed": []}
            assert host.wait() == 0
        else:
            assert host.wait() in (1, 2), host.text()
            assert re.search("^bghost: .+", host.text(), re.MULTILINE), host.text()
        quiet(host)
        assert box.processes() == {}
        if not fired:
            break
    assert number > 1 or fired, "nothing has failed"


def ready_or_over(host: Host) -> None:
    """Wait until its worker is ready, or it has ended."""

    def look() -> bool:
        try:
            return not host.alive or host.row("one")["state"] == "ready"
        except BghostError:
            return False

    until(look, what="a worker that is ready, or an end")


def test_a_host_without_epoll(sandbox: Sandbox, tmp_path: Path) -> None:
    """From its start on the kernel lets nothing into an epoll: poll has to do, which is said once."""
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config(table("bystander"))
    inject = ["-e", "trace=epoll_ctl", "-e", "inject=epoll_ctl:error=ENOSPC"]
    host = sandbox.start_host_under("strace", "-D", "-qq", "-o", os.devnull, *inject)
    host.wait_answering()
    host.client.wait("bystander")
    life(host, "w0")
    before = usage(host)
    life(host, "w1")
    oracle(host, before)
    assert host.text().count("poll has to do") == 1
    host.signal(signal.SIGTERM)
    ended(host)

"""Workers in an interpreter of their own: like those that are forked, and their kinds are not imported in the host."""

import os
import signal
from pathlib import Path

import pytest
from chaos import CHAOS, table
from support import StartHost, notes, pid_in, until

from bghost import WorkerSpec

either = pytest.mark.parametrize("start", ["fork", "spawn"])


@either
def test_a_worker_however_it_is_started(start: str, bghost_host: StartHost) -> None:
    """One pid from the fork on; its log and output are the host's; requests, dumps, deaths and stops are as ever."""
    ask = "note('asked {}', worker.launch(WorkerSpec(kind='chaos', name='child')).wait_ready(10))"
    one = table("one", start=start, setup="print('printed')", tick=ask, cleanup="note('cleanup {}', reason)")
    host = bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=one)
    (row,) = host.client.wait("one")
    pid = pid_in(row)
    assert host.wait_line(r"\[one\] started, pid (\d+)").match[1] == str(pid)
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"bghost: one (default)")
    assert os.getsid(pid) == pid
    host.wait_line(r"INFO +\[one\] printed")
    host.wait_line("note: asked True")
    host.wait_row("one", lambda row: row["doing"] == "idle")
    until(lambda: "in sleep" in host.client.request("dump", names=["one"])["one"])  # idle an instant before it sleeps
    os.kill(pid, signal.SIGKILL)
    again = host.wait_row("one", lambda row: row["starts"] == 2 and row["state"] == "ready")
    assert again["pid"] != pid
    assert host.client.stop("one") == {"stopped": ["one"], "killed": []}
    assert notes(host, "one")[-1] == "cleanup stop"


def test_spawned_kinds_are_not_imported_in_the_host(bghost_host: StartHost) -> None:
    """Nor in a worker of another kind; settings and the workers that it asks for are known all the same."""
    odd = """
import os, threading
import bghost
from bghost import WorkerSpec

class Settings(bghost.Settings):
    word: str = 'none'

class Kind:
    Settings = Settings

    @staticmethod
    @bghost.hookimpl
    def bghost_workers(settings):
        return [WorkerSpec(kind='odd', start='spawn', settings={'word': settings.word + '!'})] * 2

    @bghost.hookimpl
    def bghost_tick(self, worker):
        worker.log.info('note: {} {}', worker.settings.word, os.getppid() == HERE)
        return bghost.UNTIL_WOKEN

HERE = os.getppid()
"""
    host = bghost_host(kinds={"odd": odd}, args=["run", "odd", "--set", "odd.word=true"])
    host.client.wait("odd.1", "odd.2")
    for name in ("odd.1", "odd.2"):
        host.wait_line(rf"\[{name}\] note: true! True")
    assert "test_kind_odd" not in Path(f"/proc/{host.pid}/maps").read_text()
    assert host.bghost("stop", "odd").code == 0


@either
def test_a_signal_before_its_handler_stands_is_not_lost(start: str, bghost_host: StartHost) -> None:
    """It is delivered when signals are unblocked: an orderly end, and the worker comes back."""
    host = bghost_host(kinds={"chaos": CHAOS}, args=["run"], config="[host]\nkinds = ['chaos']\n")
    for number in range(2):
        name = f"w{number}"
        spec = WorkerSpec(kind="chaos", name=name, start=start, restart_after=0.05)  # type: ignore[arg-type]
        os.kill(pid_in(host.client.launch(spec)), signal.SIGTERM)
        row = host.wait_row(name, lambda row: row["starts"] == 2 and row["state"] == "ready")
        assert row["exit"] == "exit code 1", row


@either
def test_the_hosts_death_while_a_worker_starts(start: str, bghost_host: StartHost) -> None:
    """Whatever the young process is about when the host is killed, it is gone at once, without the guard's help."""
    tables = table("young", start=start, count=3, setup="note('up')")
    host = bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=tables, answering=False)
    host.wait_line(r"\] started, pid")
    host.signal(signal.SIGKILL)
    until(lambda: host.sandbox.processes() == {}, 30.0, "the end of all")
    host.wait()
    assert "which the dead host had left behind" not in host.text()


def test_an_interpreter_that_cannot_be_had(bghost_host: StartHost) -> None:
    """The worker's error says so; the host and others go on."""
    gone = "import sys; sys.executable = '/nowhere/python'\n" + CHAOS
    two = table("one", start="spawn", restart="never") + table("two", kind="other")
    host = bghost_host(kinds={"chaos": CHAOS, "other": gone}, args=["run"], config=two)
    row = host.wait_row("one", lambda row: row["state"] == "failed")
    assert row["exit"] == "exit code 1"
    assert (
        row["last_error"]
        == f"cannot be started: /nowhere/python cannot be run by uid {os.getuid()}: No such file or directory"
    )
    host.client.wait("two")

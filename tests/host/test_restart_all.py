"""``on_crash = "restart-all"``: one worker's crash ends every process, and all start again, as in PostgreSQL."""

import os
import re
import signal

from chaos import CHAOS, table
from support import Host, StartHost, notes, pid_in


def start(bghost_host: StartHost, *tables: str, on_crash: str = "restart-all") -> Host:
    config = f"[host]\nkinds = ['chaos']\non_crash = '{on_crash}'\n" + "".join(tables)
    return bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=config)


def test_a_crash_restarts_everybody(bghost_host: StartHost) -> None:
    """BG-16: who is never restarted is gone, the others are back at once, whatever their delays; done is done."""
    up, down = "note('up')", "note('down')"
    host = start(
        bghost_host,
        table("never", setup=up, restart="never"),
        table("slow", setup=up, cleanup=down, count=2, restart_after=600),
        table("deaf", setup=up, tick="if worker.args: time.sleep(1)", restart_after=600),
        table("over", tick="sys.exit()"),
        table("crasher", setup=up, restart_after=0.2),
    )
    host.client.wait("never", "slow", "deaf", "crasher")
    host.client.wait("over", until="stopped")
    os.kill(pid_in(host.row("crasher")), signal.SIGSEGV)
    host.wait_line("worker crasher has crashed: all workers are started again")
    for name in ("slow.1", "slow.2", "deaf", "crasher"):
        host.wait_row(name, lambda row: row["starts"] == 2 and row["state"] == "ready", 30.0)
    rows = {row["name"]: (row["state"], row["starts"], row["exit"]) for row in host.client.ps()}
    assert rows["never"] == ("stopped", 1, "exit code 2, bypassing bghost")
    assert rows["over"][:2] == ("done", 1)
    assert rows["slow.1"][2] == "exit code 2, bypassing bghost"  # at once: what it shared may be half-written
    assert rows["crasher"][2] == "killed by SIGSEGV"
    assert "down" not in notes(host, "slow.1")
    assert host.client.shutdown() == {"killed": []}
    assert host.wait() == 0


def test_two_crashes_at_once_are_one_restart(bghost_host: StartHost) -> None:
    """BG-17: only the first is told as a crash; each worker comes back once."""
    host = start(bghost_host, table("w", count=6, restart_after=0.05))
    pids = [pid_in(row) for row in host.client.wait("w")]
    host.signal(signal.SIGSTOP)  # so that it sees both at the same time
    for pid in pids[:2]:
        os.kill(pid, signal.SIGKILL)
    host.signal(signal.SIGCONT)
    for number in range(1, 7):
        host.wait_row(f"w.{number}", lambda row: row["starts"] == 2 and row["state"] == "ready")
    assert len(re.findall("has crashed: all workers are started again", host.text())) == 1
    assert [row["starts"] for row in host.client.ps()] == [2] * 6


def test_what_is_no_crash_restarts_nobody_else(bghost_host: StartHost) -> None:
    """Exit 0 and 1, a stop, a SIGTERM from elsewhere; and no crash does where each is on its own."""
    host = start(
        bghost_host,
        table("quiet"),
        table("one", tick="sys.exit(1)", restart="never"),
        table("zero", tick="sys.exit(0)"),
        table("stopped"),
        table("terminated", restart_after=0.05),
    )
    alone = start(bghost_host, table("quiet"), table("dies", tick="os._exit(9)", restart="never"), on_crash="restart")
    host.client.wait("one", "zero", until="stopped")
    host.client.wait("stopped", "terminated")
    host.client.stop("stopped", mode="immediate")
    os.kill(pid_in(host.row("terminated")), signal.SIGTERM)
    host.wait_row("terminated", lambda row: row["starts"] == 2)
    alone.client.wait("dies", until="stopped")
    assert host.row("quiet")["starts"] == alone.row("quiet")["starts"] == 1
    assert "has crashed" not in host.text() + alone.text()


def test_a_stop_in_the_middle_of_it_holds(bghost_host: StartHost) -> None:
    """Who was to come back does not, once a stop has begun."""
    host = start(bghost_host, table("w", count=10, cleanup="time.sleep(1)", restart_after=1.0))
    pids = [pid_in(row) for row in host.client.wait("w")]
    host.signal(signal.SIGSTOP)
    os.kill(pids[0], signal.SIGKILL)
    host.signal(signal.SIGINT)
    host.signal(signal.SIGCONT)
    assert host.wait() == 0
    text = host.text()
    assert "started, pid" not in text[text.index("stopping, fast") :]

"""What workers leave behind: found, ended and named when they end; what a living one keeps in the background stays."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import CHAOS, table
from processes import children, state
from support import BGHOST, SLOW, Host, Sandbox, StartHost, pid_in, until

FORKED = """
import setproctitle
told, tell = os.pipe()
def forked(title, then=None, leave=None):
    pid = os.fork()
    if pid == 0:
        if leave:
            leave()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        setproctitle.setproctitle(title)
        os.write(tell, b'.')
        if then:
            then()
        while True:
            time.sleep(1)
    return pid
def wait_for(count):
    while count:
        count -= len(os.read(told, count))
"""
"""Forks with a title, and the wait until so many have theirs."""

FAMILY = (
    FORKED
    + """
forked('kin: in the group')
forked('kin: in a session', leave=os.setsid)
# in the group, and what it has started is not: it comes to the host only when this one has ended, too
forked('kin: parent', lambda: forked('kin: of a parent', lambda: forked('kin: of that', leave=os.setsid), os.setsid))
if os.fork() == 0:  # twice forked, as daemons do
    os.setsid()
    forked('kin: daemon')
    os._exit(0)
os.wait()
nap = 'import signal, sys, time; signal.pthread_sigmask(0, signal.valid_signals()); time.sleep(120)'
kind.program = subprocess.Popen([sys.executable, '-c', nap, 'kin: program'], start_new_session=True)
wait_for(6)
note('has kin')
"""
)
KIN = 7


def start(bghost_host: StartHost, *tables: str, head: str = "") -> Host:
    config = f"[host]\nkinds = ['chaos']\n{head}\n" + "".join(tables)
    return bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=config)


@pytest.mark.parametrize("end", ["killed", "stopped", "with the host"])
def test_all_descendants_end_with_their_worker(end: str, bghost_host: StartHost) -> None:
    """Of any depth, in any group and session, forked or exec'd; those that had left the group are named."""
    host = start(bghost_host, table("family", tick=FAMILY, restart="never"), table("other"))
    host.wait_line("note: has kin")
    # Popen returns an instant before the new command line can be read.
    until(lambda: sum("kin: " in line for line in host.sandbox.processes().values()) == KIN, what="all kin")
    if end == "killed":
        os.kill(pid_in(host.row("family")), signal.SIGKILL)
        host.client.wait("family", until="stopped")
    elif end == "stopped":
        host.client.stop("family")
    else:
        assert host.client.shutdown() == {"killed": []}
    until(lambda: not any("kin: " in line for line in host.sandbox.processes().values()), what="the end of all kin")
    pattern = r"left behind by worker (\w+): pid \d+ \((.*)\); killed"
    said = (
        until(lambda: found if len(found := re.findall(pattern, host.text())) >= 5 else None, what="five lines") or []
    )
    # Whose a fork was can be told as long as its worker has not ended together with others.
    assert {worker for worker, _ in said} <= ({"family", "other"} if end == "with the host" else {"family"})
    assert {re.search("kin: [a-z ]+", line)[0].strip() for _, line in said} == {  # type: ignore[index]
        "kin: in a session",
        "kin: of a parent",
        "kin: of that",
        "kin: daemon",
        "kin: program",
    }
    if end == "with the host":
        assert host.wait() == 0
        assert not host.sandbox.processes()
    else:
        assert host.row("other")["starts"] == 1
        until(lambda: not zombies(host), what="no zombie")


HEADLESS = (
    FORKED
    + """
import ctypes, threading
def lose_main_thread(title):
    def then():
        forked(title, leave=os.setsid)
        threading.Thread(target=time.sleep, args=(120,)).start()
        ctypes.CDLL(None).syscall(60, 0)  # exit: of this thread, not of the process
    return then
near = forked('kin: near', lose_main_thread('kin: below'), leave=os.setpgrp)
apart = forked('kin: apart', lose_main_thread('kin: far below'), leave=os.setsid)
wait_for(4)
while any(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z' for pid in (near, apart)):
    time.sleep(0.02)
note(f'has kin: {near} {apart}')
"""
)
"""A process without its main thread stands for one on its way out: /proc shows no environment and no files of it."""


def test_what_is_on_its_way_out_while_it_is_looked_at_hides_nothing(bghost_host: StartHost) -> None:
    """One in the worker's session is still ended; one that nothing tells the worker of is looked below when it ends."""
    host = start(bghost_host, table("family", tick=HEADLESS, restart="never"), table("other"))
    near, apart = map(int, host.wait_line(r"note: has kin: (\d+) (\d+)").match.groups())
    host.client.stop("family")
    host.wait_line(r"left behind by worker family: pid \d+ \(kin: below\); killed")
    until(lambda: not Path(f"/proc/{near}").exists(), what="the end of the one in the worker's session")
    os.kill(apart, signal.SIGKILL)
    host.wait_line(r"left behind by worker family: pid \d+ \(kin: far below\); killed")
    until(lambda: not any("kin: " in line for line in host.sandbox.processes().values()), what="the end of all kin")
    until(lambda: not zombies(host), what="no zombie")
    assert host.row("other")["starts"] == 1


def zombies(host: Host) -> list[int]:
    return [pid for pid in children(host.pid) if state(pid) == "Z"]


def test_what_a_living_worker_has_in_the_background_stays(bghost_host: StartHost) -> None:
    """Another worker's end does not touch it; when it ends by itself it is reaped at once."""
    background = """
program = 'import time; time.sleep({seconds})'
subprocess.run(['sh', '-c', 'setsid "$@" & exit 0', 'sh', sys.executable, '-c', program, 'background-' + worker.name])
note('has started one')
"""
    host = start(
        bghost_host,
        table("keeper", tick=background.replace("{seconds}", "120")),
        table("short", tick=background.replace("{seconds}", "0.5")),
        table("dies", tick="worker.wait(60); os._exit(1)", restart="never"),
    )
    for name in ("keeper", "short"):
        host.wait_line(rf"\[{name}\] note: has started one")

    def there(name: str) -> list[int]:
        return [
            pid
            for pid, line in host.sandbox.processes().items()
            if f"background-{name}" in line and "sh -c" not in line
        ]

    until(lambda: there("keeper"))
    host.client.wait("dies")
    host.client.request("wake", names=["dies"])
    host.client.wait("dies", until="stopped")
    until(lambda: not there("short"), what="the end of the short one")
    until(lambda: not zombies(host), what="no zombie")
    assert there("keeper")
    assert "left behind" not in host.text()
    host.client.stop("keeper")
    host.wait_line(r"left behind by worker keeper: pid \d+ \(.*background-keeper")
    until(lambda: not there("keeper"))


AS_INIT = """
import os, signal, subprocess, sys, time
from bghost.shared.client import Client
# This process has come into the namespace from outside; it stands for a `docker exec`.
def wait(condition):
    until = time.monotonic() + 15
    while not (value := condition()):
        assert time.monotonic() < until, subprocess.run(['ps', 'axf'], capture_output=True, text=True).stdout
        time.sleep(0.02)
    return value
# both are strangers to the host, and its children now
subprocess.run(['sh', '-c', 'exec >/dev/null 2>&1; sleep 61 & sleep 0.3 & exit 0'])
def strangers(seconds):
    return subprocess.run(['pgrep', '-f', f'^sleep {seconds}$'], capture_output=True, text=True).stdout.split()
wait(lambda: strangers(61))
client = Client()
wait(lambda: not strangers('0.3'))
wait(lambda: 'Z' not in subprocess.run(['ps', '-eo', 'stat='], capture_output=True, text=True).stdout)
wait(lambda: len(subprocess.run(['pgrep', '-f', 'kin: '], capture_output=True, text=True).stdout.split()) == 7)
os.kill(client.ps('family')[0]['pid'], signal.SIGKILL)
client.wait('family', until='stopped')
wait(lambda: not subprocess.run(['pgrep', '-f', 'kin: '], capture_output=True, text=True).stdout.split())
assert strangers(61), 'a stranger was killed'
print('ok', flush=True)
"""


def test_as_pid_1_it_reaps_strangers_and_kills_none(sandbox: Sandbox) -> None:
    """As in a container: whoever loses its parent there comes to the host, which ends only what is its workers' own."""
    isolate = ["unshare", "-pf", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or shutil.which("nsenter") is None
        or subprocess.run([*isolate, "true"], capture_output=True).returncode != 0
    ):
        pytest.skip("no PID namespace can be made here")
    sandbox.kinds({"chaos": CHAOS})
    sandbox.config("[host]\nstop_timeout = 600\n" + table("family", tick=FAMILY, restart="never") + table("other"))
    host = subprocess.Popen(
        [*isolate, *BGHOST, "run"], env=sandbox.environ(), cwd=sandbox.root, stderr=subprocess.PIPE, text=True
    )
    try:
        client = sandbox.client()

        def answers() -> bool:
            try:
                return client.ps("family")[0]["ticks"] == 1
            except Exception:
                return False

        until(answers)
        (init,) = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
        script = sandbox.root / "exec.py"
        script.write_text(AS_INIT)
        inside = subprocess.run(
            ["nsenter", "-t", init, "-p", "-m", sys.executable, str(script)],
            env=sandbox.environ(), capture_output=True, text=True, timeout=40 * SLOW,
        )  # fmt: skip
        assert (inside.returncode, inside.stdout) == (0, "ok\n"), inside.stderr
        client.shutdown()
        assert host.wait(30 * SLOW) == 0
    finally:
        if host.poll() is None:
            host.kill()
            host.wait()
            for pid in sandbox.processes():
                os.kill(pid, signal.SIGKILL)
        assert host.stderr is not None
        print(host.stderr.read())
        host.stderr.close()

"""A host that is still setting up: it can be stopped, and nothing that a plugin does there holds it up for ever."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import SLOW, Sandbox, StartHost

SLOW_EXTENSION = """
import time, bghost

class Extension:
    @bghost.hookimpl
    def bghost_host_setup(self, host):
        host.log.info("note: sets up")
        time.sleep(600)

    @bghost.hookimpl
    def bghost_host_cleanup(self, host):
        host.log.info("note: cleans up")
"""

KIND = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        return bghost.UNTIL_WOKEN
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_set_up(bghost_host: StartHost, signum: signal.Signals) -> None:
    """What an extension has set up is cleaned up, no worker starts, and the exit code is 0: a stop was asked for."""
    host = bghost_host(
        kinds={"sleeper": KIND}, extensions={"slow": SLOW_EXTENSION}, args=["run", "sleeper"], answering=False
    )
    host.wait_line("note: sets up")
    host.signal(signum)
    assert host.wait() == 0
    assert "note: cleans up" in host.text()
    assert "started, pid" not in host.text()


STUBBORN = """
import time, bghost

class Extension:
    @bghost.hookimpl
    def bghost_host_setup(self, host):
        told = False
        while True:
            try:
                if not told:
                    told = True
                    host.log.info("note: sets up")
                time.sleep(1)
            except BaseException:
                host.log.info("note: goes on")
"""


def test_a_set_up_that_does_not_let_itself_be_stopped(bghost_host: StartHost) -> None:
    """It has stop_timeout seconds; then the host ends without it."""
    host = bghost_host(
        kinds={"sleeper": KIND},
        extensions={"stubborn": STUBBORN},
        args=["run", "sleeper", "--set", "host.stop_timeout=0.5"],
        answering=False,
    )
    host.wait_line("note: sets up")
    begun = time.monotonic()
    host.signal(signal.SIGTERM)
    assert host.wait() == -signal.SIGALRM
    assert time.monotonic() - begun > 0.4
    assert "note: goes on" in host.text()


DAEMON = """
import os, signal, time
told, tell = os.pipe()
if os.fork() == 0:
    os.setsid()
    signal.alarm(60)
    open(os.environ["DAEMON"], "a").write(f"{os.getpid()}\\n")
    os.write(tell, b".")
    time.sleep(60)
    os._exit(0)
os.read(told, 1)  # whoever comes up knows all daemons
os.close(told)
os.close(tell)
"""


def test_an_import_that_leaves_a_daemon_holds_nobody_up(bghost_host: StartHost, tmp_path: Path) -> None:
    """The daemon has all that its parent had open; it is the parent's end that the start waits for."""
    note = tmp_path / "daemons"
    host = bghost_host(kinds={"sleeper": DAEMON + KIND}, args=["run", "sleeper"], env={"DAEMON": str(note)})
    host.client.wait("sleeper")
    assert "was not imported within" not in host.text()
    for pid in note.read_text().split():  # they hold the instance's lock, too
        os.kill(int(pid), signal.SIGKILL)
    assert host.client.shutdown() == {"killed": []}
    assert host.wait() == 0


@pytest.mark.parametrize(("limit", "code"), [(64, 1), (400, 0)])
def test_a_limit_of_descriptors_that_is_too_low(sandbox: Sandbox, limit: int, code: int) -> None:
    """E5: too low for the start, it is refused; too low for all workers, it is said: with the numbers, in one line."""
    sandbox.kinds({"ends": KIND.replace("return bghost.UNTIL_WOKEN", "raise SystemExit(0)")})
    shell = f'ulimit -n {limit} && exec "$@"'
    argv = ["sh", "-c", shell, "sh", sys.executable, "-m", "bghost", "run", "ends"]
    done = subprocess.run(argv, env=sandbox.env, capture_output=True, text=True, timeout=30 * SLOW, check=False)
    assert done.returncode == code, done.stderr
    told = rf"max_workers is 100, which takes up to \d+ descriptors, and RLIMIT_NOFILE allows {limit}\b"
    assert re.search(told, done.stderr), done.stderr
    assert "Traceback" not in done.stderr

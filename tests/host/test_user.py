"""Workers that run as somebody else than the host, which is root."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import CHAOS, table
from support import BGHOST, SLOW, Sandbox, notes, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has workers run as somebody else")

NOBODY = pwd.getpwnam("nobody")


def _run_by(user: int) -> bool:
    """Whether this interpreter can be run by *user*."""
    try:
        return subprocess.run([sys.executable, "-c", ""], user=user, capture_output=True).returncode == 0
    except PermissionError:
        return False


out_of_reach = pytest.mark.skipif(
    os.geteuid() != 0 or not _run_by(NOBODY.pw_uid), reason="this interpreter lies where other users cannot run it"
)
either = pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=out_of_reach)])


@pytest.fixture
def box() -> Iterator[Sandbox]:
    """A sandbox into which everybody can look; what is the host's own is closed to others."""
    root = Path(tempfile.mkdtemp(prefix="bghost-"))
    root.chmod(0o755)
    box = Sandbox(root, Path(tempfile.mkdtemp(prefix="bghost-")))
    box.kinds({"chaos": "import os\nWHO = os.getuid()\n" + CHAOS})
    try:
        yield box
    finally:
        box.end()
        shutil.rmtree(root)


WHO = "note('{} {} {} {} {}', WHO, os.getresuid(), os.getresgid(), os.getgroups(), os.environ['USER'])"


@either
def test_a_worker_is_its_user_before_its_kind_is_imported(start: str, box: Sandbox) -> None:
    """Groups, gid and uid, for good; the host stays root, and so does a worker that names no user."""
    box.config(
        table("one", setup=WHO, start=start, user="nobody") + table("two", setup=WHO.replace("['USER']", ".get('X')"))
    )
    host = box.start_host("run")
    host.wait_answering()
    (row,) = host.client.wait("one")
    host.client.wait("two")
    uids, gids = (NOBODY.pw_uid,) * 3, (NOBODY.pw_gid,) * 3
    assert notes(host, "one") == [f"{NOBODY.pw_uid} {uids} {gids} {os.getgrouplist('nobody', NOBODY.pw_gid)} nobody"]
    assert notes(host, "two")[0].startswith("0 (0, 0, 0) (0, 0, 0)")
    assert f"Uid:\t{NOBODY.pw_uid}\t{NOBODY.pw_uid}" in Path(f"/proc/{row['pid']}/status").read_text()
    # It is idle an instant before it sleeps.
    until(lambda: "in sleep" in host.client.request("dump", names=["one"])["one"], what="a dump of a sleeping worker")


@either
def test_what_it_may_ask_of_the_host(start: str, box: Sandbox) -> None:
    """To look at all workers, to command its own user's, to launch some of that user; no more, and never as root."""
    tick = """
def ask(what, *args):
    try:
        note('{}: {}', what, eval(what))
    except bghost.BghostError as error:
        note('{}: {}', what, error)
handle = worker.launch(WorkerSpec(kind='chaos', name='mine', args={'setup': "note('uid {}', os.getuid())"}))
note('ready {}', handle.wait_ready(10))
note('stopped {}', handle.stop())
for what in (
    "len(worker.ask('ps', {}, 5))",
    "worker.launch(WorkerSpec(kind='chaos', name='theirs', user='root'))",
    "worker.ask('stop', {'names': ['other']}, 5)",
    "worker.ask('shutdown', {}, 5)",
    "worker.ask('reload', {}, 5)",
):
    ask(what)
"""
    box.config(
        table(
            "one",
            tick=tick.replace("def ask(what, *args):", "def ask(what, worker=worker, note=note):"),
            start=start,
            user="nobody",
        )
        + table("other")
    )
    host = box.start_host("run")
    host.wait_answering()
    host.wait_line(r"note: worker.ask\('reload'")
    assert notes(host, "one") == [
        "ready True",
        "stopped True",
        "len(worker.ask('ps', {}, 5)): 3",
        "worker.launch(WorkerSpec(kind='chaos', name='theirs', user='root')): "
        "a worker that runs as nobody launches others that do",
        "worker.ask('stop', {'names': ['other']}, 5): "
        "worker other does not run as nobody, whose workers alone this one may command",
        "worker.ask('shutdown', {}, 5): the host knows no verb 'shutdown'",
        "worker.ask('reload', {}, 5): the host knows no verb 'reload'",
    ]
    assert notes(host, "mine") == [f"uid {NOBODY.pw_uid}"]
    assert host.row("other")["starts"] == 1


@either
def test_it_follows_a_log_that_it_cannot_open(start: str, box: Sandbox) -> None:
    """The host hands out what it has opened anew: after a HUP, and after a rotation."""
    log = box.root / "log" / "bghost.log"
    log.parent.mkdir(mode=0o700)
    config = f"[host]\nuser = 'nobody'\n[host.log]\nfile = '{log}'\n" + table("one", tick="note('tick')", start=start)
    box.config(config)
    host = box.start_host("run")
    host.wait_answering()
    host.client.wait("one")
    until(lambda: "[one] note: tick" in log.read_text())
    for number in (1, 2):
        log.rename(log.with_suffix(f".{number}"))
        host.signal(signal.SIGHUP)
        until(log.exists)
        host.client.request("wake", names=["one"])
        until(lambda: "[one] note: tick" in log.read_text())
    box.config(config.replace("bghost.log'", "other.log'"))
    assert host.bghost("reload", "--wait").code == 0
    host.client.request("wake", names=["one"])
    until(lambda: "[one] note: tick" in log.with_name("other.log").read_text())
    assert host.client.shutdown() == {"killed": []}
    assert host.wait() == 0


@either
def test_it_goes_with_its_host(start: str, box: Sandbox) -> None:
    """The kernel tells it of the host's death, also after it has become another user."""
    box.config(table("one", start=start, user="nobody", tick="while True: time.sleep(0.01); worker.check_interrupts()"))
    host = box.start_host("run")
    host.wait_answering()
    (row,) = host.client.wait("one")
    host.signal(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{row['pid']}").exists(), 30.0)
    host.wait()
    assert "the host has died" in host.text() and "killed pid" not in host.text()


def test_users_that_there_are_not(box: Sandbox) -> None:
    """A config error with file, line and key; where a launch names one, the worker says so and is failed."""
    box.config("[host]\nuser = 'nobody'\n" + table("one", user="nosuch"))
    refused = box.bghost("run")
    assert (refused.code, refused.stderr) == (2, f"bghost: {box.config_file}:7: there is no user 'nosuch'")
    box.config("[host]\nuser = 'nosuch'\n" + table("one"))
    refused = box.bghost("config", "check")
    assert (refused.code, refused.stderr) == (2, f"bghost: {box.config_file}:2: there is no user 'nosuch'")


@out_of_reach
def test_a_host_that_is_not_root(box: Sandbox) -> None:
    """It says that only root can do that; its own user is no other one."""
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv here")
    (box.root / "home").chmod(0o777)
    become = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups", "--inh-caps=-all"]
    for user, said in (
        ("daemon", "only a host that is root can have workers run as 'daemon'"),
        ("nobody", "good, 1 worker"),
    ):
        box.config(table("one", user=user))
        argv = [*become, *BGHOST, "config", "check"]
        done = subprocess.run(argv, env=box.environ(), cwd=box.root, capture_output=True, text=True, timeout=20 * SLOW)
        assert said in done.stdout + done.stderr, done

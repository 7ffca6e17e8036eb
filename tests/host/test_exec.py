"""The kind exec: any program as a worker, which the worker becomes."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos import CHAOS, table
from support import Host, Sandbox, StartHost, pid_in, until

from bghost import WorkerSpec
from bghost.shared.errors import BghostError

PYTHON = [sys.executable, "-u", "-c"]


def program(name: str, *command: str, **keys: Any) -> str:
    """An exec worker that becomes *command*; other arguments of exec may be among *keys*."""
    names = ("env", "cwd", "stop_signal", "reload_signal", "death_signal", "notify")
    args = {key: keys.pop(key) for key in names if key in keys}
    env = args.pop("env", None)
    text = table(name, kind="exec", args={"command": list(command), **args}, **keys)
    if isinstance(env, dict):
        inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in env.items())
        text += f"args.env = {{ {inline} }}\n"
    return text


def start(bghost_host: StartHost, *tables: str, head: str = "") -> Host:
    config = f"[host]\nkinds = ['exec', 'chaos']\n{head}\n" + "".join(tables)
    return bghost_host(kinds={"chaos": CHAOS}, args=["run"], config=config)


SEES = """
import json, os, signal, sys
fds = [fd for fd in map(int, os.listdir('/proc/self/fd')) if fd > 2 and os.path.exists(f'/proc/self/fd/{fd}')]
print('sees', json.dumps({
    'fds': [os.readlink(f'/proc/self/fd/{fd}') for fd in fds], 'stdin': os.readlink('/proc/self/fd/0'),
    'parent': os.getppid(), 'pid': os.getpid(), 'session': os.getsid(0),
    'argv': sys.argv[1:], 'more': os.environ.get('MORE'), 'cwd': os.getcwd(), 'notify': os.environ.get('NOTIFY_SOCKET'),
}))
signal.pause()
"""


def test_a_worker_becomes_the_program(bghost_host: StartHost, tmp_path: Path) -> None:
    """No process between; signals as a program expects them; no descriptor but the lock's; its own words."""
    host = start(
        bghost_host,
        program("sees", *PYTHON, SEES, "a b", "ü\n$X", env={"MORE": "x=y"}, cwd=str(tmp_path)),
        program("status", "cat", "/proc/self/status"),
    )
    seen = json.loads(host.wait_line(r"\] sees (.*)").match[1])
    row = host.row("sees")
    assert (seen["parent"], seen["pid"], seen["session"]) == (host.pid, row["pid"], row["pid"])
    lock = host.directories.lock
    assert [fd for fd in seen["fds"] if not fd.startswith("/proc/")] == [lock], seen["fds"]
    for mask in ("SigBlk", "SigIgn"):
        # 32 and 33 are the C library's own, and stay as whoever started pytest has them.
        others = sum(1 << (number - 1) for number in (signal.SIGINT, 32, 33))
        assert int(host.wait_line(rf"{mask}:\\t(\w+)").match[1], 16) & ~others == 0, mask
    assert seen["argv"] == ["a b", "ü\n$X"]
    assert (seen["more"], seen["cwd"], seen["notify"], seen["stdin"]) == ("x=y", str(tmp_path), None, "/dev/null")
    assert (row["state"], row["kind"], row["starts"]) == ("ready", "exec", 1)
    assert host.client.shutdown() == {"killed": []}
    assert host.wait() == 0


ECHO = """
import os, signal, sys
def heard(number, frame):
    if 'FILE' in os.environ:  # for what is heard when the host, which takes up what is printed, is dead
        with open(os.environ['FILE'], 'a') as file:
            print('heard', signal.Signals(number).name, file=file)
    else:
        print('heard', signal.Signals(number).name, flush=True)
    if signal.Signals(number).name == os.environ.get('END', 'SIGTERM'):
        sys.exit(int(os.environ.get('CODE', '0')))
for number in (1, 2, 10, 12, 15):
    signal.signal(number, heard)
print('up', flush=True)
while True:
    signal.pause()
"""


def test_signals(bghost_host: StartHost) -> None:
    """It is stopped and told of a new config with the signals of its choice, and with those that one sends it."""
    host = start(
        bghost_host,
        program("one", *PYTHON, ECHO, stop_signal="INT", reload_signal="SIGUSR1", env={"END": "SIGINT"}),
        program("two", *PYTHON, ECHO),
    )
    until(lambda: host.text().count("] up") == 2, what="both programs")
    host.client.wait("one", "two")
    host.client.reload()
    host.wait_line("heard SIGUSR1")
    assert host.client.request("signal", names=["two"], signal=signal.SIGUSR2) == {"signaled": ["two"]}
    host.wait_line("heard SIGUSR2")
    assert host.client.stop("one") == {"stopped": ["one"], "killed": []}
    assert (host.row("one")["state"], host.row("one")["exit"]) == ("stopped", "exit code 0")
    assert host.client.stop("two", mode="fast") == {"stopped": ["two"], "killed": []}
    heard = re.findall("heard SIG.*", host.text())
    assert sorted(heard) == ["heard SIGINT", "heard SIGTERM", "heard SIGUSR1", "heard SIGUSR2"]  # no HUP by default


ON_THE_WAY = """
import collections

def hold():
    if not os.path.exists('held'):  # the first process alone
        open('held', 'w').close()
        print('is held', flush=True)
        open('gate', 'rb').read(1)

class Environment(collections.UserDict):
    def keys(self):
        hold()
        return super().keys()

class Word:
    def __fspath__(self):
        hold()
        return '600'

"""
"""A worker that can be held where it has begun to become its program, and where nothing is left but execve."""

HELD = {
    "begun": "worker.become(['sleep', '600'], env=Environment(MORE='x'), stop_signal={})",
    "ready": "worker.become(['sleep', Word()], stop_signal={})",
}


def hold(bghost_host: StartHost, where: str, stop_signal: int = signal.SIGTERM) -> tuple[Host, Path]:
    """A host with the worker one, which is held there until something is written to that FIFO."""
    host = start(bghost_host)
    gate = host.sandbox.root / "gate"
    os.mkfifo(gate)
    code = ON_THE_WAY + HELD[where].format(int(stop_signal))
    host.client.launch(WorkerSpec(kind="chaos", name="one", args={"setup": code}, stop_timeout=600, restart_after=0.05))
    host.wait_line(r"\[one\] is held")
    return host, gate


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("where", "exit"), [("begun", "exit code 0"), ("ready", "killed by {}")])
def test_a_stop_on_the_way_to_the_program(
    where: str, exit: str, stop_signal: signal.Signals, bghost_host: StartHost
) -> None:
    """The worker ends instead, or the signal does what it does to a program; it is not lost in between."""
    host, gate = hold(bghost_host, where, stop_signal)
    stop = host.sandbox.start("stop", "one")
    host.wait_row("one", lambda row: row["state"] in ("stopping", "stopped"))
    with open(gate, "r+b", buffering=0) as opened:
        opened.write(b"x")
        assert stop.wait() == 0
    row = host.row("one")
    assert (row["state"], row["exit"]) == ("stopped", exit.format(stop_signal.name))


@pytest.mark.parametrize(("where", "exit"), [("begun", "exit code 1"), ("ready", "killed by SIGTERM")])
def test_a_sigterm_on_the_way_to_the_program(where: str, exit: str, bghost_host: StartHost) -> None:
    """From elsewhere it ends the worker or its program, which is started again."""
    host, gate = hold(bghost_host, where)
    os.kill(pid_in(host.row("one")), signal.SIGTERM)
    with open(gate, "r+b", buffering=0) as opened:
        opened.write(b"x")
        row = host.wait_row("one", lambda row: row["starts"] == 2 and row["state"] == "ready")
    assert row["exit"] == exit


def test_a_stop_at_once(bghost_host: StartHost) -> None:
    """It is killed, having nothing to be told by; that was asked for, and is no stop that came too late."""
    host = start(bghost_host, program("one", "sleep", "60"))
    host.client.wait("one")
    assert host.client.stop("one", mode="immediate") == {"stopped": ["one"], "killed": []}
    assert (host.row("one")["state"], host.row("one")["exit"]) == ("stopped", "killed by SIGKILL")
    assert "in time" not in host.text()


def test_what_needs_python_is_not_for_it(bghost_host: StartHost) -> None:
    """Wakes and dumps say so instead of seeming to work; from another worker, too."""
    code = "handle = worker.find('program'); note('wakes {}', handle.wake())"
    host = start(bghost_host, program("program", "sleep", "60"), table("boss", tick="worker.wait(60)\n" + code))
    host.client.wait("program", "boss")
    with pytest.raises(BghostError, match="has become another program"):
        host.client.request("wake", names=["program"])
    assert "has become another program" in host.client.dump("program")["program"]
    host.client.request("wake", names=["boss"])
    host.wait_line("note: wakes False")


def test_ends_are_those_of_any_worker(bghost_host: StartHost) -> None:
    """Exit 0 is done; others are restarted, with their delays; a signal is told by its name."""
    host = start(
        bghost_host,
        program("zero", "true"),
        program("three", "sh", "-c", "exit 3", restart_after=0.05),
        program("never", "sh", "-c", "kill -SEGV $$", restart="never"),
        program("once", "sh", "-c", "test -e seen && echo runs && exec sleep 60; : > seen; exit 1", restart_after=0.05),
    )
    assert host.client.wait("zero", until="stopped")[0]["state"] == "done"
    row = host.client.wait("never", until="stopped")[0]
    assert (row["state"], row["exit"]) == ("failed", "killed by SIGSEGV")
    host.wait_row("three", lambda row: row["starts"] >= 3 and row["exit"] == "exit code 3")
    host.wait_row("once", lambda row: row["starts"] == 2 and row["state"] == "ready")
    host.wait_line(r"\[once\] runs")  # until it is that program, a signal is still the worker's
    pid = pid_in(host.row("once"))
    os.kill(pid, signal.SIGTERM)
    host.wait_row("once", lambda row: row["exit"] == "killed by SIGTERM" and row["starts"] == 3)


NOTIFY = """
import os, signal, socket, subprocess, sys, time
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(text.encode(), os.environ['NOTIFY_SOCKET'])
say('READY=0\\nSTATUS=READY=1')
child = os.fork()
if child == 0:
    say('READY=1')  # not the program itself
    os._exit(0)
os.wait()
print('is not ready', flush=True)
while not os.path.exists('go'):
    time.sleep(0.01)
say('STATUS=here\\nREADY=1')
say('READY=1')
print('said so', flush=True)
signal.pause()
"""


def test_ready_when_it_says_so_itself(bghost_host: StartHost) -> None:
    """Only the program's own word counts; until then others that come after it wait; then ready_timeout is over."""
    host = start(
        bghost_host,
        program("says", *PYTHON, NOTIFY, notify=True),
        program("mute", "sleep", "60", notify=True, ready_timeout=0.5, restart="never"),
        table("after", after=["says"], setup="note('up')"),
    )
    host.wait_line("is not ready")
    row = host.client.wait("mute", until="stopped")[0]
    assert (row["state"], row["last_error"]) == ("failed", "not ready within 0.5 s, killed")
    assert [row["state"] for row in host.client.ps("says", "after")] == ["starting", "starting"]
    assert host.row("after")["starts"] == 0
    (host.sandbox.root / "go").touch()
    host.client.wait("says", "after")
    assert "note: up" in host.text()


def test_it_goes_when_the_host_dies(bghost_host: StartHost, tmp_path: Path) -> None:
    """By the signal of its choice, at once; one that does not listen is ended by the guard."""
    deaf = ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"]
    host = start(
        bghost_host,
        program("usr1", *PYTHON, ECHO, death_signal="USR1", env={"END": "SIGUSR1", "FILE": str(tmp_path / "usr1")}),
        program("default", *PYTHON, ECHO, env={"FILE": str(tmp_path / "default")}),
        program("deaf", *deaf),
        head="stop_timeout = 3.0",
    )
    until(lambda: host.text().count("] up") == 3, what="all programs")
    host.client.wait("usr1", "default", "deaf")
    pids = {row["name"]: row["pid"] for row in host.client.ps()}
    host.signal(signal.SIGKILL)
    for name, heard in (("usr1", "heard SIGUSR1\n"), ("default", "heard SIGTERM\n")):
        path = tmp_path / name
        until(lambda path=path, heard=heard: path.exists() and path.read_text() == heard, what=name)  # type: ignore[misc]
    assert "killed pid" not in host.text()  # nobody had to tell them once more
    host.wait_line(rf"killed pid {pids['deaf']} \(sh -c")
    host.wait()


def test_a_program_that_cannot_be_run(bghost_host: StartHost, tmp_path: Path) -> None:
    """Says which and why; the worker has failed like any other, and nothing half of it is left."""
    plain = tmp_path / "plain"
    plain.write_text("no program")
    plain.chmod(0o755)
    bad = tmp_path / "bad"
    bad.write_text("#!/nonexistent/interpreter\n")
    bad.chmod(0o755)
    cases = {
        "missing": (["no-such-program"], {}, "there is no such program on PATH"),
        "format": ([str(plain)], {}, "Exec format error"),
        "interpreter": ([str(bad)], {}, "No such file or directory"),
        "folder": (["/"], {}, "there is no such program on PATH"),
        "cwd": (["true"], {"cwd": "/nonexistent"}, "No such file or directory"),
    }
    host = start(
        bghost_host, *(program(name, *command, restart="never", **more) for name, (command, more, _) in cases.items())
    )
    for name, (command, _, why) in cases.items():
        row = host.client.wait(name, until="stopped")[0]
        assert (row["state"], row["exit"]) == ("failed", "exit code 1"), name
        assert f"{command[0]!r} cannot be run" in (row["last_error"] or "") and why in (row["last_error"] or ""), row
    with pytest.raises(BghostError, match="did not become ready"):
        host.client.request(
            "launch", spec={"kind": "exec", "args": {"command": ["nope"]}, "restart": "never"}, wait=True
        )


def test_arguments_that_cannot_be(sandbox: Sandbox, bghost_host: StartHost) -> None:
    """Are refused at launch, by name."""
    host = start(bghost_host)
    for args, text in (
        ({}, "command"),
        ({"command": []}, "command"),
        ({"command": "ls"}, "command"),
        ({"command": ["x"], "stop_signal": "NOPE"}, "NOPE"),
        ({"command": ["x"], "stop_signal": 15}, "stop_signal"),
        ({"command": ["x"], "reload_signal": "1"}, "reload_signal"),
        ({"command": ["x\0y"]}, "NUL"),
        ({"command": ["x"], "shell": True}, "shell"),
    ):
        with pytest.raises(BghostError, match=text):
            host.client.request("launch", spec={"kind": "exec", "args": args})
    assert host.client.ps() == []

"""A worker's life: what it is born with, the order of its hooks, and its way out."""

import json
import os
import random
import re
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from support import SLOW, Sandbox, StartHost, notes

from bghost import WorkerSpec

LIFE = """
import bghost

class Settings(bghost.Settings):
    word: str = "old"

class Draft:
    open = None

    def __init__(self, note):
        self.note = note

    def left_open(self):
        return self.open

    def roll_back(self, timeout):
        self.note("note: draft: rolled back, open: {}", self.open)
        self.open = None

class Kind:
    Settings = Settings
    rounds = 0

    @bghost.hookimpl
    def bghost_setup(self, worker):
        note = worker.log.info
        note("note: kind: setup")
        worker.on_exit(lambda: note("note: exit: the first that was asked for"))
        worker.on_exit(lambda: note("note: exit: the second"))
        worker.scope.callback(note, "note: scope: {} closed", worker.scope.path)
        self.draft = Draft(note)
        worker.enlist(self.draft)

    def round(self, worker):
        self.rounds += 1
        note = worker.log.info
        note("note: kind: round {}", self.rounds)
        if self.rounds == 3:
            worker.scope.callback(note, "note: scope: {} closed", worker.scope.path)
            inner = worker.scope.child("inner")
            inner.callback(note, "note: scope: {} closed", inner.path)
            self.draft.open = "a line"
            raise ValueError("three")
        return 0 if self.rounds < 4 else bghost.UNTIL_WOKEN

    @bghost.hookimpl
    def bghost_recover(self, worker, error):
        worker.log.info("note: kind: recovers from {!r} in scope {}", error, worker.root_scope.current.path)
        while "reload" not in worker.wait(60):
            pass

    @bghost.hookimpl
    def bghost_reload(self, worker, old, new):
        worker.log.info("note: kind: reload, {} to {}, now {}", old.word, new.word, worker.settings.word)

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        worker.log.info("note: kind: cleanup, {}", reason)
"""

DEFAULT_LOOP = """
    @bghost.hookimpl
    def bghost_tick(self, worker):
        return self.round(worker)
"""

OWN_LOOP = """
    @bghost.hookimpl
    def bghost_main(self, worker):
        for _ in worker.mainloop():
            nap = None
            with worker.recovery():
                nap = self.round(worker)
            worker.wait(nap)
"""

LOOPS = pytest.mark.parametrize("loop", [DEFAULT_LOOP, OWN_LOOP], ids=["default loop", "own loop"])
"""The same guarantees hold in both."""

WATCHER = """
import bghost

class Extension:
    @bghost.hookimpl
    def bghost_setup(self, worker):
        worker.log.info("note: watcher: setup")

    @bghost.hookimpl(wrapper=True)
    def bghost_tick(self, worker):
        worker.log.info("note: watcher: a tick begins")
        try:
            nap = yield
        except ValueError:
            worker.log.info("note: watcher: the tick fails")
            raise
        worker.log.info("note: watcher: the tick gives {}", nap)
        return nap

    @bghost.hookimpl(wrapper=True)
    def bghost_recover(self, worker, error):
        worker.log.info("note: watcher: recovery is to be decided")
        decision = yield
        worker.log.info("note: watcher: {}", decision)
        return decision

    @bghost.hookimpl
    def bghost_reload(self, worker, old, new):
        worker.log.info("note: watcher: reload")

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        worker.log.info("note: watcher: cleanup, {}", reason)
"""

SLEEPER = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        return bghost.UNTIL_WOKEN
"""


@LOOPS
def test_a_whole_life(loop: str, bghost_host: StartHost) -> None:
    """Start, two ticks, an error, recovery, reload, a tick, stop: hooks, scopes and callbacks in this order."""
    host = bghost_host(kinds={"life": LIFE + loop}, extensions={"watcher": WATCHER}, args=["run", "life"], config="")
    host.wait_line("note: kind: recovers")
    host.sandbox.config('[kind.life]\nword = "new"')
    host.client.reload()
    host.wait_line("note: kind: round 4")
    assert host.client.stop("life") == {"stopped": ["life"], "killed": []}
    assert host.wait() == 0

    life = [
        "watcher: setup",
        "kind: setup",
        "watcher: a tick begins",
        "kind: round 1",
        "watcher: the tick gives 0",
        "watcher: a tick begins",
        "kind: round 2",
        "watcher: the tick gives 0",
        "watcher: a tick begins",
        "kind: round 3",
        "watcher: the tick fails",
        "draft: rolled back, open: a line",
        "scope: life/tick/inner closed",
        "scope: life/tick closed",
        "watcher: recovery is to be decided",
        "kind: recovers from ValueError('three') in scope life",
        "watcher: None",
        "watcher: reload",
        "kind: reload, old to new, now new",
        "watcher: a tick begins",
        "kind: round 4",
        "watcher: the tick gives inf",
        "draft: rolled back, open: None",
        "kind: cleanup, stop",
        "watcher: cleanup, stop",
        "exit: the second",
        "exit: the first that was asked for",
        "scope: life closed",
    ]
    if loop is OWN_LOOP:  # it calls no tick hook that could be wrapped
        life = [line for line in life if not line.startswith(("watcher: a tick", "watcher: the tick"))]
    assert notes(host, "life") == life


def _status(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def _signals(mask: str) -> set[int]:
    """What is in a mask; 32 and 33 are the C library's own, and stay as whoever started pytest has them."""
    return {number for number in range(1, 65) if int(mask, 16) >> (number - 1) & 1} - {32, 33}


def test_set_up_is_done_when_the_first_hook_runs(bghost_host: StartHost) -> None:
    """Title, session, handlers, an empty mask, the root scope, identity and stats are there before bghost_setup."""
    facts = """
    import json, os, signal, time, bghost

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            standard = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
            identity = worker.identity
            with open("/proc/self/cmdline") as title:
                facts = {
                    "title": title.read().rstrip("\\0"),
                    "session": os.getsid(0) == os.getpgrp() == os.getpid(),
                    "handlers": all(callable(signal.getsignal(number)) for number in standard),
                    "mask": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
                    "scope": [worker.scope.path, worker.scope is worker.root_scope],
                    "name": [worker.name, worker.kind, worker.args],
                    "identity": [identity.name, identity.kind, identity.instance, identity.application_name],
                    "user": bool(identity.user),
                    "started": 0 <= time.time() - identity.started < 60,
                    "stopping": worker.stopping,
                    "doing": worker.slot.doing,
                    "stdin": os.read(0, 1).decode(),
                }
            worker.log.info("note: {}", json.dumps(facts))

        @bghost.hookimpl
        def bghost_tick(self, worker):
            return bghost.UNTIL_WOKEN
    """
    host = bghost_host(
        kinds={"facts": facts}, args=["run", "facts", "--name", "clerk"], env={"BGHOST_INSTANCE": "office"}
    )
    pid = host.client.wait("clerk")[0]["pid"]
    assert pid is not None
    host.wait_line("note: ")
    assert json.loads(notes(host, "clerk")[0]) == {
        "title": "bghost: clerk (office)",
        "session": True,
        "handlers": True,
        "mask": [],
        "scope": ["clerk", True],
        "name": ["clerk", "facts", {}],
        "identity": ["clerk", "facts", "office", "bghost: clerk (office)"],
        "user": True,
        "started": True,
        "stopping": False,
        "doing": "idle",
        "stdin": "",
    }
    standard = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT}
    status = _status(pid)
    assert _signals(status["SigBlk"]) == set()
    assert _signals(status["SigIgn"]) == set()
    assert standard <= _signals(status["SigCgt"])
    assert Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") == b"bghost: clerk (office)"
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert status["Threads"] == "1"


def test_a_signal_at_any_instant_after_the_fork_is_acted_on(bghost_host: StartHost) -> None:
    """No signal is lost, kills, or is run by the host's handlers, be it sent before the worker's first instruction."""
    host = bghost_host(
        kinds={"target": SLEEPER}, args=["run"], config='[[worker]]\nkind = "target"\nrestart_after = 0.001\n'
    )
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    children = Path(f"/proc/{host.pid}/task/{host.pid}/children")
    first = host.client.wait("target")[0]["pid"]
    seen = {int(pid) for pid in children.read_text().split()} - {first}  # the host's guard
    harmless = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for _ in range(200):
        deadline = time.monotonic() + 5 * SLOW
        while not (new := {int(pid) for pid in children.read_text().split()} - seen):
            assert time.monotonic() < deadline, "the worker did not come back"
        (pid,) = new
        seen.add(pid)
        pidfd = os.pidfd_open(pid)
        try:
            until_then = time.perf_counter() + chance.random() * 0.02
            while time.perf_counter() < until_then:
                pass  # a sleep of a few microseconds would take longer
            signal.pidfd_send_signal(pidfd, chance.choice(harmless))
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            assert select.select([pidfd], [], [], 5 * SLOW)[0], "SIGTERM was lost"
        finally:
            os.close(pidfd)
    host.wait_row("target", lambda row: row["starts"] == 201 and row["state"] == "ready")
    ends = Counter(re.findall(r"WARNING \[target\] (.*); started again", host.text()))
    assert ends == {"exit code 1": 200}
    assert host.client.status()["stopping"] is None
    assert host.client.shutdown() == {"killed": []}
    assert host.wait() == 0


def test_programs_that_a_worker_runs_see_default_signals(bghost_host: StartHost) -> None:
    """However a program is started, its signal mask is empty and nothing is ignored."""
    starter = """
    import os, subprocess, sys, bghost

    LOOK = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
    OF_LIBC = 3 << 31  # 32 and 33: nobody else's, and ignored in what glibc's posix_spawn starts

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            def spawned(spawn):
                reading, writing = os.pipe()
                os.waitpid(spawn(writing), 0)
                os.close(writing)
                with open(reading) as pipe:
                    return pipe.read()

            def spawn(fd):
                return os.posix_spawnp("grep", LOOK, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, fd, 1)])

            def fork(fd):
                pid = os.fork()
                if pid == 0:
                    os.dup2(fd, 1)
                    os.execvp("grep", LOOK)
                return pid

            texts = {
                "subprocess": subprocess.run(LOOK, capture_output=True, text=True).stdout,
                "as it is": subprocess.run(LOOK, capture_output=True, text=True, restore_signals=False).stdout,
                "worker.run": worker.run(LOOK, capture_output=True, text=True).stdout,
                "posix_spawn": spawned(spawn),
                "fork and exec": spawned(fork),
            }
            for how, text in texts.items():
                worker.log.info("note: {}: {}", how, [int(mask, 16) & ~OF_LIBC for mask in text.split()[1::2]])
            sys.exit()
    """
    host = bghost_host(kinds={"starter": starter}, args=["run", "starter"], answering=False)
    assert host.wait() == 0
    assert notes(host, "starter") == [
        f"{how}: [0, 0]" for how in ("subprocess", "as it is", "worker.run", "posix_spawn", "fork and exec")
    ]


def _descriptors(pid: int) -> Counter[str]:
    """What a process has open, numbers of pipes and the like left out."""
    found: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
        if int(fd) <= 2:
            target = "standard"
        found[re.sub(r":\[\d+\]| \(deleted\)|^.*/(?=lock$)", "", target)] += 1
    return found


JUNK = """
import os

null = os.open(os.devnull, os.O_RDWR)
for number in range(3, 51):
    os.dup2(null, number)
    os.set_inheritable(number, True)
"""


@pytest.mark.parametrize("junk", [False, True], ids=["clean start", "junk inherited"])
def test_descriptors_of_a_worker(junk: bool, sandbox: Sandbox) -> None:
    """A worker holds the standard three and what this list has, whatever the host has open or was started with."""
    sandbox.kinds({"sleeper": SLEEPER})
    sandbox.config("[host]\nmax_workers = 4\n[[worker]]\nkind = 'sleeper'\ncount = 3\n")
    if junk:
        (sandbox.site / "sitecustomize.py").write_text(JUNK)  # the interpreter's first act: as if inherited
    host = sandbox.start_host("run")
    host.wait_answering()
    host.client.wait("sleeper")
    with socket.socket(socket.AF_UNIX) as silent:  # a client's connection is open while a worker is forked
        silent.connect(host.directories.socket)
        host.client.launch(WorkerSpec(kind="sleeper", name="late"), wait=True)
        for row in host.client.ps():
            assert row["pid"] is not None
            assert _descriptors(row["pid"]) == {
                "standard": 3,
                "lock": 1,  # the instance's: it is free when the last of its processes has ended
                # Each slot's latch, both ends: who wakes whom is not known at the fork. And what the host logs to.
                "pipe": 2 * 4 + 1,
                "/memfd:bghost-control": 2,  # a mapping that only the host writes, and one to read
                "/memfd:bghost-stats": 1,
                "/memfd:bghost-dump": 1,  # its own: where its stack goes when it is asked for
                "anon_inode:[pidfd]": 1,  # the host, readable when it has died
                "anon_inode:[eventfd]": 1,  # rings when the worker is ready
            }, row["name"]


def test_exit_callbacks_all_run(bghost_host: StartHost) -> None:
    """Last in first out, after bghost_cleanup, before the root scope, though one after the other fails; exit 1 then."""
    leaver = """
    import sys, bghost

    def failing(note, text):
        note("note: {}", text)
        raise ValueError(text)

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            note = worker.log.info
            worker.scope.callback(note, "note: scope, opened first")
            worker.scope.callback(failing, note, "scope, fails")
            worker.scope.callback(note, "note: scope, opened last")
            worker.on_exit(lambda: note("note: callback 1"))
            worker.on_exit(lambda: failing(note, "callback 2, fails"))
            worker.on_exit(lambda: sys.exit("callback 3, exits"))
            worker.on_exit(lambda: worker.on_exit(lambda: note("note: callback 5, asked for by 4")))

        @bghost.hookimpl
        def bghost_main(self, worker):
            return

        @bghost.hookimpl
        def bghost_cleanup(self, worker, reason):
            failing(worker.log.info, f"cleanup, {reason}, fails")
    """
    host = bghost_host(
        kinds={"leaver": leaver},
        args=["run"],
        config='[[worker]]\nkind = "leaver"\nrestart = "never"\n',
    )
    (row,) = host.client.wait("leaver", until="stopped")
    assert (row["state"], row["exit"]) == ("failed", "exit code 1")
    host.client.shutdown()
    host.wait()
    assert notes(host, "leaver") == [
        "cleanup, done, fails",
        "callback 5, asked for by 4",
        "callback 2, fails",
        "callback 1",
        "scope, opened last",
        "scope, fails",
        "scope, opened first",
    ]
    for failure in ("cleanup, done, fails", "callback 2, fails", "callback 3, exits", "scope, fails"):
        assert re.search(rf"(on the way out: .*|^\t.*){failure}", host.text(), re.MULTILINE), failure


ENDING = """
import os, signal, bghost

class Bug(BaseException):
    pass

class Kind:
    @bghost.hookimpl
    def bghost_setup(self, worker):
        if worker.args["how"] == "set-up fails":
            raise ValueError("set-up")

    def round(self, worker):
        how = worker.args["how"]
        if how in ("asked", "asked, fast"):
            return bghost.UNTIL_WOKEN
        if how == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
            return 0
        raise {
            "exits": SystemExit,
            "exits with 0": SystemExit(0),
            "exits with 3": SystemExit(3),
            "exits with a text": SystemExit("a text"),
            "gives up": bghost.GiveUp("enough"),
            "bug": Bug,
            "stops itself": bghost.Stop,
        }.get(how, ValueError(how))

    @bghost.hookimpl
    def bghost_recover(self, worker, error):
        how = worker.args["how"]
        if how == "recovery fails":
            raise TypeError("recovery")
        return bghost.Recovery.RESTART if how == "restart" else bghost.Recovery.STOP

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        worker.log.info("note: {}", reason)
"""

ENDS = {
    "exits": ("done", "done", "exit code 0"),
    "exits with 0": ("done", "done", "exit code 0"),
    "exits with 3": ("error", "failed", "exit code 3"),
    "exits with a text": ("error", "failed", "exit code 1"),
    "asked": ("stop", "stopped", "exit code 0"),
    "asked, fast": ("stop", "stopped", "exit code 0"),
    "terminated": ("stop", "failed", "exit code 1"),
    "stops itself": ("stop", "done", "exit code 0"),
    "stop": ("stop", "done", "exit code 0"),  # decided by bghost_recover, like the next
    "restart": ("restart", "failed", "exit code 1"),
    "recovery fails": ("error", "failed", "exit code 1"),
    "set-up fails": ("error", "failed", "exit code 1"),
    "gives up": ("give_up", "failed", "exit code 1"),
    "bug": ("error", "failed", "exit code 1"),
}
"""How a worker that is not to be restarted ends: the reason that its cleanup is told, its state, its exit."""


def workers_of(kind: str, names: Iterable[str]) -> str:
    """The config of one worker for each case, named w1, w2, ..., with the case as its args, not restarted."""
    return "".join(
        f"[[worker]]\nkind = '{kind}'\nname = 'w{number}'\nrestart = 'never'\nargs = {{ how = '{how}' }}\n"
        for number, how in enumerate(names, 1)
    )


@LOOPS
def test_the_reason_that_cleanup_is_told(loop: str, bghost_host: StartHost) -> None:
    """bghost_cleanup is told why the worker ends, for each way to end; with the exit that the host sees."""
    host = bghost_host(kinds={"ending": ENDING + loop}, args=["run"], config=workers_of("ending", ENDS))
    names = {how: f"w{number}" for number, how in enumerate(ENDS, 1)}
    host.client.wait(names["asked"], names["asked, fast"])
    host.client.stop(names["asked"])
    host.client.stop(names["asked, fast"], mode="fast")
    rows = {row["name"]: row for row in host.client.wait("all", until="stopped", timeout=10 * SLOW)}
    host.client.shutdown()
    assert host.wait() == 0
    assert {how: (*notes(host, name), rows[name]["state"], rows[name]["exit"]) for how, name in names.items()} == ENDS


@LOOPS
def test_cleanup_runs_when_the_host_dies(loop: str, bghost_host: StartHost) -> None:
    """A worker that sleeps sees the host's death at once, and cleans up, told of the reason."""
    host = bghost_host(kinds={"ending": ENDING + loop}, args=["run"], config=workers_of("ending", ["asked"]))
    host.client.wait("w1")
    host.signal(signal.SIGKILL)
    assert host.wait() == -signal.SIGKILL  # and its workers have let go of its output
    assert notes(host, "w1") == ["host_died"]
    assert "terminated by" not in host.text()


def test_stats_tell_what_a_worker_does(bghost_host: StartHost) -> None:
    """ps shows what a worker does, waits for and has done; texts and words are gone when their block has ended."""
    busy = """
    import bghost

    class Kind:
        done = False

        @bghost.hookimpl
        def bghost_tick(self, worker):
            if self.done:
                return bghost.UNTIL_WOKEN
            with worker.activity("outer"):
                with worker.activity("counting"), worker.waiting("abacus"):
                    worker.log.info("note: counts")
                    while "wake" not in worker.wait(60):
                        pass
                worker.log.info("note: has counted")
                worker.wait(60)
                self.done = True
                raise ValueError("lost count")
    """
    host = bghost_host(kinds={"busy": busy}, args=["run", "busy"])
    host.wait_line("note: counts")
    row = host.wait_row("busy", lambda row: row["doing"] == "waiting")
    pid = row["pid"]
    assert pid is not None
    assert (row["state"], row["activity"], row["wait"]) == ("ready", "counting", "abacus")
    assert (row["ticks"], row["errors"], row["last_error"]) == (0, 0, None)
    os.kill(pid, signal.SIGUSR1)
    host.wait_line("note: has counted")
    row = host.wait_row("busy", lambda row: row["doing"] == "waiting" and row["wait"] is None)
    assert row["activity"] == "outer"
    os.kill(pid, signal.SIGUSR1)
    row = host.wait_row("busy", lambda row: row["ticks"] >= 1 and row["doing"] == "idle")
    assert (row["activity"], row["errors"], row["last_error"]) == (None, 1, "ValueError: lost count")

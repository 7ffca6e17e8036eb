"""``bghost why``: each cause of a worker's end is told from its output alone."""

import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from support import Host, Sandbox, StartHost, until

CORES: Final = not Path("/proc/sys/kernel/core_pattern").read_text().startswith("|")
"""Whether a core is a file, and not what another program makes of it."""

CAUSES: Final = {
    "error": ("raise ValueError('no such account')", "ValueError: no such account", r"exit code 1$"),
    "code": ("sys.exit(3)", "SystemExit: 3", r"exit code 3$"),
    "bypass": ("os._exit(7)", r"ended without bghost's way out: os\._exit", "exit code 7, bypassing bghost"),
    "segv": ("ctypes.string_at(8)", "memory that is not its own was touched", r"killed by SIGSEGV"),
    "abort": (
        "os.chdir(os.environ['HOME']); resource.setrlimit(resource.RLIMIT_CORE, (1 << 16, -1)); os.abort()",
        "C code gave up",
        "killed by SIGABRT" + (", core dumped" if CORES else ""),
    ),
    "killed": (
        "with worker.activity('select 7'): os.kill(os.getpid(), 9)",
        "bghost has not sent that SIGKILL",
        "killed by SIGKILL",
        r"in +starting, select 7$",
    ),
    "term": ("os.kill(os.getpid(), 15); worker.wait(30)", "a SIGTERM that bghost did not send", "exit code 1"),
    "gave_up": ("raise bghost.GiveUp('the queue is gone')", "raised GiveUp", "gave up: the queue is gone"),
    "memory": (
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, -1)); x = bytearray(1 << 40)",
        "memory ran out; RLIMIT_AS is",
        "MemoryError",
    ),
    "cpu": (
        "resource.setrlimit(resource.RLIMIT_CPU, (1, 3))\n            while True: pass",
        r"RLIMIT_CPU, .* is used up",
        "killed by SIGXCPU",
    ),
}

KIND: Final = """
    import ctypes, os, resource, sys
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            worker.log.info("last words of " + worker.name)
            print("printed by", worker.name)
            {}

        @bghost.hookimpl
        def bghost_tick(self, worker):
            return bghost.UNTIL_WOKEN
"""


def why(host: Host, *names: str) -> str:
    result = host.bghost("why", *names)
    assert result.code == 0, result
    return result.stdout


def test_ten_causes(bghost_host: StartHost) -> None:
    """An error, an exit code, a crash, a signal from elsewhere, a limit: each with its last lines and what follows."""
    kinds = {name: KIND.format(code) for name, (code, *_) in CAUSES.items()}
    tables = "".join(f"[[worker]]\nkind = '{name}'\nrestart = 'never'\n" for name in CAUSES)
    host = bghost_host(kinds=kinds, args=["run"], config=tables)
    host.client.wait(*CAUSES, until="stopped", timeout=40)
    texts = dict(zip(CAUSES, why(host, *CAUSES).split("\n\n"), strict=True))
    for name, (_, *told) in CAUSES.items():
        text = texts[name]
        for pattern in told:
            assert re.search(pattern, text, re.MULTILINE), text
        assert f"{name} ({name}) is failed" in text
        assert f"[{name}] last words of {name}" in text and f"[{name}] printed by {name}" in text
        assert "decision    failed: " in text
    assert "Fatal Python error: Segmentation fault" in texts["segv"] and "string_at" in texts["segv"]
    (row,) = host.client.why("killed")
    assert row["ended"] is not None and (row["ended"]["signal"], row["ended"]["orderly"]) == ("SIGKILL", False)


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """Where a process writes its number to have, with its children, 128 MiB at most."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("what memory is short of goes to swap here")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        root, limit = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            if controllers == "memory"
            else ("/sys/fs/cgroup", "memory.max")
        )
        group = Path(f"{root}{own}") / f"bghost-{uuid.uuid4().hex}"
        if controllers not in ("memory", ""):
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(128 << 20))
            yield group / "cgroup.procs"
            return
        except OSError:
            pass
        finally:
            until(lambda group=group: _is_removed(group))  # type: ignore[misc]
    pytest.skip("no memory cgroup can be made here")


def _is_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False  # its last process has not gone yet
    return True


def test_a_kernel_out_of_memory(small_memory: Path, sandbox: Sandbox) -> None:
    """A SIGKILL that nobody has sent but the kernel, for want of memory, is told as that."""
    sandbox.kinds({"eats": KIND.format("eaten = b'x' * (1 << 30)")})
    sandbox.config("[[worker]]\nkind = 'eats'\nrestart = 'never'\n")
    host = sandbox.start_host_under("sh", "-c", f'echo $$ > {small_memory}; exec "$@"', "sh")
    host.wait_answering()
    host.client.wait("eats", until="stopped")
    told = why(host, "eats")
    assert "exit        killed by SIGKILL" in told
    assert "the kernel has killed 1 of this cgroup for want of memory while it ran: most likely this one" in told


def test_a_worker_that_is_tried_again(bghost_host: StartHost) -> None:
    """Says which unhealthy run it was, and when the next try is."""
    host = bghost_host(
        kinds={"fails": KIND.format("raise OSError('nobody there')")},
        args=["run"],
        config="[[worker]]\nkind = 'fails'\nrestart_after = 50\n",
    )
    host.wait_row("fails", lambda row: row["state"] == "backoff")
    text = why(host, "fails")
    assert re.search(r"next try    \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, in [45]\d\.\d s", text), text
    assert re.search(r"decision    unhealthy run 1 of 10, started again after (5\d\.\d|60\.0) s", text), text
    (answer,) = host.bghost("why", "fails", "--json").json()
    assert answer["next_try"] > answer["ended"]["at"]
    assert host.bghost("why", "nobody").code == 5


STUCK: Final = """
    import time
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            with worker.activity("select pg_sleep(600)"), worker.interruptible():
                sleeps_too_long()
            return bghost.UNTIL_WOKEN

    def sleeps_too_long():
        time.sleep(600)
"""


def test_a_stuck_tick(bghost_host: StartHost) -> None:
    """It is told what it was in the middle of, such as a query, and where."""
    text = "[[worker]]\nkind = 'stuck'\ntick_timeout = 0.5\nrestart_after = 50\n"
    host = bghost_host(kinds={"stuck": STUCK}, args=["run"], config=text)
    host.wait_row("stuck", lambda row: row["state"] == "backoff", 20)
    told = why(host, "stuck")
    assert "a tick took longer than tick_timeout, 0.5 s; bghost stopped it" in told
    assert "select pg_sleep(600)" in told
    assert "sleeps_too_long" in told.partition("its stacks")[2]


def test_what_bghost_did_itself(bghost_host: StartHost) -> None:
    """A stop, a kill after it, and a set-up that takes too long are no mystery."""
    deaf = KIND.format("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15, 3])").replace(
        "return bghost.UNTIL_WOKEN", "worker.log.info('deaf'); ctypes.PyDLL(None).sleep(600)"
    )
    slow = KIND.format("ctypes.CDLL(None).sleep(600)")
    tables = "[[worker]]\nkind = 'deaf'\n[[worker]]\nkind = 'slow'\nready_timeout = 0.5\nrestart = 'never'\n"
    host = bghost_host(kinds={"deaf": deaf, "slow": slow}, args=["run"], config=tables)
    host.wait_line(r"\[deaf\] deaf")
    host.client.stop("deaf", mode="immediate")
    told = why(host, "deaf")
    assert "a stop was asked for through bghost" in told and "bghost killed it" in told
    assert "stopped, until it is started again" in told
    host.client.wait("slow", until="stopped")
    assert "bghost_setup took longer than ready_timeout, 0.5 s; bghost killed it" in why(host, "slow")


def test_a_worker_that_runs(bghost_host: StartHost) -> None:
    """Shows its last lines, and that nothing has ended; one that waits for another, whom it waits for."""
    tables = "[[worker]]\nkind = 'fine'\n[[worker]]\nkind = 'fine'\nname = 'second'\nafter = ['never']\n"
    tables += "[[worker]]\nkind = 'never'\nrestart_after = 50\n"
    kinds = {"fine": KIND.format("pass"), "never": KIND.format("1 / 0")}
    host = bghost_host(kinds=kinds, args=["run"], config=tables)
    host.client.wait("fine")
    until(lambda: "printed by fine" in why(host, "fine"))
    assert "no process of it has ended so far" in why(host, "fine")
    assert "waits for   never, which it is to start after" in why(host, "second")


def test_an_error_is_told_once_in_a_line(bghost_host: StartHost) -> None:
    """Of an error that a tick is recovered from, which is the whole message, the last lines have no second copy."""
    source = "import bghost\nclass Kind:\n    @bghost.hookimpl\n    def bghost_tick(self, worker): 1 / 0"
    host = bghost_host(kinds={"failing": source}, args=["run", "failing"])
    told = until(lambda: [line for line in why(host, "failing").splitlines() if "division by zero" in line])
    assert told[0].count("division by zero") == 1


def test_patterns_in_names(bghost_host: StartHost) -> None:
    """Whatever takes a name takes a pattern, as a shell has them; one that fits nobody is no worker."""
    host = bghost_host(
        kinds={"w": KIND.format("pass"), "other": KIND.format("pass")},
        args=["run"],
        config="[[worker]]\nkind = 'w'\ncount = 2\n[[worker]]\nkind = 'other'\n",
    )
    host.client.wait("all")
    for pattern in ("w*", "w.?", "[w].[12]"):
        assert [row["name"] for row in host.client.ps(pattern)] == ["w.1", "w.2"]
    both = host.bghost("ps", "--json", "w.2", "o*").json()
    assert [row["name"] for row in both] == ["w.2", "other"]
    assert host.client.signal("o*", signum=signal.SIGUSR1) == ["other"]
    stopped, nobody = host.sandbox.bghost_each(["stop", "w*"], ["stop", "x*"])
    assert (stopped.code, nobody.code) == (0, 5)
    assert {row["name"]: row["state"] for row in host.client.ps()} == {
        "w.1": "stopped", "w.2": "stopped", "other": "ready",
    }  # fmt: skip
    host.client.stop("all")
    assert {row["state"] for row in host.client.ps("all")} == {"stopped"}

"""test_shm_mq as a user meets it, through the command and in a host. MQ-n: cases of the original's behaviour."""

import os
import re
import signal
from collections.abc import Mapping

import pytest
from support import SLOW, Host, Result, Sandbox, StartHost, until


def run(sandbox: Sandbox, *options: object) -> Result:
    """``bghost test-shm-mq`` with *options*."""
    return sandbox.bghost("test-shm-mq", *map(str, options), timeout=170)


def went_through(result: Result, repeat: int, size: int, workers: int) -> bool:
    """Whether it was done, and says so."""
    assert result.code == 0, result.stderr
    return f"{repeat} messages of {size} bytes went through {workers} workers" in result.stderr


@pytest.mark.parametrize("repeat, size", [(2000, 0), (2001, 1)], ids=["MQ-1", "MQ-2"])
def test_tiny_messages(sandbox: Sandbox, repeat: int, size: int) -> None:
    """MQ-1, MQ-2: an empty message, and one of a byte, go round some thousand times."""
    options = ("--queue-size", 1024, "--message-size", size, "--repeat", repeat)
    assert went_through(run(sandbox, *options), repeat, size, 1)


LONG = 10_000 if os.environ.get("BGHOST_SOAK", "") not in ("", "0") else 2_500
"""Times round through a queue that is too short for the message, which takes both sides a wake-up for each part."""


@pytest.mark.timeout(180 * SLOW)
@pytest.mark.parametrize("queue, size, times", [(32768, 400, 10_000), (100, 300, LONG)], ids=["MQ-3", "MQ-4"])
def test_thousands_of_messages(sandbox: Sandbox, queue: int, size: int, times: int) -> None:
    """MQ-3, MQ-4: thousands of times round, also where the message is longer than the queue: it comes back equal."""
    options = ("--queue-size", queue, "--message-size", size, "--repeat", times)
    assert went_through(run(sandbox, *options), times, size, 1)


@pytest.mark.timeout(180 * SLOW)
def test_pipelined(sandbox: Sandbox) -> None:
    """MQ-5: long messages, 200 of them under way through three workers, each compared: no deadlock."""
    options = ("--queue-size", 16384, "--message-size", 270000, "--repeat", 200, "--workers", 3, "--pipelined")
    assert went_through(run(sandbox, *options, "--verify"), 200, 270000, 3)


def test_pipelined_without_workers(sandbox: Sandbox) -> None:
    """The caller may be at both ends of a single queue; without verify too."""
    options = ("--queue-size", 64, "--message-size", 500, "--repeat", 50, "--workers", 0, "--pipelined", "--no-verify")
    assert went_through(run(sandbox, *options), 50, 500, 0)


SLOW_WORKER = {
    "slow": """
    import bghost

    class Extension:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            if worker.name == "test_shm_mq-2":
                worker.log.info("note: lingers")
                worker.wait(600)
    """
}


def start(bghost_host: StartHost, *sets: str, extensions: Mapping[str, str] | None = None, config: str = "") -> Host:
    """A host that runs the caller with *sets*, and stays when that has ended."""
    values = "".join(f"{text.replace('=', ' = ')}\n" for text in sets)
    config = f"[kind.test_shm_mq]\n{values}\n[[worker]]\nkind = 'test_shm_mq'\nrestart = 'never'\n{config}"
    return bghost_host(args=["run"], extensions=extensions or {}, config=config)


def workers(host: Host) -> dict[str, str]:
    """States of the ring's workers, by name."""
    return {row["name"]: row["state"] for row in host.client.ps() if row["name"] != "test_shm_mq"}


ENDED = {"stopped", "done"}  # by the caller, or because the worker before or after it was


def ended(host: Host, count: int) -> bool:
    states = workers(host)
    return len(states) == count and not {"starting", "ready", "stopping", "backoff"} & set(states.values())


def kill(host: Host, name: str) -> None:
    pid = host.row(name)["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_worker_that_dies_before_all_are_ready(bghost_host: StartHost) -> None:
    """MQ-6: the caller is told, fails with an error that says so, and every other worker is stopped."""
    host = start(bghost_host, "workers=3", "repeat=1", extensions=SLOW_WORKER)
    host.wait_line("note: lingers")
    host.wait_row("test_shm_mq-1", lambda row: row["state"] == "ready")
    kill(host, "test_shm_mq-2")
    row = host.wait_row("test_shm_mq", lambda row: row["state"] == "failed" and row["pid"] is None)
    assert "one or more background workers failed to start: test_shm_mq-2" in str(row["last_error"])
    until(lambda: ended(host, 3))
    states = workers(host)
    assert states.pop("test_shm_mq-2") == "failed"
    assert set(states.values()) <= ENDED


def test_a_caller_that_dies_amid_messages(bghost_host: StartHost) -> None:
    """MQ-7: once all are ready, the caller's death makes every worker end by itself, in good order."""
    host = start(bghost_host, "workers=3", "repeat=1_000_000_000", "pipelined=true")
    until(lambda: list(workers(host).values()) == ["ready"] * 3)
    kill(host, "test_shm_mq")
    until(lambda: ended(host, 3))
    assert set(workers(host).values()) == {"done"}


def test_a_caller_that_dies_before_a_worker_is_ready(bghost_host: StartHost) -> None:
    """MQ-8: the worker that comes late finds nobody who waits for it, and ends with 1, not to be started again."""
    host = start(bghost_host, "workers=2", "repeat=1", extensions=SLOW_WORKER)
    host.wait_line("note: lingers")
    kill(host, "test_shm_mq")
    host.wait_row("test_shm_mq", lambda row: row["state"] == "failed" and row["pid"] is None)
    host.bghost("wake", "test_shm_mq-2")
    row = host.wait_row("test_shm_mq-2", lambda row: row["state"] == "failed" and row["pid"] is None)
    assert (row["state"], row["exit"], row["restarts"]) == ("failed", "exit code 1", 0)
    until(lambda: ended(host, 2))


def test_fewer_slots_than_workers(bghost_host: StartHost) -> None:
    """MQ-9: the error says which setting to raise, and the workers that had started are stopped."""
    host = start(bghost_host, "workers=5", config="[host]\nmax_workers = 4\n")
    row = host.wait_row("test_shm_mq", lambda row: row["state"] == "failed" and row["pid"] is None)
    assert "max_workers" in str(row["last_error"])
    until(lambda: ended(host, 3))
    assert set(workers(host).values()) <= ENDED


@pytest.mark.parametrize(
    "options",
    [("--repeat", "-1"), ("--workers", "0"), ("--workers", "-1", "--pipelined"), ("--queue-size", "63")],
)
def test_what_cannot_be_is_refused(sandbox: Sandbox, options: tuple[str, ...]) -> None:
    """MQ-10: an error that names the option, exit code 2, and nothing was started."""
    result = run(sandbox, *options)
    assert result.code == 2
    assert re.match(rf"bghost: .*{options[0]}", result.stderr)
    assert "INFO" not in result.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_ring_is_ended_by_a_signal(sandbox: Sandbox, signum: signal.Signals) -> None:
    """SIGINT or SIGTERM to the command, whatever goes round, stops its host and all that belongs to it."""
    process = sandbox.start("test-shm-mq", "--repeat", "1000000000", "--workers", "2")
    process.wait_line(r"\[test_shm_mq-2\] started")
    process.signal(signum)
    process.wait_line("host of instance test_shm_mq ends", 30)
    process.wait(30)

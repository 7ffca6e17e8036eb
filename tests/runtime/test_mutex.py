"""Locks in shared memory: exclusive, given up by whoever dies with them, waited for neither long nor deafly."""

import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from support import SLOW, Host, StartHost, notes, until

from bghost import LockDamaged, WorkerSpec
from bghost.shared.mutex import MUTEX_SIZE, Acquired, RobustMutex


class Shared:
    """A mapping with a mutex and a few words, and children that share it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.view = memoryview(self.memory)
        self.mutex = RobustMutex(self.view[:MUTEX_SIZE])
        self.mutex.initialise()
        self.words = self.view[1024:2048].cast("Q")
        self.children: list[int] = []

    def fork(self, act: Callable[[], object]) -> int:
        """A child that does *act* and ends at once."""
        pid = os.fork()
        if pid == 0:
            try:
                act()
                os._exit(0)
            finally:
                os._exit(1)
        self.children.append(pid)
        return pid

    def end(self, pid: int, signum: int = 0) -> int:
        """Wait for a child's end, killing it first if told; its wait status."""
        if signum:
            os.kill(pid, signum)
        self.children.remove(pid)
        return os.waitpid(pid, 0)[1]

    def acquire(self, seconds: float) -> Acquired:
        """Acquire in slices."""
        deadline = time.monotonic() + seconds
        while (acquired := self.mutex.acquire_within(0.05)) is Acquired.BUSY and time.monotonic() < deadline:
            pass
        return acquired


@pytest.fixture
def shared() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    for pid in list(shared.children):
        shared.end(pid, signal.SIGKILL)


def test_it_is_free_taken_busy_and_free_again(shared: Shared) -> None:
    """Taken by one, busy for another process, and its owner can be named; released, it is free again."""
    assert shared.mutex.try_acquire() is Acquired.TAKEN
    busy = shared.fork(lambda: os._exit(42 if shared.mutex.try_acquire() is Acquired.BUSY else 0))
    assert os.waitstatus_to_exitcode(shared.end(busy)) == 42
    assert shared.mutex.owner == os.getpid()
    shared.mutex.release()
    assert shared.mutex.owner == 0
    free = shared.fork(lambda: os._exit(42 if shared.mutex.try_acquire() is Acquired.TAKEN else 0))
    assert os.waitstatus_to_exitcode(shared.end(free)) == 42


def test_it_is_not_recursive(shared: Shared) -> None:
    """Its own thread is refused with an error, not put to sleep for ever."""
    shared.mutex.try_acquire()
    with pytest.raises(RuntimeError, match="has the lock already"):
        shared.mutex.try_acquire()
    with pytest.raises(RuntimeError, match="has the lock already"):
        shared.mutex.acquire_within(0.01)
    shared.mutex.release()
    with pytest.raises(PermissionError):
        shared.mutex.release()


@pytest.mark.timeout(180 * SLOW)
def test_a_holder_that_dies_gives_it_up_each_time(shared: Shared) -> None:
    """500 holders are killed, exit or become another program in the section: the next has it within 100 ms, told so."""
    ways: list[Callable[[], object]] = [
        signal.pause,  # and is killed
        lambda: os._exit(3),
        lambda: os.execv("/bin/true", ["true"]),
    ]
    slow = []
    for number in range(500):
        held, holding = os.pipe()
        way = ways[number % len(ways)]

        def hold(way: Callable[[], object] = way, holding: int = holding) -> None:
            assert shared.mutex.try_acquire()
            os.write(holding, b".")
            way()

        pid = shared.fork(hold)
        assert os.read(held, 1) == b"."
        os.close(held)
        os.close(holding)
        if way is signal.pause:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        assert shared.acquire(5.0 * SLOW) is Acquired.INHERITED
        slow.append(time.monotonic() - began)
        assert shared.mutex.owner == os.getpid()
        shared.mutex.release()
        shared.end(pid)
        assert shared.mutex.try_acquire() is Acquired.TAKEN  # only the first is told
        shared.mutex.release()
    assert sorted(slow)[490] < 0.1 * SLOW


@pytest.mark.timeout(120 * SLOW)
def test_it_is_exclusive_however_its_holders_die(shared: Shared) -> None:
    """Four processes count under it and are killed at random: no count is lost but one that its holder died in."""
    counter, shadow = 0, 1

    def count() -> None:
        while True:
            acquired = Acquired.BUSY
            while acquired is Acquired.BUSY:
                acquired = shared.mutex.acquire_within(0.05)
            if acquired is Acquired.INHERITED:
                shared.words[shadow] = shared.words[counter]
            assert shared.words[shadow] == shared.words[counter]
            number = shared.words[counter]
            shared.words[2] = os.getpid()
            shared.words[counter] = number + 1
            assert shared.words[2] == os.getpid()  # nobody else is in here
            shared.words[shadow] = number + 1
            shared.mutex.release()

    chance = random.Random(1)
    counting = [shared.fork(count) for _ in range(4)]
    for _ in range(60):
        before = shared.words[counter]
        until(lambda before=before: shared.words[counter] > before + chance.randrange(50))  # type: ignore[misc]
        victim = counting.pop(chance.randrange(4))
        assert os.WTERMSIG(shared.end(victim, signal.SIGKILL)) == signal.SIGKILL
        counting.append(shared.fork(count))
    for pid in counting:
        assert os.WTERMSIG(shared.end(pid, signal.SIGKILL)) == signal.SIGKILL  # none has failed by itself
    assert shared.acquire(1.0)
    assert shared.words[counter] > 60


def test_a_forked_child_is_not_its_owner(shared: Shared) -> None:
    """A child of the holder can neither release it nor keep it: its end changes nothing for the parent."""
    shared.mutex.try_acquire()

    def release() -> None:
        with pytest.raises(PermissionError):
            shared.mutex.release()
        assert shared.mutex.try_acquire() is Acquired.BUSY

    assert shared.end(shared.fork(release)) == 0
    shared.mutex.release()
    assert shared.mutex.try_acquire() is Acquired.TAKEN


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x5A])
def test_one_that_was_written_over_is_refused(
    shared: Shared, byte: int, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros, ones or anything else in its cell: an error that says so, from every call, and no wait."""
    if held:
        shared.mutex.try_acquire()
    shared.view[:MUTEX_SIZE] = bytes((byte,)) * MUTEX_SIZE
    assert not shared.mutex.intact
    monkeypatch.setattr("bghost.shared.mutex._clocklock", lambda *args: pytest.fail("it waits"))
    for call in (
        lambda: shared.mutex.try_acquire(),
        lambda: shared.mutex.acquire_within(1),
        shared.mutex.release,
    ):
        with pytest.raises(LockDamaged, match="written over"):
            call()
    shared.mutex.initialise()
    assert shared.mutex.try_acquire() is Acquired.TAKEN


def test_a_holder_that_is_not_is_damage(shared: Shared) -> None:
    """What is locked by a thread that does not exist was written over; what a living thread or a dying one has, not."""
    futex = shared.view[16:20].cast("I")
    assert not shared.mutex.is_orphaned

    def hold() -> None:
        shared.mutex.try_acquire()
        signal.pause()

    holder = shared.fork(hold)
    until(lambda: shared.mutex.owner == holder)
    assert not shared.mutex.is_orphaned
    shared.end(holder, signal.SIGKILL)
    assert not shared.mutex.is_orphaned
    assert shared.acquire(1.0) is Acquired.INHERITED
    shared.mutex.release()
    futex[0] = holder
    assert shared.mutex.try_acquire() is Acquired.BUSY
    orphaned = shared.mutex.is_orphaned
    assert orphaned


def test_a_cell_that_cannot_be_one_is_refused(shared: Shared) -> None:
    """Size and place of a cell are checked."""
    with pytest.raises(ValueError, match="128 bytes"):
        RobustMutex(shared.view[:64])
    with pytest.raises(ValueError, match="multiple of 64"):
        RobustMutex(shared.view[8 : 8 + MUTEX_SIZE])


LOCKING = """
import mmap, os, signal, time
import bghost
from bghost.shared.mutex import MUTEX_SIZE, RobustMutex
from bghost.worker.locking import Lock

memory = mmap.mmap(-1, mmap.PAGESIZE)
mutex = RobustMutex(memoryview(memory)[:MUTEX_SIZE])
mutex.initialise()


class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        def note(text):
            worker.log.info("note: {}", text)

        lock = Lock(worker, mutex, "of the test", worker.args.get("timeout", 1.0))
        exec(worker.args["tick"], globals() | locals())
        return bghost.UNTIL_WOKEN
"""
HOLD = "lock.__enter__(); note('holds'); time.sleep(600)"


def locking(tick: str, name: str, **args: object) -> str:
    lines = [f"name = {name!r}", "kind = 'locking'", "restart = 'never'", f"args.tick = '''{tick}'''"]
    lines += [f"args.{key} = {value!r}" for key, value in args.items()]
    return "[[worker]]\n" + "\n".join(lines) + "\n"


def kill(host: Host, name: str) -> None:
    pid = host.row(name)["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_stopped_holder_is_named_to_whoever_waits(bghost_host: StartHost) -> None:
    """A wait for the lock of a suspended worker ends after its timeout, with an error that says who that is."""
    host = bghost_host(
        kinds={"locking": LOCKING},
        args=["run"],
        config=locking(HOLD, "holder") + locking("worker.wait(); lock.__enter__()", "waiter", timeout=0.3),
    )
    host.wait_line("note: holds")
    pid = host.row("holder")["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert host.bghost("wake", "waiter").code == 0
    row = host.wait_row("waiter", lambda row: row["errors"])
    assert f"held by worker holder, pid {pid}, slot 0" in str(row["last_error"])
    assert "not become free within 0.3 s" in str(row["last_error"])
    kill(host, "holder")


def test_a_killed_holder_leaves_it_to_the_next_who_is_told(bghost_host: StartHost) -> None:
    """The first to get the lock after its holder was killed sees it, and the log says so; the next do not."""
    host = bghost_host(
        kinds={"locking": LOCKING},
        args=["run"],
        config=locking(HOLD, "holder")
        + locking(
            "worker.wait()\nfor _ in range(2):\n    with lock: note(f'inherited {lock.inherited}')",
            "waiter",
            timeout=30.0,
        ),
    )
    host.wait_line("note: holds")
    assert host.bghost("wake", "waiter").code == 0
    host.wait_row("waiter", lambda row: row["wait"] == "lock")
    kill(host, "holder")
    host.wait_line("lock of the test is taken over: its holder has died with it")
    until(lambda: notes(host, "waiter") == ["inherited True", "inherited False"])


ASYNC = (
    LOCKING.replace("def bghost_tick", "async def bghost_tick")
    .replace("return bghost", "async with lock: pass\n        return bghost")
    .replace("import mmap", "import asyncio, mmap")
    .replace("bghost.worker.locking import Lock", "bghost.worker.async_pool import AsyncLock")
    .replace("Lock(worker", "AsyncLock(worker")
    .replace('("timeout", 1.0))', '("timeout", 1.0), among_tasks=asyncio.Lock())')
)


@pytest.mark.parametrize("source", [LOCKING, ASYNC], ids=["sync", "async"])
def test_a_wait_for_it_is_interruptible(bghost_host: StartHost, source: str) -> None:
    """SIGTERM ends a wait for the lock at once, and the worker with it."""
    hold = "mutex.try_acquire(); note('holds'); time.sleep(600)"
    wait = "lock.__enter__()" if source is LOCKING else "pass"
    host = bghost_host(kinds={"locking": source}, args=["run"], config=locking(hold, "holder"))
    host.wait_line("note: holds")
    host.client.launch(WorkerSpec(kind="locking", name="waiter", args={"tick": wait, "timeout": 600.0}))
    pid = host.wait_row("waiter", lambda row: row["wait"] == "lock")["pid"]
    assert pid is not None
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    os.kill(pid, signal.SIGTERM)
    assert poll.poll(30_000 * SLOW)  # its time for the lock is longer
    os.close(ended)
    kill(host, "holder")


def test_what_a_tick_leaves_locked_is_released_with_its_error(bghost_host: StartHost) -> None:
    """A lock that was entered and not left is rolled back by recovery, whatever the tick's error was."""
    host = bghost_host(
        kinds={"locking": LOCKING},
        args=["run"],
        config=locking("lock.__enter__(); note('had it'); 1 / 0", "one")
        + locking("with lock: note('had it'); 1 / 0", "two")
        + locking("worker.scope.enter(lock); note('had it'); 1 / 0", "three")
        + locking("worker.scope.enter(lock); note('had it')", "four"),
    )
    for name in ("one", "two", "three", "four"):
        line = host.wait_line(rf"\[{name}\] note: had it")
        if name != "four":  # its tick is tried again, after a second, and again: each time through another Lock
            host.wait_line(rf"\[{name}\] note: had it", after=line)


def test_what_it_costs() -> None:
    """The bench runs, and its figures can be read."""
    bench = os.path.join(os.path.dirname(__file__), "..", "bench", "mutex.py")
    done = subprocess.run([sys.executable, bench, "--count", "1000", "--rounds", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) >= {"mutex", "with lock", "take over from a killed holder"}

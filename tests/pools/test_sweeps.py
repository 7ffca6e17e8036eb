"""Deaths at any instant and at every step: in updates, in lock sections, in launches, in callbacks.

A few hundred by default, in seconds; BGHOST_SOAK=full: ten thousand, and a thousand keys; BGHOST_SOAK=N: a part of it.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from typing import Any, Final

import pytest
from poolkit import consistent, start
from support import SLOW, Host, StartHost, notes, until

from bghost.shared.errors import BghostError

_SIZE: Final = os.environ.get("BGHOST_SOAK", "")
PART: Final = 1.0 if _SIZE == "full" else float(_SIZE or 0)
KILLS: Final = max(60, int(10_000 * PART))
KEYS: Final = max(100, int(1_000 * PART))

pytestmark = pytest.mark.timeout(3_600 if PART else 120)

STEPS: Final = """
import os, random, signal, sys

class Steps:
    '''Kills this process at the so-manieth bytecode that it executes in one of *files*.'''

    def __init__(self, number, *files):
        self.left = number
        self.files = files

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        frame.f_trace_opcodes = True
        return self.step

    def step(self, frame, event, arg):
        if event == "opcode":
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.step
"""
"""A debugger's hook stops at every single step of the interpreter: that is as fine as a death can fall in Python."""

EACH_STEP: Final = (
    STEPS
    + """
import json, mmap, time
from bghost.shared.mutex import MUTEX_SIZE, Acquired, RobustMutex
from bghost.shared.publication import Publications, Writer

memory = memoryview(mmap.mmap(-1, 4096))
place, salt = MUTEX_SIZE, 5
published, mutex = Publications(memory, 72), RobustMutex(memory[:MUTEX_SIZE])
writer, live = Writer(published, place, salt), published.live_at(place)
mutex.initialise()

def data(number):
    return number.to_bytes(8, "little") * 9

def each_step(act, check, *files):
    '''Have a child die in *act* at step 1, 2, 3, ... until it comes to its end; how many died.'''
    sys.settrace(Steps(1 << 60, *files))
    act(0)  # Python 3.13 tells of no step in a function that is traced for the first time
    sys.settrace(None)
    number = 0
    while True:
        number += 1
        pid = os.fork()
        if pid == 0:
            sys.settrace(Steps(number, *files))
            act(number)
            sys.settrace(None)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        check(number)
        if ended == 0:
            return number - 1
        assert ended == -signal.SIGKILL, ended
"""
)


def run(program: str) -> Any:
    """What a program prints as JSON; in a process of its own, since it forks."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", EACH_STEP + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60 * SLOW,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    return json.loads(process.stdout)


def test_a_death_at_each_step_of_an_update() -> None:
    """What is read is the data before or after, whole; the next process, and the live data, go on from there."""
    died = run("""
        read = 0

        def check(number):
            global read
            before, read = read, int.from_bytes((published.read(place, salt) or bytes(8))[:8], "little")
            assert published.read(place, salt) in (None, data(read))
            assert read in (before, number), (before, read, number)
            writer.heal()
            assert bytes(memory[live : live + 72]) == data(read)

        died = each_step(lambda number: writer.write(data(number)), check, "shared/publication.py")
        assert read == died + 1
        print(json.dumps(died))
    """)
    assert died > 20


def test_a_death_at_each_step_of_a_lock() -> None:
    """Whoever comes next has it in time: told that it is inherited if, and only if, its holder died with it."""
    died, inherited = run("""
        count = 0

        def act(number):
            mutex.try_acquire()
            mutex.release()

        def check(number):
            global count
            acquired = Acquired.BUSY
            while acquired is Acquired.BUSY:
                acquired = mutex.acquire_within(0.05)
            count += acquired is Acquired.INHERITED
            mutex.release()

        print(json.dumps([each_step(act, check, "shared/mutex.py"), count]))
    """)
    assert died > 20
    assert 0 < inherited < died


SWEPT: Final = """
from test_pool import POOL
from test_steps import Steps
import random, sys

FILES = ("shared/publication.py", "shared/mutex.py", "worker/locking.py", "worker/pool.py", "worker/recovery.py")

def perhaps_die(worker, chance, steps):
    '''Have this process die at some step of what follows in bghost's files, or not.'''
    random.seed(worker.slot.control[4] ^ worker.slot.stats[1])
    if random.random() < chance:
        sys.settrace(Steps(random.randrange(1, steps), *FILES))
"""

SWEPT_ENTRY: Final = """
    def work(self, worker, n):
        from test_swept import perhaps_die
        from test_shared import words
        perhaps_die(worker, 0.2, 250)
        with self.mine.update() as d:
            d.first, d.second = d.first + 1, (d.first + 1) * 3
        with worker.pool(POOL).lock(30) as lock:
            if lock.inherited:
                words[1] = words[0]  # what its last holder has left half done
            elif words[0] != words[1]:
                worker.log.error("note: torn lock section")
            words[0] += 1
            words[1] += 1
        sys_settrace(None)
        return 0.02
"""

SWEPT_MANAGER: Final = """
    def manage(self, worker):
        from test_swept import perhaps_die
        perhaps_die(worker, 0.3, 1500)
        return min(0.1, self.pool.reconcile({Key(n): {"n": n} for n in range(8)}))

    def told(self, event):
        line = f"{event.number} {event.kind.name} {event.key.n} {event.generation} {event.redelivered}\\n"
        with open("ledger", "ab", buffering=0) as ledger:
            ledger.write(line.encode())
"""

READER: Final = """
from test_pool import POOL
import bghost, time

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        for entry in worker.pool(POOL):
            try:
                read = entry.snapshot()
            except bghost.EntryGone:
                continue
            if read.second != read.first * 3:
                worker.log.error("note: torn read")
        begun = time.monotonic()
        with worker.pool(POOL).lock(30):
            pass
        if time.monotonic() - begun > 10:  # one that nobody gives back is waited for till the end of time
            worker.log.error("note: waited for the lock")
        return 0.005
"""


def test_deaths_in_a_pool(bghost_host: StartHost) -> None:
    """Managers and entries' workers are killed from outside at any instant, and die by themselves at random steps of
    updates, lock sections, launches and callbacks. Nobody waits for ever, no read is torn, no event is lost, and none
    comes twice unmarked; the tables are consistent in the end."""
    host = start(
        bghost_host,
        capacity=8,
        options="'retry_after': 0.0",
        entry=SWEPT_ENTRY.replace("sys_settrace", "__import__('sys').settrace"),
        manager=SWEPT_MANAGER,
        kinds={"reader": READER},
        modules={
            "test_steps": STEPS,
            "test_swept": SWEPT,
            "test_shared": 'import mmap\nwords = memoryview(mmap.mmap(-1, 4096)).cast("Q")\n',
        },
        args=("run",),
        config="""
            [host]
            kinds = ["manager", "entry", "reader"]
            [[worker]]
            kind = "manager"
            count = 2
            restart_after = 0.0
            restart_max = 0.01
            [[worker]]
            kind = "reader"
        """,
    )
    chance = random.Random(1)
    killed, died, begun = 0, 0, time.monotonic()
    while died < KILLS:
        rows = {row["name"]: row for row in host.client.ps()}
        if failed := [name for name, row in rows.items() if row["state"] == "failed" and row["kind"] == "manager"]:
            host.client.restart(*failed)  # ten deaths in a row, each within seconds
        kind = "manager" if chance.random() < 0.1 else "entry"
        victims = [row["pid"] for row in rows.values() if row["pid"] and row["kind"] == kind]
        time.sleep(chance.random() * 0.05)  # any instant is as good as another
        if victims:
            try:
                os.kill(chance.choice(victims), signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        if killed % (KILLS // 30) == 0:
            died = deaths(host)
    events = settle(host)
    died = deaths(host)
    print(f"{died} deaths, {killed} of them from outside, {events} events, {time.monotonic() - begun:.1f} s")
    assert not [text for text in notes(host, "reader") + re.findall(r"note: torn.*", host.text()) if "torn" in text]
    assert "waited for the lock" not in host.text()
    assert "LockTimeout" not in host.text() and "LockDamaged" not in host.text()
    ledger(host, events)
    consistent(host)


def deaths(host: Host) -> int:
    """How many processes have died by SIGKILL so far."""
    return len(re.findall(r"\] killed by SIGKILL", host.text()))


def settle(host: Host) -> int:
    """How many events there are once all entries run and all events are read; deaths go on after that."""

    def events_read() -> int:
        try:
            failed = [row["name"] for row in host.client.ps() if row["state"] == "failed" and row["kind"] == "manager"]
            if failed:
                host.client.restart(*failed)
            (table,) = host.client.pools()
        except BghostError:
            return 0
        quiet = all(entry["state"] == "ready" for entry in table["entries"])
        return table["events"] if quiet and table["acknowledged"] == table["events"] else 0

    return until(events_read, 30.0, "all events read")


def ledger(host: Host, events: int) -> None:
    """Each number is there, at most once unmarked, and then first."""
    told: dict[int, list[bool]] = {}
    for line in (host.sandbox.root / "ledger").read_text().splitlines():
        number, _, _, _, again = line.split()
        told.setdefault(int(number), []).append(again == "True")
    assert sorted(told)[:events] == list(range(1, events + 1))
    assert [number for number, marks in told.items() if not all(marks[1:])] == []
    twice = Counter(len(marks) for marks in told.values())
    print(f"in the ledger: {', '.join(f'{count} numbers {times} times' for times, count in sorted(twice.items()))}")


def test_keys_that_come_and_go(bghost_host: StartHost) -> None:
    """Many keys go through few entries; each task is seen by one worker, once."""
    entries = 50 if PART else 10
    host = start(
        bghost_host,
        capacity=entries,
        manager=f"""
    def manage(self, worker):
        self.left = getattr(self, "left", {{n: {{"n": n}} for n in range({KEYS})}})
        wanted = dict(list(self.left.items())[:{entries}])
        if not wanted:
            self.note("all done")
            return bghost.UNTIL_WOKEN
        return self.pool.reconcile({{Key(n): args for n, args in wanted.items()}})

    @bghost.hookimpl
    def bghost_pool_exited(self, worker, pool, event):
        assert not event.redelivered
        del self.left[event.key.n]
""",
        entry="""
    def work(self, worker, n):
        with open("tasks", "ab", buffering=0) as tasks:
            tasks.write(f"{n} {self.mine.key.n} {self.mine.generation}\\n".encode())
        raise SystemExit
""",
        options="'retry_after': 60.0",
    )
    begun = time.monotonic()
    host.wait_line("note: all done", 60 + 600 * PART)
    print(f"{KEYS} keys through {entries} entries in {time.monotonic() - begun:.1f} s")
    tasks = [line.split() for line in (host.sandbox.root / "tasks").read_text().splitlines()]
    assert sorted(int(n) for n, _, _ in tasks) == list(range(KEYS))
    assert all(n == key for n, key, _ in tasks)
    until(lambda: consistent(host)["used"] == 0)
    assert host.client.pools()[0]["events"] == 2 * KEYS

"""Pools: launch, look-up, events, throttle, managers that die or stand by, and entries that outlive them."""

import os
import re
import signal

import pytest
from poolkit import ENTRY, MANAGER, POOL, ready, start
from support import StartHost, notes, until

from bghost.shared.replies import Row


def test_launch_and_events(bghost_host: StartHost) -> None:
    """What is wanted runs; its start, and its end, are told once, in order, with what was published."""
    host = start(
        bghost_host,
        entry="""
    def work(self, worker, n):
        with self.mine.update() as d:
            d.first, d.second = n, n * 10
        up = {entry.key.n for entry in worker.pool(POOL) if entry.state == "ready"}
        if self.rounds > 1 and n == 2 and 1 in up:
            raise SystemExit(3)
        return 0.1
""",
    )
    host.wait_line("note: had .*")
    assert sorted(notes(host, "manager")[:2]) in (
        ["1 started key 1 generation 1", "2 started key 2 generation 1"],
        ["1 started key 2 generation 1", "2 started key 1 generation 1"],
    )
    assert notes(host, "manager")[2:4] == ["3 died key 2 generation 1", "had (2, 20), exit 3"]
    host.wait_line("note: 4 started key 2 generation 2")
    row = host.row("apply.1")
    assert (row["pool"], row["key"], row["kind"]) == ("apply", "01000000", "entry")


def test_a_launch_that_fails_is_told_with_its_reason_and_throttled(bghost_host: StartHost) -> None:
    """LR-4: one key that always fails is tried at growing distances, and does not slow the others."""
    host = start(
        bghost_host,
        entry="""
    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.mine = POOL.entry(worker)
        self.rounds = 0
        if worker.args["n"] == 2:
            raise ValueError("two is bad")
""",
    )
    host.wait_line("note: why: in set-up: ValueError: two is bad")
    host.wait_line(r"launch_failed key 2 generation 3")
    times = [
        float(h) * 3600 + float(m) * 60 + float(s)
        for h, m, s in re.findall(r" (\d+):(\d+):([\d.]+) \S+ +\[apply.2\] started", host.text())
    ]
    if len(times) < 3:  # the key may have the other entry
        times = [
            float(h) * 3600 + float(m) * 60 + float(s)
            for h, m, s in re.findall(r" (\d+):(\d+):([\d.]+) \S+ +\[apply.1\] started", host.text())
        ]
    first, second = times[1] - times[0], times[2] - times[1]
    assert first >= 0.15 and second >= 0.3
    host.wait_line("started key 1 generation 1")


def test_an_end_that_is_seen_before_the_bell(bghost_host: StartHost) -> None:
    """A worker that was ready is told as started, and then as exited, though its end comes up first."""
    host = start(
        bghost_host,
        wanted="(1,)",
        entry="""
    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.rounds = 0
        with open(os.devnull, "wb") as nobody:  # rings, and nobody hears it
            for fd in map(int, os.listdir("/proc/self/fd")):
                try:
                    if "eventfd" in os.readlink(f"/proc/self/fd/{fd}"):
                        os.dup2(nobody.fileno(), fd)
                except FileNotFoundError:
                    pass  # the listing's own

    def work(self, worker, n):
        raise SystemExit
""",
    )
    host.wait_line("note: .* exited key 1 generation 1")
    assert notes(host, "manager")[:2] == ["1 started key 1 generation 1", "2 exited key 1 generation 1"]


def test_what_is_not_wanted_any_more_is_stopped(bghost_host: StartHost) -> None:
    """reconcile stops what is not in its table; that is an exit, and no death."""
    host = start(
        bghost_host,
        manager="""
    def manage(self, worker):
        running = [entry.key.n for entry in self.pool if entry.state == "ready"]
        wanted = (1, 2) if sorted(running) != [1, 2] and not hasattr(self, "less") else (1,)
        if wanted == (1,):
            self.less = True
        self.pool.reconcile({Key(n): {"n": n} for n in wanted})
        return 0.05
""",
    )
    host.wait_line("note: .* exited key 2 generation 1")
    assert ready(host, "apply.1")


def test_throttled_full_and_pending(bghost_host: StartHost) -> None:
    """launch says what stands against it: time, room, unread events; a running key's entry is what it gives."""
    host = start(
        bghost_host,
        manager="""
    def manage(self, worker):
        if self.rounds > 1:
            return bghost.UNTIL_WOKEN
        entries = [self.pool.launch(Key(n), {"n": n}) for n in range(4)]
        self.note("again: {}", self.pool.launch(Key(0), {}).generation == entries[0].generation)
        try:
            self.pool.launch(Key(9), {})
        except bghost.PoolFull as error:
            self.note("{}", error)
        self.note("gone: {}", self.pool.stop(Key(0), 10))
        try:
            self.pool.launch(Key(0), {})
        except bghost.EventsPending:
            self.note("events pending")
        self.note("nobody: {} {} {}", self.pool.stop(Key(77), 1), self.pool.wait(Key(77), 1), self.pool.wake(Key(77)))
        self.note("wait: {}", self.pool.wait(Key(1), 0.05))
        self.note("signal: {}", self.pool.signal(Key(1), signal.SIGTERM))
        self.note("wait: {}", self.pool.wait(Key(1), 10))
""",
    )
    host.wait_line("note: wait: True")
    assert [text for text in notes(host, "manager") if not re.match(r"\d|had", text)] == [
        "again: True",
        "pool apply is full: 4 run, 0 have events that its manager has not read (raise its capacity)",
        "gone: True",
        "events pending",
        "nobody: True True False",
        "wait: False",
        "signal: True",
        "wait: True",
    ]


def test_throttle_and_forget(bghost_host: StartHost) -> None:
    """A key that has died waits its time; one that is forgotten does not."""
    host = start(
        bghost_host,
        options="'retry_after': 600, 'retry_max': 600",
        manager="""
    def manage(self, worker):
        if self.rounds == 1:
            self.pool.launch(Key(1), {"n": 1})
        elif not hasattr(self, "done") and self.pool.get(Key(1)) is None:
            self.done = True
            try:
                self.pool.launch(Key(1), {"n": 1})
            except bghost.Throttled as error:
                self.note("throttled: {}", 0 < error.seconds <= 600)
            self.pool.forget(Key(1))
            self.note("launched: {}", self.pool.launch(Key(1), {"n": 1}).generation)
        return 0.01
""",
        entry="""
    def work(self, worker, n):
        os._exit(9)
""",
    )
    host.wait_line("note: launched: 2")
    assert "throttled: True" in notes(host, "manager")


@pytest.mark.parametrize("where", ["callback", "tick"])
def test_a_manager_that_dies_loses_no_event(bghost_host: StartHost, where: str) -> None:
    """Its successor finds the workers running; what it was in the middle of comes again, marked; all else, once."""
    in_callback = """
    @bghost.hookimpl
    def bghost_pool_started(self, worker, pool, event):
        self.told(event)
        if worker.slot.control[2] == 1 and event.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""
    in_tick = """
    def manage(self, worker):
        nap = self.pool.reconcile({Key(n): {"n": n} for n in (1, 2)})
        if worker.slot.control[2] == 1:
            while any(entry.state != "ready" for entry in self.pool):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return nap
"""
    host = start(bghost_host, manager=in_callback if where == "callback" else in_tick)
    host.wait_row("manager", lambda row: row["starts"] == 2)
    until(lambda: len(notes(host, "manager")) >= (3 if where == "callback" else 2), 10.0)
    told = [re.sub(r"key \d ", "", text) for text in notes(host, "manager")]
    if where == "callback":
        assert told == ["1 started generation 1", "1 started generation 1 again", "2 started generation 1"]
    else:
        assert told == ["1 started generation 1", "2 started generation 1"]
    assert host.row("apply.1")["starts"] == host.row("apply.2")["starts"] == 1


def test_a_standby_takes_over(bghost_host: StartHost) -> None:
    """A second worker of the manager's kind does nothing until the first is gone; then it adopts what runs."""
    host = start(bghost_host, args=("run", "manager", "--count", "2"))
    host.wait_line("manages pool apply")
    for number in (1, 2):
        ready(host, f"apply.{number}")

    def stands_by(row: Row) -> bool:
        return (row["wait"], row["doing"]) == ("pool apply", "waiting")

    standby = until(lambda: next(filter(stands_by, host.client.ps("manager")), None))
    assert standby is not None and standby["ticks"] == 0
    (manager,) = [row for row in host.client.ps("manager") if row["name"] != standby["name"]]
    pids = {host.row(f"apply.{number}")["pid"] for number in (1, 2)}
    assert host.bghost("stop", manager["name"]).code == 0
    host.wait_line(rf"worker {standby['name']} manages pool apply")
    host.wait_row(standby["name"], lambda row: row["ticks"] > 0)
    assert {host.row(f"apply.{number}")["pid"] for number in (1, 2)} == pids


@pytest.mark.parametrize("orphans", ["stop", "keep"])
def test_orphans(bghost_host: StartHost, orphans: str) -> None:
    """When the manager is gone for good its entries' workers stop, or stay, as the pool says."""
    host = start(bghost_host, options=f"'orphans': '{orphans}'")
    for number in (1, 2):
        ready(host, f"apply.{number}")
    assert host.bghost("stop", "manager").code == 0
    if orphans == "stop":
        host.wait_line("pool apply has no manager any more: its 2 workers stop")
        assert host.wait() == 0
    else:
        host.bghost("ps")
        assert host.row("apply.1")["state"] == "ready"


def test_another_worker_reads_the_pool(bghost_host: StartHost) -> None:
    """Any worker of the host looks entries up, sees their data whole, and wakes them; an entry that is over says so."""
    host = bghost_host(
        kinds={
            "manager": MANAGER.format(wanted="(1,)"),
            "entry": ENTRY
            + """
    def work(self, worker, n):
        self.mine.data.first += 1
        with self.mine.update() as d:
            d.second = d.first * 2
        return bghost.UNTIL_WOKEN
""",
            "reader": """
from test_pool import Key, POOL
import bghost

class Kind:
    entry = None
    signaled = False

    @bghost.hookimpl
    def bghost_tick(self, worker):
        pool = worker.pool(POOL)
        if self.entry is not None:
            try:
                data = self.entry.snapshot()
            except bghost.EntryGone:
                worker.log.info("note: gone")
                raise SystemExit
            if data.second == 4 and not self.signaled:
                worker.log.info("note: woken")
                self.signaled = pool.signal(Key(1), 9)
            return 0.01
        entry = pool.get(Key(1))
        if entry is not None and entry.state == "ready" and entry.snapshot().second:
            self.entry = entry
            worker.log.info("note: {} {}", entry.data.first, entry.snapshot().second)
            pool.wake(Key(1))
        return 0.01
""",
        },
        modules={"test_pool": POOL.format(options="", capacity=4)},
        args=("run", "manager", "reader"),
    )
    host.wait_line("note: gone", 20)
    assert notes(host, "reader")[:2] == ["1 2", "woken"]


def test_what_is_published(bghost_host: StartHost) -> None:
    """An entry takes a structure, or its bytes, from its own worker; all else is refused, and changes nothing."""
    host = start(
        bghost_host,
        wanted="(1,)",
        manager="""
    def manage(self, worker):
        self.pool.reconcile({Key(1): {"n": 1}})
        entry = self.pool.get(Key(1))
        if entry.state == "ready" and entry.snapshot().second == 8:
            for publish in (lambda: entry.publish(Data(9, 9)), entry.update):
                try:
                    with publish():
                        pass
                except bghost.UsageError as error:
                    self.note("{}; {}", error.message, error.hint)
            entry.data.first = 10
            self.note("{} {}", entry.snapshot().first, entry.data.first)
            return bghost.UNTIL_WOKEN
        return 0.01
""",
        entry="""
    def work(self, worker, n):
        if self.rounds > 1:
            return bghost.UNTIL_WOKEN
        from test_pool import Data, Key
        publish = self.mine.publish
        publish(Data(1, 2))
        worker.log.info("note: {}", self.mine.snapshot().second)
        publish(bytes(Data(3, 4)))
        worker.log.info("note: {}", self.mine.snapshot().second)
        publish(bytearray(Data(5, 6)))
        worker.log.info("note: {}", self.mine.snapshot().second)
        for wrong in (b"short", 16, Key(1), None, "x" * 16, bytes(17)):
            try:
                publish(wrong)
            except bghost.UsageError as error:
                worker.log.info("note: {}", error.message)
        worker.log.info("note: {} {}", self.mine.data.second, self.mine.snapshot().second)
        publish(Data(7, 8))
""",
    )
    host.wait_line("note: 7 10", 20)
    told = notes(host, "apply.1")
    assert told[:3] == ["2", "4", "6"]
    refused = [text.partition("is a Data, or its 16 bytes, not ")[2] for text in told[3:9]]
    assert "Key object" in refused.pop(2)
    assert refused == ["5 bytes", "16", "None", repr("x" * 16), "17 bytes"]
    assert told[9:] == ["6 6"]
    alone = "the data of <Entry 0 of apply, generation 1> is published by its own worker alone"
    assert [alone in text for text in notes(host, "manager") if "alone" in text] == [True, True]


def test_the_pools_lock(bghost_host: StartHost) -> None:
    """The lock excludes other processes, and says when its last holder has died with it."""
    host = start(
        bghost_host,
        entry="""
    def work(self, worker, n):
        if n == 1 and worker.slot.control[2] == 1:
            with worker.pool(POOL).lock():
                worker.log.info("note: holds")
                os._exit(9)
        with worker.pool(POOL).lock() as lock:
            if lock.inherited:
                worker.log.info("note: inherited")
        return 0.05
""",
    )
    host.wait_line("note: holds")
    host.wait_line("note: inherited")


def test_a_worker_cannot_write_the_control_words(bghost_host: StartHost) -> None:
    """Scribbling over the control words fails in the scribbler; over data, it harms its own entry alone."""
    host = start(
        bghost_host,
        entry="""
    def work(self, worker, n):
        if n == 1 and self.rounds == 1:
            try:
                self.mine._control[0] = 77
            except TypeError as error:
                worker.log.info("note: {}", error)
            place, published = self.mine._place, self.mine._published
            published.data[place : place + published.stride] = b"\\xff" * published.stride
            worker.log.info("note: {}", self.mine.snapshot().first)
        return 0.05
""",
    )
    host.wait_line("note: cannot modify read-only memory")
    host.wait_line("note: 0")
    assert host.bghost("ps").code == 0
    assert ready(host, "apply.2")


def test_unknown_pools_and_declarations(bghost_host: StartHost) -> None:
    """A pool that nobody declares, and types that mean nothing in another process, are refused with what is wrong."""
    host = bghost_host(
        kinds={
            "loner": """
import ctypes, bghost
class Key(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p)]
class Data(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int)]
class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        for kwargs in ({"key": Key, "data": Data}, {"key": Data, "data": Data}):
            try:
                worker.pool(bghost.PoolSpec("none", kind="loner", capacity=1, **kwargs))
            except bghost.BghostError as error:
                worker.log.info("note: {}", error)
        raise SystemExit
"""
        },
        args=("run", "loner"),
        answering=False,
    )
    assert host.wait() == 0
    assert notes(host, "loner") == [
        "field Key.p of the key is a c_void_p: a pointer means nothing in another process",
        "there is no pool 'none' (name the kind that declares it in [host] kinds: "
        "tables are made before the first fork)",
    ]


def test_the_hosts_death_ends_all(bghost_host: StartHost) -> None:
    """Entries' workers go with the host, like all others."""
    host = start(bghost_host)
    pids = [ready(host, f"apply.{number}")["pid"] for number in (1, 2)]
    os.kill(host.pid, signal.SIGKILL)
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 30.0)

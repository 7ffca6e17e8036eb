"""What the launcher of logical replication workers does, and its weak spots, in a pool. LR-n: cases of the original."""

import os
import re
import signal

import pytest
from poolkit import MANAGER, consistent, ready, start
from support import StartHost, notes, until


def test_a_full_pool(bghost_host: StartHost) -> None:
    """LR-5: a key that finds the pool full is warned of, with what to raise, and runs once there is room."""
    host = start(
        bghost_host,
        capacity=1,
        manager="""
    def manage(self, worker):
        self.pool.reconcile({Key(n): {"n": n} for n in (range(1, 500) if self.rounds < 6 else (2,))})
        return 0.02
""",
    )
    host.wait_line(r"WARNING \[manager\] pool apply is full: 1 run, 0 have events .* \(raise its capacity\)")
    host.wait_line("note: . started key 2 generation 2")
    assert host.text().count("pool apply is full") < 5  # told once, and again where something has changed
    assert consistent(host)["used"] == 1


def test_no_slot_of_the_hosts(bghost_host: StartHost) -> None:
    """LR-6: where the host has no slot the launch fails with what to raise, the entry is free again, and the key runs
    once a slot is."""
    host = start(
        bghost_host,
        args=("run",),
        kinds={"idle": "import bghost\nclass Kind:\n  @bghost.hookimpl\n  def bghost_tick(self, worker): pass\n"},
        config="""
            [host]
            max_workers = 3
            kinds = ["manager", "entry"]
            [[worker]]
            kind = "manager"
            [[worker]]
            kind = "idle"
        """,
    )
    host.wait_line(r"why: no slot for worker apply\..: all 3 are taken: .* \(raise max_workers in \[host\]")
    ready_rows = until(lambda: [row for row in host.client.ps() if row["pool"] == "apply" and row["state"] == "ready"])
    until(lambda: consistent(host)["used"] == 1)
    assert len(ready_rows) == 1
    assert host.bghost("stop", "idle").code == 0
    until(lambda: [entry["state"] for entry in consistent(host)["entries"]] == ["ready", "ready"])


def test_a_worker_that_dies_before_it_has_its_entry(bghost_host: StartHost) -> None:
    """LR-7: who waits for it is told at once, the launch has failed with how it ended, and the next generation runs."""
    host = start(
        bghost_host,
        manager="""
    def manage(self, worker):
        if self.rounds == 1:
            self.pool.launch(Key(1), {"n": 1})
            self.note("gone: {}", self.pool.wait(Key(1), 10))
        return self.pool.reconcile({Key(1): {"n": 1}})

    @bghost.hookimpl
    def bghost_pool_launch_failed(self, worker, pool, event):
        self.told(event)
        self.note("pid {}: {}", event.pid, event.reason)
""",
        entry="""
    @bghost.hookimpl
    def bghost_setup(self, worker):
        if worker.handle.generation == 1:
            os.kill(os.getpid(), 9)
        self.mine = POOL.entry(worker)
        self.rounds = 0
""",
    )
    host.wait_line("started key 1 generation 2")
    pid = host.wait_line(r"\[apply.1\] started, pid (\d+)").match[1]
    assert notes(host, "manager")[:3] == [
        "gone: True",
        "1 launch_failed key 1 generation 1",
        f"pid {pid}: killed by SIGKILL",
    ]
    consistent(host)


def test_a_stop_while_it_starts(bghost_host: StartHost) -> None:
    """LR-8: it is stopped all the same, and the stop returns when it has gone."""
    host = start(
        bghost_host,
        manager="""
    def manage(self, worker):
        if self.rounds == 1:
            os.mkfifo("starting")
            os.mkfifo("stopping")
            self.pool.launch(Key(1), {"n": 1})
            with open("starting") as starting:
                pid = int(starting.read())
            entry = self.pool.get(Key(1))
            while entry.pid is None:
                worker.wait(0.01)  # it may run before the host, which writes that down, does
            self.note("state: {}, pid {}", entry.state, entry.pid == pid)
            self.note("stopped: {} {}", self.pool.stop(Key(1), 10), os.path.exists(f"/proc/{pid}"))
        return bghost.UNTIL_WOKEN
""",
        entry="""
    @bghost.hookimpl
    def bghost_setup(self, worker):
        with open("starting", "w") as starting:
            starting.write(str(os.getpid()))
        open("stopping").close()  # till then it is in its set-up
        self.mine = POOL.entry(worker)
        self.rounds = 0
""",
    )
    host.wait_line("note: state: ")
    host.wait_row("apply.1", lambda row: row["state"] == "stopping")
    (host.sandbox.root / "stopping").open("w").close()
    host.wait_line("note: . (exited|launch_failed) key 1 generation 1")
    assert notes(host, "manager")[:2] == ["state: starting, pid True", "stopped: True False"]
    until(lambda: consistent(host)["used"] == 0)


def test_a_stop_whose_entry_goes_to_another_key(bghost_host: StartHost) -> None:
    """LR-9: it returns once its own worker has gone; the next one in that entry is neither stopped nor waited for, and
    whoever holds the old entry is refused."""
    host = start(
        bghost_host,
        capacity=1,
        kinds={
            "stopper": """
from test_pool import Key, POOL
import bghost, signal

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        pool = worker.pool(POOL)
        old = pool.get(Key(1))
        if old is None or old.state != "ready":
            return 0.01
        handle = old.handle
        worker.log.info("note: stopped: {}", pool.stop(Key(1)))
        while pool.get(Key(2)) is None or pool.get(Key(2)).state != "ready":
            worker.wait(0.01)
        refused = 0
        for use in (lambda: old.data, lambda: old.snapshot(), lambda: old.read(), lambda: old.handle,
                    lambda: old.publish(bytes(16)), lambda: old.update().__enter__()):
            try:
                use()
            except bghost.EntryGone:
                refused += 1
        worker.log.info("note: refused: {}, state {}, pid {}", refused, old.state, old.pid)
        worker.log.info("note: {} {} {}", handle.signal(9), handle.wake(), pool.stop(Key(1)))
        return bghost.UNTIL_WOKEN
"""
        },
        manager="""
    def manage(self, worker):
        last = self.pool._table.head[0]
        self.pool.reconcile({Key(n): {"n": n} for n in ((1,) if last < 2 else (2,))})
        return 0.02
""",
        args=("run", "manager", "stopper"),
    )
    host.wait_line("note: (True|False) (True|False) ")
    assert notes(host, "stopper") == ["stopped: True", "refused: 6, state free, pid None", "False False True"]
    assert host.row("apply.1")["starts"] == 1 and host.row("apply.1")["state"] == "ready"


def test_one_that_comes_up_too_late(bghost_host: StartHost) -> None:
    """A start that takes too long is ended by the host in time, without anybody asking; then its entry goes to another
    key, and whoever is no entry's worker cannot pass for one."""
    host = start(
        bghost_host,
        capacity=1,
        options="'ready_timeout': 0.3",
        manager="""
    def manage(self, worker):
        self.since = getattr(self, "since", time.monotonic())
        if self.rounds == 1:
            self.pool.launch(Key(1), {"n": 1})
        elif self.pool.get(Key(1)) is None:
            if not hasattr(self, "after"):
                self.after = time.monotonic() - self.since
                self.note("after {}", round(self.after, 3))
            self.pool.reconcile({Key(2): {"n": 2}})  # which may be late as well
        return bghost.UNTIL_WOKEN if self.rounds == 1 else 0.01
""",
        entry="""
    @bghost.hookimpl
    def bghost_setup(self, worker):
        if worker.args.get("n") == 1:
            while True:
                time.sleep(0.01)
        self.mine = POOL.entry(worker)
        self.rounds = 0
""",
    )
    generation = host.wait_line(r"note: \d+ started key 2 generation (\d+)").match[1]
    told = notes(host, "manager")
    assert told[:2] == ["1 launch_failed key 1 generation 1", "why: not ready within 0.3 s, killed"]
    assert float(told[2].split()[1]) >= 0.3
    result = host.bghost("launch", "entry", "--name", "apply.9", "--wait")
    assert result.code == 1
    assert "worker apply.9 is the worker of no entry of pool apply" in result.stderr
    assert host.bghost("restart", "apply.1").code == 0  # its manager's to start
    host.wait_line(rf"note: \d+ exited key 2 generation {generation}$")
    consistent(host)


def test_a_manager_that_dies_while_its_worker_starts(bghost_host: StartHost) -> None:
    """The worker comes up all the same, and is its successor's."""
    host = start(
        bghost_host,
        manager="""
    def manage(self, worker):
        nap = self.pool.reconcile({Key(1): {"n": 1}})
        if worker.slot.control[2] == 1:
            os.kill(os.getpid(), 9)
        return nap
""",
        entry="""
    @bghost.hookimpl
    def bghost_setup(self, worker):
        time.sleep(0.1)
        self.mine = POOL.entry(worker)
        self.rounds = 0
""",
    )
    host.wait_line("note: 1 started key 1 generation 1$")
    assert (ready(host, "apply.1")["starts"], host.row("manager")["starts"]) == (1, 2)


def test_a_wake_up_during_a_wait_for_an_entry_is_kept(bghost_host: StartHost) -> None:
    """Neither a launch nor a wait for a key's end eats what the manager's latch was set for; and a stop ends such a
    wait, though the worker that is waited for has not come up."""
    host = start(
        bghost_host,
        manager="""
    def manage(self, worker):
        worker.wake()
        self.pool.launch(Key(1), {"n": 1})
        worker.wake()
        self.pool.wait(Key(1), 0.1)
        self.note("woken: {}", sorted(worker.wait(5)))
        self.pool.wait(Key(1))
""",
        entry="""
    @bghost.hookimpl
    def bghost_setup(self, worker):
        worker.wait(600)
""",
    )
    host.wait_line("note: woken: ")
    assert notes(host, "manager")[0].startswith("woken: ['wake'")
    assert host.bghost("shutdown", "--fast").code == 0
    assert host.wait() == 0
    assert "stopping, immediate" not in host.text()


@pytest.mark.parametrize("both", [False, True], ids=["standby", "both at once"])
def test_whoever_takes_over_knows_what_was_begun(bghost_host: StartHost, both: bool) -> None:
    """A standby that was up before the manager died in a callback marks that event; also where the worker that it
    tells of dies in the same instant. Every number comes, in order."""
    host = start(
        bghost_host,
        args=("run", "manager", "--count", "2"),
        wanted="(1,)",
        manager=f"""
    @bghost.hookimpl
    def bghost_pool_started(self, worker, pool, event):
        self.told(event)
        if event.number == 1 and not event.redelivered:
            while not os.path.exists("go"):
                time.sleep(0.01)
            if {both}:
                os.kill(event.pid, 9)
            os.kill(os.getpid(), 9)
""",
    )
    host.wait_line("note: 1 started key 1 generation 1$")
    until(lambda: any(row["wait"] == "pool apply" for row in host.client.ps()))
    (host.sandbox.root / "go").touch()
    host.wait_line("note: 1 started key 1 generation 1 again")
    if both:
        host.wait_line("note: 3 started key 1 generation 2$")
    told = re.findall(r"note: (\d+ \w+ key 1 generation \d.*)", host.text())
    assert told[:2] == ["1 started key 1 generation 1", "1 started key 1 generation 1 again"]
    assert [text.split()[0] for text in told[2:]] == (["2", "3"] if both else [])
    consistent(host)


def test_limits_of_groups_and_what_a_dump_shows(bghost_host: StartHost) -> None:
    """A group has no more entries than it may, whoever launches them; the dump of the tables shows what there is, and
    says so where something does not agree."""
    host = start(
        bghost_host,
        options="'group': lambda key: key.n % 2, 'group_limit': 2",
        manager="""
    def manage(self, worker):
        if self.rounds == 1:
            for n in (1, 3, 5, 2):
                try:
                    self.pool.launch(Key(n), {"n": n})
                except bghost.PoolFull as error:
                    self.note("{}: {}", n, error)
        return bghost.UNTIL_WOKEN
""",
        entry="""
    def work(self, worker, n):
        with self.mine.update() as d:
            d.first, d.second = n, 7
        return bghost.UNTIL_WOKEN
""",
    )
    host.wait_line(r"note: 3 started key \d generation 1")
    assert "5: group 1 of pool apply has 2 entries, as many as it may" in notes(host, "manager")
    until(lambda: all(entry["published"] for entry in consistent(host)["entries"]))
    shown = host.bghost("dump", "--pools", "apply")
    assert shown.code == 0
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("pool apply of kind entry, managed by manager: 3 of 4 entries used, 1 free, ")
    assert lines[1] == "  lock: intact, held by nobody"
    assert re.fullmatch(
        r"  1: key 03000000, ready, generation 1, worker apply.2, pid \d+, launched \d+s ago.*, published 1 times",
        lines[3],
    )
    assert host.bghost("dump", "--pools", "nope").code == 5
    assert host.bghost("dump").code == 2
    (table,) = host.client.pools()
    assert bytes.fromhex(table["entries"][1]["data"] or "")[:16] == (3).to_bytes(8, "little") + (7).to_bytes(
        8, "little"
    )


def test_a_kind_with_pools_that_was_not_named(bghost_host: StartHost) -> None:
    """It cannot be launched later: the error says so, and which line to add; so does that of a pool that is not."""
    host = start(
        bghost_host,
        args=("run",),
        config='[host]\nkinds = ["entry"]\n',
    )
    result = host.bghost("launch", "manager", "--wait")
    assert result.code == 1
    assert "kind 'manager' has pools, and was not named at the host's start" in result.stderr
    assert "add 'manager' to kinds in [host], and start the host again" in result.stderr
    os.kill(host.pid, signal.SIGTERM)
    assert host.wait() == 0


def test_why_a_launch_has_failed(bghost_host: StartHost) -> None:
    """An import that fails, and one that ends its process, are told of with what it was, like all other ends before the
    worker is ready."""
    host = start(
        bghost_host,
        kinds={"entry": "import os\nif os.path.exists('dies'):\n    os._exit(4)\nimport no_such_module\n"},
        wanted="(1,)",
        options="'retry_after': 0.1",
    )
    host.wait_line("why: .*No module named 'no_such_module'")
    (host.sandbox.root / "dies").touch()
    host.wait_line("why: exit code 4, bypassing bghost")


def test_a_manager_that_cannot_be_preloaded(bghost_host: StartHost) -> None:
    """One whose import starts a thread is imported in its workers alone, and its pools are asked for in a throw-away
    process: they are there."""
    host = start(
        bghost_host,
        kinds={
            "manager": MANAGER.format(wanted="(1,)")
            + "\nimport threading\nthreading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
        },
    )
    assert re.search("importing kind 'manager' .* starts a thread", host.text())
    assert ready(host, "apply.1")
    assert len(os.listdir(f"/proc/{host.pid}/task")) == 1
    consistent(host)

"""What a worker writes over that is not its own to write: found, put right, and never the host's ruin."""

import re

from poolkit import consistent, ready, start
from support import Host, StartHost, notes, until

SCRIBBLER = """
from test_pool import POOL
import bghost, os, time

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        if worker.args.get("byte") is not None and worker.slot.control[2] == 1:
            pool = worker.pool(POOL)
            stats = [worker._table.slot(index).stats.cast("B") for index in range(len(worker._table))]
            worker.log.info("note: writes over {} places", len(stats) + 1)
            for place in (pool._table._data, *stats):
                place[:] = bytes((worker.args["byte"],)) * len(place)
        return bghost.UNTIL_WOKEN
"""

LOCKING = """
    def work(self, worker, n):
        with worker.pool(POOL).lock() as lock:
            with self.mine.update() as d:
                d.first, d.second = n, d.second + 1
            if n == 2 and worker.slot.control[1] == 1 and self.mine.generation == 1:
                worker.log.info("note: holds")
                time.sleep(600)
        return 0.05
"""


def test_what_is_written_over_is_made_anew(bghost_host: StartHost) -> None:
    """All that a worker can write is set to zeros, and later to ones, with the lock held: everybody is started again
    in time, locks and data are good, no event is lost, and the host lives."""
    host = start(
        bghost_host,
        entry=LOCKING,
        kinds={"scribbler": SCRIBBLER},
        args=("run",),
        config="""
            [host]
            kinds = ["manager", "entry", "scribbler"]
            [[worker]]
            kind = "manager"
            [[worker]]
            kind = "scribbler"
        """,
    )
    host.wait_line("note: holds")
    ready(host, "apply.1")
    for byte in (0x00, 0xFF):
        before = pids(host)
        told = len(notes(host, "manager"))
        assert host.bghost("launch", "scribbler", "--arg", f"byte={byte}", "--name", f"bad{byte}").code == 0
        host.wait_line(f"\\[bad{byte}\\] note: writes over")
        until(lambda now=before: good(host, now), 30.0, "all workers again")  # type: ignore[misc]
        assert any(
            re.fullmatch(r"\d+ died key . generation \d+( again)?", text) for text in notes(host, "manager")[told:]
        )
    assert host.alive
    text = host.text()
    assert len(re.findall(r"ERROR +\[host\] pool apply: something has written over its lock", text)) == 2
    assert len(re.findall(r"\[host\] pool apply: its lock is made anew", text)) == 2
    table = until(lambda: table if (table := consistent(host))["acknowledged"] == table["events"] else None)
    assert table is not None
    assert table["lock"]["intact"]
    first_told = [text for text in notes(host, "manager") if re.match(r"\d+ \w+ key . generation \d+$", text)]
    numbers = [int(text.split()[0]) for text in first_told]
    assert numbers == sorted(set(numbers))
    assert set(numbers) | {int(text.split()[0]) for text in notes(host, "manager") if text.endswith(" again")} == set(
        range(1, table["events"] + 1)
    )


def pids(host: Host) -> set[int | None]:
    return {row["pid"] for row in host.client.ps() if row["state"] == "ready"}


def good(host: Host, before: set[int | None]) -> bool:
    """Whether each worker that is to run is another process than before, and both entries publish, with the lock."""
    names = {row["name"] for row in host.client.ps() if row["state"] == "ready" and row["pid"] not in before}
    if not {"manager", "scribbler", "apply.1", "apply.2"} <= names:
        return False
    (table,) = host.client.pools()
    return len(table["entries"]) == 2 and all(entry["published"] > 1 for entry in table["entries"])


def test_words_of_the_manager_that_go_astray_are_put_right(bghost_host: StartHost) -> None:
    """What a manager has read cannot go back, nor ahead: what comes again is marked, and keys are given away."""
    host = start(
        bghost_host,
        manager="""
    def manage(self, worker):
        marks = self.pool._table.marks
        self.left = getattr(self, "left", [0, (1 << 64) - 1])
        if marks[0] == 2 and self.left:
            marks[0] = self.left.pop(0)
            worker.interrupts.ring_host()
        self.pool.reconcile({Key(n): {"n": n} for n in (range(2) if self.left else range(2, 4))})
        return 0.05
""",
        capacity=2,
    )
    host.wait_line("started key 2 generation 2")
    host.wait_line("started key 3 generation 2")
    assert "pool apply: something has written over what its manager has read" in host.text()
    told = [text for text in notes(host, "manager") if not text.endswith("again")]
    assert [text.split()[0] for text in told] == [str(number) for number in range(1, 7)]
    consistent(host)


QUEUE = """
import bghost

queue = bghost.SharedQueue(1 << 12)

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        if worker.name == "sender":
            if worker.slot.control[2] == 1:
                queue.ring.view[:] = b"\\xff" * len(queue.ring.view)
            with queue.sender(worker) as tx:
                tx.send(b"whole")
        else:
            with queue.receiver(worker) as rx:
                worker.log.info("note: {}", rx.receive().decode())
        return bghost.UNTIL_WOKEN
"""


def test_a_queue_that_is_written_over_is_made_anew(bghost_host: StartHost) -> None:
    """Whoever attaches finds it, both workers are started again, and messages go through."""
    host = bghost_host(
        kinds={"ends": QUEUE},
        args=["run"],
        config='[[worker]]\nkind = "ends"\nname = "sender"\n[[worker]]\nkind = "ends"\nname = "receiver"\n',
    )
    host.wait_line("a queue of 4096 bytes: something has written over its lock; all workers are started again")
    host.wait_line("a queue of 4096 bytes: its lock is made anew")
    host.wait_line("note: whole")

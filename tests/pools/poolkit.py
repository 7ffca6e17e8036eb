"""A pool with a manager and entries' workers, whose methods a test may replace."""

from collections.abc import Mapping

from support import Host, StartHost, until

from bghost.shared.replies import PoolDump, Row

POOL = """
import ctypes, os, time, bghost

class Key(ctypes.Structure):
    _fields_ = [("n", ctypes.c_uint32)]

class Data(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint64), ("second", ctypes.c_uint64)]

OPTIONS = {{'retry_after': 0.2, {options}}}
POOL = bghost.PoolSpec("apply", kind="entry", key=Key, data=Data, capacity={capacity}, **OPTIONS)
"""

MANAGER = """
from test_pool import Data, Key, POOL
import bghost, os, signal, time

class Kind:
    @classmethod
    @bghost.hookimpl
    def bghost_pools(cls, settings):
        return [POOL]

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.note = lambda text, *args: worker.log.info("note: " + text, *args)
        self.pool = worker.pool(POOL)
        self.rounds = 0

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        return self.manage(worker)

    def manage(self, worker):
        return self.pool.reconcile({{Key(n): {{"n": n}} for n in {wanted}}})

    def told(self, event):
        self.note(
            "{{}} {{}} key {{}} generation {{}}{{}}", event.number, event.kind.name.lower(), event.key.n,
            event.generation, " again" if event.redelivered else "",
        )

    @bghost.hookimpl
    def bghost_pool_launch_failed(self, worker, pool, event):
        self.told(event)
        self.note("why: {{}}", event.reason)

    @bghost.hookimpl
    def bghost_pool_started(self, worker, pool, event):
        self.told(event)

    @bghost.hookimpl
    def bghost_pool_exited(self, worker, pool, event):
        self.told(event)

    @bghost.hookimpl
    def bghost_pool_died(self, worker, pool, event):
        self.told(event)
        self.note("had {{}}, exit {{}}", event.data and (event.data.first, event.data.second), event.exit)
"""

ENTRY = """
from test_pool import POOL
import bghost, os, time

class Kind:
    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.mine = POOL.entry(worker)
        self.rounds = 0

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        return self.work(worker, worker.args["n"])

    def work(self, worker, n):
        return bghost.UNTIL_WOKEN
"""


def start(
    bghost_host: StartHost,
    *,
    manager: str = "",
    entry: str = "",
    wanted: str = "(1, 2)",
    options: str = "",
    capacity: int = 4,
    args: tuple[str, ...] = ("run", "manager"),
    kinds: Mapping[str, str] | None = None,
    modules: Mapping[str, str] | None = None,
    config: str | None = None,
) -> Host:
    """A host with a manager that wants these keys, and methods of its own and of its entries' workers."""
    return bghost_host(
        kinds={"manager": MANAGER.format(wanted=wanted) + manager, "entry": ENTRY + entry, **(kinds or {})},
        modules={"test_pool": POOL.format(options=options, capacity=capacity), **(modules or {})},
        args=args,
        config=config,
    )


def ready(host: Host, name: str) -> Row:
    """The row of an entry's worker, which may still be to be launched, once it is ready."""

    def look() -> Row | None:
        rows = {row["name"]: row for row in host.client.ps()}
        return rows[name] if name in rows and rows[name]["state"] == "ready" else None

    row = until(look, 10.0, f"{name} to be ready")
    assert row is not None
    return row


def consistent(host: Host) -> PoolDump:
    """The table of the only pool, which agrees with what the host knows."""
    result = host.bghost("dump", "--pools", "--json")
    assert result.code == 0, result
    (table,) = result.json()
    assert table["problems"] == []
    assert table["used"] + table["free"] == table["size"]
    assert len(table["entries"]) == table["used"]
    dump: PoolDump = table
    return dump

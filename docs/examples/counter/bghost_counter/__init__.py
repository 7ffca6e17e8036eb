from typing import Annotated

import msgspec

import bghost
import bghost_postgres


class CounterSettings(bghost.Settings):
    """Settings of the counter, [kind.counter] in bghost.toml."""

    naptime: Annotated[float, msgspec.Meta(gt=0, description="seconds between counts")] = 10.0


class Counter:
    Settings = CounterSettings

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker[CounterSettings]) -> None:
        self.db = bghost_postgres.connect(worker)  # a Database; touches no network yet; closed with the worker's scope

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker[CounterSettings]) -> float | None:
        with self.db.transaction() as txn:  # begins one unless one is open; only the beginner ends it
            txn.execute("update counted set n = n + 1")
        return None  # sleep settings.naptime; or seconds, 0 for at once, bghost.UNTIL_WOKEN

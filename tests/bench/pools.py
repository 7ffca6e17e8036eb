"""What it costs to read and update an entry of a pool by its key, next to LMDB and to a struct in a mapping.

LMDB is measured where it is installed (it is no dependency of the project), on a file in memory: within one transaction
that goes on, and with a transaction for each read, which is what a reader takes to see what others have written.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import mmap
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import turn

import bghost
from bghost.shared import pools as p
from bghost.shared.pools import EntryState, PoolTable
from bghost.shared.publication import Writer, salt
from bghost.worker.pool import Pool

lmdb: Any = None
with contextlib.suppress(ImportError):
    lmdb = importlib.import_module("lmdb")

ENTRIES = 500


class Key(ctypes.Structure):
    """Plain integers: its bytes are its canonical form."""

    _fields_ = [("database", ctypes.c_uint32), ("subscription", ctypes.c_uint32)]


class Name(ctypes.Structure):
    """A text, of which what follows its end does not count."""

    _fields_ = [("name", ctypes.c_char * 8)]


class Data(ctypes.Structure):
    """64 bytes."""

    _fields_ = [(f"word{number}", ctypes.c_uint64) for number in range(8)]


def make_pool(key: Any, keys: list[Any]) -> Pool[Any, Data]:
    """A pool as its entries' workers and all others see it, with an entry for each key, and data in it."""
    spec = bghost.PoolSpec[Any, Data]("bench", kind="ticker", key=key, data=Data, capacity=len(keys))
    table, worker = PoolTable(spec.layout("ticker")), turn.make_worker()
    for index, each in enumerate(keys):
        cells = table.entry(index)
        cells.write_key(bytes(each))
        cells.control[p.GENERATION] = 1
        cells.control[p.SLOT_GENERATION] = worker.handle.generation
        cells.control[p.STATE] = EntryState.READY
        table.head[p.CHANGES] += 1
        Writer(table.data, cells.place, salt(1)).write(bytes(64))
    return Pool(worker, spec, table)


def seconds(call: Callable[[Any], object], arguments: list[Any]) -> float:
    """Seconds of processor time for a call with each of *arguments*."""
    began = time.process_time()
    for argument in arguments:
        call(argument)
    return time.process_time() - began


def subjects_of_pools(count: int, chance: random.Random) -> dict[str, Callable[[], float]]:
    """Each gives seconds for *count* operations."""
    keys = [Key(number, number * 7) for number in range(ENTRIES)]
    names = [Name(b"n%d" % number) for number in range(ENTRIES)]
    pool, named = make_pool(Key, keys), make_pool(Name, names)
    some, some_names = chance.choices(keys, k=count), chance.choices(names, k=count)
    used_names = [Name.from_buffer_copy(bytes(name)[:-1] + b"x") for name in some_names]
    data, raw = Data(*range(8)), bytes(range(64))
    read, get, get_named = pool.read, pool.get, named.get

    def snapshot(key: Key) -> None:
        get(key).snapshot()  # type: ignore[union-attr]

    def update(key: Key) -> None:
        get(key).publish(raw)  # type: ignore[union-attr]

    def update_structure(key: Key) -> None:
        get(key).publish(data)  # type: ignore[union-attr]

    def view(key: Key) -> int:
        return get(key).data.word3  # type: ignore[union-attr, no-any-return]

    def view_update(key: Key) -> None:
        get(key).data.word3 = 5  # type: ignore[union-attr]

    held = next(iter(pool))

    def update_held(_: Key) -> None:
        held.publish(raw)

    def block(key: Key) -> None:
        with get(key).update() as draft:  # type: ignore[union-attr]
            draft.word3 = 5

    entries = list(pool)

    def changed() -> float:
        """As often as it takes, each key once after each was written to."""
        took = 0.0
        for _ in range(0, count, ENTRIES):
            for entry in entries:
                entry.publish(raw)
            took += seconds(read, keys)
        return took

    return {
        "get by key, bytes": lambda: seconds(read, some),
        "get by key, bytes, each changed since": changed,
        "get by key, snapshot()": lambda: seconds(snapshot, some),
        "get by key, a word of data": lambda: seconds(view, some),
        "get by a key with a text, bytes": lambda: seconds(named.read, some_names),
        "look-up by key alone": lambda: seconds(get, some),
        "look-up by a key with a text alone": lambda: seconds(get_named, some_names),
        "look-up by a text with something behind its end": lambda: seconds(get_named, used_names),
        "update by key, bytes": lambda: seconds(update, some),
        "update of an entry at hand, bytes": lambda: seconds(update_held, some),
        "update by key, a structure": lambda: seconds(update_structure, some),
        "update by key, with update()": lambda: seconds(block, some),
        "update by key, a word of data": lambda: seconds(view_update, some),
    }


def subjects_of_struct(count: int, chance: random.Random) -> dict[str, Callable[[], float]]:
    """A struct in a mapping, found by a dict: nothing tells a reader what is torn."""
    mapping, layout = mmap.mmap(-1, ENTRIES * 64), struct.Struct("8Q")
    places = {struct.pack("II", number, number * 7): number * 64 for number in range(ENTRIES)}
    some, values = chance.choices(list(places), k=count), tuple(range(8))
    unpack, pack = layout.unpack_from, layout.pack_into
    return {
        "struct, read": lambda: seconds(lambda key: unpack(mapping, places[key]), some),
        "struct, update": lambda: seconds(lambda key: pack(mapping, places[key], *values), some),
    }


def subjects_of_lmdb(count: int, chance: random.Random, folder: str) -> dict[str, Callable[[], float]]:
    """An environment in memory; nothing is synced."""
    env = lmdb.open(folder, map_size=1 << 24, sync=False, metasync=False, writemap=True)
    keys, raw = [Key(number, number * 7) for number in range(ENTRIES)], bytes(range(64))
    some = chance.choices(keys, k=count)

    def write() -> float:
        with env.begin(write=True) as txn:
            put = txn.put
            return seconds(lambda key: put(bytes(key), raw), some)

    def read() -> float:
        with env.begin() as txn:
            get = txn.get
            return seconds(lambda key: get(bytes(key)), some)

    def one(key: Key) -> None:
        with env.begin() as txn:
            txn.get(bytes(key))

    def write_one(key: Key) -> None:
        with env.begin(write=True) as txn:
            txn.put(bytes(key), raw)

    write()
    return {
        "LMDB, get": read,
        "LMDB, get in a transaction each": lambda: seconds(one, some),
        "LMDB, update": write,
        "LMDB, update in a transaction each": lambda: seconds(write_one, some),
    }


def measure(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds an operation, interleaved round by round: median, 10th and 90th percentile."""
    chance = random.Random(1)
    subjects: dict[str, Callable[[], float]] = {
        **subjects_of_pools(count, chance),
        **subjects_of_struct(count, chance),
    }
    folder = tempfile.mkdtemp(prefix="bghost-bench-", dir="/dev/shm")
    try:
        if lmdb is not None:
            subjects |= subjects_of_lmdb(count, chance, folder)
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in range(rounds):
            for name, subject in subjects.items():
                times[name].append(subject() / count * 1e6)
    finally:
        shutil.rmtree(folder)
    return {name: turn.spread(values) for name, values in times.items()} | ratios(times)


def ratios(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """How often a subject is done while LMDB does the same once, of each round."""
    if lmdb is None:
        return {}
    pairs = [
        (ours, f"LMDB, {theirs}{how}")
        for ours, theirs in (("get by key, bytes", "get"), ("update by key, bytes", "update"))
        for how in ("", " in a transaction each")
    ]
    return {
        f"rate of {ours}, to {theirs}": turn.spread(
            [other / own for own, other in zip(times[ours], times[theirs], strict=True)]
        )
        for ours, theirs in pairs
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000, help="operations a round")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.rounds), indent=2))

"""How fast SharedQueue moves messages from one process to another, next to multiprocessing.Pipe and faster-fifo.

Long messages also next to memcpy, and to a mere copy from one process to the other. faster-fifo is measured where it is
installed; it is no dependency of the project.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import signal
import struct
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import turn

from bghost.shared import table as t
from bghost.worker.queues import SharedQueue
from bghost.worker.worker import Worker

try:
    import faster_fifo  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    faster_fifo = None

MANY = 100  # messages in a batch
WARM = 10  # messages that go first
Side = Callable[[int, bytes], object]


class Pair:
    """A process that sends so many messages, and one that receives them."""

    def __init__(self, send: Side, receive: Side) -> None:
        self.sides = (send, receive)

    def started(self, pids: list[int]) -> None:
        """Both run."""

    def seconds(self, count: int, data: bytes) -> tuple[float, float]:
        """What a message takes: on the clock, and of the processor of the side that takes more of it."""
        result, results = os.pipe()
        pids = [self._fork(partial(self._measure, side, count, data, results)) for side in self.sides]
        self.started(pids)
        for pid in pids:
            if os.waitpid(pid, 0)[1]:
                raise SystemExit(f"{self}: a side has failed")
        took = [struct.unpack("dd", os.read(result, 16)) for _ in pids]
        os.close(result)
        os.close(results)
        return max(clock for clock, _ in took) / count, max(busy for _, busy in took) / count

    def _measure(self, side: Side, count: int, data: bytes, results: int) -> None:
        side(WARM, data)
        began, busy = time.perf_counter(), time.process_time()
        side(count, data)
        os.write(results, struct.pack("dd", time.perf_counter() - began, time.process_time() - busy))

    def _fork(self, act: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            try:
                act()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        return pid


class Queue(Pair):
    """SharedQueue between two workers, one by one or in batches, or without a copy at the end."""

    def __init__(self, size: int, *, many: bool = False, view: bool = False) -> None:
        super().__init__(self._send, self._receive)
        self.queue = SharedQueue(size)
        self.table = t.Table(2)
        for index in range(2):
            self.table.slot(index).control[t.GENERATION] = 1
        self.many, self.view = many, view
        self.end: Any = None

    def started(self, pids: list[int]) -> None:
        for index, pid in enumerate(pids):
            self.table.slot(index).control[t.PID] = pid

    def worker(self, index: int) -> Worker:
        if self.end is None:
            self.table.become_reader()
        return turn.make_worker(self.table, index)

    def _send(self, count: int, data: bytes) -> None:
        tx = self.end = self.end or self.queue.sender(self.worker(0))
        if self.many:
            batch = [data] * MANY
            for left in range(count, 0, -MANY):
                tx.send_many(batch[:left])
        else:
            for _ in range(count):
                tx.send(data)

    def _receive(self, count: int, data: bytes) -> None:
        rx = self.end = self.end or self.queue.receiver(self.worker(1))
        if self.many:
            while count > 0:
                count -= len(rx.receive_many(min(count, MANY)))
        elif self.view:
            for _ in range(count):
                assert len(rx.receive_view()) == len(data)
        else:
            for _ in range(count):
                assert len(rx.receive()) == len(data)


def pipe() -> Pair:
    """multiprocessing.Pipe."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def send(count: int, data: bytes) -> None:
        for _ in range(count):
            sender.send_bytes(data)

    def receive(count: int, data: bytes) -> None:
        for _ in range(count):
            assert len(receiver.recv_bytes()) == len(data)

    return Pair(send, receive)


def fifo(size: int, *, many: bool = False) -> Pair:
    """faster-fifo, without its pickling."""
    queue = faster_fifo.Queue(max_size_bytes=size, loads=bytes, dumps=bytes)

    def send(count: int, data: bytes) -> None:
        if many:
            batch = [data] * MANY
            for left in range(count, 0, -MANY):
                queue.put_many(batch[:left], timeout=60)
        else:
            for _ in range(count):
                queue.put(data, timeout=60)

    def receive(count: int, data: bytes) -> None:
        if many:
            while count > 0:
                count -= len(queue.get_many(timeout=60, max_messages_to_get=min(count, MANY)))
        else:
            for _ in range(count):
                assert len(queue.get(timeout=60)) == len(data)

    return Pair(send, receive)


def handed_over(room: int) -> Pair:
    """Nothing but a copy into shared memory in one process, and one out of it in the other, told by pipes.

    What another processor has just written is read more slowly than a memcpy reads, which finds all in its own cache:
    no queue that copies can be faster than this.
    """
    area = mmap.mmap(-1, room)
    (full, fills), (free, frees) = os.pipe(), os.pipe()

    def send(count: int, data: bytes) -> None:
        places = room // len(data)
        for number in range(count):
            if number >= places:
                os.read(free, 1)
            at = number % places * len(data)
            area[at : at + len(data)] = data
            os.write(fills, b".")
        for _ in range(min(count, places)):
            os.read(free, 1)

    def receive(count: int, data: bytes) -> None:
        places = room // len(data)
        for number in range(count):
            os.read(full, 1)
            at = number % places * len(data)
            assert len(area[at : at + len(data)]) == len(data)
            os.write(frees, b".")

    return Pair(send, receive)


def memcpy(count: int, data: bytes, room: int) -> tuple[float, float]:
    """A copy within one process, to one place after the other of an area as large as the queue."""
    target = memoryview(bytearray(room))
    places = [target[at : at + len(data)] for at in range(0, room, len(data))]
    began, busy = time.perf_counter(), time.process_time()
    for number in range(count):
        places[number % len(places)][:] = data
    return (time.perf_counter() - began) / count, (time.process_time() - busy) / count


def measure(count: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds a message, interleaved round by round: median, 10th and 90th percentile."""
    short, long = bytes(64), bytes(1 << 20)
    long_count = max(count // 100, 3)
    room, long_room = 1 << 18, 1 << 22
    subjects: dict[str, Callable[[], tuple[float, float]]] = {
        "64 B SharedQueue": lambda: Queue(room).seconds(count, short),
        "64 B SharedQueue many": lambda: Queue(room, many=True).seconds(count, short),
        "64 B Pipe": lambda: pipe().seconds(count, short),
        "1 MiB SharedQueue": lambda: Queue(long_room).seconds(long_count, long),
        "1 MiB SharedQueue view": lambda: Queue(long_room, view=True).seconds(long_count, long),
        "1 MiB handed over": lambda: handed_over(long_room).seconds(long_count, long),
        "1 MiB Pipe": lambda: pipe().seconds(long_count, long),
        "1 MiB memcpy": lambda: memcpy(long_count, long, long_room),
    }
    if faster_fifo is not None:
        subjects |= {
            "64 B faster-fifo": lambda: fifo(room).seconds(count, short),
            "64 B faster-fifo many": lambda: fifo(room, many=True).seconds(count, short),
            "1 MiB faster-fifo": lambda: fifo(long_room).seconds(long_count, long),
        }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            times[name].append(subject())
    return {
        name: {
            "clock": turn.spread([clock * 1e6 for clock, _ in values]),
            "busier side's processor": turn.spread([busy * 1e6 for _, busy in values]),
        }
        for name, values in times.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="short messages a round; a 100th of it long ones")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.rounds), indent=2))

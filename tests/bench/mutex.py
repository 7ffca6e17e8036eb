"""What an uncontended lock and unlock costs, and how soon the next has it when its holder is killed."""

import argparse
import json
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping

import turn

from bghost.shared.mutex import MUTEX_SIZE, Acquired, RobustMutex
from bghost.worker.locking import Lock


def seconds(call: Callable[[], object], count: int) -> float:
    """Seconds of processor time for *count* calls."""
    began = time.process_time()
    for _ in range(count):
        call()
    return time.process_time() - began


def take_over(mutex: RobustMutex) -> float:
    """Seconds from the SIGKILL to the holder until this process has the mutex."""
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        mutex.try_acquire()
        os.write(tells, b".")
        signal.pause()
        os._exit(1)
    os.read(told, 1)
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    while mutex.acquire_within(0.05) is Acquired.BUSY:
        pass
    took = time.perf_counter() - began
    mutex.release()
    os.waitpid(pid, 0)
    os.close(told)
    os.close(tells)
    return took


def measure(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds, interleaved round by round: median, 10th and 90th percentile."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    mutex = RobustMutex(memoryview(memory)[:MUTEX_SIZE])
    mutex.initialise()
    lock = Lock(turn.make_worker(), mutex, "bench")
    other = multiprocessing.Lock()

    def bare() -> None:
        mutex.try_acquire()
        mutex.release()

    def block() -> None:
        with lock:
            pass

    def others() -> None:
        with other:
            pass

    subjects: Mapping[str, Callable[[], float]] = {
        "mutex": lambda: seconds(bare, count) / count,
        "with lock": lambda: seconds(block, count) / count,
        "multiprocessing.Lock": lambda: seconds(others, count) / count,
        "take over from a killed holder": lambda: take_over(mutex),
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            times[name].append(subject() * 1e6)
    return {name: turn.spread(values) for name, values in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000, help="calls a round")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.rounds), indent=2))

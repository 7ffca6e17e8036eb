"""A kind that does whatever its arguments say, and the config text that has it do so."""

import json
from collections.abc import Mapping
from typing import Final

from processes import state

CHAOS: Final = '''
import ctypes, os, signal, subprocess, sys, time
import bghost
from bghost import WorkerSpec

deaf = ctypes.PyDLL(None)  # calls hold the GIL: no Python code runs, no handler


def deaf_sleep(seconds):
    """Wait in C with the GIL held, for a lock that nobody releases; no signal interrupts that."""
    mutex = ctypes.create_string_buffer(64)
    deaf.pthread_mutex_lock(mutex)
    deaf.pthread_mutex_timedlock(mutex, (ctypes.c_long * 2)(int(time.time() + seconds), 0))


class Kind:
    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.do(worker, "setup")

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.do(worker, "tick")
        return bghost.UNTIL_WOKEN

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        self.do(worker, "cleanup", reason=reason)

    def do(self, worker, when, **names):
        def note(text, *args):
            worker.log.info("note: {}", text.format(*args) if args else text)

        exec(worker.args.get(when, ""), globals() | {"worker": worker, "note": note, "kind": self} | names)
'''
"""``setup``, ``tick`` and ``cleanup`` of the args are statements that the hooks of those names execute."""

DEAF: Final = "note('is up'); deaf_sleep(120)"
"""A tick in C with the GIL held; :func:`is_deaf` tells when it has come so far."""


def is_deaf(pid: int | None) -> bool:
    """Whether a worker that has said that it is up is in C by now: it sleeps, which it does nowhere before."""
    return pid is not None and state(pid) == "S"


BLOCKED: Final = """
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
note('is up')
while True:
    time.sleep(1)
"""
"""A tick with all signals blocked."""

SWALLOW: Final = """
note('swallows')
while True:
    try:
        worker.check_interrupts()
        time.sleep(0.01)
    except BaseException:
        pass
"""
"""A tick that nothing ends in order."""


def table(
    name: str, *, kind: str = "chaos", count: int = 1, args: Mapping[str, object] | None = None, **keys: object
) -> str:
    """A ``[[worker]]`` table; ``setup``, ``tick`` and ``cleanup`` become its args."""
    args = dict(args or {}) | {key: keys.pop(key) for key in ("setup", "tick", "cleanup") if key in keys}
    lines = [f"name = {json.dumps(name)}", f"kind = {json.dumps(kind)}", f"count = {count}"]
    lines += [f"args.{key} = {json.dumps(value)}" for key, value in args.items()]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "[[worker]]\n" + "\n".join(lines) + "\n"

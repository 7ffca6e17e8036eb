"""Imports in a throw-away child first: what a plugin's import does to a process is found out where it harms nobody."""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

from bghost.shared import errors
from bghost.shared.errors import BUG, BghostError

TIMEOUT: Final = 10.0  # seconds that an import may take
_CHUNK: Final = 1 << 16
_KILL_TIME: Final = 2.0  # seconds from SIGKILL to the end of whatever can be killed
_SLICE: Final = 0.05  # seconds between two looks, where there are no pidfds


class Died(Exception):
    """The throw-away child ended without an answer."""


class Hung(Exception):
    """The throw-away child gave no answer in time, and was killed."""


def throwaway(function: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
    """Call *function* in a forked child that is then thrown away.

    :param function: its result has to be what JSON can carry.
    :param timeout: seconds.
    :raises BghostError: the one that *function* raised.
    :raises Died: if the child ended by itself: exit, signal, or an unexpected exception, which it prints.
    :raises Hung: if it took longer than *timeout*.
    """
    readable, writable = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(readable)
            answer(function, writable)
        finally:
            os._exit(BUG)
    os.close(writable)
    try:
        status, data = _outcome(pid, readable, time.monotonic() + timeout)
    finally:
        os.close(readable)
    if status is None:
        raise Hung
    return result(status, data)


def result(status: int, data: bytes) -> Any:
    """What a child that has ended with *status* (minus a signal) has answered in *data*.

    :raises BghostError: the one that its function raised.
    :raises Died: if it has not answered.
    """
    if status != 0 or not data:
        raise Died(signal.Signals(-status).name if status < 0 else f"exit code {status}")
    told = json.loads(data)
    if "error" in told:
        raise errors.from_wire(told["error"])
    return told["result"]


def threads() -> int:
    """How many threads this process has, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))


def answer(function: Callable[[], Any], fd: int) -> None:
    """Be the child: call *function*, write what came of it to *fd*, and end; come back where that cannot be."""
    try:
        told = {"result": function()}
    except BghostError as error:
        told = {"error": errors.to_wire(error)}
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        return
    data = memoryview(json.dumps(told).encode())
    while data:
        data = data[os.write(fd, data) :]
    os._exit(0)


def _outcome(pid: int, fd: int, until: float) -> tuple[int | None, bytes]:
    """How the child has ended, ``None`` if it had to be killed, and what it has said.

    It is its own end that is waited for, not that of the pipe: an import may close that, or leave it to a daemon.
    """
    data = b""
    os.set_blocking(fd, False)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    pidfd, killed = -1, False
    try:
        try:
            pidfd = os.pidfd_open(pid)
            poll.register(pidfd, select.POLLIN)
        except OSError:
            pass  # in slices, then
        while True:
            left = max(0.0, until - time.monotonic())
            poll.poll((left if pidfd >= 0 else min(left, _SLICE)) * 1000)
            ended, status = os.waitpid(pid, os.WNOHANG)
            try:
                while chunk := os.read(fd, _CHUNK):
                    data += chunk
                poll.unregister(fd)
            except BlockingIOError:
                pass
            except KeyError:
                pass  # it is at its end since before
            if ended:
                return None if killed else os.waitstatus_to_exitcode(status), data
            if time.monotonic() >= until:
                if killed:
                    return None, data  # it hangs in the kernel, and is left to that
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
                killed, until = True, time.monotonic() + _KILL_TIME
    finally:
        if pidfd >= 0:
            os.close(pidfd)

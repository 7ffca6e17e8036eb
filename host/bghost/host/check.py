"""The config read and judged in a child of the host, which is then thrown away; the loop goes on meanwhile."""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bghost.host import process as processes
from bghost.host.poller import READ, Poller
from bghost.host.process import Process
from bghost.host.timers import Timer
from bghost.host.verdict import Verdict
from bghost.shared.errors import BghostError, ConfigError, HostError
from bghost.shared.throwaway import TIMEOUT, Died, answer, result

if TYPE_CHECKING:
    from bghost.host.host import Host

ANSWER_LIMIT: Final = 1 << 24  # bytes; a config has at most one of 16 MiB

_CHUNK: Final = 1 << 16


class Check:
    """One at a time.

    :param judge: reads the config and gives the verdict as plain data; called in the child.
    :param told: given the verdict, or why there is none; once for each check, unless it was killed.
    """

    def __init__(
        self, host: "Host", poller: Poller, judge: Callable[[], Any], told: Callable[[Verdict | BghostError], None]
    ) -> None:
        self._host = host
        self._poller = poller
        self._judge = judge
        self._told = told
        self._child: Process | None = None
        self._pipe = -1
        self._data = bytearray()
        self._limit: Timer | None = None
        self._over = False  # it has been told, or nobody waits for it any more

    @property
    def runs(self) -> bool:
        """Whether there is a child still, be it that nobody waits for it."""
        return self._child is not None

    def fds(self) -> list[int]:
        """The descriptors that a child must not keep."""
        child = [self._child.pidfd] if self._child is not None and self._child.pidfd >= 0 else []
        return child + ([self._pipe] if self._pipe >= 0 else [])

    def begin(self) -> None:
        """Start one; there is none now.

        :raises HostError: if no child can be had.
        """
        host = self._host
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(writer, True)
        self._data.clear()
        self._over = False
        self._pipe = reader
        try:
            self._child = processes.fork(
                lambda: answer(self._judge, writer),  # type: ignore[arg-type,return-value]
                host.private_fds(),
                host.pid,
                death_signal=9,
            )
        except OSError as error:
            self._close_pipe()
            raise HostError(f"the config cannot be checked: {processes.why_none(error)}") from None
        finally:
            os.close(writer)
        host.spare(self._child)
        self._poller.register(reader, self._readable)
        self._limit = host.timers.at(time.monotonic() + TIMEOUT, self._too_late)
        host.watch(self._child, self.look_ended)

    def kill(self) -> None:
        """Nobody waits for it any more."""
        self._over = True
        if self._child is not None:
            self._child.kill_group()

    def _readable(self, events: int) -> None:
        if self._pipe < 0:
            return  # the child's end came up in the same turn, and was seen first
        try:
            data = os.read(self._pipe, _CHUNK)
        except BlockingIOError:
            return
        self._data += data
        if not data or len(self._data) > ANSWER_LIMIT:
            self._poller.unregister(self._pipe)
            self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._pipe)
        self._pipe = -1

    def _too_late(self) -> None:
        if not self._over:
            self.kill()
            # Perhaps it hangs in the kernel, on a file of a server that is gone: nobody waits for its end.
            self._told(ConfigError(f"the config was not read and checked within {TIMEOUT:g} s"))

    def look_ended(self) -> None:
        """See whether the child has ended; then take what it has said."""
        child = self._child
        status = None if child is None else child.status()
        if child is None or status is None:
            return
        while self._pipe >= 0:
            before = len(self._data)
            self._readable(READ)
            if len(self._data) == before and self._pipe >= 0:  # a process that it has left behind holds the other end
                self._poller.unregister(self._pipe)
                self._close_pipe()
        if self._limit is not None:
            self._limit.cancel()
        child.kill_group()
        self._host.forget(child)
        child.reap()
        self._host.spare_no_more(child)
        self._child = None
        self._host.changed = True
        if not self._over:
            self._over = True
            self._told(self._found(status))

    def _found(self, status: int) -> Verdict | BghostError:
        try:
            return msgspec.convert(result(status, bytes(self._data)), Verdict)
        except Died as error:
            return HostError("the process that checked the config has given no answer", detail=str(error))
        except BghostError as error:
            return error

"""What a worker's process, and whatever it starts, writes to stdout and stderr: taken up line by line, by its name."""

import io
import os
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

from bghost.host.poller import Poller
from bghost.shared import logs
from bghost.shared.sink import LIMIT

CHUNK: Final = 1 << 16  # bytes taken from one worker in one turn of the loop
RECENT: Final = 60  # lines that are kept: a stack, after a crash, and what came before it


class Output:
    """The pipe of one process, and its lines as they come.

    Made before the fork; the child makes its end descriptors 1 and 2 with :meth:`become`, the host lets go of that with
    :meth:`watch`.

    :param heard: told each line.
    :raises OSError: if there is no descriptor for it.
    """

    def __init__(self, worker: str, poller: Poller, heard: Callable[[str], None]) -> None:
        self._worker = worker
        self._poller = poller
        self._heard = heard
        self._near, self._far = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._near, False)
        self._rest = b""  # a line that has not ended yet
        self._skipping = False  # the rest of a line that was cut
        self.recent: deque[str] = deque(maxlen=RECENT)

    def fds(self) -> list[int]:
        """The descriptors that a child must not keep."""
        return [self._near] if self._near >= 0 else []

    def become(self) -> None:
        """In the child: have what it prints come here."""
        os.close(self._near)
        os.dup2(self._far, 1)
        os.dup2(self._far, 2)
        os.close(self._far)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # a pipe's default is to wait for a few thousand characters

    def watch(self) -> None:
        """In the host, once the child is there."""
        self._poller.register(self._near, lambda events: self._read())
        os.close(self._far)
        self._far = -1

    def close(self) -> None:
        """The process has ended: take up what is there still. What others may write later nobody hears."""
        if self._far >= 0:  # there was no child
            os.close(self._far)
            os.close(self._near)
            self._far = self._near = -1
            return
        for _ in range(2):  # a pipe holds no more than one chunk
            self._read()
        if self._near >= 0:
            self._let_go()

    def _let_go(self) -> None:
        self._poller.unregister(self._near)
        os.close(self._near)
        self._near = -1
        if self._rest and not self._skipping:
            self._take([self._rest])
        self._rest = b""

    def _read(self) -> None:
        if self._near < 0:
            return  # the process has ended in the same turn of the loop
        try:
            data = os.read(self._near, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._let_go()
            return
        *lines, rest = (self._rest + data).split(b"\n")
        if self._skipping and lines:
            del lines[0]
            self._skipping = False
        if self._skipping:
            rest = b""
        elif len(rest) >= LIMIT:
            lines.append(rest)
            self._skipping, rest = True, b""
        self._rest = rest
        self._take(lines)

    def _take(self, lines: list[bytes]) -> None:
        texts = [line.decode("utf-8", "backslashreplace").rstrip("\r") for line in lines if line.strip()]
        if texts:
            self.recent.extend(logs.output(self._worker, texts))
            for text in texts:
                self._heard(text)

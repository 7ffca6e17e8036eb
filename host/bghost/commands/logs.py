"""``bghost logs``: what the host and its workers have logged, and what they go on to log."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import click

from bghost.commands.arguments import names_argument
from bghost.host.order import meant
from bghost.shared import linux
from bghost.shared.client import Client
from bghost.shared.errors import HostError, NoHost
from bghost.shared.paths import directories

_HEAD: Final = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \S+ +\[([^\]]*)\]")
_BLOCK: Final = 1 << 16

Wanted = Callable[[bytes], bool]
"""Whether the record that a line begins is asked for."""


@click.command()
@names_argument(required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on, and show what is added, until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    "count",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="So many records.",
)
def logs(names: tuple[str, ...], follow: bool, count: int) -> None:
    """Show the log, of the whole host or of the workers named; from files that were rotated, too.

    That needs a log file: file in [host.log]. A NAME need not be that of a worker that there is now; "host" is the
    host itself.
    """
    path = log_file()
    wanted = _wanted(names)
    follower = Follower(path) if follow else None  # first: nothing that comes meanwhile is missed
    end = follower.end() if follower is not None else None
    for record in last_records(path, count, wanted, end):
        sys.stdout.buffer.write(record)
    sys.stdout.buffer.flush()
    if follower is not None:
        shown = False
        for line in follower.lines():
            if not line.startswith(b"\t"):
                shown = wanted(line)
            if shown:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()


def log_file() -> str:
    """The log file of this instance: that of the host that runs, or else of the config.

    :raises HostError: if it logs to no file; says where instead.
    """
    try:
        status = Client().status()
    except NoHost:
        configured = _configured()
        if configured is None:
            raise HostError("no host is running, and the config has no log file", hint=_HINT) from None
        return configured
    path: str | None = status["log"]
    if path is None:
        pid = status["pid"]
        try:
            where = os.readlink(f"/proc/{pid}/fd/2")
        except OSError:
            where = "not to be looked at"
        raise HostError(f"the log goes to the stderr of the host (pid {pid}), which is {where}", hint=_HINT)
    return path


_HINT: Final = 'file = "/path/to/bghost.log" under [host.log] has it in a file; under systemd, journalctl has it'


def _configured() -> str | None:
    from bghost.commands.serve import sources_of
    from bghost.shared.plugins import discover

    given = os.environ.get("BGHOST_CONFIG") or None
    return sources_of(given, directories(), {}).read(discover()).config().host.log.file


def _wanted(names: Sequence[str]) -> Wanted:
    known: dict[str, bool] = {}

    def wanted(line: bytes) -> bool:
        who = worker_of(line)
        if who not in known:
            known[who] = any(meant(name, [who]) or fnmatch.fnmatch(who, name) for name in names)
        return known[who]

    return wanted if names and "all" not in names else lambda line: True


def worker_of(line: bytes) -> str:
    """Who has logged the record that *line* begins; empty where that cannot be told."""
    if line.startswith(b"{"):
        try:
            who = json.loads(line).get("worker")
        except (ValueError, AttributeError, RecursionError):
            return ""
        return who if isinstance(who, str) else ""
    match = _HEAD.match(line)
    return match[1].decode("utf-8", "replace") if match else ""


def last_records(path: str, count: int, wanted: Wanted, end: int | None = None) -> list[bytes]:
    """The last *count* records that are wanted, oldest first; a record is a line and those after it that are indented.

    :param end: where the newest file ends, for this; ``None``: at its end.
    :raises HostError: if there is no such file, or it may not be read.
    """
    found: deque[bytes] = deque()
    rest: list[bytes] = []
    for name in rotated(path):
        if len(found) >= count:
            break
        try:
            with open(name, "rb") as file:
                for line in _backwards(file.fileno(), end if name == path else None):
                    rest.append(line)
                    if not line.startswith(b"\t"):
                        if wanted(line):
                            found.appendleft(b"".join(reversed(rest)))
                        rest = []
                        if len(found) >= count:
                            break
        except FileNotFoundError:
            if name == path:
                raise HostError(f"there is no log {path}", detail="nothing has been logged to it") from None
        except OSError as error:
            raise HostError(f"the log {name} cannot be read: {error.strerror}") from None
    return list(found)


def rotated(path: str) -> Iterator[str]:
    """The log and those that it was rotated to, newest first."""
    yield path
    number = 1
    while os.path.exists(f"{path}.{number}"):
        yield f"{path}.{number}"
        number += 1


def _backwards(fd: int, end: int | None) -> Iterator[bytes]:
    """The whole lines of a file, the last one first."""
    at = os.fstat(fd).st_size if end is None else end
    rest = b""
    while at:
        start = max(0, at - _BLOCK)
        data = os.pread(fd, at - start, start) + rest
        at = start
        # Only at newlines: splitlines() knows ends of lines that are none here.
        lines = [line + b"\n" for line in data.removesuffix(b"\n").split(b"\n")]
        rest = lines.pop(0) if at else b""
        yield from reversed(lines)


class Follower:
    """Waits for what is added to a log, and goes over to the new file when it is rotated."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._watch = linux.inotify(os.path.dirname(path))
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"the log {path} cannot be read: {error.strerror}") from None
        os.lseek(self._fd, 0, os.SEEK_END)
        self._before: int | None = None  # the file before this one: somebody may still add to it
        self._rests = {self._fd: b""}

    def end(self) -> int:
        """Where the file ended when this began."""
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def lines(self) -> Iterator[bytes]:
        """Whole lines as they come, without end."""
        while True:
            if self._before is not None:
                yield from self._read(self._before)
            yield from self._read(self._fd)
            if self._moved():
                continue
            os.read(self._watch, _BLOCK)  # waits for something to happen in the directory

    def _read(self, fd: int) -> Iterator[bytes]:
        while data := os.read(fd, _BLOCK):
            *lines, self._rests[fd] = (self._rests[fd] + data).split(b"\n")
            yield from (line + b"\n" for line in lines)

    def _moved(self) -> bool:
        """Whether there is another file now; it is taken up then."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False  # moved away, and nobody has made a new one yet
        if os.path.sameopenfile(fd, self._fd):
            os.close(fd)
            if os.fstat(self._fd).st_size < os.lseek(self._fd, 0, os.SEEK_CUR):
                os.lseek(self._fd, 0, os.SEEK_SET)  # somebody has emptied it
                return True
            return False
        if self._before is not None:
            os.close(self._before)
            del self._rests[self._before]
        self._before, self._fd = self._fd, fd
        self._rests[fd] = b""
        return True

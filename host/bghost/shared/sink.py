"""Where a process's log goes: a file, or what stderr is, written to without waiting for whoever reads it."""

import errno
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from bghost.shared.errors import ConfigError
from bghost.shared.paths import problem

LIMIT: Final = 1 << 16  # bytes of one record; what is longer is cut
PIPE_LIMIT: Final = select.PIPE_BUF  # bytes that a pipe takes whole, or not at all
ROOM: Final = 1 << 20  # bytes that the host keeps back while there is no room for them
PATIENCE: Final = 1.0  # seconds that a worker waits for room, once; then it does without, until there is some


class Sink:
    """Takes whole records, each in one write, so that records of many processes are not mixed.

    What there is no room for is kept back, or waited for, or given up and counted; that it was is written as soon as
    there is room again. Nothing here raises once it is open.

    :param file: absolute path; ``None``: what descriptor 2 is now.
    :param room: bytes that are kept back.
    :param patience: seconds that a record waits for room, unless the one before it has waited in vain.
    :param lost: makes the record that tells of so many lost ones, with the reason.
    :raises ConfigError: if the file cannot be had, or is not safe to write to.
    """

    def __init__(
        self, file: str | None, lost: Callable[[int, str], bytes], *, room: int = ROOM, patience: float = 0.0
    ) -> None:
        self.open: Callable[[str], int] = open_file
        """Opens the file; raises BlockingIOError where that has to be tried again later."""
        self.room = room
        self.patience = patience
        self.lost = 0
        """Records, in all."""
        self._tell = lost
        self._untold = 0
        self._reason = ""
        self._stuck = False  # the last record has waited in vain
        self._torn = False  # the first of those that wait is the rest of one
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._socket: socket.socket | None = None
        self._blocking = False
        self._on_file = stat.S_ISREG(os.fstat(2).st_mode)
        # Kept also while there is a file: a config may take that away, and 2 is a worker's own affair by then.
        self._stderr = self._open_stderr()
        self.file: str | None = None
        self._fd = self._stderr
        self.reopen(file)

    def _open_stderr(self) -> int:
        if self._on_file:
            return os.dup(2)  # writing to a file does not wait; and the place in it is shared with the shell
        try:
            # Not F_SETFL on 2 itself: whoever has given us that uses it too, and expects it to wait.
            return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            fd = os.dup(2)
            if error.errno == errno.ENXIO:
                self._socket = socket.socket(fileno=fd)
            else:
                self._blocking = True  # another user's, say, after su
            return fd

    def fds(self) -> list[int]:
        """What an exec'd process inherits to write where this one does."""
        return [self._stderr] if self._fd == self._stderr else [self._stderr, self._fd]

    def __getstate__(self) -> dict[str, object]:
        """What goes over an exec; what is kept back is this process's to write."""
        return {**vars(self), "_socket": None, "_waiting": deque(), "_size": 0, "_untold": 0, "_torn": False}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        if stat.S_ISSOCK(os.fstat(self._stderr).st_mode):
            self._socket = socket.socket(fileno=self._stderr)

    @property
    def limit(self) -> int:
        """Bytes that are written whole."""
        return LIMIT if self.file is not None or self._on_file else PIPE_LIMIT

    def reopen(self, file: str | None) -> None:
        """Have it go to *file* from now on, opened anew; ``None``: to what descriptor 2 was at first.

        :raises ConfigError: as the constructor does; it then goes where it went.
        """
        fd = self._stderr if file is None else self.open(file)
        if self._fd != self._stderr:
            os.close(self._fd)
        self._fd, self.file = fd, file

    def forget(self) -> None:
        """In a child: what is kept back is the parent's to write."""
        self._waiting.clear()
        self._size = self._untold = 0
        self._torn = False

    @property
    def behind(self) -> bool:
        """Whether something is kept back, or untold: :meth:`flush` is to be called again."""
        return bool(self._waiting or self._untold)

    def write(self, record: bytes) -> None:
        """Write *record*, lines that end in a newline; or keep it back, or lose it."""
        self.flush()
        for part in parts(record, self.limit):
            self._waiting.append(part)
            self._size += len(part)
        self._push()
        if self._waiting and self.patience and not self._stuck and not self._has_room(self.patience):
            self._stuck = True
        elif self._waiting:
            self._push()
        while self._size > self.room and len(self._waiting) > self._torn:
            self._lose("nobody has taken them")

    def flush(self) -> None:
        """Write what was kept back, and how many were lost, as far as there is room."""
        self._push()
        if self._untold and not self._waiting:
            count, self._untold = self._untold, 0
            line = self._tell(count, self._reason)
            try:
                written = self._send(line)
            except OSError:
                written = 0
            if written < len(line) and not self._mend(line, written):
                self._untold = count

    def finish(self, seconds: float) -> None:
        """Flush; wait so long for room, before the process ends."""
        self.flush()
        if self._waiting and self._has_room(seconds):
            self.flush()

    def _push(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            try:
                written = self._send(first)
            except BlockingIOError:
                return
            except OSError as error:  # closed, full, or its reader is gone: work goes on without the record
                self._lose(error.strerror or str(error), last=False)
                continue
            self._stuck = False
            if written == len(first):
                self._waiting.popleft()
                self._size -= written
                self._torn = False
                continue
            self._waiting.popleft()
            self._size -= len(first)
            if not self._mend(first, written):
                self.lost += 1
                self._untold += 1
                self._reason = "no space left for all of it"

    def _mend(self, record: bytes, written: int) -> bool:
        """*record* was written in part: see that nobody's record ends up behind half of it. Whether the rest waits."""
        if self.file is not None or self._on_file:
            # A disk that has become full: no other process can have added anything yet, so what is there of it can go.
            self._take_back(record[:written])
            return False
        if written:
            self._waiting.appendleft(record[written:])
            self._size += len(record) - written
            self._torn = True
        return bool(written)

    def _lose(self, reason: str, *, last: bool = True) -> None:
        record = self._waiting.pop() if last else self._waiting.popleft()
        self._torn = self._torn and last
        self._size -= len(record)
        self.lost += 1
        self._untold += 1
        self._reason = reason

    def _send(self, data: bytes) -> int:
        if self._socket is not None and self.file is None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if self._blocking and self.file is None and not self._has_room(0.0):
            raise BlockingIOError
        return os.write(self._fd, data)

    def _has_room(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))

    def _take_back(self, data: bytes) -> None:
        try:
            at = os.fstat(self._fd).st_size - len(data)
            if data and os.pread(self._fd, len(data), at) == data:
                os.ftruncate(self._fd, at)
        except OSError:
            pass  # it cannot be read: half a record stays


def open_file(path: str) -> int:
    """A descriptor that appends to the log at *path*, made with mode 0600 if there is none.

    :raises ConfigError: if it cannot be opened, is no file, or others could put another in its place.
    """
    directory, name = os.path.split(path)
    directory = os.path.realpath(directory)
    if why := problem(directory, shared=True):
        raise ConfigError(f"the log cannot be in {directory}, which {why}")
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(os.path.join(directory, name), flags, 0o600)
    except OSError as error:
        reason = "it is a symlink" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"the log {path} cannot be opened: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"the log {path} is no file")
    return fd


def parts(record: bytes, limit: int) -> Iterator[bytes]:
    """*record* in pieces of whole lines, each at most *limit* bytes; a line that is longer is cut."""
    if len(record) <= limit:
        yield record
        return
    piece = b""
    for line in record.splitlines(keepends=True):
        if len(line) > limit:
            line = line[: limit - 5].decode("utf-8", "ignore").encode() + b" ...\n"
        if len(piece) + len(line) > limit:
            yield piece
            piece = b""
        piece += line
    yield piece

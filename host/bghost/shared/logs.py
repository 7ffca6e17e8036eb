"""Log records of every process: loguru with one sink, one write per record; stdlib logging goes in too."""

import json
import logging
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from loguru import logger

from bghost.shared.sink import LIMIT, PATIENCE, Sink

if TYPE_CHECKING:
    from loguru import Message

LogFormat = Literal["text", "json"]
LAST: Final = 0.5  # seconds that the host waits for room when it ends
RECENT: Final = 20  # records of a worker that are kept for its post-mortem
SHORT: Final = 240  # characters that are kept of each of them
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
# Ends of lines, too, for some readers; and what turns the direction of a text, and so can make it look like another.
_CONTROL.update((code, f"\\u{code:04x}") for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
_CONTROL[0x0A] = "\\n"
_CONTROL[0x09] = "\\t"


def one_line(text: str) -> str:
    """*text* with everything escaped that could end a line or steer a terminal."""
    return text.translate(_CONTROL)


class _Log:
    """What this process knows of its log."""

    def __init__(self) -> None:
        self.sink: Sink | None = None
        self.format: LogFormat = "text"
        self.level = "INFO"
        self.name = "host"
        self.number = 0  # of the log that the sink was opened for
        self.current: Callable[[], int] | None = None
        self.keep: Callable[[str], None] | None = None
        self.note_lost: Callable[[int], None] | None = None

    def write(self, data: bytes) -> None:
        assert self.sink is not None
        if self.current is not None and self.current() != self.number:
            number = self.current()
            try:
                self.sink.reopen(self.sink.file)
            except BlockingIOError:
                number = self.number  # the host has not handed it out yet
            except Exception:
                pass  # it goes on where it went; the host has said what is wrong
            self.number = number
        before = self.sink.lost
        self.sink.write(data)
        if self.sink.lost != before and self.note_lost is not None:
            self.note_lost(self.sink.lost - before)


_log: Final = _Log()


def _forked() -> None:
    if _log.sink is not None:
        _log.sink.forget()


os.register_at_fork(after_in_child=_forked)


def sink() -> Sink | None:
    """The sink of this process."""
    return _log.sink


def finish() -> None:
    """Before the host ends: write what is kept back, if there is room for it soon."""
    if _log.sink is not None:
        _log.sink.finish(LAST)


def configure(level: str = "INFO", file: str | None = None, format: LogFormat = "text") -> None:
    """Send every record of this process to *file*, or to what stderr is. In the host before its first fork.

    :raises ConfigError: if the file cannot be had; everything stays as it was then.
    """
    if _log.sink is None:
        _log.sink = Sink(file, _lost_record)
    elif _log.sink.file != file:
        try:
            _log.sink.reopen(file)
        except BlockingIOError:
            _log.sink.file, _log.number = file, -1  # tried again with each line, until the host has handed it out
    _log.format = format
    _log.level = level
    _begin()


def give() -> Any:
    """What :func:`take` needs in a process that is exec'd by this one."""
    return _log.sink, _log.level, _log.format


def fds() -> list[int]:
    """The descriptors that such a process inherits for it."""
    return _log.sink.fds() if _log.sink is not None else []


def take(said: Any) -> None:
    """In a process that was exec'd: log where the process before did."""
    _log.sink, _log.level, _log.format = said
    _begin()


def opened_by(open: Callable[[str], int]) -> None:
    """Have *open* open the log's file in this process, which cannot do that itself."""
    assert _log.sink is not None
    _log.sink.open = open


def _begin() -> None:
    level = _log.level
    logger.remove()
    logger.configure(extra={})
    logger.add(_take, format="{message}", level=level, backtrace=False, diagnose=False, catch=False)
    logging.basicConfig(handlers=[_ToLoguru()], level=logger.level(level).no, force=True)


def become_worker(
    name: str,
    current: Callable[[], int],
    keep: Callable[[str], None],
    note_lost: Callable[[int], None],
    number: int,
) -> None:
    """In a worker's process: its records bear its name, and their last lines are kept where its host finds them.

    :param current: the number of the log; another one than before: it is to be opened anew.
    :param keep: takes the last records, a line each, after each record.
    :param note_lost: told how many records were lost, when some were.
    :param number: of the log that this process was born with.
    """
    assert _log.sink is not None
    _log.sink.patience, _log.sink.room = PATIENCE, 0
    _log.current, _log.note_lost = current, note_lost
    _log.number, _log.name = number, name
    recent: deque[str] = deque(maxlen=RECENT)

    def remember(line: str) -> None:
        recent.append(line[:SHORT])
        keep("\n".join(recent))

    _log.keep = remember
    logger.configure(extra={"worker": name})


def follow(level: str, file: str | None, format: LogFormat) -> None:
    """Have this worker's records go where a config that it takes says.

    :raises ConfigError: if the file cannot be had.
    """
    if (level, file, format) != (_log.level, _log.sink and _log.sink.file, _log.format):
        configure(level, file, format)
        logger.configure(extra={"worker": _log.name})


def output(worker: str, lines: Iterable[str]) -> list[str]:
    """Log what *worker* has written to its stdout or stderr; what was logged, as text, shortened.

    Past loguru, and in one write where it fits: a program may write a thousand lines at a time.
    """
    now = datetime.now().astimezone()
    wanted = logger.level("INFO").no >= logger.level(_log.level).no
    texts, data = [], []
    for line in lines:
        text = _head(now, "INFO", worker, line)
        texts.append(text[:SHORT])
        if wanted:
            data.append(_json(now, "INFO", worker, line) if _log.format == "json" else f"{text}\n".encode())
    if data and _log.sink is not None:
        _log.write(b"".join(data))
    return texts


def _take(message: "Message") -> None:
    record = message.record
    who = str(record["extra"].get("worker", "host"))
    head = _head(record["time"], record["level"].name, who, record["message"])
    error = record["exception"]
    trace = [] if error is None else _traceback(*error)
    lines = [one_line(line) for line in record["extra"].get("lines", ())]
    if _log.format == "json":
        data = _json(record["time"], record["level"].name, who, record["message"], error and error.type, trace, lines)
    else:
        data = ("\n\t".join([head, *trace, *lines]) + "\n").encode("utf-8", "backslashreplace")
    if _log.keep is not None:
        _log.keep(head if not trace or head.endswith(trace[-1]) else f"{head} ({trace[-1]})")
    _log.write(data)


def _head(time: datetime, level: str, who: str, text: str) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}.{time.microsecond // 1000:03d} {level:<7} [{one_line(who)}] {one_line(text)}"


def _json(
    time: datetime,
    level: str,
    worker: str,
    text: str,
    error: type[BaseException] | None = None,
    trace: Iterable[str] = (),
    lines: Iterable[str] = (),
) -> bytes:
    """The record as a line of JSON. Only ASCII: nothing in it can steer a terminal."""
    limit = _log.sink.limit if _log.sink is not None else LIMIT
    size, trace, lines = limit, list(trace), list(lines)
    while True:
        record: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": level,
            "worker": worker,
            "message": text if len(text) <= size else text[:size] + " ...",
        }
        if error is not None:
            record["error"] = error.__name__[:SHORT]
            record["traceback"] = _last(trace, size)
        if lines:
            record["lines"] = _last(lines, size)
        data = json.dumps(record).encode() + b"\n"
        if len(data) <= limit or size < 8:
            return data
        size //= 2


def _last(lines: list[str], size: int) -> list[str]:
    """As many of the last lines as have that many characters together: the end of a traceback says most."""
    found: list[str] = []
    for line in reversed(lines):
        line = line if len(line) <= size // 2 else line[: size // 2] + " ..."
        size -= len(line) + 4
        if size < 0:
            break
        found.append(line)
    return found[::-1]


def _lost_record(count: int, reason: str) -> bytes:
    text = (
        f"{count} log record{'' if count == 1 else 's'} could not be written and {'is' if count == 1 else 'are'} lost"
    )
    now, who = datetime.now().astimezone(), _log.name
    text = f"{text}: {reason}"
    if _log.format == "json":
        return _json(now, "WARNING", who, text)
    return f"{_head(now, 'WARNING', who, text)}\n".encode("utf-8", "backslashreplace")


def _traceback(kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> list[str]:
    return [
        one_line(line)
        for chunk in traceback.format_exception(kind, value, trace)
        for line in chunk.rstrip("\n").split("\n")
    ]


class _ToLoguru(logging.Handler):
    """Hands records of stdlib logging to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        try:
            text = record.getMessage()
        except Exception as error:  # a mistake of who logs; that is no reason to fail
            text = f"{record.msg!r} % {record.args!r}: {error}"
        logger.opt(exception=record.exc_info).bind(logger=record.name).log(level, "{}", text)

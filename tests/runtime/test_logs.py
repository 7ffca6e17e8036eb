"""Log records: one line each, whatever is in them, from every process and from stdlib logging too."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from support import BGHOST, SLOW, Process, Sandbox, StartHost, until

from bghost.shared.logs import one_line
from bghost.shared.sink import PIPE_LIMIT

RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (\w[\w ]{6,}?) +\[([^]]+)\] (.*)")


def logged(program: str, level: str = "INFO", before: str = "") -> bytes:
    """What a process writes to its stderr that does just that; *before* runs before the log is opened."""
    head = "import logging, os, sys\nfrom loguru import logger\nfrom bghost.shared import logs\n"
    head += textwrap.dedent(before)
    head += f"logs.configure(level={level!r})\n"
    process = subprocess.run(
        [sys.executable, "-P", "-c", head + textwrap.dedent(program)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=20 * SLOW,
        check=True,
    )
    return process.stderr


def records(data: bytes) -> list[tuple[str, str, str]]:
    """Level, worker and text of each record; a line that is none, and continues none, fails."""
    found: list[tuple[str, str, str]] = []
    assert data.endswith(b"\n")
    for line in data.decode().removesuffix("\n").split("\n"):
        if line.startswith("\t"):
            level, who, text = found.pop()
            found.append((level, who, f"{text}\n{line}"))
        else:
            match = RECORD.fullmatch(line)
            assert match is not None, line
            found.append((match[1].strip(), match[2], match[3]))
    return found


def test_a_record_is_a_line() -> None:
    """It has the time, the level, who, and the text."""
    assert records(
        logged("""
            logger.info("to {}", "whom")
            logger.bind(worker="counter.1").warning("braces are {{}} and {}", "{}")
            logger.debug("not at this level")
        """)
    ) == [("INFO", "host", "to whom"), ("WARNING", "counter.1", "braces are {} and {}")]


def test_nothing_in_a_record_makes_another() -> None:
    """Ends of lines, and what steers a terminal, are escaped: in texts, in names, in errors and their notes."""
    found = records(
        logged(r"""
            evil = "a\nINFO b\r\x1b[2Jc\u2028d\x85e\u202ef\udcffg\th\0"
            logger.info(evil)
            logger.bind(worker=evil).info("x")
            error = ValueError(evil)
            error.add_note(evil)
            logger.opt(exception=error).error("bad")
            logging.warning("%s", evil)
        """)
    )
    escaped = r"a\nINFO b\x0d\x1b[2Jc\u2028d\x85e\u202ef\udcffg\th\x00"
    assert [(level, who) for level, who, _ in found] == [
        ("INFO", "host"),
        ("INFO", escaped),
        ("ERROR", "host"),
        ("WARNING", "host"),
    ]
    assert found[0][2] == found[3][2] == escaped
    assert "\x1b" not in found[2][2]


@given(st.text())
def test_one_line(text: str) -> None:
    """Whatever a text has in it, what is written of it has no end of a line, and nothing that a terminal obeys."""
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)
    if text.isprintable():
        assert line == text


def test_an_error_is_told_with_its_traceback() -> None:
    """Each line of it belongs to the record; causes are there, and no values of variables, which may be secrets."""
    (record,) = records(
        logged("""
            def work(password):
                try:
                    open("/nowhere/" + password[:0])
                except OSError as error:
                    raise ValueError("no luck") from error

            try:
                work("geheim")
            except ValueError:
                logger.exception("it failed")
        """)
    )
    level, _, text = record
    lines = text.split("\n")
    assert (level, lines[0]) == ("ERROR", "it failed")
    assert lines[1] == "\tTraceback (most recent call last):"
    assert lines[-1] == "\tValueError: no luck"
    assert "\tFileNotFoundError: [Errno 2] No such file or directory: '/nowhere/'" in lines
    assert "geheim" not in text.replace('work("geheim")', "")


def test_errors_that_cannot_tell() -> None:
    """An error whose text cannot be had, or a group of them, or none where one is asked for, is logged as well."""
    found = records(
        logged("""
            class Mute(Exception):
                def __str__(self):
                    raise RuntimeError("no")

            logger.opt(exception=Mute()).error("mute")
            logger.opt(exception=ExceptionGroup("many", [ValueError("a"), Mute()])).error("group")
            logger.opt(exception=True).error("none")
            logging.error("none", exc_info=True)
        """)
    )
    assert [text.split("\n")[0] for _, _, text in found] == ["mute", "group", "none", "none"]


def test_a_long_record_is_cut() -> None:
    """It ends with dots, at the end of a character, in a line of its own."""
    data = logged("""
        for pad in range(4):
            logger.info("x" * pad + "\\N{GRINNING FACE}" * 50_000)
        logger.info("next")
    """)
    found = records(data)
    assert [text.endswith("\N{GRINNING FACE} ...") for _, _, text in found] == [True] * 4 + [False]
    for line in data.split(b"\n")[:4]:
        assert PIPE_LIMIT - 8 <= len(line) < PIPE_LIMIT


def test_stdlib_logging_goes_the_same_way() -> None:
    """With its levels, its errors, and its own mistakes, which are no reason to fail."""
    found = records(
        logged(
            """
            log = logging.getLogger("some.library")
            log.debug("debug")
            log.info("%s and %d", "text", 5)
            log.warning("{} stays")
            log.log(35, "between")
            logging.addLevelName(33, "LOUD")
            log.log(33, "loud")
            log.info("%d", "no number")
            log.info("%s %s", "one")
            try:
                1 / 0
            except ZeroDivisionError:
                log.exception("oops")
        """,
            level="DEBUG",
        )
    )
    assert [(level, text.split("\n")[0]) for level, _, text in found][:3] == [
        ("DEBUG", "debug"),
        ("INFO", "text and 5"),
        ("WARNING", "{} stays"),
    ]
    assert [text.split("\n")[0] for _, _, text in found][3:] == [
        "between",
        "loud",
        "'%d' % ('no number',): %d format: a real number is required, not str",
        "'%s %s' % ('one',): not enough arguments for format string",
        "oops",
    ]
    assert "ZeroDivisionError" in found[-1][2]


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    """Closed, full, or without a reader: the work goes on."""
    before = """
        near, far = os.pipe()
        os.dup2(far, 2)
    """
    program = """
        for number in range(1000):
            logger.info("x" * 1000)  # full
        os.close(near)
        logger.info("x")  # no reader
        os.close(logs.sink()._fd)
        logger.info("x")  # closed
        os._exit(0)
    """
    assert logged(program, before=before) == b""


KIND = """
import logging
import bghost
from loguru import logger

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        worker.log.info("by the worker's log")
        logger.info("by loguru")
        logging.getLogger("some.library").warning("by logging")
        return bghost.UNTIL_WOKEN
"""


def test_who_has_logged(bghost_host: StartHost) -> None:
    """What a library logs in a worker's process is that worker's, however it logs."""
    host = bghost_host(kinds={"logger": KIND}, args=["run", "logger"])
    for how in ("the worker's log", "loguru", "logging"):
        assert host.wait_line(rf"\] by {how}").text.endswith(f"[logger] by {how}")


def test_a_host_without_a_stderr(sandbox: Sandbox) -> None:
    """It runs, and no file that it opens gets the number of its stderr, and the log with it."""
    sandbox.kinds({"logger": KIND})
    argv = ["sh", "-c", 'exec "$@" 2>&-', "sh", *BGHOST, "run", "logger"]
    host = Process(argv, sandbox.env, sandbox.root)
    try:
        sandbox.wait_answering()
        sandbox.client().wait("logger")
        assert os.readlink(f"/proc/{host.pid}/fd/2") == "/dev/null"
        assert b"by logging" not in Path(sandbox.directories.lock).read_bytes()
    finally:
        host.signal(signal.SIGTERM)
        assert host.wait() == 0
    until(lambda: not os.path.exists(f"/proc/{host.pid}"))

"""Texts in shared memory: read whole or not at all, whatever the writer does, and whenever it dies."""

import json
import mmap
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SLOW

from bghost.shared.cells import TextCell

SIZE = 176
AROUND = 16  # bytes before and after the cell, which are not its own


class Memory:
    """A mapping with one cell in it."""

    def __init__(self, size: int = SIZE) -> None:
        self.data = memoryview(bytearray(b"\xa5" * (size + 2 * AROUND)))
        self.data[AROUND:-AROUND] = bytes(size)
        self.cell = TextCell(self.data.cast("Q"), self.data, AROUND, size)

    @property
    def around(self) -> bytes:
        return bytes(self.data[:AROUND]) + bytes(self.data[-AROUND:])


def test_an_unwritten_cell_is_empty() -> None:
    assert Memory().cell.read() == ""


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=5))
def test_what_is_written_is_read(texts: list[str]) -> None:
    """The last text is there, cut to the cell's room at the end of a character; nothing around the cell is touched."""
    memory = Memory()
    room = memory.cell.capacity
    for text in texts:
        memory.cell.write(text)
        read = memory.cell.read()
        if len(text.encode()) <= room:
            assert read == text
        else:
            assert read.endswith("...")
            assert text.startswith(read[:-3])
            # It is cut where it had to be: with its next character it would not fit.
            assert len(text[: len(read) - 2].encode()) + 3 > room >= len(read.encode())
        assert memory.cell.read() == read
    assert memory.around == b"\xa5" * (2 * AROUND)


def test_a_text_of_no_encoding_is_written_all_the_same() -> None:
    """A lone surrogate, as in a file name of another encoding, becomes a question mark."""
    memory = Memory()
    memory.cell.write("a\udcffb")
    assert memory.cell.read() == "a?b"


@settings(max_examples=60)
@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_nothing_that_is_there_makes_reading_fail(data: bytes) -> None:
    """Bytes that nobody has written as a text are no text."""
    memory = Memory()
    memory.data[AROUND:-AROUND] = data
    assert memory.cell.read() == ""
    memory.cell.write("better")
    assert memory.cell.read() == "better"
    assert memory.around == b"\xa5" * (2 * AROUND)


@settings(max_examples=60)
@given(st.text(max_size=60), st.text(max_size=60), st.integers(0, SIZE - 1), st.integers(1, 255))
def test_a_changed_byte_is_no_text(old: str, new: str, place: int, change: int) -> None:
    """What was disturbed is not read as something else: as the text, as the one before it, or as none."""
    memory = Memory()
    memory.cell.write(old)
    before = memory.cell.read()
    memory.cell.write(new)
    after = memory.cell.read()
    memory.data[AROUND + place] ^= change
    assert memory.cell.read() in (before, after, "")


PROGRAM = """
import json, mmap, os, random, signal, sys, time
from bghost.shared.cells import TextCell

def text(number):
    '''A text that tells whether it is whole.'''
    return f"{number}:{str(number) * (number * 7919 % 120)}!"

def whole(text):
    number, _, rest = text.partition(":")
    assert number.isdigit() and rest == str(int(number)) * (int(number) * 7919 % 120) + "!", f"torn: {text!r}"
    return int(number)

data = memoryview(mmap.mmap(-1, 4096))
cell = TextCell(data.cast("Q"), data, 64, 2048)

def fork(child):
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    return pid

def write(number):
    while True:
        number += 1
        cell.write(text(number))
"""


def run(program: str) -> Any:
    """What a program prints as JSON. It forks; in a process of its own, since this one may have threads."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30 * SLOW,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    return json.loads(process.stdout)


def test_no_text_is_read_torn_while_it_is_written() -> None:
    """Two readers of a cell that another process writes all the time read whole texts, each no older than the last."""
    result = run("""
        began = time.monotonic()

        def read():
            reads = empty = last = 0
            seen = set()
            # One second; longer where others have the processors, until it has met the writer often enough.
            while (took := time.monotonic() - began) < 1.0 or (len(seen) < 200 and took < 15.0):
                got = cell.read()
                reads += 1
                if not got:
                    empty += 1  # the writer was faster, as often as a reader looks
                    continue
                number = whole(got)
                assert number >= last, f"{number} after {last}"
                last = number
                seen.add(number)
            return reads, empty, len(seen)

        cell.write(text(1))
        writer = fork(lambda: write(1))
        other = fork(read)
        result = read()
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        print(json.dumps([result, os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])]))
    """)
    (reads, empty, distinct), other = result
    assert other == 0
    assert distinct >= 200
    assert empty < reads / 100


def test_a_writer_that_dies_leaves_a_whole_text() -> None:
    """300 writers killed at any instant: what is read then is the text before or the one after, and can be replaced."""
    result = run("""
        chance = random.Random(5)
        cell.write(text(1))
        number, changed = 1, 0
        for _ in range(300):
            pid = fork(lambda: write(number))
            end = time.perf_counter() + chance.random() * 0.004
            while time.perf_counter() < end:
                pass
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            read = whole(cell.read())
            assert read >= number, f"{read} after {number}"
            changed += read > number
            number = read
        print(json.dumps(changed))
    """)
    assert result > 30


@pytest.mark.parametrize("size", [48, 176, 1072, 2048])
def test_the_room_of_a_cell(size: int) -> None:
    """Both halves of a cell hold as many bytes as it says, and not one more."""
    memory = Memory(size)
    for letter in "ab":
        text = letter * memory.cell.capacity
        memory.cell.write(text)
        assert memory.cell.read() == text
        memory.cell.write(text + "x")
        assert memory.cell.read() == text[:-3] + "..."
    assert memory.around == b"\xa5" * (2 * AROUND)


def test_a_cell_of_a_real_mapping() -> None:
    with mmap.mmap(-1, 4096) as mapping, memoryview(mapping) as data, data.cast("Q") as words:
        TextCell(words, data, 8, SIZE).write("text")
        assert TextCell(words, data, 8, SIZE).read() == "text"

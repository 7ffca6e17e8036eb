"""The publication of an entry's data at the level of single stores, seen in any order."""

import itertools
import mmap
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import until

from bghost.shared.publication import Publications, Writer, salt

SIZE = 24


PLACE = 64  # of a place that is not the first
SEQUENCE = PLACE // 8
MINE = salt(7)


class Cells:
    """One place, as its owner and readers see it."""

    def __init__(self, size: int) -> None:
        self.data = memoryview(bytearray(1024))
        self._publications = Publications(self.data, size)

    def publish(self, data: bytes, owner: int = MINE) -> None:
        Writer(self._publications, PLACE, owner).write(data)

    def published(self, owner: int = MINE) -> bytes | None:
        return self._publications.read(PLACE, owner)

    def live(self) -> bytes:
        at = self._publications.live_at(PLACE)
        return bytes(self.data[at : at + self._publications.size])

    def heal(self) -> None:
        Writer(self._publications, PLACE, MINE).heal()


@pytest.fixture(name="cells")
def make_cells() -> Cells:
    return Cells(SIZE)


def data(number: int, size: int = SIZE) -> bytes:
    """The data of the so-manieth publication; each byte differs from that of every other."""
    return bytes((number * 31 + place) & 0xFF for place in range(size))


def words_of(cells: Cells) -> list[int]:
    return [*cells.data.cast("Q")]


def show(cells: Cells, words: list[int]) -> None:
    """Have a reader find these words."""
    memory = cells.data.cast("Q")
    for place, word in enumerate(words):
        memory[place] = word


def states(cells: Cells, publish: Callable[[int], None], count: int) -> Iterator[list[int]]:
    """The memory after 0, 1, 2, ... publications."""
    yield words_of(cells)
    for number in range(1, count):
        publish(number)
        yield words_of(cells)


def test_any_part_of_the_stores_in_any_order(cells: Cells) -> None:
    """Whichever stores of a publication a reader sees, and whichever it does not yet, it reads what was published
    before or what is published now, whole; or, where the last word came too early, nothing, and looks again."""
    old, new = list(states(cells, lambda number: cells.publish(data(number)), 6))[4:]
    changed = [place for place, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    # The word that counts them, the checksum, the data; the live data.
    assert len(changed) == 2 + 2 * (SIZE // 8)
    whole = changed[: 2 + SIZE // 8]
    seen = set()
    for part in itertools.product((False, True), repeat=len(changed)):
        shown = old.copy()
        for place, is_seen in zip(changed, part, strict=True):
            if is_seen:
                shown[place] = new[place]
        show(cells, shown)
        read = cells.published()
        flipped = shown[SEQUENCE] == new[SEQUENCE]
        assert read == (
            data(4) if not flipped else data(5) if all(shown[place] == new[place] for place in whole) else None
        )
        seen.add(read)
    assert seen == {data(4), data(5), None}


def test_any_mixture_of_publications_is_refused(cells: Cells) -> None:
    """A reader that is slow may copy each word of a half from another publication than the next, and may have seen any
    of the last words: what it believes is the publication that the word names, whole."""
    memory = list(states(cells, lambda number: cells.publish(data(number)), 7))
    half = [place for place in range(len(memory[6])) if memory[6][place] != memory[5][place]][1 : 2 + SIZE // 8]
    believed = 0
    for sequence in (2, 4, 6):
        for versions in itertools.product((2, 4, 6), repeat=len(half)):
            shown = memory[6].copy()
            shown[SEQUENCE] = sequence
            for place, version in zip(half, versions, strict=True):
                shown[place] = memory[version][place]
            show(cells, shown)
            whole = set(versions) == {sequence}
            assert cells.published() == (data(sequence) if whole else None)
            believed += whole
    assert believed == 3


@settings(max_examples=10)
@given(st.integers(1, 80), st.integers(1, 6), st.randoms(use_true_random=False))
def test_random_mixtures_of_any_data(size: int, count: int, chance: random.Random) -> None:
    """The same for data of any size and content, word by word: nothing that was not published is ever read."""
    cells = Cells(size)
    published = [chance.randbytes(size) for _ in range(count)]
    memory = list(states(cells, lambda number: cells.publish(published[number - 1]), count + 1))
    for _ in range(10):
        show(cells, [chance.choice(versions) for versions in zip(*memory, strict=True)])
        assert cells.published() in (None, *published)


def test_a_place_that_changes_hands(cells: Cells) -> None:
    """Who reads for one owner never believes what another has published, be the place cleared between or not."""
    for owner, other in itertools.pairwise(map(salt, range(1000))):
        cells.publish(data(1), owner)
        assert cells.published(owner) == data(1)
        assert cells.published(other) is None


@pytest.mark.parametrize("before", [0, 1, 4])
def test_a_death_amid_a_publication(cells: Cells, before: int) -> None:
    """The owner's next process begins with live data that is what was published last, whichever word was written last;
    single words that are written after that stay."""
    *_, old, new = states(cells, lambda number: cells.publish(data(number)), before + 2)
    word, check, *rest = [place for place, value in enumerate(new) if value != old[place]]
    half, live = rest[: SIZE // 8], rest[SIZE // 8 :]
    assert len(live) == SIZE // 8
    last = data(before) if before else None
    shown = old.copy()
    for place in (None, *half, check, *live):
        if place is not None:
            shown[place] = new[place]
        show(cells, shown)
        cells.heal()
        assert (cells.live(), cells.published()) == (last or bytes(SIZE), last)
        cells.data.cast("Q")[live[0]] = 77
        cells.heal()
        assert cells.live()[:8] == (77).to_bytes(8, "little")
    shown[word] = new[word]
    show(cells, shown)
    cells.heal()
    assert (cells.live(), cells.published()) == (data(before + 1), data(before + 1))


PUBLISHER: Final = """
import mmap, sys
from bghost.shared.publication import Publications, Writer
with open(sys.argv[1], "r+b") as file:
    write = Writer(Publications(memoryview(mmap.mmap(file.fileno(), 4096)), 64), 0, 1).write
write(b"a" * 64)
print("ready", flush=True)
while True:
    write(b"b" * 64)
    write(b"a" * 64)
"""


def test_a_word_that_is_read_amid_a_publication(tmp_path: Path) -> None:
    """A single word of the live data is one that was written, whenever another process looks at it."""
    (tmp_path / "memory").write_bytes(bytes(4096))
    with (
        (tmp_path / "memory").open("r+b") as file,
        mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ) as mapping,
        subprocess.Popen([sys.executable, "-c", PUBLISHER, file.name], stdout=subprocess.PIPE) as publisher,
    ):
        try:
            assert publisher.stdout
            assert publisher.stdout.readline() == b"ready\n"
            with memoryview(mapping) as data, data.cast("Q") as words:
                live, seen = Publications(data, 64).live_at(0) // 8, set[int]()

                def look() -> bool:
                    seen.update(words[word] for _ in range(50_000) for word in range(live, live + 8))
                    return len(seen) > 1

                until(look, what="a word to change")
        finally:
            publisher.kill()
    assert {word.to_bytes(8, "little") for word in seen} == {b"a" * 8, b"b" * 8}


@settings(max_examples=30)
@given(st.binary(min_size=1024, max_size=1024))
def test_nothing_that_is_written_over_makes_reading_fail(noise: bytes) -> None:
    """Noise is no publication, and the next one is read."""
    cells = Cells(SIZE)
    cells.data[:] = (noise * 2)[: len(cells.data)]
    assert cells.published() is None
    cells.publish(data(3))
    assert cells.published() == data(3)

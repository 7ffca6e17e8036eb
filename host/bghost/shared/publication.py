"""Data in shared memory whose fields belong together: published whole by one process, read whole by any, no lock.

A place holds the data three times: live, where single words are written and read at any moment, and in two halves that
are published in turn. A half is a checksum and the data; a word in front of all counts the publications, and its lowest
bit says which half holds the last. The writer fills the half that is not in use, then the live data, then stores the
word: shadow and flip, so that a death at any point leaves the old data whole.

The reader copies the half that the word names, and believes the copy if the checksum, which covers the word's number
too, is right. Shadow and flip alone would do on a processor that shows stores in their order; elsewhere the flip may be
seen before the half is, or a half while the writer, a round further, fills it anew, and a pair of fences, which Python
has not, would have to keep the order. The checksum stands in for them: whatever order the stores are shown in, a copy
that is not the publication of that number, whole, has another checksum (but for one torn copy in four thousand
million), and the reader looks again. So it trusts no order at all.

A writer that dies between its half and the word may leave live data that is neither old nor new. The half tells: it is
whole for a number that the word has not come to. The owner's next process then begins with what was published last.

A place goes from one owner to the next. The checksum covers a salt, which is each owner's own: who reads for one owner
never believes what another has published, whenever the place has changed hands.
"""

import struct
import zlib
from typing import Final

HEAD: Final = 64  # bytes in front of the halves
_CHECK: Final = 8  # bytes of the checksum in front of the data of a half
_MASK: Final = (1 << 64) - 1
_TRIES: Final = 64
crc32: Final = zlib.crc32


def salt(owner: int) -> int:
    """The salt of an owner's number; those of neighbours differ in many bits."""
    return owner * 0x9E3779B1 & 0x3FFFFFFF


class Publications:
    """All places of a mapping, each of *size* bytes of data. A place is where it begins, in bytes.

    :param data: the mapping.
    :param size: bytes of data.
    """

    __slots__ = ("_live", "_unpack", "data", "halves", "size", "stride", "words")

    def __init__(self, data: memoryview, size: int) -> None:
        self.data = data
        self.words = data.cast("Q")
        self.halves: Final = (HEAD, HEAD + _aligned(_CHECK + size))
        self.stride = stride(size)
        self.size = size
        self._unpack = struct.Struct(f"=Q{size}s").unpack_from
        self._live = self.stride - _aligned(size)

    def live_at(self, place: int) -> int:
        """Where in the mapping the live data of a place is."""
        return place + self._live

    def read(self, place: int, salt: int) -> bytes | None:
        """What was published last; ``None`` if nothing was, or what is there makes no sense."""
        return self.read_numbered(place, salt)[1]

    def read_numbered(self, place: int, salt: int) -> tuple[int, bytes | None]:
        """:meth:`read`, and the number of that publication; 0 if there is none."""
        for _ in range(_TRIES):
            number = self.words[place >> 3]
            if not number:
                break
            data = self.half(place, salt, number)
            if data is not None:
                return number, data
        return 0, None

    def half(self, place: int, salt: int, number: int) -> bytes | None:
        """The data of the publication of that number; ``None`` if the half does not hold it, whole."""
        data: bytes
        check, data = self._unpack(self.data, place + self.halves[number & 1])
        return data if check == crc32(data, number ^ salt) else None

    def clear(self, place: int) -> None:
        """Leave nothing of the last owner."""
        self.data[place : place + self.stride] = bytes(self.stride)

    def sequence(self, place: int) -> int:
        """How often data was published there."""
        return self.words[place >> 3]


class Writer:
    """A place, as its owner writes it.

    :param publications: of the mapping.
    :param place: where it begins, in bytes.
    :param salt: the owner's.
    """

    __slots__ = ("_checks", "_halves", "_live", "_memory", "_place", "_publications", "_salt", "_word", "_words")

    def __init__(self, publications: Publications, place: int, salt: int) -> None:
        size = publications.size
        halves = [place + half for half in publications.halves]
        live = publications.live_at(place)
        self._publications = publications
        self._place = place
        self._salt = salt
        self._memory = publications.data
        self._words = publications.words
        # All that a publication needs is made ahead: there may be a million in a second.
        self._word = place >> 3
        self._checks = [half >> 3 for half in halves]
        self._halves = [slice(half + _CHECK, half + _CHECK + size) for half in halves]
        self._live = slice(live, live + size)

    def write(self, data: bytes) -> None:
        """Publish *data*, and make it the live data.

        :raises ValueError: if it is of another size.
        """
        words, memory, word = self._words, self._memory, self._word
        number = words[word] + 1 & _MASK
        half = number & 1
        # Not by struct's pack_into(), which fills with zeros first: others read single words of live data meanwhile.
        memory[self._halves[half]] = data
        words[self._checks[half]] = crc32(data, number ^ self._salt)
        memory[self._live] = data
        words[word] = number

    def heal(self) -> None:
        """Begin with live data that is whole: the last process of this owner may have died while it wrote it."""
        publications, place = self._publications, self._place
        number = self._words[self._word] + 1 & _MASK
        if publications.half(place, self._salt, number) is not None:
            self._memory[self._live] = publications.read(place, self._salt) or bytes(publications.size)
            self._words[self._checks[number & 1]] ^= 1  # it was never published, and is not to be healed from again


def stride(size: int) -> int:
    """Bytes from one place to the next."""
    return HEAD + 2 * _aligned(_CHECK + size) + _aligned(size)


def _aligned(size: int) -> int:
    """Rounded up to whole lines of a processor's cache."""
    return (size + 63) // 64 * 64

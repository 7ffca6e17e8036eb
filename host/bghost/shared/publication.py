"""Data in shared memory whose fields belong together: published whole by one process, read whole by any, no lock.

A place holds the data three times: live, where single words are written and read at any moment, and in two halves that
are published in turn. A half is a sequence number, a checksum that covers that number and the data, and the data; a
word in front of all says which number was published last, and its lowest bit which half that is. The writer fills the
half that is not in use, then stores the word: shadow and flip, so that a death at any point leaves the old data whole.

The reader copies the half that the word names, and believes the copy if the checksum is right for the number that
stands with it, and that number is not older than the word. Shadow and flip alone would do on a processor that shows
stores in their order; elsewhere the flip may be seen before the half is, or a half while the writer, a round further,
fills it anew, and a pair of fences, which Python has not, would have to keep the order. The checksum stands in for
them: whatever order the stores are shown in, a copy that is not one publication, number and data, has another
checksum (but for one torn copy in four thousand million), and the reader looks again. So it trusts no order at all.

A place goes from one owner to the next. The checksum covers a salt, which is each owner's own: who reads for one owner
never believes what another has published, whenever the place has changed hands.
"""

import struct
import zlib
from typing import Final

HEAD: Final = 64  # bytes in front of the halves
_LIVE: Final = 1  # word in the head: the number up to which the live data is written
_HALF_HEAD: Final = 16  # bytes: sequence number, checksum
_WORD: Final = (1 << 64) - 1
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

    __slots__ = ("_halves", "_live", "_pack", "_unpack", "data", "size", "stride", "words")

    def __init__(self, data: memoryview, size: int) -> None:
        self.data = data
        self.words = data.cast("Q")
        self._halves = (HEAD, HEAD + _aligned(_HALF_HEAD + size))
        self.stride = stride(size)
        self.size = size
        layout = struct.Struct(f"=QQ{size}s")
        self._pack = layout.pack_into
        self._unpack = layout.unpack_from
        self._live = self.stride - _aligned(size)

    def live_at(self, place: int) -> int:
        """Where in the mapping the live data of a place is."""
        return place + self._live

    def write(self, place: int, salt: int, data: bytes) -> None:
        """Publish *data*, and make it the live data. The place's owner alone."""
        words, memory, word, live = self.words, self.data, place >> 3, place + self._live
        sequence = words[word] + 1 & _WORD
        self._pack(memory, place + self._halves[sequence & 1], sequence, crc32(data, sequence ^ salt), data)
        words[word] = sequence
        # Not by pack_into(), which is quicker, but fills with zeros first: others read single words of it meanwhile.
        memory[live : live + self.size] = data
        words[word + _LIVE] = sequence

    def read(self, place: int, salt: int) -> bytes | None:
        """What was published last; ``None`` if nothing was, or what is there makes no sense."""
        return self.read_numbered(place, salt)[1]

    def read_numbered(self, place: int, salt: int) -> tuple[int, bytes | None]:
        """:meth:`read`, and the number of that publication if it is one that cannot be published again; else 0.

        A number that is ahead of the word may be that of a writer that has died before it was to be seen, and comes
        again with other data.
        """
        for _ in range(_TRIES):
            sequence = self.words[place >> 3]
            if not sequence:
                break
            number, check, data = self._unpack(self.data, place + self._halves[sequence & 1])
            if check == crc32(data, number ^ salt) and number >= sequence:
                return (number if number == sequence else 0), data
        return 0, None

    def heal(self, place: int, salt: int) -> None:
        """Begin with live data that is whole: the last process of this owner may have died while it wrote it."""
        words, word = self.words, place >> 3
        if words[word + _LIVE] != words[word] and (data := self.read(place, salt)) is not None:
            live = self.live_at(place)
            self.data[live : live + self.size] = data
            words[word + _LIVE] = words[word]

    def clear(self, place: int) -> None:
        """Leave nothing of the last owner."""
        self.data[place : place + self.stride] = bytes(self.stride)

    def sequence(self, place: int) -> int:
        """How often data was published there."""
        return self.words[place >> 3]


def stride(size: int) -> int:
    """Bytes from one place to the next."""
    return HEAD + 2 * _aligned(_HALF_HEAD + size) + _aligned(size)


def _aligned(size: int) -> int:
    """Rounded up to whole lines of a processor's cache."""
    return (size + 63) // 64 * 64

"""A short text in shared memory: one writer, any readers, no lock, never read torn."""

import struct
import zlib
from typing import Final

_HEAD: Final = struct.Struct("<II")  # checksum, length
_TRIES: Final = 64


class TextCell:
    """Two halves and a sequence word whose lowest bit tells which half holds the text.

    The writer fills the other half, then stores the word: a writer that dies between leaves the old text. A reader
    copies a half and believes the copy only if its checksum, which covers the sequence number, is right. So it needs
    no memory fence, which Python does not have: on a processor that shows the stores in another order, or when the
    writer has lapped the reader, the checksum differs and the reader looks again.

    :param words: the mapping as 64-bit words.
    :param data: the same mapping as bytes.
    :param offset: where the cell begins, in bytes; a multiple of 8.
    :param size: of the whole cell in bytes; a multiple of 16 above 32.
    """

    __slots__ = ("_data", "_half", "_offset", "_word", "_words", "capacity")

    def __init__(self, words: memoryview, data: memoryview, offset: int, size: int) -> None:
        self._words = words
        self._data = data
        self._word = offset // 8
        self._offset = offset + 8
        self._half = (size - 8) // 2
        self.capacity = self._half - _HEAD.size  # bytes

    def write(self, text: str) -> None:
        """Publish *text*, cut to what fits at a character's end."""
        raw = text.encode("utf-8", "replace")
        if len(raw) > self.capacity:
            raw = raw[: self.capacity - 3].decode("utf-8", "ignore").encode() + b"..."
        sequence = (self._words[self._word] + 1) & 0xFFFFFFFFFFFFFFFF
        at = self._offset + (sequence & 1) * self._half
        _HEAD.pack_into(self._data, at, zlib.crc32(raw, sequence & 0xFFFFFFFF), len(raw))
        at += _HEAD.size
        self._data[at : at + len(raw)] = raw
        self._words[self._word] = sequence

    @property
    def sequence(self) -> int:
        """A number that differs whenever the text does: who has read the text need not read it again before."""
        return self._words[self._word]

    def read(self) -> str:
        """The last text that was published whole; empty if none was, or if what is there makes no sense."""
        for _ in range(_TRIES):
            sequence = self._words[self._word]
            if not sequence:
                return ""
            at = self._offset + (sequence & 1) * self._half
            crc, length = _HEAD.unpack_from(self._data, at)
            if length > self.capacity:
                continue
            raw = bytes(self._data[at + _HEAD.size : at + _HEAD.size + length])
            if zlib.crc32(raw, sequence & 0xFFFFFFFF) == crc:
                return raw.decode("utf-8", "replace")
        return ""

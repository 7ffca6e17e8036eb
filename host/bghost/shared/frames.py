"""Length-prefixed JSON frames: how the control socket's two ends talk."""

from __future__ import annotations

import json
import struct

TYPE_CHECKING = False  # typing itself is not imported: see bghost/__init__.py
if TYPE_CHECKING:
    from typing import Final

LIMIT: Final = 1 << 20  # bytes of one frame's body; a longer one is refused before it is read
_HEAD: Final = struct.Struct(">I")


class FrameError(ValueError):
    """A frame that is too long or is no JSON object; the connection it came on is of no more use."""


def encode(message: dict[str, object]) -> bytes:
    """One frame.

    :raises FrameError: if *message* is longer than :data:`LIMIT` or holds a number that JSON has no word for.
    """
    try:
        body = json.dumps(message, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise FrameError(f"no JSON: {error}") from None
    return framed(body)


def framed(body: bytes) -> bytes:
    """One frame of what is encoded already.

    :raises FrameError: if it is longer than :data:`LIMIT`.
    """
    if len(body) > LIMIT:
        raise FrameError(f"a frame of {len(body)} bytes; the limit is {LIMIT}")
    return _HEAD.pack(len(body)) + body


class Decoder:
    """Collects bytes and gives back whole messages; holds no more than one frame and what was read with it."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was read."""
        self._data += data

    def next(self) -> dict[str, object] | None:
        """The next whole message, or ``None`` while it is not there.

        :raises FrameError: if what has come can be no frame.
        """
        if len(self._data) < _HEAD.size:
            return None
        (length,) = _HEAD.unpack_from(self._data)
        if not 0 < length <= LIMIT:
            raise FrameError(f"a frame of {length} bytes; the limit is {LIMIT}")
        if len(self._data) < _HEAD.size + length:
            return None
        body = bytes(self._data[_HEAD.size : _HEAD.size + length])
        del self._data[: _HEAD.size + length]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"no JSON: {type(error).__name__}") from None
        if not isinstance(message, dict):
            raise FrameError("no JSON object")
        return message

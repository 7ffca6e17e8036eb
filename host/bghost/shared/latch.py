"""The latch: what a worker sleeps on and any process of the instance can set (SetLatch, WaitLatch, latch.c).

One non-blocking pipe per slot, made before the first fork, so that everybody holds every write end. The owner's write
end is also its signal wake-up descriptor (one byte, the signal's number, written by Python's C handler).

The order that loses nothing: who wakes first writes what it has to say, then the wake word, then the byte; the owner
first empties the pipe, then clears the word, then reads what was said. Whatever is said after the owner looked leaves
a byte in the pipe that the owner has not emptied, and its next sleep ends at once. The word lets a busy worker see a
wake-up without a system call; the byte is what counts.
"""

import fcntl
import os
from typing import Final

_PAGE: Final = 4096
_F_SETPIPE_SZ: Final = 1031
_READ: Final = 1 << 16


class Latch:
    """One slot's pipe; *inherited*: its two ends, as the host has made them, in a process that was exec'd.

    A wake-up carries the lower bits of the generation that it is meant for, so that one that was sent to a slot's last
    occupant does not wake the next one.
    """

    __slots__ = ("read_fd", "write_fd")

    def __init__(self, inherited: tuple[int, int] | None = None) -> None:
        if inherited is not None:
            self.read_fd, self.write_fd = inherited
            return
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # One page: a latch carries a few bytes, and a user's pipes together may hold a limited number of pages.
        fcntl.fcntl(self.write_fd, _F_SETPIPE_SZ, _PAGE)

    def set(self, generation: int) -> None:
        """Write the byte; the caller has set the wake word before. Any process, never blocks."""
        try:
            os.write(self.write_fd, _BYTES[generation & 0x7F])
        except BlockingIOError:
            pass  # full: its owner will find it readable, and takes a full pipe for a wake-up

    def nudge(self) -> None:
        """Have the owner, where it sleeps, look again at what it waits for; that is no wake-up. Never blocks."""
        try:
            os.write(self.write_fd, _NUDGE)
        except BlockingIOError:
            pass  # full: its owner looks anyway

    def reset(self, generation: int) -> bool:
        """Empty the pipe; whether a wake-up for *generation* was in it. The owner only."""
        try:
            data = os.read(self.read_fd, _READ)
        except BlockingIOError:
            return False
        return 0x80 | (generation & 0x7F) in data or len(data) >= _PAGE


_NUDGE: Final = b"\0"  # no signal has this number
_BYTES: Final = tuple(bytes((0x80 | tag,)) for tag in range(0x80))  # signal numbers end below 0x80

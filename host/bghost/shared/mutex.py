"""A lock in shared memory that the death of its holder does not keep locked: POSIX's robust mutex, through ctypes.

The kernel hands the mutex of a process that was killed, has ended or has become another program to the next who asks
for it, and tells that one (EOWNERDEAD), so that it can look what its predecessor has left half done. Nobody is ever
the owner by inheritance: a child that the holder forks is not.

Nothing here waits longer than it is told; a Python signal handler does not run within a call.
"""

import ctypes
import enum
import errno
import os
import sys
import time
import weakref
from typing import Final, Protocol

from bghost.shared.errors import LockDamaged

MUTEX_SIZE: Final = 128  # bytes of a cell, which begins at a multiple of 64
SLICE: Final = 0.05  # seconds; the longest that one call sleeps, and with it every signal handler

# A cell: eight bytes for a check, eight unused, the mutex, eight for a check. What runs over the mutex from either
# side, or the zeros and ones of a stray memset, are seen there before the mutex is touched. Where nothing waits, taking
# looks at the first byte and releasing at the last: a byte is read in a third of a word's time, and no memset gets past
# both. Who finds damage that these do not show takes them away, so that nobody touches the mutex any more, and the host
# sees it.
CHECK: Final = 0
CHECK_2: Final = 127
INTACT: Final = 0xB6
INTACT_2: Final = 0x5D
_FRONT: Final = bytes((INTACT,)) + b"bghost*"
_BACK: Final = b"*bghost" + bytes((INTACT_2,))
_MUTEX: Final = 16

# Of a robust mutex the kernel has to know the owner, so the word that it is told of has the thread's number. It comes
# first with glibc, and second with musl.
_FUTEX: Final = _MUTEX + (0 if "CS_GNU_LIBC_VERSION" in os.confstr_names else 4)
_OWNER_DIED: Final = 0x40000000
_THREAD: Final = 0x3FFFFFFF

_CLOCK_MONOTONIC: Final = 1
_PROCESS_SHARED: Final = 1
_ROBUST: Final = 1
_ERRORCHECK: Final = 2


class Acquired(enum.IntEnum):
    """What came of trying to get a mutex."""

    BUSY = 0
    TAKEN = 1
    INHERITED = 2  # taken, from a holder that has died with it


class _Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_long), ("nsec", ctypes.c_long)]


class _Attributes(ctypes.Union):
    _fields_ = [("bytes", ctypes.c_char * 64), ("align", ctypes.c_long)]


# PyDLL keeps the GIL, which costs less where nothing waits. No argtypes: a byref() that is passed as it is costs half.
_quick: Final = ctypes.PyDLL(None)
trylock: Final = _quick.pthread_mutex_trylock
unlock: Final = _quick.pthread_mutex_unlock
_consistent: Final = _quick.pthread_mutex_consistent
_init: Final = _quick.pthread_mutex_init
_clocklock: Final = ctypes.CDLL(None).pthread_mutex_clocklock


class Guarded(Protocol):
    """Something in shared memory that a mutex guards, made before any fork; see :data:`GUARDED`."""

    title: str
    """What it is called in messages."""
    mutex: "RobustMutex"

    def renew(self) -> None:
        """Make it as new, whatever is in it; nobody is using it. Runs in: host."""


GUARDED: Final[weakref.WeakSet[Guarded]] = weakref.WeakSet()
"""All that this process has made: the host sees to it that what was written over is made anew."""


class RobustMutex:
    """One mutex, as this process sees it. Not recursive; a thread's own.

    :param cell: :data:`MUTEX_SIZE` bytes of a shared, writable mapping, at a multiple of 64; initialised once by
        :meth:`initialise`, before any other process uses it.
    """

    __slots__ = ("cell", "mutex")

    def __init__(self, cell: memoryview) -> None:
        if len(cell) != MUTEX_SIZE:
            raise ValueError(f"a mutex takes {MUTEX_SIZE} bytes, not {len(cell)}")
        first = ctypes.c_char.from_buffer(cell)
        if ctypes.addressof(first) % 64:
            raise ValueError("a mutex begins at a multiple of 64 bytes")
        self.mutex: Final = ctypes.byref(first, _MUTEX)  # keeps the mapping
        self.cell: Final = cell.cast("B")

    def initialise(self) -> None:
        """Make the cell an unlocked mutex, whatever was in it; nobody may be using it."""
        self.cell[:] = bytes(MUTEX_SIZE)
        attributes = _Attributes()
        reference = ctypes.byref(attributes)
        for call, argument in (
            (_quick.pthread_mutexattr_setpshared, _PROCESS_SHARED),
            (_quick.pthread_mutexattr_settype, _ERRORCHECK),
            (_quick.pthread_mutexattr_setrobust, _ROBUST),
        ):
            _succeed(call(reference, argument))
        _succeed(_init(self.mutex, reference))
        self.cell[-len(_BACK) :] = _BACK
        self.cell[: len(_FRONT)] = _FRONT

    @property
    def intact(self) -> bool:
        """Whether the checks stand; looks only."""
        return self.cell[: len(_FRONT)] == _FRONT and self.cell[-len(_BACK) :] == _BACK

    @property
    def owner(self) -> int:
        """The thread that has it, as the kernel knows it; 0 for nobody. To be shown."""
        return self._futex & _THREAD

    @property
    def is_orphaned(self) -> bool:
        """Whether it is locked by a thread that does not exist, which the kernel would not have left so: damage."""
        futex = self._futex
        if not futex or futex & _OWNER_DIED or _lives(futex & _THREAD):
            return False
        return self._futex == futex  # else the thread has ended just now

    @property
    def _futex(self) -> int:
        return int.from_bytes(self.cell[_FUTEX : _FUTEX + 4], sys.byteorder)

    def try_acquire(self) -> Acquired:
        """Take the mutex if nobody has it.

        :raises LockDamaged: if something has written over it.
        :raises RuntimeError: if this thread has it already.
        """
        if self.cell[CHECK] != INTACT or self.cell[CHECK_2] != INTACT_2:
            raise self.damaged()
        return self.judge(trylock(self.mutex))

    def acquire_within(self, seconds: float) -> Acquired:
        """:meth:`try_acquire` that sleeps until the mutex is free, :data:`SLICE` at most."""
        if self.cell[CHECK] != INTACT or self.cell[CHECK_2] != INTACT_2:
            raise self.damaged()
        until = time.monotonic_ns() + int(min(max(seconds, 0.0), SLICE) * 1e9)
        moment = _Timespec(*divmod(until, 1_000_000_000))
        return self.judge(_clocklock(self.mutex, _CLOCK_MONOTONIC, ctypes.byref(moment)))

    def judge(self, code: int) -> Acquired:
        """What :data:`trylock` has come to, for who calls it to save the time of :meth:`try_acquire`."""
        if code == 0:
            return Acquired.TAKEN
        if code == errno.EBUSY or code == errno.ETIMEDOUT:
            return Acquired.BUSY
        if code == errno.EDEADLK:
            raise RuntimeError("this thread has the lock already")
        if code != errno.EOWNERDEAD:
            raise self.damaged(os.strerror(code))
        # At once: a mutex that is unlocked without it can never be locked again.
        _succeed(_consistent(self.mutex))
        return Acquired.INHERITED

    def release(self) -> None:
        """Give it up.

        :raises LockDamaged: if something has written over it; it is not touched then.
        :raises PermissionError: if this thread is not its owner; in a child that was forked by the owner, say.
        """
        if self.cell[CHECK] != INTACT or self.cell[CHECK_2] != INTACT_2:
            raise self.damaged()
        code = unlock(self.mutex)
        if code:
            if code == errno.EPERM:
                raise PermissionError(code, "the lock is not this thread's")
            raise self.damaged(os.strerror(code))

    def damaged(self, why: str = "its checks are gone") -> LockDamaged:
        """Mark it as damaged, for all processes; the error that says so."""
        self.cell[CHECK] = self.cell[CHECK_2] = 0
        return LockDamaged(
            "a lock in shared memory is damaged",
            detail=f"something has written over it: {why}",
            hint="what uses it has to be restarted",
        )


def _lives(thread: int) -> bool:
    return os.path.exists(f"/proc/{thread}")  # of kill(2) a thread that is not its process's first is none


def _succeed(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))

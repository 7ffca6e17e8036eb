"""The few system calls that Python has no function for."""

import ctypes
import fcntl
import os
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
F_SEAL_FUTURE_WRITE: Final = 0x0010  # no fcntl constant before Python 3.15

_libc: Final = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument.

    :raises OSError: as the kernel answers.
    """
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def follow(parent: int, signum: int) -> bool:
    """Have the kernel send this process *signum* when *parent* dies; whether it lives, and the signal is to come.

    :raises OSError: as the kernel answers.
    """
    prctl(PR_SET_PDEATHSIG, signum)
    return os.getppid() == parent  # it may have died before that


def memfd(name: str, size: int) -> int:
    """A memfd of *size* bytes, which nobody can make shorter, and so end others with a SIGBUS; close-on-exec.

    Its pages are taken when they are first written; no limit of a file system counts for them.

    :raises OSError: EMFILE and the like.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, for {size} bytes of shared memory") from None
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal_future_writes(fd: int) -> None:
    """From now on memfd *fd* can be mapped for reading only; writable mappings that exist stay writable."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)


_MEMBARRIER: Final = {
    "x86_64": 324,
    "i686": 375,
    "aarch64": 283,
    "riscv64": 283,
    "loongarch64": 283,
    "ppc64le": 365,
    "s390x": 356,
    "armv7l": 389,
}.get(os.uname().machine)
KEEPS_ORDER: Final = os.uname().machine in ("x86_64", "i686", "s390x")
"""Whether this processor's stores are seen in their order, and its loads done in theirs."""

_GLOBAL_EXPEDITED: Final = 2
_REGISTER_GLOBAL_EXPEDITED: Final = 4


def register_membarrier() -> bool:
    """Have this process take part in the :func:`membarrier` of others; whether the kernel has that."""
    return _MEMBARRIER is not None and _libc.syscall(_MEMBARRIER, _REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0


def membarrier() -> None:
    """Have each thread of every process that takes part pass a full memory barrier before this call returns.

    :raises OSError: if the kernel does not have it.
    """
    if _libc.syscall(_MEMBARRIER, _GLOBAL_EXPEDITED, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def order_reads() -> None:
    """What was stored before a word that this process has just read is seen by what it reads from here on.

    Where the processor does not see to that by itself, those who store have to take part in :func:`membarrier`; where
    the kernel does not have it, nothing can be done, and a reader may have to look again.
    """
    if not KEEPS_ORDER and _MEMBARRIER is not None:
        _libc.syscall(_MEMBARRIER, _GLOBAL_EXPEDITED, 0, 0)


class _Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_int64)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


_TFD_TIMER_ABSTIME_CANCEL_ON_SET: Final = 3


def wall_clock_timer(moment: float) -> int:
    """A timerfd that can be read at *moment* of the wall clock, and at once when somebody sets that clock.

    os.timerfd_create comes with Python 3.13.

    :param moment: unix seconds.
    :raises OSError: EMFILE and the like.
    """
    fd: int = _libc.timerfd_create(0, os.O_CLOEXEC | os.O_NONBLOCK)  # CLOCK_REALTIME
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    whole = int(moment)
    value = _Itimerspec(_Timespec(0, 0), _Timespec(max(whole, 0), max(int((moment - whole) * 1e9), 1)))
    if _libc.timerfd_settime(fd, _TFD_TIMER_ABSTIME_CANCEL_ON_SET, ctypes.byref(value), None) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise OSError(code, os.strerror(code))
    return fd


_IN_MODIFY: Final = 0x2
_IN_CREATE: Final = 0x100
_IN_MOVED_TO: Final = 0x80
_IN_ATTRIB: Final = 0x4


def inotify(directory: str) -> int:
    """A descriptor that can be read when something in *directory* was written to, made, or moved there.

    :raises OSError: as the kernel answers.
    """
    fd: int = _libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    mask = _IN_MODIFY | _IN_CREATE | _IN_MOVED_TO | _IN_ATTRIB
    if _libc.inotify_add_watch(fd, os.fsencode(directory), ctypes.c_uint32(mask)) < 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise OSError(code, os.strerror(code), directory)
    return fd

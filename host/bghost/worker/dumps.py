"""Dumps: a worker's Python stacks, written by faulthandler from inside a signal handler in C, and its scopes.

The stacks come even while some C code holds the GIL. They go into a memfd, from which the host reads them (it opens the
worker's descriptor through /proc) and logs them as one record.
"""

import faulthandler
import fcntl
import os
import signal

from bghost.shared import table as t
from bghost.shared.table import DUMP_NAME


def install(slot: t.Slot) -> None:
    """Have SIGUSR2 dump before it runs the handler that Python has for it; that one is installed already."""
    fd = os.memfd_create(DUMP_NAME, os.MFD_CLOEXEC)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    faulthandler.enable(file=2)  # a crash in C shows where it was; the host takes up what 2 says
    faulthandler.register(signal.SIGUSR2, file=fd, all_threads=True, chain=True)
    slot.stats[t.DUMP_FD] = fd


def add(slot: t.Slot, text: str) -> None:
    """Append *text* to what the host will read."""
    os.write(slot.stats[t.DUMP_FD], text.encode("utf-8", "replace"))

"""Taking a worker's dump: see :mod:`bghost.worker.dumps`."""

import os
import re
from typing import Final

from bghost.host import child
from bghost.shared import table as t

LIMIT: Final = 1 << 16  # bytes

_BORN: Final = re.compile(rf'^  File "{re.escape(child.__file__)}", line \d+ in be\n(?:  File .*\n?)*', re.MULTILINE)
"""The frames of a fork's parent, down to its command line, and the one that a worker begins with."""


def take(pid: int, slot: t.Slot) -> str:
    """Read and empty the dump of the process *pid*, which is not reaped. Empty where there is none to be had.

    Its stacks begin with the worker's life: what the host was doing when it forked is left out.

    The descriptor's number is the worker's word; that it is a memory file of the right name is seen to here.
    """
    path = f"/proc/{pid}/fd/{slot.stats[t.DUMP_FD]}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{t.DUMP_NAME}"):
            return ""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        data = os.read(fd, LIMIT)
        os.ftruncate(fd, 0)
    except OSError:
        return ""
    finally:
        os.close(fd)
    return _BORN.sub("", data.decode("utf-8", "replace"))

"""A worker in an interpreter of its own: what the host's child execs. From there on it is like one that was forked."""

import io
import sys

from bghost.shared import handover
from bghost.worker import life

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # it is a pipe to the host, which logs lines
    life.live(handover.take(int(sys.argv[1])))

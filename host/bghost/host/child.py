"""What a forked child does before it is a worker, where its spec asks for that: another user, another interpreter."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from bghost.shared import handover, linux, users
from bghost.shared import table as t
from bghost.shared.birth import Birth
from bghost.shared.errors import FAILED, BghostError


def be(birth: Birth, user: str | None, live: Callable[[Birth], NoReturn]) -> NoReturn:
    """Be the worker that *birth* says; nothing of its kind has been imported before it is *user*.

    This frame is where a worker's stack begins: see :mod:`bghost.host.dumps`.

    :param live: what a worker does, in this interpreter.
    """
    try:
        if user is not None:
            users.become(users.find(user))
            if not linux.follow(birth.host_pid, signal.SIGTERM):
                os._exit(FAILED)
        if birth.spec.start == "spawn":
            _exec(birth)
    except (BghostError, OSError) as error:
        _fail(birth, f"cannot be started: {error}")
    live(birth)


def _exec(birth: Birth) -> NoReturn:
    file = handover.give(birth)
    # The options of this interpreter; never the working directory on sys.path.
    options = [option for option in subprocess._args_from_interpreter_flags() if option != "-P"]  # type: ignore[attr-defined]
    argv = [sys.executable, "-P", *options, "-m", "bghost.worker.spawned", str(file)]
    try:
        os.execv(sys.executable, argv)
    except OSError as error:
        # As another user, perhaps: an interpreter in somebody's home is often not for others.
        raise BghostError(f"{sys.executable} cannot be run by uid {os.getuid()}", detail=error.strerror or "") from None


def _fail(birth: Birth, text: str) -> NoReturn:
    """End like a worker whose set-up has failed. Of the table a child may touch what workers write, and no more."""
    slot = birth.table.slot(birth.slot)
    slot.note_error(text)
    slot.stats[t.EXITING] = 1
    print(text, file=sys.stderr, flush=True)
    os._exit(FAILED)

"""What workers leave behind: processes that come to the host when their parent dies, found, ended and reaped.

The host is a subreaper, so a grandchild that has left its worker's process group or session cannot leave the host. What
the plugins have started in ``bghost_host_setup`` came before that, and is left alone. So is what belongs to a worker
that lives: it may run in the background on purpose. Whose a process is tells its session, or the pid that each worker
puts into its environment, or, where it is a fork and no other program, the worker's memory file for dumps. What has
none of these is ended with the last worker.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Final

from loguru import logger

from bghost.host.holders import command
from bghost.host.timers import Timers
from bghost.shared import linux
from bghost.shared.environ import OWNER, RUN
from bghost.shared.table import DUMP_NAME

KILL_TIME: Final = 2.0
"""Seconds from SIGKILL until a process counts as one that cannot be killed."""


_PF_EXITING: Final = 0x4  # of the flags in /proc/PID/stat


class Orphans:
    """The strangers among the host's children. Their numbers are their own until they are reaped here.

    :param run_id: tells this run's processes from others where the host is PID 1.
    :param workers: tells the pids of the workers that live.
    """

    def __init__(self, timers: Timers, run_id: str, workers: Callable[[], set[int]]) -> None:
        self._timers = timers
        self._run_id = run_id
        self._workers = workers
        self._own = set(_children())
        self._killed: dict[int, tuple[str, int]] = {}  # not reaped yet: whose death left it, and that one's group
        self._swept_for = ""  # the worker that the last sweep was for; none yet
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)

    @property
    def ending(self) -> bool:
        """Whether one that was killed has not gone yet."""
        return bool(self._killed)

    def spare(self, pid: int) -> None:
        """*pid* is a child of the host's own."""
        self._own.add(pid)

    def spare_no_more(self, pid: int) -> None:
        """That child has been reaped, and its number is free."""
        self._own.discard(pid)

    def sweep(self, dead: dict[int, str]) -> None:
        """Look for strangers after workers have ended, and end them.

        :param dead: the process groups of those workers, which got SIGKILL before, and their names.
        """
        dead = dead | self._reaped()  # in this order: what shows nobody's name is rather the newer dead's
        self._swept_for = next(iter(dead.values()))
        for pid in self._strangers() - self._killed.keys():
            group = self._left_by(pid, dead)
            if group is None:
                continue
            # Whose it is shows no more where several have ended at once, or it had been left before: then one of them.
            worker = dead.get(group) or self._swept_for
            if os.getpgid(pid) not in dead:
                logger.warning("left behind by worker {}: pid {} ({}); killed", worker, pid, command(pid))
            self._killed[pid] = worker, group
            os.kill(pid, signal.SIGKILL)
            self._timers.at(time.monotonic() + KILL_TIME, lambda pid=pid: self._lose(pid))  # type: ignore[misc]

    def reap(self) -> None:
        """SIGCHLD has come: let go of those that have ended. What those have left behind comes to the host only now."""
        if dead := self._reaped():
            self.sweep(dead)

    def _reaped(self) -> dict[int, str]:
        """Let go of those that have ended; for whom to look below them, as :meth:`sweep` takes it.

        Also of one that was not killed: the sweep may have met it on its way out, when nothing told whose it was.
        """
        dead = {}
        for pid in self._strangers():
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None:
                # 0: a group's number may be another's by now, except where the host has just killed.
                worker, group = self._killed.pop(pid, (self._swept_for, 0))
                dead[group] = worker
        return dead if self._swept_for else {}

    def _strangers(self) -> set[int]:
        return set(_children()) - self._workers() - self._own

    def _left_by(self, pid: int, dead: dict[int, str]) -> int | None:
        """The process group of the worker that has left it behind, 0 for one of the dead; ``None``: it is not left."""
        known = self._workers()
        session = os.getsid(pid)
        if session and session in dead:  # 0 is a session outside of this PID namespace
            return session
        environment = _environment(pid)
        owner = session if session in known else _number(environment.get(OWNER, ""))
        if owner:
            return None if owner in known else owner
        inherited = _dump_file(pid)
        if inherited:
            # Of one that is just ending the file is not known any more; what it leaves is for its own sweep.
            lives = inherited in map(_dump_file, known) or any(map(_ends, known))
            return None if lives else 0
        if os.getpid() == 1 and environment.get(RUN) != self._run_id:
            return None  # any process of the container may be an orphan
        return None if known else 0

    def _lose(self, pid: int) -> None:
        """SIGKILL did not end it: it hangs in the kernel. Nothing waits for it any more."""
        if pid in self._killed:
            worker, _ = self._killed.pop(pid)
            self._own.add(pid)
            logger.error("left behind by worker {}, cannot be killed: pid {} ({})", worker, pid, command(pid))


def _children() -> list[int]:
    try:
        with open("/proc/thread-self/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []  # a kernel without CONFIG_PROC_CHILDREN: what has left its group is not found then


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _ends(pid: int) -> bool:
    """Whether it is on its way out or a zombie: its descriptors may be closed already."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return bool(int(file.read().rpartition(")")[2].split()[6]) & _PF_EXITING)
    except OSError:
        return True


def _environment(pid: int) -> dict[str, str]:
    """What it was started with; nothing if it is on its way out, or not ours to look into."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            fields = file.read().decode("utf-8", "replace").split("\0")
    except OSError:
        return {}
    return dict(field.split("=", 1) for field in fields if "=" in field)


def _dump_file(pid: int) -> int:
    """The inode of the memory file that a worker makes for its dumps, if it holds one; else 0."""
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            if os.readlink(path).startswith(f"/memfd:{DUMP_NAME} "):
                return os.stat(path).st_ino
    except OSError:
        pass  # it has ended, or is not ours to look into
    return 0

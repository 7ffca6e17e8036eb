"""Interrupts: requests that a signal handler or the host has noted, acted on at safe points (miscadmin.h).

A handler notes and wakes, no more: it may run between any two steps of the author's code. Only ``interruptible``
sections, which the author has declared safe, and SIGQUIT act at once.
"""

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Final

from bghost.shared import table as t
from bghost.shared.birth import Birth
from bghost.shared.errors import Canceled, Stop
from bghost.shared.spec import StopMode

QUIT_EXIT: Final = 2


class Interrupts:
    """What one worker was asked to do and has not done yet.

    :param slot: the worker's slot, as this process sees it.
    """

    __slots__ = (
        "_bell",
        "_control",
        "_generation",
        "_head",
        "_host_pid",
        "_latch",
        "_stats",
        "attention",
        "breakable",
        "cancel",
        "config",
        "config_told",
        "dump",
        "dying",
        "holds",
        "host_died",
        "host_pidfd",
        "terminate",
        "ticking",
        "woken",
    )

    def __init__(self, birth: Birth, slot: t.Slot) -> None:
        self._latch = slot.latch
        self._control = slot.control
        self._stats = slot.stats
        self._head = birth.table.head
        self._generation = birth.generation
        self._host_pid = birth.host_pid
        self._bell = birth.bell
        self.host_pidfd = birth.host_pidfd
        """Readable once the host is dead, even while it is a zombie."""
        self.attention = False  # something below may be set; the only word that a turn looks at
        self.terminate = False  # SIGTERM has come
        self.cancel = False  # SIGINT has come
        self.dump = False  # SIGUSR2 has come
        self.woken = False  # a wake-up has come that no wait has told of yet
        self.host_died = False
        self.config = 0  # number of the config that this worker runs with
        self.config_told = 0, False  # the last config that a wait has told of, and whether that was in a tick
        self.holds = 0  # depth of hold_interrupts()
        self.breakable = 0  # depth of interruptible()
        self.ticking = False  # inside recovery(): a cancel has something to cancel, a smart stop waits for its end
        self.dying = False  # on the way out: nothing is raised any more

    def install(self) -> None:
        """Make the standard handlers this process's; the caller has blocked all signals and unblocks them after."""
        signal.set_wakeup_fd(self._latch.write_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_int)
        signal.signal(signal.SIGHUP, self._on_wake)  # the config's number says whether there is something to take
        signal.signal(signal.SIGUSR1, self._on_usr1)
        signal.signal(signal.SIGUSR2, self._on_usr2)
        signal.signal(signal.SIGQUIT, self._on_quit)
        # Handlers that do nothing, where Python ignores the signal: that would be inherited by programs that are run.
        signal.signal(signal.SIGPIPE, _noted)
        signal.signal(signal.SIGXFSZ, _noted)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    # Handlers

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        self.terminate = self.attention = True
        if os.getppid() != self._host_pid:
            self.host_died = True  # the kernel sent it, as asked for
        self._break_in()

    def _on_int(self, signum: int, frame: FrameType | None) -> None:
        self.cancel = self.attention = True
        self._break_in()

    def _on_wake(self, signum: int, frame: FrameType | None) -> None:
        self.attention = True

    def _on_usr1(self, signum: int, frame: FrameType | None) -> None:
        self.woken = self.attention = True

    def _on_usr2(self, signum: int, frame: FrameType | None) -> None:
        self.dump = self.attention = True
        self.tell_dump()

    def _on_quit(self, signum: int, frame: FrameType | None) -> None:
        os._exit(QUIT_EXIT)

    def tell_dump(self) -> None:
        """Tell the host that a dump is there, or that there is more of it."""
        self._stats[t.DUMPS] += 1
        self.ring_host()

    def ring_host(self) -> None:
        """Have the host look at what this worker has written."""
        os.eventfd_write(self._bell, 1)

    def _break_in(self) -> None:
        if self.breakable and not self.holds and not self.dying:
            # If this raises, the blocks are over; also one whose __exit__ is what the signal has interrupted.
            depth, self.breakable = self.breakable, 0
            self.act()
            self.breakable = depth

    # Safe points

    @property
    def pending(self) -> bool:
        """Whether a look is due; no system call."""
        return self.attention or self._stats[t.WAKE] != 0

    @property
    def asked(self) -> StopMode:
        """How the host has asked this worker to stop."""
        mode = self._control[t.STOP_MODE]
        return StopMode(mode) if mode <= StopMode.KILL else StopMode.NONE

    @property
    def stopping(self) -> bool:
        """Whether the worker is to end, be it only after its tick."""
        return self.terminate or self.host_died or bool(self._control[t.STOP_MODE])

    @property
    def reload(self) -> bool:
        """Whether the host has accepted a config that this worker has not taken yet."""
        return self._head[t.CONFIG_NUMBER] != self.config

    def reload_is_news(self) -> bool:
        """Whether there is a reload that no wait has told of yet: it ends one wait, not each until it is taken.

        That is one in a tick, and one after it: the first has not brought the worker to where it takes the reload.
        """
        news = self._head[t.CONFIG_NUMBER], self.ticking
        if news[0] == self.config or news == self.config_told:
            return False
        self.config_told = news
        self.attention = True  # so that the next turn takes it, also where its signal has not come yet
        return True

    def reset(self) -> None:
        """Empty the latch; then what was said before it was set can be read (ResetLatch)."""
        if self._latch.reset(self._generation):
            self.woken = self.attention = True

    def look(self) -> None:
        """Act on what is due, if interrupts are not held.

        :raises Stop: when it is to end.
        :raises Canceled: when what is running is to be cancelled.
        """
        generation = self._stats[t.WAKE]
        if generation:  # another one's, from whoever holds an old handle, may have come over our own
            self._stats[t.WAKE] = 0
            # The system call makes the processor do the store before what wakers have said is read. A store that came
            # later could undo a wake-up whose reason was not seen, and a worker that never sleeps finds no byte.
            self.reset()
            if generation == self._generation:
                self.woken = self.attention = True
        if self.holds or self.dying:
            return
        self.attention = False  # first: a handler may run between any two steps from here on
        if self.stopping or self.reload or self.dump or self.woken:
            self.attention = True  # what is not acted on here stays a reason to look again at the next safe point
        self.act()

    def act(self) -> None:
        """Raise what is due; see :meth:`look`."""
        least = StopMode.FAST if self.ticking else StopMode.SMART
        if self.terminate or self.host_died or self._control[t.STOP_MODE] >= least:
            raise Stop
        if self.cancel:
            self.cancel = False
            if self.ticking:
                raise Canceled("canceled by SIGINT")
            self._stats[t.DROPPED] += 1

    def note_host(self) -> None:
        """See whether the host is still there, with one system call; used after its pidfd was readable."""
        if self.host_pidfd < 0:
            dead = os.getppid() != self._host_pid
        else:
            poll = select.poll()
            poll.register(self.host_pidfd, select.POLLIN)
            dead = bool(poll.poll(0))
        if dead:
            self.host_died = self.attention = True


class Hold:
    """``with worker.hold_interrupts():`` puts off TERM and INT; what came meanwhile is acted on at the end. Nests."""

    __slots__ = ("_interrupts",)

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts.holds += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.holds -= 1
        if kind is None and self._interrupts.pending:
            self._interrupts.look()


class Interruptible:
    """``with worker.interruptible():`` lets TERM and INT break plain blocking Python code at once."""

    __slots__ = ("_interrupts", "_outer")

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._outer = 0

    def __enter__(self) -> None:
        self._outer = self._interrupts.breakable
        # First the word, then the look: a signal between the two raises from its handler.
        self._interrupts.breakable += 1
        try:
            self._interrupts.look()
        except BaseException:
            self._interrupts.breakable = self._outer
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.breakable = self._outer


def _noted(signum: int, frame: FrameType | None) -> None:
    """What the signal is about comes as an error of the call that it interrupts."""

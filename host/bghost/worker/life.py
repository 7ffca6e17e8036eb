"""A worker process from its first instruction to its last: set-up, loop, the way out."""

import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import setproctitle
from loguru import logger

from bghost.shared import hooks as loader
from bghost.shared import logs
from bghost.shared import settings as conversion
from bghost.shared import table as t
from bghost.shared.birth import Birth, config_of
from bghost.shared.environ import OWNER
from bghost.shared.errors import DONE, FAILED, BghostError, GiveUp, Stop
from bghost.shared.spec import Reason, Settings
from bghost.worker import dumps, requests
from bghost.worker.channel import Channel
from bghost.worker.interrupts import Interrupts
from bghost.worker.program import Become, Program, become
from bghost.worker.recovery import RecoveryFailed, RepeatedErrors, Restart, describe
from bghost.worker.worker import Worker

STOP_TIMEOUT = 10.0  # seconds for the way out, where the config says nothing


def live(birth: Birth) -> NoReturn:
    """Be the worker; the host's fork ends here. Called with all signals blocked.

    Ends the process with 0 when done or stopped by the host, 1 when it failed, was given up, or was stopped by others.
    """
    birth.table.become_reader()
    for pool in birth.pools.values():
        pool.become_reader()
    life = _Life(birth)
    life.interrupts.install()
    os.environ[OWNER] = str(os.getpid())
    dumps.install(birth.table.slot(birth.slot))
    setproctitle.setproctitle(f"bghost: {birth.spec.name} ({birth.instance})")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        life.run()
    finally:
        life.leave()
    raise AssertionError("a worker does not outlive its life")


class _Life:
    def __init__(self, birth: Birth) -> None:
        self._birth = birth
        self._slot = birth.table.slot(birth.slot)
        self._stats = self._slot.stats
        logs.become_worker(
            birth.spec.name or "",
            lambda: birth.table.head[t.LOG_NUMBER],
            self._slot.recent.write,
            self._count_lost,
            birth.log_number,
        )
        if birth.channel >= 0:
            requests.channel = Channel(birth.channel)
        self._log = logger.bind(worker=birth.spec.name)
        self.interrupts = Interrupts(birth, self._slot)
        self._worker: Worker[Any] | None = None  # until its kind is loaded
        self._extension_errors: defaultdict[tuple[str, str], RepeatedErrors] = defaultdict(RepeatedErrors)
        self._set_up = False
        self._stop_timeout = STOP_TIMEOUT
        self._program: Program | None = None  # what to become instead of ending
        self._reason = Reason.ERROR
        self._code = FAILED

    def _count_lost(self, count: int) -> None:
        self._stats[t.LOG_LOST] += count

    def run(self) -> None:
        """Everything up to the way out; sets reason and exit code."""
        try:
            worker = self._worker = self._make()
            self._set_up = True
            worker.hooks.setup(worker)
            self._ready()
            if worker.hooks.main is not None:
                worker.hooks.main(worker)
            else:
                default_loop(worker)
            self._end(Reason.DONE, DONE)
        except Become as decision:
            self._program = decision.program
            self._end(Reason.DONE, DONE)
        except Stop:
            self._stopped()
        except Restart:
            self._end(Reason.RESTART, FAILED)
        except GiveUp as error:
            self._gave_up(error)
        except RecoveryFailed as error:
            self._failed(error, "an error came up while another was being recovered: ")
        except SystemExit as error:
            self._exited(error)
        except BghostError as error:
            self._slot.note_error(str(error))
            self._log.error("{}", error)
            self._end(Reason.ERROR, FAILED)
        except Exception as error:
            self._failed(error, "" if self._stats[t.READY] else "in set-up: ")
        except BaseException as error:
            self._failed(error, "an exception that is neither an Exception nor a SystemExit is a bug of the kind: ")

    def _make(self) -> Worker[Any]:
        birth = self._birth
        kind = birth.loaded if birth.loaded is not None else birth.kind.load()
        number, document = config_of(birth.table)
        self.interrupts.config = self._stats[t.CONFIG_ACK] = number
        self._stop_timeout = birth.spec.stop_timeout or document["stop_timeout"]
        hooks = loader.worker_hooks(
            birth.kind,
            kind,
            {name: (found, conversion.extension_layers(document, name)) for name, found in birth.extensions.items()},
            report=self._extension_failed,
            drive=self._drive,
        )
        if hooks.has_pools and not birth.named:
            kind_name = birth.spec.kind
            raise GiveUp(
                f"kind {kind_name!r} has pools, and was not named at the host's start "
                f"(add {kind_name!r} to kinds in [host], and start the host again)"
            )
        settings = self._settings(document, hooks.settings_type)
        if hooks.is_async:
            from bghost.worker.tasks import AsyncWorker

            worker: Worker[Any] = AsyncWorker(birth, self.interrupts, hooks)
        else:
            worker = Worker(birth, self.interrupts, hooks)
        if hooks.args_type is not None:
            worker.args = conversion.convert(birth.spec.args, hooks.args_type, f"args of {worker.name}")
        worker.strict = document["strict"]
        worker.use_settings(settings)
        worker.take_config = lambda: self._take_config(worker)
        return worker

    def _drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run the coroutine of an ``async def`` hook to its end."""
        from bghost.worker.tasks import AsyncWorker

        assert isinstance(self._worker, AsyncWorker)
        return self._worker.tasks.call(coroutine)

    def _settings(self, document: dict[str, Any], type: type[Settings] | None) -> Settings:
        spec = self._birth.spec
        return conversion.convert(conversion.layers(document, spec), type or Settings, spec.kind)

    def _take_config(self, worker: Worker[Any]) -> None:
        number, document = config_of(self._birth.table)
        self.interrupts.config = number
        try:
            logs.follow(**document["log"])
        except BghostError as error:
            self._log.error("{}", error)
        old = worker.settings
        try:
            new = self._settings(document, worker.hooks.settings_type)
        except BghostError as error:
            # The host has checked it, unless it does not have the kind's module: keep what is good.
            self._log.error("config {} is not for this worker, the old settings stay: {}", number, error)
            return
        new = conversion.keep_start_only(old, new)
        worker.use_settings(new)
        if new != old:
            worker.block.aside(lambda: worker.hooks.reload(worker, old, new))
        self._stats[t.CONFIG_ACK] = number  # not before the hook, which may give up
        self.interrupts.ring_host()  # somebody may wait for that
        if new != old:
            worker.look()

    def _ready(self) -> None:
        self._stats[t.READY] = 1
        self.interrupts.ring_host()

    def _extension_failed(self, extension: str, hook: str, error: BaseException) -> None:
        self._stats[t.EXTENSION_ERRORS] += 1
        count = self._extension_errors[extension, hook].count(error, time.monotonic())
        if isinstance(error, BghostError):
            self._log.error("{}", error)
        elif count == 1:
            self._log.opt(exception=error).error("extension {} failed in {}; the worker goes on", extension, hook)
        elif count & (count - 1) == 0:  # 2, 4, 8, ...
            self._log.error("extension {} failed in {}: {}, {} times by now", extension, hook, describe(error), count)

    # How it ended

    def _end(self, reason: Reason, code: int) -> None:
        self._reason = reason
        self._code = code

    def _gave_up(self, error: GiveUp) -> None:
        self._stats[t.GAVE_UP] = 1
        self._slot.last_error.write(f"gave up: {error.reason}")
        self._log.error("gave up: {}", error.reason)
        self._end(Reason.GIVE_UP, FAILED)

    def _failed(self, error: BaseException, where: str) -> None:
        text = where + (str(error) if isinstance(error, RecoveryFailed) else describe(error))
        self._slot.note_error(text)
        self._log.opt(exception=error).error("{}", text)
        self._end(Reason.ERROR, FAILED)

    def _stopped(self) -> None:
        if (self._worker is not None and self._worker.decided_to_stop) or self.interrupts.asked:
            self._end(Reason.STOP, DONE)
        elif self.interrupts.host_died:
            self._log.warning("the host has died")
            self._end(Reason.HOST_DIED, FAILED)
        elif self.interrupts.terminate:
            self._stats[t.TERMINATED] = 1
            self._log.warning("terminated by a SIGTERM that bghost did not send")
            self._end(Reason.STOP, FAILED)
        else:  # the kind's own
            self._end(Reason.STOP, DONE)

    def _exited(self, error: SystemExit) -> None:
        if error.code is None or error.code == 0:
            self._end(Reason.DONE, DONE)
        elif isinstance(error.code, int):
            self._slot.note_error(f"SystemExit: {error.code}")
            self._end(Reason.ERROR, error.code & 0xFF or FAILED)
        else:
            self._slot.note_error(f"SystemExit: {error.code}")
            self._log.error("{}", error.code)
            self._end(Reason.ERROR, FAILED)

    # The way out

    def leave(self) -> NoReturn:
        """Roll back, clean up, close, and end the process: each step though the one before it failed."""
        self.interrupts.dying = True
        # If the host is alive it keeps the deadline. This one is for when it is not, or when nobody has asked: the
        # default action of SIGALRM ends a process also where the GIL is held in C.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self._stop_timeout)
        self._stats[t.EXITING] = t.LEAVING
        worker = self._worker
        if worker is not None:
            self._try(worker.roll_back)
            self._try(lambda: worker.close_tick_scope(Stop()))  # a tick that came to its end has closed it
            if self._set_up:
                self._try(lambda: worker.hooks.cleanup(worker, self._reason))
            while worker.exits:
                self._try(worker.exits.pop())
            self._try(worker.root_scope.close)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                pass  # closed, or its reader is gone
        if self._program is not None and self._code == DONE:
            self._become(self._program)
        self._stats[t.EXITING] = 1
        os._exit(self._code)

    def _become(self, program: Program) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        interrupts = self.interrupts
        try:
            if not interrupts.stopping:
                notify_socket, lock = self._birth.notify_socket, self._birth.lock
                become(program, self._slot, notify_socket, [lock], self._ready, lambda: interrupts.stopping)
            self._stopped()  # before it was that program: there is nothing to be begun any more
        except BghostError as error:
            self._slot.note_error(str(error))
            self._log.error("{}", error)
            self._end(Reason.ERROR, FAILED)

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except GiveUp as error:
            self._gave_up(error)
        except BaseException as error:
            self._failed(error, "on the way out: ")


def default_loop(worker: Worker[Any]) -> None:
    """The loop of a kind without ``bghost_main``; what an author can write with the same helpers."""
    tick = worker.hooks.tick
    assert tick is not None  # the loader refuses a kind with neither main nor tick
    for _ in Worker.mainloop(worker):
        nap = None
        with worker.block:
            nap = tick(worker)
            if nap is not None and not (nap.__class__ is float and nap >= 0.0):
                _check_nap(nap)
        worker.sleep(nap)


def _check_nap(nap: object) -> None:
    if isinstance(nap, bool) or not isinstance(nap, int | float):
        raise TypeError(f"bghost_tick returned {nap!r}; seconds as a number, or None, are expected")
    if not nap >= 0:
        raise ValueError(f"bghost_tick returned {nap!r}; a nap is 0 or more seconds")

"""The kinds ``test_shm_mq`` and ``test_shm_mq_worker``: PostgreSQL's example (src/test/modules/test_shm_mq), ported.

It shows queues between workers: made before the fork, attached to by both sides, given up by either, or by its death;
workers that a worker launches, waits for, and takes down if not all of them come up; and a ring that comes apart by
itself, one worker after the other, once its first queue is left.

The caller (``test_shm_mq``) sends a message to the first of its workers, each worker passes on what it gets, and the
last one's messages come back to the caller, which compares them. Either one message goes round at a time, or, with
``pipelined``, as many as the queues hold.

Sizes, counts and what is checked of them are the original's. On purpose different are:

- The queues are made when the host starts, from the caller's settings: memory is shared by inheritance alone. So there
  is no segment to attach to, no number to be taken under a lock: a worker's number is one of its arguments.
- A worker is ready when its set-up is over, and the caller is told by the host; it need not count under a lock either.
- The message is random bytes of a given size, not a text of the user's.
- A worker whose work is over exits with 0. The original exits with 1, to be logged, since it is not restarted anyway.
- ``verify`` is on by default in both forms; the form that waits for each message always verifies, as in the original.
"""

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Final

from msgspec import Meta

import bghost

if TYPE_CHECKING:
    from bghost.host.facade import HostView
    from bghost.worker.queues import Receiver, Sender

WORKER: Final = "test_shm_mq_worker"  # the kind of the caller's workers, as its entry point says

_queues: list[bghost.SharedQueue] = []  # queue N leads to worker N; the last one to the caller


class CallerSettings(bghost.Settings):
    """What goes round, and through how many workers."""

    queue_size: Annotated[int, Meta(ge=64)] = 65536  # bytes
    message_size: Annotated[int, Meta(ge=0)] = 100  # bytes
    repeat: Annotated[int, Meta(ge=0)] = 1
    workers: Annotated[int, Meta(ge=0)] = 1
    pipelined: bool = False
    verify: bool = True


class Caller:
    """The kind ``test_shm_mq``: makes the ring, and sends messages round it until it is done."""

    Settings = CallerSettings

    @staticmethod
    @bghost.hookimpl
    def bghost_workers(settings: CallerSettings) -> list[bghost.WorkerSpec]:
        """One caller, which is not started again: its queues are used up."""
        return [bghost.WorkerSpec(kind="test_shm_mq", restart="never")]

    @staticmethod
    @bghost.hookimpl
    def bghost_host_setup(host: "HostView") -> None:
        """Make the queues, before anybody is forked who is to inherit them."""
        settings = host.settings("test_shm_mq")
        assert isinstance(settings, CallerSettings)
        if settings.workers == 0 and not settings.pipelined:
            raise bghost.UsageError("workers is 0", hint="one or more, or pipelined")
        _queues[:] = [bghost.SharedQueue(settings.queue_size) for _ in range(settings.workers + 1)]

    @bghost.hookimpl
    def bghost_main(self, worker: "bghost.Worker[CallerSettings]") -> None:
        """Set up the ring, send, receive, compare; then leave the queues, so that the ring comes apart."""
        settings = worker.settings
        message = os.urandom(settings.message_size)
        with _queues[0].sender(worker) as tx, _queues[-1].receiver(worker) as rx:
            handles = _launch_all(worker)
            began = time.monotonic()
            if settings.pipelined:
                _pipelined(tx, rx, message, settings.repeat, verify=settings.verify)
            else:
                _one_by_one(tx, rx, message, settings.repeat)
            took = time.monotonic() - began
        for handle in handles:
            handle.wait_stopped()
        worker.log.info(
            "{} messages of {} bytes went through {} workers in {:.3f} s, {:.0f} a second",
            settings.repeat,
            len(message),
            settings.workers,
            took,
            settings.repeat / took if took else 0.0,
        )


def _launch_all(worker: "bghost.Worker[CallerSettings]") -> list[bghost.Handle]:
    """Launch the workers of the ring and wait until all are ready; if one is not, none goes on."""
    handles: list[bghost.Handle] = []
    with ExitStack() as undo:
        undo.callback(_stop_all, worker, handles)
        for number in range(worker.settings.workers):
            spec = bghost.WorkerSpec(
                kind=WORKER,
                name=f"{worker.name}-{number + 1}",
                args={"number": number, "caller": worker.name},
                restart="never",
            )
            handles.append(worker.launch(spec))
        for number, handle in enumerate(handles, 1):
            try:
                handle.wait_ready()
            except bghost.HostError as error:
                raise bghost.LaunchError(
                    "one or more background workers failed to start", detail=f"{worker.name}-{number}: {error}"
                ) from error
        undo.pop_all()  # from now on, leaving the queues is what ends them
    return handles


def _stop_all(worker: bghost.Worker, handles: list[bghost.Handle]) -> None:
    with worker.hold_interrupts():  # also where it is a stop of the caller itself that has come between
        for handle in handles:
            handle.stop(mode="fast")


def _one_by_one(tx: "Sender", rx: "Receiver", message: bytes, repeat: int) -> None:
    """Send what has come back, each time; compare at the end."""
    went = message
    for _ in range(repeat):
        tx.send(went)
        went = rx.receive()
    _compare(message, went)


def _pipelined(tx: "Sender", rx: "Receiver", message: bytes, repeat: int, *, verify: bool) -> None:
    """Send while there is room, receive while there is something, and wait only when there is neither."""
    sent = received = 0
    last = message
    while received < repeat:
        idle = True
        if sent < repeat and tx.try_send(message):
            sent += 1
            idle = False
        if (came := rx.try_receive()) is not None:
            received += 1
            last = came
            if verify:
                _compare(message, came)
            idle = False
        if idle:
            bghost.SharedQueue.wait(*((tx, rx) if sent < repeat else (rx,)))
    _compare(message, last)


def _compare(sent: bytes, came: bytes) -> None:
    if len(sent) != len(came):
        raise bghost.BghostError("message corrupted", detail=f"{len(sent)} bytes were sent, {len(came)} came back")
    if sent != came:
        place = next(at for at, (one, other) in enumerate(zip(sent, came, strict=True)) if one != other)
        raise bghost.BghostError("message corrupted", detail=f"byte {place} is {came[place]}, was {sent[place]}")


class LinkArgs(bghost.Args):
    """Where a worker is in the ring, and whose ring it is."""

    number: int
    caller: str


class Link:
    """The kind ``test_shm_mq_worker``: passes on what comes, until either of its queues is left."""

    Args = LinkArgs

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker) -> None:
        """Attach to both queues; see whether somebody still waits for that."""
        args: LinkArgs = worker.args
        if args.number + 1 >= len(_queues):
            raise bghost.UsageError(f"there is no place {args.number} in the ring, which has {len(_queues) - 1}")
        before = args.caller if args.number == 0 else f"{args.caller}-{args.number}"
        self.rx = _queues[args.number].receiver(worker, worker.find(before))
        self.tx = _queues[args.number + 1].sender(worker)
        caller = worker.find(args.caller)
        if caller is None or caller.pid() is None:
            worker.log.debug("the caller has gone away")
            raise SystemExit(1)

    @bghost.hookimpl
    def bghost_main(self, worker: bghost.Worker) -> None:
        """Copy messages, each as soon as it is there."""
        try:
            while True:
                self.tx.send(self.rx.receive_view())
        except bghost.QueueDetached:
            pass  # the ring comes apart; leaving both queues lets the next one see it

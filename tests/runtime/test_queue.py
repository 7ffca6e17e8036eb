"""SharedQueue: what was sent arrives, whole and in order; whoever is left alone is told at once."""

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SLOW, Host, StartHost, notes, pid_in, until

import bghost.shared.ring as rings
from bghost import BghostError, SharedQueue
from bghost.shared import linux
from bghost.shared.ring import HEAD, LEAST, Reader, Ring, Writer

# The ring against a model, in one process


def message(number: int, length: int) -> bytes:
    """A message whose every byte depends on its number and place."""
    return bytes((number * 7 + place) & 0xFF for place in range(length))


def lengths(size: int) -> st.SearchStrategy[int]:
    """Lengths that matter to a ring of *size* bytes."""
    edges = [0, 1, 7, 8, 9, size // 2 - 9, size // 2 - 8, size // 2 - 7, size // 2, size - 8, size, 3 * size + 1]
    return st.sampled_from([length for length in edges if length >= 0]) | st.integers(0, size)


@settings(max_examples=80)
@given(data=st.data(), size=st.sampled_from([64, 72, 100, 256, 1000, 4096]))
def test_the_ring_is_a_queue_of_messages(data: st.DataObject, size: int) -> None:
    """However writes, withdrawals and the four ways to read follow each other: what is read is what was written."""
    ring = Ring(size)
    writer, reader = Writer(ring, lambda: None), Reader(ring, lambda: None)
    sent: list[bytes] = []
    received: list[bytes] = []
    trying: bytes | None = None
    for number in range(data.draw(st.integers(1, 60))):
        step = data.draw(st.sampled_from(["write", "write", "many", "withdraw", "read", "view", "read many"]))
        if step == "write":
            if trying is None:
                trying = message(number, data.draw(lengths(size)))
            if writer.try_write(trying):
                sent.append(trying)
                trying = None
        elif step == "many" and trying is None:
            batch = [message(number, length) for length in data.draw(st.lists(lengths(size), max_size=5))]
            count = writer.write_many(batch)
            sent += batch[:count]
            if count < len(batch):
                writer.withdraw()
        elif step == "withdraw":
            writer.withdraw()
            trying = None
        elif step == "read" and (one := reader.try_read()) is not None:
            received.append(one)
        elif step == "view" and (view := reader.try_view()) is not None:
            received.append(bytes(view))
        elif step == "read many":
            received += reader.read_many(data.draw(st.integers(1, 5)))
        assert ring.words[rings.WRITTEN] - ring.words[rings.READ] <= ring.size
    while trying is not None or len(received) < len(sent):
        if trying is not None and writer.try_write(trying):
            sent.append(trying)
            trying = None
        received += reader.read_many(5)
    assert received == sent
    assert reader.try_read() is None


def test_a_reader_sees_whole_messages_only() -> None:
    """Of a message that is written in part nothing is seen, and what has room is written however small the ring is."""
    ring = Ring(LEAST)
    writer, reader = Writer(ring, lambda: None), Reader(ring, lambda: None)
    long = message(1, 500)
    tries = 0
    while not writer.try_write(long):
        assert reader.try_read() is None
        tries += 1
    assert tries > 5
    assert reader.try_read() == long


def test_another_message_does_not_go_into_the_midst_of_one() -> None:
    """After a part of one, another is refused with an error, until the first is withdrawn."""
    ring = Ring(LEAST)
    writer, reader = Writer(ring, lambda: None), Reader(ring, lambda: None)
    assert not writer.try_write(message(1, 500))
    with pytest.raises(ValueError, match="partly written"):
        writer.try_write(b"another")
    writer.withdraw()
    while not writer.try_write(b"another"):
        assert reader.try_read() is None
    assert reader.try_read() == b"another"


def test_any_buffer_can_be_sent() -> None:
    """bytes, bytearray, memoryviews of any item size: their bytes arrive."""
    ring = Ring(256)
    writer, reader = Writer(ring, lambda: None), Reader(ring, lambda: None)
    words = memoryview(bytearray(16)).cast("Q")
    words[1] = 5
    for data in (bytearray(b"abc"), memoryview(b"xabcx")[1:4], words):
        assert writer.try_write(data)
        assert reader.try_read() == bytes(data)
        assert writer.write_many([data]) == 1
        assert reader.try_read() == bytes(data)


def test_a_ring_that_was_written_over_is_refused() -> None:
    """Whatever is in its memory: an error or no message, never a hang, never a gigantic one."""
    for byte in (0xFF, 0x7F, 0x01):
        ring = Ring(256)
        writer, reader = Writer(ring, lambda: None), Reader(ring, lambda: None)
        writer.try_write(b"abc")
        ring.view[HEAD:] = bytes((byte,)) * 256
        with pytest.raises(BghostError, match="damaged"):
            reader.try_read()


def test_who_sleeps_is_roused_once() -> None:
    """A side that naps is roused by what the other publishes next, and not again before it naps again."""
    ring = Ring(256)
    roused: list[str] = []
    writer = Writer(ring, lambda: roused.append("reader"))
    reader = Reader(ring, lambda: roused.append("writer"))
    writer.try_write(b"1")
    reader.nap()
    writer.try_write(b"2")
    writer.try_write(b"3")
    reader.wake_up()
    writer.try_write(b"4")
    assert roused == ["reader"]
    reader.nap()
    reader.nap()
    writer.write_many([b"5", b"6"])
    assert roused == ["reader"] * 2
    writer.nap()
    reader.read_many(10)
    assert not reader.has_more
    assert roused == ["reader"] * 2 + ["writer"]


def test_sizes_that_cannot_be_are_refused() -> None:
    """A queue has 64 bytes at least, of which it keeps what it promises."""
    with pytest.raises(ValueError, match="64 at least"):
        SharedQueue(63)
    assert SharedQueue(65).size == 128


@pytest.mark.timeout(180 * SLOW)
@pytest.mark.parametrize("orders", [True, False], ids=["orders", "reorders"])
def test_a_million_messages_between_two_processes(orders: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arrives once, in order, as it was sent; on a processor that needs barriers for it as well."""
    monkeypatch.setattr(linux, "KEEPS_ORDER", orders)
    count = 1_000_000 if orders else 100_000
    ring = Ring(1 << 16)
    pid = os.fork()
    if pid == 0:
        try:
            writer = Writer(ring, lambda: None)
            for first in range(0, count, 100):
                batch = [number.to_bytes(8, "little") * (number % 5) for number in range(first, first + 100)]
                while batch:
                    del batch[: writer.write_many(batch)]
                    os.sched_yield()
            os._exit(0)
        finally:
            os._exit(1)
    reader = Reader(ring, lambda: None)
    number = 0
    try:
        while number < count:
            os.sched_yield()
            for got in reader.read_many(1000):
                assert got == number.to_bytes(8, "little") * (number % 5)
                number += 1
    finally:
        if number < count:
            os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.timeout(120 * SLOW)
def test_a_writer_killed_at_any_instant_leaves_whole_messages() -> None:
    """150 times SIGKILL amid messages of one piece and of many: what can be read is whole, in order, without a gap."""
    chance = random.Random(2)
    most = 0
    for _ in range(150):
        ring = Ring(256)
        pid = os.fork()
        if pid == 0:
            writer, number = Writer(ring, lambda: None), 0
            while True:
                sent = message(number, number * 13 % 600)
                while not writer.try_write(sent):
                    os.sched_yield()
                number += 1
        reader, number = Reader(ring, lambda: None), 0
        until(lambda reader=reader: reader.has_more)  # type: ignore[misc]
        enough, looks = chance.randrange(30), chance.randrange(20)
        killed = False
        while not killed or reader.has_more:
            looks -= number >= enough
            if not killed and looks < 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed = True
            if (came := reader.try_read()) is not None:
                assert came == message(number, number * 13 % 600)
                number += 1
        most = max(most, number)
    assert most > 20


# Between two workers

QUEUE = """
import os, signal, time
import bghost
from bghost import QueueDetached, TimedOut

queue = bghost.SharedQueue(SIZE)


class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        def note(text):
            worker.log.info("note: {}", text)

        exec(worker.args["tick"], globals() | locals())
        return bghost.UNTIL_WOKEN
"""


@pytest.fixture
def start(bghost_host: StartHost) -> Callable[..., Host]:
    """Starts a host with workers that share one queue: name to the statements of a tick."""

    def start(size: int = 1024, source: str = QUEUE, restart: str = "never", **ticks: str) -> Host:
        tables = (
            f"[[worker]]\nname = '{name}'\nkind = 'queue'\nrestart = '{restart}'\nargs.tick = '''{tick}'''\n"
            for name, tick in ticks.items()
        )
        return bghost_host(kinds={"queue": source.replace("SIZE", str(size))}, args=["run"], config="".join(tables))

    return start


def kill(host: Host, name: str) -> None:
    pid = host.row(name)["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


RECEIVE_ALL = """
with queue.receiver(worker) as rx:
    note('attached')
    n = sum(1 for _ in rx)
note(f'{n} came')
"""


def test_messages_of_all_lengths_go_through(start: Callable[..., Host]) -> None:
    """From nothing to many times the queue, sent and received blocking: each arrives as it was sent."""
    host = start(
        size=1000,
        sender="""
with queue.sender(worker) as tx:
    for n in range(0, 9000, 37):
        tx.send(bytes([n % 251]) * n)
    tx.send_many([bytes([n % 251]) * (n % 700) for n in range(500)])
note('sent')
""",
        receiver="""
with queue.receiver(worker) as rx:
    for n in range(0, 9000, 37):
        assert rx.receive(30) == bytes([n % 251]) * n
    left = [bytes([n % 251]) * (n % 700) for n in range(500)]
    while left:
        got = rx.receive_many(7) if len(left) % 2 else [bytes(rx.receive_view())]
        assert got == left[:len(got)]
        del left[:len(got)]
note('as sent')
""",
    )
    until(lambda: notes(host, "receiver") == ["as sent"], 30)
    until(lambda: notes(host, "sender") == ["sent"])


@pytest.mark.parametrize("way", ["detach", "kill", "exit"])
def test_a_receiver_that_waits_is_told_of_the_senders_end(start: Callable[..., Host], way: str) -> None:
    """It gets what was sent whole, then sees the end, at once, whether the sender detached, exited or was killed."""
    end = {"detach": "tx.detach()", "kill": "os.kill(os.getpid(), signal.SIGKILL)", "exit": "os._exit(0)"}[way]
    host = start(
        sender=f"""
tx = queue.sender(worker)
for n in range(50): tx.send(b'whole')
assert not tx.try_send(bytes(5000)) or True
worker.wait(60)
{end}
""",
        receiver="""
rx = queue.receiver(worker)
n = 0
try:
    while rx.receive() == b'whole': n += 1
except QueueDetached as error:
    note(f'{n} {error}')
""",
    )
    host.wait_row("receiver", lambda row: row["wait"] == "queue receive")
    assert host.bghost("wake", "sender").code == 0
    (told,) = until(lambda: notes(host, "receiver"))
    assert told.startswith("50 the queue's sender is gone")


@pytest.mark.parametrize("way", ["detach", "kill"])
def test_a_sender_that_waits_is_told_of_the_receivers_end(start: Callable[..., Host], way: str) -> None:
    """It waits for room, and the one that would have made it detaches or is killed: QueueDetached, at once."""
    host = start(
        size=64,
        sender="""
tx = queue.sender(worker)
try:
    tx.send(bytes(1000))
except QueueDetached as error:
    note(error)
""",
        receiver="rx = queue.receiver(worker); worker.wait(60); rx.detach(); note('detached')",
    )
    host.wait_row("sender", lambda row: row["wait"] == "queue send")
    host.wait_row("receiver", lambda row: row["ticks"] == 0 and row["doing"] == "waiting")
    if way == "kill":
        kill(host, "receiver")
    else:
        host.bghost("wake", "receiver")
    (text,) = until(lambda: notes(host, "sender"))
    assert text.startswith("the queue's receiver is gone")


def test_a_sender_that_never_waits_is_told_too(start: Callable[..., Host]) -> None:
    """With room in the queue a send to a receiver that was killed is refused."""
    host = start(
        sender="""
tx = queue.sender(worker)
tx.send(b'1')
worker.wait(60)
for n in range(1000):
    try:
        tx.send(b'2')
    except QueueDetached:
        note('refused')
        break
    worker.wait(0.01)
""",
        receiver="rx = queue.receiver(worker); rx.receive(); note('has it'); worker.wait(60)",
    )
    host.wait_line("note: has it")
    kill(host, "receiver")
    host.wait_row("receiver", lambda row: row["state"] == "failed" or row["pid"] is None)
    assert host.bghost("wake", "sender").code == 0
    until(lambda: notes(host, "sender") == ["refused"])


@pytest.mark.timeout(180 * SLOW)
@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_either_side_killed_at_any_instant(start: Callable[..., Host], victim: str) -> None:
    """Killed again and again amid messages: the other sees it each time, nothing comes torn, and both begin anew."""
    both = """
while True:
    try:
        end = queue.{end}(worker)
    except bghost.BghostError:
        worker.wait(0.01)
        continue
    note('attached')
    try:
        n = 0
        while True:
            {act}
            n += 1
    except QueueDetached:
        note('left')
        end.detach()
"""
    host = start(
        size=500,
        restart="never",  # nobody comes back who could tell of the old one's end
        sender=both.format(end="sender", act="end.send(n.to_bytes(8, 'little') * (n % 90 + 1))"),
        receiver=both.format(end="receiver", act="assert end.receive() == n.to_bytes(8, 'little') * (n % 90 + 1)"),
    )
    other = "receiver" if victim == "sender" else "sender"
    chance = random.Random(victim)
    for round in range(4):
        for name in (victim, other):  # whoever is killed before that leaves nobody
            until(lambda name=name, round=round: notes(host, name).count("attached") > round)  # type: ignore[misc]
        time.sleep(chance.random() * 0.3)  # the random instant
        os.kill(pid_in(host.row(victim)), signal.SIGKILL)
        until(lambda round=round: notes(host, other).count("left") > round)  # type: ignore[misc]
        host.client.request("restart", names=[victim], mode="fast")
    assert host.row(other)["errors"] == 0
    assert host.row("receiver")["last_error"] is None
    host.client.shutdown(mode="fast")  # a tick without end


def test_waits_are_interruptible_and_take_a_message_back(start: Callable[..., Host]) -> None:
    """SIGINT ends a send in the midst of a message as a recovered error; the receiver sees the next one only."""
    host = start(
        size=64,
        sender="""
if not hasattr(self, 'tx'):
    self.tx = queue.sender(worker)
    self.tx.send(b'x' * 1000)
self.tx.send(b'whole')
note('sent')
""",
        receiver="rx = queue.receiver(worker); worker.wait(60)\nwhile True: note(rx.receive())",
    )
    host.wait_row("sender", lambda row: row["wait"] == "queue send")
    host.bghost("signal", "sender", "INT")
    host.wait_row("sender", lambda row: row["errors"] == 1)
    assert host.bghost("wake", "receiver").code == 0
    until(lambda: notes(host, "receiver") == ["b'whole'"], 15)
    host.wait_row("receiver", lambda row: row["wait"] == "queue receive")
    pid = host.row("receiver")["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    host.wait_row("receiver", lambda row: row["pid"] is None)


def test_a_wait_ends_at_its_timeout_and_is_no_wake_up(start: Callable[..., Host]) -> None:
    """TimedOut after the timeout; and what the queue's peer does wakes no wait of the worker's own."""
    host = start(
        sender="tx = queue.sender(worker); worker.wait(60); tx.send(b'1'); tx.send(b'2'); worker.wait(60)",
        receiver="""
rx = queue.receiver(worker)
try:
    rx.receive(0.2)
except TimedOut as error:
    note(error)
note(rx.try_receive())
note(rx.receive())
note(sorted(worker.wait(0.3)))
note(rx.receive())
""",
    )
    host.wait_row("receiver", lambda row: row["wait"] == "queue receive")
    until(lambda: len(notes(host, "receiver")) == 2)
    host.wait_row("receiver", lambda row: row["wait"] == "queue receive")
    assert host.bghost("wake", "sender").code == 0
    want = ["nothing to receive within 0.2 s", "None", "b'1'", "['timeout']", "b'2'"]
    until(lambda: notes(host, "receiver") == want)


def test_a_peer_that_never_attaches_is_seen_to_be_over(start: Callable[..., Host]) -> None:
    """Told which worker is to be at the other end, a wait sees that worker's end before it attached."""
    host = start(
        sender="note('no'); worker.wait(60); import sys; sys.exit(0)",
        receiver="""
rx = queue.receiver(worker, worker.find('sender'))
try:
    rx.receive()
except QueueDetached as error:
    note(error)
""",
    )
    host.wait_row("receiver", lambda row: row["wait"] == "queue receive")
    assert host.bghost("wake", "sender").code == 0
    until(lambda: notes(host, "receiver") == ["the queue's sender is gone"])


def test_an_end_is_one_workers_alone(start: Callable[..., Host]) -> None:
    """A second receiver is refused, and told who is there; so is one that made the queue itself."""
    host = start(
        first="rx = queue.receiver(worker); note('attached'); worker.wait(60)",
        second="""
worker.wait(60)
for q in (queue, bghost.SharedQueue(64)):
    try:
        q.receiver(worker)
    except bghost.BghostError as error:
        note(error)
""",
    )
    host.wait_line("note: attached")
    assert host.bghost("wake", "second").code == 0
    pid = host.row("first")["pid"]
    busy, own = until(lambda: notes(host, "second")[1:] and notes(host, "second"))
    assert busy == f"the queue has its receiver: worker first, pid {pid}"
    assert own.startswith("the queue was made in this worker")


def test_async_workers_wait_without_stopping_their_loop(start: Callable[..., Host]) -> None:
    """An async worker awaits send and receive; its other tasks go on meanwhile."""
    source = (
        QUEUE.replace("def bghost_tick", "async def bghost_tick").replace(
            'exec(worker.args["tick"], globals() | locals())', "await globals()[worker.name](worker, note)"
        )
        + """

async def sender(worker, note):
    with queue.sender(worker) as tx:
        for n in range(200):
            await tx.send(bytes([n]) * n * 10)
        await tx.send_many([b'last'] * 100)


async def receiver(worker, note):
    import asyncio
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.get_running_loop().create_task(count())
    with queue.receiver(worker) as rx:
        for n in range(200):
            assert await rx.receive() == bytes([n]) * n * 10
        left = 100
        while left:
            left -= len(await rx.receive_many())
    counting.cancel()
    note(f'all came, {turns > 10}')
"""
    )
    host = start(source=source, sender="", receiver="")
    until(lambda: notes(host, "receiver") == ["all came, True"], 20)

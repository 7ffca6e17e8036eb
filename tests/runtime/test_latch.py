"""The latch loses no wake-up: shown for every interleaving of the protocol, and for a million real ones."""

import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest
from support import SLOW, StartHost

from bghost.shared import table as t
from bghost.shared.errors import Stop
from bghost.shared.handle import Handle
from bghost.shared.latch import Latch
from bghost.shared.spec import StopMode, WorkerSpec
from bghost.worker.interrupts import Interrupts
from bghost.worker.worker import Worker

# The model. Actors are the real functions (Worker.wait, Worker.mainloop, Interrupts.look, Handle.wake, Slot.wake); what
# they share is not. A word of shared memory is reached through a store buffer, as on x86 (TSO): a store is seen by
# others later, in order, and at the latest when its process makes a system call. The pipe is modelled too, with room
# for two bytes.
#
# An actor is run by replay: it gets the results of all that it has asked for since its round began, and the next thing
# that it asks for is the next step. So its state is that list, and all states can be visited, each once.

Op = tuple[Any, ...]
Word = tuple[str, int]

OLD: Final = 1  # the generation that the slot had
NOW: Final = 2  # and the one that it has
ROOM: Final = 2
FD: Final = 1000
SHARED: Final = {("stats", t.WAKE), ("control", t.STOP_MODE), ("control", t.GENERATION)}
WRAP: Final = 1 << 64


class Asked(BaseException):
    """An actor has come to the end of what it was told, and asks for *op*."""

    def __init__(self, op: Op) -> None:
        self.op = op


class RoundOver(BaseException):
    """An actor has come to a point where nothing counts but its memory."""


class Replay:
    """What the actor that runs just now has been told."""

    def __init__(self, told: tuple[Any, ...]) -> None:
        self.told = told
        self.at = 0
        self.polled = False
        self.over = False

    def ask(self, *op: Any) -> Any:
        if self.over:
            return 0  # it unwinds
        if op[0] == "empty" and self.polled:
            self.over = True
            raise RoundOver
        if self.at == len(self.told):
            self.over = True
            raise Asked(op)
        self.polled = op[0] == "poll"
        self.at += 1
        return self.told[self.at - 1]


replay = Replay(())


class Words:
    """A mapping, some words of which are shared; the others nobody else uses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.own: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:
        if (self.name, index) in SHARED or self.name == "said":
            value: int = replay.ask("load", (self.name, index))
            return value
        return self.own.get(index, 0)

    def __setitem__(self, index: int, value: int) -> None:
        assert 0 <= value < WRAP
        if (self.name, index) in SHARED or self.name == "said":
            replay.ask("store", (self.name, index), value)
        else:
            self.own[index] = value


class ModelLatch:
    """A latch whose pipe is modelled; what it does with a real one is tested below."""

    read_fd = write_fd = FD

    def set(self, generation: int) -> None:
        replay.ask("byte", generation)

    def reset(self, generation: int) -> bool:
        found: bool = replay.ask("empty", generation)
        return found


class ModelPoll:
    def register(self, fd: int, mask: int) -> None:
        pass

    def unregister(self, fd: int) -> None:
        pass

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        return [(FD, 1)] if replay.ask("poll", timeout) else []


def model_slot() -> t.Slot:
    slot = t.Slot.__new__(t.Slot)
    slot.index = 0
    slot.control = Words("control")  # type: ignore[assignment]
    slot.stats = Words("stats")  # type: ignore[assignment]
    slot.latch = ModelLatch()  # type: ignore[assignment]
    slot.control[t.PID] = 1
    return slot


class Memory(NamedTuple):
    """What an owner remembers from one round to the next."""

    seen: tuple[int, ...]  # of each waker, the last that the owner has read
    attention: bool = False
    woken: bool = False
    told: tuple[str, ...] = ()  # what its waits have said so far
    stopped: bool = False


Seen = tuple[int, ...]
Turn = Callable[[Worker[Any], Callable[[], Seen]], tuple[frozenset[str], Seen | None]]
"""One round of an owner: what its wait has told, and what it has read then, if it has."""


def sleeper(worker: Worker[Any], read: Callable[[], Seen]) -> tuple[frozenset[str], Seen | None]:
    """Sleeps until woken."""
    woken = worker.wait()
    return woken, read() if "wake" in woken else None


def runner(worker: Worker[Any], read: Callable[[], Seen]) -> tuple[frozenset[str], Seen | None]:
    """Has always something to do, and so never sleeps."""
    next(worker.mainloop())
    woken = worker.wait(0)
    return woken, read() if "wake" in woken else None


class ModelBirth(SimpleNamespace):
    """What a worker is born with, as far as it counts for its waits."""

    def __getattr__(self, name: str) -> dict[str, Any]:
        return {}


class Owner:
    """Runs one round of an owner from what it remembers."""

    def __init__(self, turn: Turn, wakers: int, interrupts: type[Interrupts] = Interrupts) -> None:
        self.turn = turn
        self.wakers = wakers
        self.slot = model_slot()
        table = SimpleNamespace(head=Words("head"), slot=lambda index: self.slot, run_id=1)
        birth: Any = ModelBirth(
            spec=WorkerSpec(kind="model", name="model"),
            table=table,
            slot=0,
            generation=NOW,
            instance="model",
            host_pid=1,
            host_pidfd=FD + 1,
        )
        self.worker: Worker[Any] = Worker(birth, interrupts(birth, self.slot), birth)
        self.worker._poll = ModelPoll()  # type: ignore[assignment]
        self.start = Memory((0,) * wakers)

    def run(self, memory: Memory) -> Memory:
        said = Words("said")
        interrupts = self.worker.interrupts
        interrupts.attention, interrupts.woken = memory.attention, memory.woken
        woken: frozenset[str] = frozenset()
        seen: Seen | None = None
        try:
            woken, seen = self.turn(self.worker, lambda: tuple(said[waker] for waker in range(self.wakers)))
        except Stop:
            return memory._replace(stopped=True)
        except RoundOver:
            pass
        told = tuple(sorted({*memory.told, *woken} - {"timeout"}))
        return Memory(memory.seen if seen is None else seen, interrupts.attention, interrupts.woken, told)


Program = Callable[[], None]


Wake = Callable[[t.Slot], None]


def waker(number: int, times: int, wake: Wake = lambda slot: slot.wake(NOW), *, late: bool = False) -> Program:
    """Says something and wakes, that often.

    :param late: whether it says it only then, which is wrong.
    """

    def program() -> None:
        slot, said = model_slot(), Words("said")
        for value in range(1, times + 1):
            if late:
                wake(slot)
            said[number] = value
            if not late:
                wake(slot)

    return program


def stopper() -> None:
    """Asks for a smart stop, as the host does."""
    slot = model_slot()
    slot.control[t.STOP_MODE] = StopMode.SMART
    slot.wake(NOW)


def stale() -> None:
    """Wakes by a handle of the slot's last occupant."""
    table: Any = SimpleNamespace(slot=lambda index: model_slot(), run_id=1)
    Handle(table, 0, OLD).wake()


def registering(then: Program | None = None) -> Program:
    """Gives the slot to its next occupant, as the host does, and then perhaps does more."""

    def program() -> None:
        slot = model_slot()
        slot.stats[t.WAKE] = 0
        slot.latch.reset(NOW)
        slot.control[t.GENERATION] = NOW
        replay.ask("born")
        if then is not None:
            then()

    return program


class State(NamedTuple):
    memory: tuple[tuple[Word, int], ...]
    buffers: tuple[tuple[tuple[Word, int], ...], ...]  # of each actor, the stores that others do not see yet
    pipe: tuple[int, ...]  # generations
    owner: Memory
    told: tuple[tuple[Any, ...] | None, ...]  # of each actor, the owner last; None: it has ended
    born: bool


class Model:
    """Every state that one owner and some wakers can come to."""

    def __init__(self, owner: Owner, programs: list[Program], generation: int) -> None:
        self.owner = owner
        self.programs = programs
        self.generation = generation  # of the slot, at first
        self.known: dict[tuple[int, Memory | None, tuple[Any, ...]], Op | Memory | None] = {}

    def next(self, actor: int, state: State) -> Op | Memory | None:
        """What an actor asks for next; a memory at the end of a round, nothing at the end of a program."""
        global replay
        told = state.told[actor]
        assert told is not None
        is_owner = actor == len(self.programs)
        key = (actor, state.owner if is_owner else None, told)
        if key not in self.known:
            replay = Replay(told)
            try:
                self.known[key] = self.owner.run(state.owner) if is_owner else self.programs[actor]()
            except Asked as asked:
                self.known[key] = asked.op
        return self.known[key]

    def first(self) -> State:
        actors = len(self.programs) + 1
        state = State((), ((),) * actors, (), self.owner.start, ((),) * actors, self.generation == NOW)
        for actor in range(actors):
            state = self.settled(state, actor)
        return state

    def after(self, state: State) -> Iterator[State]:
        """Whatever can happen next, up to where it matters again who goes first."""
        for actor, buffer in enumerate(state.buffers):
            if buffer:
                yield self.settled(self.flushed(state, actor), actor)
            if self.acts(state, actor):
                step = self.next(actor, state)
                assert isinstance(step, tuple) and not isinstance(step, Memory)
                after = self.done(state, actor, step)
                if after is not None:
                    yield self.settled(after, actor)

    def acts(self, state: State, actor: int) -> bool:
        return state.told[actor] is not None and (state.born or actor < len(self.programs))

    def settled(self, state: State, actor: int) -> State:
        """*state* after the next steps of *actor* that nobody else sees, nor anybody else's steps change.

        Those are stores, which go into its own buffer, and the ends of rounds and programs.
        """
        while self.acts(state, actor):
            step = self.next(actor, state)
            if step is None:
                state = state._replace(told=put(state.told, actor, None))
            elif isinstance(step, Memory):
                state = state._replace(owner=step, told=put(state.told, actor, None if step.stopped else ()))
            elif step[0] == "store":
                buffers = put(state.buffers, actor, (*state.buffers[actor], step[1:]))
                told = state.told[actor]
                assert told is not None
                state = state._replace(buffers=buffers, told=put(state.told, actor, (*told, None)))
            else:
                break
        return state

    def flushed(self, state: State, actor: int) -> State:
        (word, value), *rest = state.buffers[actor]
        memory = tuple(sorted({**dict(state.memory), word: value}.items()))
        return state._replace(memory=memory, buffers=put(state.buffers, actor, tuple(rest)))

    def done(self, state: State, actor: int, op: Op) -> State | None:
        """*state* after *op* of *actor*; ``None`` if it cannot happen just now."""
        result: Any = None
        if op[0] == "load":
            start = self.generation if op[1] == ("control", t.GENERATION) else 0
            result = dict((*state.memory, *state.buffers[actor])).get(op[1], start)
        elif state.buffers[actor]:
            return None  # a system call comes after all stores before it
        elif op[0] == "byte":
            state = state._replace(pipe=(*state.pipe, op[1])[:ROOM])
        elif op[0] == "empty":
            result = op[1] in state.pipe or len(state.pipe) == ROOM
            state = state._replace(pipe=())
        elif op[0] == "poll":
            result = bool(state.pipe)
            if not result and op[1] is None:
                return None  # it sleeps
        else:
            assert op[0] == "born"
            state = state._replace(born=True)
        told = state.told[actor]
        assert told is not None
        return state._replace(told=put(state.told, actor, (*told, result)))

    def ends(self) -> tuple[set[Memory], int]:
        """What the owner can remember in the end, and how many states there are.

        In the end: where whatever happens from there can also come back there; an owner that sleeps for ever, or rounds
        of one that never sleeps which change nothing any more. Every run that gives everybody a turn gets there.
        """
        states = [self.first()]
        numbers = {states[0]: 0}
        graph: list[list[int]] = []
        while len(graph) < len(states):
            following = []
            for state in self.after(states[len(graph)]):
                number = numbers.setdefault(state, len(states))
                if number == len(states):
                    states.append(state)
                following.append(number)
            graph.append(following)
        return {states[number].owner for number in bottom(graph)}, len(states)


def bottom(graph: list[list[int]]) -> Iterator[int]:
    """The nodes of the components that no edge leaves (Tarjan's algorithm)."""
    order = [0] * len(graph)  # 0: not visited yet
    low = [0] * len(graph)
    component = [0] * len(graph)
    stack: list[int] = []
    count, components = 0, 0
    work = [(0, iter(graph[0]))]
    while work:
        node, edges = work[-1]
        if not order[node]:
            count += 1
            order[node] = low[node] = count
            stack.append(node)
        for to in edges:
            if not order[to]:
                work.append((to, iter(graph[to])))
                break
            if not component[to]:
                low[node] = min(low[node], order[to])
        else:
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == order[node]:
                components += 1
                members = []
                while not component[node]:
                    members.append(stack.pop())
                    component[members[-1]] = components
                if all(component[to] == components for member in members for to in graph[member]):
                    yield from members


def put(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def ends(
    turn: Turn, *programs: Program, interrupts: type[Interrupts] = Interrupts, generation: int = NOW
) -> tuple[set[Memory], int]:
    return Model(Owner(turn, len(programs), interrupts), list(programs), generation).ends()


@pytest.mark.parametrize("times", [(2, 1), (3,)])  # two wakers of two each are 100,000 states, and hold as well
@pytest.mark.parametrize("turn", [sleeper, runner])
def test_an_owner_reads_what_every_waker_said_last(turn: Turn, times: tuple[int, ...]) -> None:
    """However wakers and an owner are interleaved, the owner is woken after whatever was said last."""
    memories, states = ends(turn, *(waker(number, count) for number, count in enumerate(times)))
    assert {memory.seen for memory in memories} == {times}
    assert states > 2000  # it was no small thing


@pytest.mark.parametrize("turn", [sleeper, runner])
def test_an_owner_sees_a_stop(turn: Turn) -> None:
    """A smart stop, which is a word in the slot and a wake-up, is seen whoever else wakes at that moment."""
    memories, _ = ends(turn, stopper, waker(1, 2))
    assert {memory.stopped for memory in memories} == {True}


@pytest.mark.parametrize("turn", [sleeper, runner])
def test_an_old_handle_wakes_nobody_else(turn: Turn) -> None:
    """Who wakes by a handle of the slot's last occupant, while the slot changes hands, does not wake the next one."""
    memories, _ = ends(turn, stale, registering(), generation=OLD)
    assert {memory.told for memory in memories} == {()}


@pytest.mark.parametrize("turn", [sleeper, runner])
def test_an_old_handle_hides_no_stop(turn: Turn) -> None:
    """A wake-up through an old handle, which writes over the word of a newer one, hides nothing from the owner."""
    memories, _ = ends(turn, stale, registering(stopper), generation=OLD)
    assert {memory.stopped for memory in memories} == {True}


def test_an_old_handle_hides_no_wake_up() -> None:
    """Nor does it hide a wake-up from one that sleeps."""
    memories, _ = ends(sleeper, stale, registering(waker(1, 2)), generation=OLD)
    assert {memory.seen for memory in memories} == {(0, 2)}


# That the model finds what is wrong: each of these loses a wake-up, in some order of events.


def reads_first(worker: Worker[Any], read: Callable[[], Seen]) -> tuple[frozenset[str], Seen | None]:
    """Reads what was said before it empties the latch."""
    seen = read()
    woken = worker.wait()
    return woken, seen if "wake" in woken else None


def test_reading_before_the_latch_is_emptied_loses_a_wake_up() -> None:
    assert {memory.seen for memory in ends(reads_first, waker(0, 2))[0]} == {(0,), (1,), (2,)}


def test_speaking_after_the_wake_up_loses_it() -> None:
    assert {memory.seen for memory in ends(sleeper, waker(0, 2, late=True))[0]} == {(1,), (2,)}


def test_a_wake_up_without_its_byte_is_lost_to_a_sleeper() -> None:
    def word(slot: t.Slot) -> None:
        slot.stats[t.WAKE] = NOW

    assert (0,) in {memory.seen for memory in ends(sleeper, waker(0, 1, word))[0]}


def test_a_byte_without_its_word_is_lost_to_a_runner() -> None:
    def byte(slot: t.Slot) -> None:
        slot.latch.set(NOW)

    assert (0,) in {memory.seen for memory in ends(runner, waker(0, 1, byte))[0]}


class ClearsLate(Interrupts):
    """Clears the word after it has read what was said."""

    def look(self) -> None:
        self.attention = False
        self.act()
        if self._stats[t.WAKE]:
            self._stats[t.WAKE] = 0
            self.reset()


class ClearsInItsBuffer(Interrupts):
    """Clears the word before it reads what was said, but others may see that later."""

    def look(self) -> None:
        if self._stats[t.WAKE]:
            self._stats[t.WAKE] = 0
            self.woken = True
        self.attention = False
        self.act()


@pytest.mark.parametrize("interrupts", [ClearsLate, ClearsInItsBuffer])
def test_a_word_that_is_cleared_too_late_hides_a_stop(interrupts: type[Interrupts]) -> None:
    memories, _ = ends(runner, stopper, waker(1, 1), interrupts=interrupts)
    assert {memory.stopped for memory in memories} == {True, False}


# The latch of a real slot, and real processes.


@pytest.fixture
def latch() -> Iterator[Latch]:
    latch = Latch()
    yield latch
    os.close(latch.read_fd)
    os.close(latch.write_fd)


def test_a_latch_tells_for_whom_it_was_set(latch: Latch) -> None:
    """Of what is in the pipe, only the byte of the owner's own generation is a wake-up; it is emptied all the same."""
    assert not latch.reset(2)
    latch.set(1)
    os.write(latch.write_fd, bytes((signal.SIGTERM,)))
    assert not latch.reset(2)
    latch.set(1)
    latch.set(2)
    assert latch.reset(2)
    assert not latch.reset(2)
    latch.set((1 << 63) + 2)
    assert latch.reset((1 << 63) + 2)


def test_a_full_pipe_is_a_wake_up(latch: Latch) -> None:
    """Setting a latch never blocks and never fails; one that is full may have lost a byte, and so counts as set."""
    for _ in range(4096):
        latch.set(1)
    latch.set(2)
    assert latch.reset(2)
    for _ in range(4095):
        os.write(latch.write_fd, bytes((signal.SIGHUP,)))
    assert not latch.reset(2)


def test_a_million_wake_ups_and_none_lost(bghost_host: StartHost) -> None:
    """Four workers wake a fifth, in bursts; after each it has to answer what they said last. Nobody has a timeout."""
    host = bghost_host(
        kinds={
            "woken": """
                import mmap

                import bghost

                said = memoryview(mmap.mmap(-1, 4096)).cast("Q")  # by each waker; shared by all that the host forks
                seen = memoryview(mmap.mmap(-1, 4096)).cast("Q")
                WAKERS, TIMES = 4, 250_000


                class Kind:
                    @bghost.hookimpl
                    def bghost_main(self, worker):
                        waits, wakers = 0, {}
                        while any(seen[number] < TIMES for number in range(WAKERS)):
                            assert worker.wait() == {"wake"}
                            waits += 1
                            for number in range(WAKERS):
                                count = said[number]
                                if count != seen[number]:
                                    seen[number] = count
                                    if number not in wakers:
                                        wakers[number] = worker.find(f"waker.{number}")
                                    wakers[number].wake()
                        worker.log.info("note: {} waits", waits)
            """,
            "waker": """
                import random

                import bghost
                from test_kind_woken import TIMES, said, seen


                class Kind:
                    @bghost.hookimpl
                    def bghost_main(self, worker):
                        number = worker.args["number"]
                        woken = worker.find("woken")
                        chance = random.Random(number)
                        done = 0
                        while done < TIMES:
                            for _ in range(min(chance.choice((1, 1, 1, 2, 3, 10, 300)), TIMES - done)):
                                done += 1
                                said[number] = done
                                woken.wake()
                            while seen[number] < done:
                                worker.wait()
            """,
        },
        config='host.kinds = ["woken", "waker"]',
        args=["run"],
    )
    host.client.launch(WorkerSpec(kind="woken"))
    names = ["woken", *(f"waker.{number}" for number in range(4))]
    for number, name in enumerate(names[1:]):
        host.client.launch(WorkerSpec(kind="waker", name=name, args={"number": number}))
    host.client.wait(*names, until="stopped", timeout=30.0 * SLOW)
    assert [row["state"] for row in host.client.ps()] == ["done"] * 5
    assert int(host.wait_line("note: ([0-9]+) waits").match[1]) > 1000  # it did sleep

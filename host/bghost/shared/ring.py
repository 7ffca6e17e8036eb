"""A ring of bytes in shared memory that carries messages from one writer to one reader (shm_mq.c).

No lock: WRITTEN is stored by the writer alone, READ by the reader alone, each counts the bytes that have ever passed,
and each is published after what it speaks of. A message travels in pieces, each with a word in front that says how
much of the message is left, that piece included; a piece is published whole, or not at all. One that takes up to half
of the ring is a single piece. So a writer that dies leaves whole pieces, and a reader can tell whole messages.

**Memory order.** Python has no fences, and the two sides run at the same time. Three orders matter:

1. The reader must not see WRITTEN before the bytes that it speaks of.
2. The writer must not see READ, and reuse the room, while the reader's loads from it are not over.
3. Who goes to sleep says so (a nap's number), then looks once more; who publishes does so, then looks whether the
   other sleeps. Not both may miss the other's store.

x86-64 and s390x keep 1 and 2 by themselves: their stores are seen in order, their loads are done in order, no store
is seen before the loads in front of it. No processor keeps 3. What is missing comes from membarrier(2): the side that
can afford a system call makes it, and the kernel has *the other* side's processor do a full barrier as well. For 3
that is the sleeper, before it looks for the last time: either the publisher's look at the nap came after the barrier,
and sees it, or its store came before, and is seen. On processors that reorder, each side also makes that call when it
has seen the other's counter move, before it touches the bytes (1 and 2): what the other did before its store of the
counter, it has done by then. A counter is looked at only when what was known of it is used up, so it is a call for a
ringful, not for a message. Compilers do not reorder across the calls that Python makes for each of these accesses.

Where the kernel refuses membarrier, sleepers look every :data:`BLIND` seconds; on a processor that reorders there are
no rings then.
"""

import mmap
import struct
from collections.abc import Callable, Sequence
from typing import Final

from bghost.shared import linux
from bghost.shared.errors import BghostError, HostError

LEAST: Final = 64  # bytes of a ring
BLIND: Final = 0.01  # seconds

# Words in front of the ring, by who stores them: each line of the processor's cache has one owner.
WRITTEN: Final = 0
WRITER_NAP: Final = 1  # odd: asleep, or about to be
READ: Final = 8
READER_NAP: Final = 9
WRITER: Final = 16  # who the sides are: the affair of whoever attaches them
READER: Final = 24
HEAD: Final = 512  # bytes in front of the ring; what is not named here is for its user

_WITHDRAWN: Final = 1 << 63  # a piece that says: the message that was begun does not come

_LONGEST: Final = 1 << 40  # bytes of a message; what claims to be longer is none

Data = bytes | bytearray | memoryview


class Ring:
    """The shared memory of one ring; made before the fork of those who use it.

    :param size: bytes that are on their way at most; rounded up to a power of two.
    :raises ValueError: if that is less than :data:`LEAST`.
    """

    def __init__(self, size: int) -> None:
        if size < LEAST:
            raise ValueError(f"a ring of {size} bytes; it takes {LEAST} at least")
        self.size: Final = 1 << (size - 1).bit_length()
        self.piece: Final = (self.size // 2 - 8) & ~7  # bytes of a message in one piece at most
        self.map: Final = mmap.mmap(-1, HEAD + self.size)
        self.view: Final = memoryview(self.map)
        self.words: Final = self.view.cast("Q")

    @property
    def unread(self) -> bool:
        """Whether something is on its way."""
        return self.words[WRITTEN] > self.words[READ]

    def clear(self) -> None:
        """Make it as new; nobody may be using it."""
        for word in (WRITTEN, READ, WRITER_NAP, READER_NAP):
            self.words[word] = 0


class _Side:
    """What the two sides have in common: the nap, and rousing the other one.

    :param ring: the ring.
    :param rouse: has the other side look again; called when it sleeps.
    """

    def __init__(self, ring: Ring, rouse: Callable[[], object], mine: int, others: int) -> None:
        self.sees_sleepers: Final = linux.register_membarrier()
        """Whether a nap is always seen by the other side; else sleepers have to look by themselves."""
        if not self.sees_sleepers and not linux.KEEPS_ORDER:
            raise HostError(
                "there are no queues here",
                detail="this processor reorders memory accesses, and the kernel refuses membarrier(2)",
            )
        self._ring = ring
        self._map = ring.map
        self._words = ring.words
        self._end = HEAD + ring.size
        self._mask = ring.size - 1
        self._piece = ring.piece
        self._rouse = rouse
        self._mine = mine
        self._others = others
        self._nap = 0
        self._told = 0  # the other side's nap that was last looked at

    def _moved(self) -> None:
        """The other side's counter was seen to have moved: what came before that is to be seen, too."""
        if not linux.KEEPS_ORDER:
            linux.membarrier()

    def nap(self) -> None:
        """Say that this side is going to sleep, or goes on to; it has to look once more after that."""
        self._nap += 2 if self._nap & 1 else 1
        self._words[self._mine] = self._nap
        if self.sees_sleepers:
            linux.membarrier()

    def wake_up(self) -> None:
        """Say that it does not sleep."""
        if self._nap & 1:
            self._nap += 1
            self._words[self._mine] = self._nap

    def _tell(self) -> None:
        """Something was published, and the other side's nap is another than before."""
        nap = self._told = self._words[self._others]
        if nap & 1:
            self._rouse()


class Writer(_Side):
    """The side that writes. One process, one thread."""

    def __init__(self, ring: Ring, rouse: Callable[[], object]) -> None:
        super().__init__(ring, rouse, WRITER_NAP, READER_NAP)
        self._written = self._words[WRITTEN]
        self._room = self._words[READ] + ring.size  # up to where what was read is known to be read
        self._message: Data | None = None  # that is partly written
        self._rest = memoryview(b"")  # of it
        self._withdraws = False
        self._most = ring.piece  # bytes of a message that is written at once; -1 while one of the two above is so

    def try_write(self, data: Data) -> bool:
        """Write a message if there is room for all of it, or for its next pieces.

        A message of several pieces may be written in part; then False says that there is no room for the rest, and the
        next call has to be made with the same object, if :meth:`withdraw` does not come first.

        :raises ValueError: if it is made with another.
        """
        given = data
        if data.__class__ is not bytes:
            data = _plain(data)
        n = len(data)
        if n > self._most:
            return self._write_long(data, given)
        written = self._written
        after = written + ((n + 15) & -8)
        if after > self._room and not self._has_room(after - written):
            return False
        words = self._words
        at = HEAD + (written & self._mask)
        end = at + 8 + n
        if n < _SHORT and end <= self._end:
            _PACK[n](self._map, at, n, data)
        else:
            words[at >> 3] = n
            self._put_around(at + 8, data)
        self._written = words[WRITTEN] = after
        if words[READER_NAP] != self._told:
            self._tell()
        return True

    def write_many(self, messages: Sequence[Data]) -> int:
        """Write as many of *messages* as there is room for, and publish them together; how many those are.

        One that needs several pieces ends the row in front of it, but is not begun unless it is the first.
        """
        ring, words, ends, mask, most = self._map, self._words, self._end, self._mask, self._most
        written, room = self._written, self._room
        count = 0
        for data in messages:
            if data.__class__ is not bytes:
                data = _plain(data)
            n = len(data)
            if n > most:
                break
            after = written + ((n + 15) & -8)
            if after > room:
                if not self._has_room(after - self._written):
                    self._wanted = after - written
                    break
                room = self._room
            at = HEAD + (written & mask)
            if n < _SHORT and at + 8 + n <= ends:
                _PACK[n](ring, at, n, data)
            else:
                words[at >> 3] = n
                self._put_around(at + 8, data)
            written = after
            count += 1
        if not count:
            return int(bool(messages) and self.try_write(messages[0]))
        self._written = words[WRITTEN] = written
        if words[READER_NAP] != self._told:
            self._tell()
        return count

    def withdraw(self) -> None:
        """Take back a message that is partly written; the reader never sees any of it."""
        if self._message is not None:
            self._message = None
            self._rest = memoryview(b"")
            self._withdraws = True

    @property
    def has_room(self) -> bool:
        """Whether the next piece of what was last tried has room; looks at the reader's counter."""
        return self._has_room(self._wanted)

    _wanted = 8  # bytes that were last found to have no room

    def _has_room(self, need: int) -> bool:
        self._wanted = need
        room = self._words[READ] + self._ring.size
        if room != self._room:
            self._moved()
            self._room = room
        return self._written + need <= room

    def _write_long(self, data: Data, given: Data) -> bool:
        if self._withdraws:
            if not self._has_room(8):
                return False
            self._put(_WITHDRAWN, memoryview(b""))
            self._withdraws = False
            self._most = self._piece
        if self._message is None:
            if len(data) <= self._piece:
                return self.try_write(data)
            self._message, self._rest = given, memoryview(data)
            self._most = -1
        elif self._message is not given:
            raise ValueError("the last message is partly written: it has to be tried again, or withdrawn")
        while rest := len(self._rest):
            piece = min(rest, self._piece)
            if not self._has_room((piece + 15) & -8):
                return False
            self._put(rest, self._rest[:piece])
            self._rest = self._rest[piece:]
        self._message = None
        self._most = self._piece
        return True

    def _put(self, head: int, data: memoryview) -> None:
        """Write and publish one piece, which has room."""
        at = HEAD + (self._written & self._mask)
        self._words[at >> 3] = head
        self._put_around(at + 8, data)
        self._written = self._words[WRITTEN] = self._written + ((len(data) + 15) & -8)
        if self._words[READER_NAP] != self._told:
            self._tell()

    def _put_around(self, at: int, data: Data) -> None:
        end = at + len(data)
        if end <= self._end:
            self._map[at:end] = data
        else:
            here = self._end - at
            view = memoryview(data)
            self._map[at : self._end] = view[:here]
            self._map[HEAD : HEAD + len(data) - here] = view[here:]


class Reader(_Side):
    """The side that reads. One process, one thread."""

    def __init__(self, ring: Ring, rouse: Callable[[], object]) -> None:
        super().__init__(ring, rouse, READER_NAP, WRITER_NAP)
        self._read = self._words[READ]
        self._published = self._read
        self._known = self._read  # up to where what was written is known to be written
        self._quarter, self._half = ring.size // 4, ring.size // 2
        self._parts: bytearray | None = None  # what has come of a message of several pieces
        self._rest = 0  # what has not
        self._most = ring.piece  # bytes of a message that is read at once; -1 in the midst of one of several pieces
        self._lent = 0  # bytes of the piece that a view shows

    def try_read(self) -> bytes | None:
        """The next message, if all of it is there."""
        if self._read == self._known and not self.has_more or self._lent and not self._give_back():
            return None
        read = self._read
        at = HEAD + (read & self._mask)
        n = self._words[at >> 3]
        if n > self._most:
            whole = self._read_long()
            return None if whole is None else bytes(whole)
        after = read + ((n + 15) & -8)
        if after > self._known:
            raise _damaged()
        end = at + 8 + n
        if end <= self._end:
            data = self._map[at + 8 : end]
        else:
            data = self._map[at + 8 : self._end] + self._map[HEAD : end - self._ring.size]
        self._read = after
        if after - self._published >= self._quarter:
            self._publish()
        return data

    def read_many(self, limit: int) -> list[bytes]:
        """The messages that are there, *limit* at most."""
        if self._read == self._known and not self.has_more or self._lent and not self._give_back():
            return []
        ring, words, ends, mask, most = self._map, self._words, self._end, self._mask, self._most
        read, known = self._read, self._known
        messages: list[bytes] = []
        while read < known and len(messages) < limit:
            at = HEAD + (read & mask)
            n = words[at >> 3]
            if n > most:
                break
            after = read + ((n + 15) & -8)
            end = at + 8 + n
            if after > known:
                raise _damaged()
            if end <= ends:
                messages.append(ring[at + 8 : end])
            else:
                messages.append(ring[at + 8 : ends] + ring[HEAD : end - ends + HEAD])
            read = after
        self._read = read
        if read - self._published >= self._quarter:
            self._publish()
        if not messages and (message := self.try_read()) is not None:
            messages.append(message)
        return messages

    def try_view(self) -> memoryview | None:
        """The next message, if all of it is there, without a copy where it lies in one piece.

        It can be looked at until the next call of any method that reads.
        """
        if self._read == self._known and not self.has_more or self._lent and not self._give_back():
            return None
        at = HEAD + (self._read & self._mask)
        n = self._words[at >> 3]
        if n > self._most:
            whole = self._read_long()
            return None if whole is None else memoryview(whole).toreadonly()
        need = (n + 15) & -8
        if self._read + need > self._known:
            raise _damaged()
        if at + 8 + n > self._end:
            data = self.try_read()
            assert data is not None
            return memoryview(data)
        self._lent = need
        return self._ring.view[at + 8 : at + 8 + n].toreadonly()

    def _publish(self) -> None:
        """Publish all the room that there is by now. A writer that sleeps is roused for half of the ring, not for less:
        it would write one message, and sleep again."""
        self._published = self._words[READ] = self._read
        if self._words[WRITER_NAP] != self._told and self._known - self._read <= self._half:
            self._tell()

    @property
    def has_more(self) -> bool:
        """Whether there is a piece that was not read; looks at the writer's counter, and tells of all room."""
        if self._lent:
            self._give_back()
        self._published = self._words[READ] = self._read
        if self._words[WRITER_NAP] != self._told:
            self._tell()
        known = self._words[WRITTEN]
        if known != self._known:
            self._moved()
            self._known = known
        return self._read != known

    def _give_back(self) -> bool:
        """What a view has shown is read; whether there is more."""
        self._skip(self._lent)
        self._lent = 0
        return self._read != self._known or self.has_more

    def _skip(self, need: int) -> None:
        self._read += need
        if self._read - self._published >= self._quarter:
            self._publish()

    def _read_long(self) -> bytearray | None:
        """Go on with a message of several pieces; the whole, once it is there."""
        while self._read != self._known or self.has_more:
            at = HEAD + (self._read & self._mask)
            head = self._words[at >> 3]
            if head == _WITHDRAWN:
                self._parts, self._most = None, self._piece
                self._skip(8)
                continue
            if self._parts is None:
                if head <= self._piece:  # after one that was withdrawn
                    data = self.try_read()
                    return None if data is None else bytearray(data)
                if head > _LONGEST:
                    raise _damaged()
                self._parts, self._rest, self._most = bytearray(head), head, -1
            piece = min(head, self._piece)
            need = (piece + 15) & -8
            if head != self._rest or self._read + need > self._known:
                raise _damaged()
            at, to = at + 8, len(self._parts) - head
            here = min(piece, self._end - at)
            view = self._ring.view
            self._parts[to : to + here] = view[at : at + here]
            self._parts[to + here : to + piece] = view[HEAD : HEAD + piece - here]
            self._rest -= piece
            self._skip(need)
            if not self._rest:
                whole, self._parts, self._most = self._parts, None, self._piece
                return whole
        return None


def _plain(data: Data) -> Data:
    """*data* as bytes one after the other; as ``bytes`` itself where it is short."""
    view = memoryview(data).cast("B")
    return bytes(view) if len(view) < _SHORT else view


# One call stores head and bytes of a short message in half the time that two assignments take.
_SHORT: Final = 257
_PACK: Final = [struct.Struct(f"Q{length}s").pack_into for length in range(_SHORT)]


def _damaged() -> BghostError:
    return BghostError(
        "a queue in shared memory is damaged",
        detail="something has written over it",
        hint="both sides have to detach from it and attach again",
    )

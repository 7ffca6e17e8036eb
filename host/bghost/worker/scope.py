"""Scopes: named, nested stacks of resources that are closed as a whole (what memory contexts are in PostgreSQL)."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar

from bghost.shared.errors import GiveUp

T = TypeVar("T")


class ScopeClosed(RuntimeError):
    """A scope, or something that belonged to it, was used after the scope's end."""


class Scope:
    """A stack of things to be undone, last in first out, and of child scopes, which are closed before it.

    Runs in: worker. Made by :meth:`child`, by the runtime (root, tick), or by a plugin (a transaction's).

    :param name: shown in messages and dumps.
    :param parent: the scope that closes this one along with itself, or ``None`` for a root.
    :param opened_at: file and line for messages; found from the caller where it is empty.
    """

    __slots__ = ("_exits", "_outer", "cell", "children", "closed", "name", "opened_at", "parent")

    def __init__(self, name: str, parent: "Scope | None" = None, *, opened_at: str = "") -> None:
        self.name = name
        self.parent = parent
        self.opened_at = opened_at
        self.closed = False
        self.children: list[Scope] = []
        self._exits: list[tuple[Callable[[BaseException | None], object], str]] = []
        self._outer: Scope | None = None  # what was current before this one was entered
        self.cell: list[Scope] = [self] if parent is None else parent.cell  # the current one, for a whole tree
        if parent is not None:
            parent._check()
            parent.children.append(self)

    @property
    def current(self) -> "Scope":
        """The scope of this tree that was entered last and not left."""
        return self.cell[0]

    def __repr__(self) -> str:
        return f"<Scope {self.path}{', closed' if self.closed else ''}>"

    @property
    def path(self) -> str:
        """The names from the root to this scope, with slashes between."""
        return f"{self.parent.path}/{self.name}" if self.parent is not None else self.name

    def _check(self) -> None:
        if self.closed:
            raise ScopeClosed(f"scope {self.path!r} is closed")

    def check_open(self, what: str) -> None:
        """Refuse use of *what*, a resource of this scope, once the scope is closed.

        :raises ScopeClosed: with the names of both.
        """
        if self.closed:
            raise ScopeClosed(f"{what} belonged to scope {self.path!r}, which is closed")

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter *manager* now, and leave it when this scope is closed; it is told of the error that came to that.

        :returns: what its ``__enter__`` gave.
        :raises ScopeClosed: if this scope is closed; *manager* is not entered then.
        """
        self._check()
        value = manager.__enter__()

        def leave(error: BaseException | None) -> None:
            if error is None:
                manager.__exit__(None, None, None)
            else:
                manager.__exit__(type(error), error, error.__traceback__)

        generator = getattr(manager, "gen", None)  # of contextlib.contextmanager
        self._exits.append((leave, getattr(generator, "__qualname__", repr(manager))))
        return value

    def callback(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call *function* when this scope is closed.

        :raises ScopeClosed: if it is closed already.
        """
        self._check()
        self._exits.append((lambda error: function(*args, **kwargs), getattr(function, "__qualname__", repr(function))))

    def child(self, name: str) -> "Scope":
        """A scope inside this one: a context manager, or to be closed by hand, or closed along with this one."""
        return Scope(name, self, opened_at=caller(2))

    def __enter__(self) -> "Scope":
        self._check()
        if self._outer is not None:
            raise RuntimeError(f"scope {self.path!r} has been entered before")
        self._outer = self.current
        self.cell[0] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close(error)
        except ExceptionGroup as failed:
            if error is None or (isinstance(error, Exception) and not isinstance(error, GiveUp)):
                raise
            raise error from failed  # what decides over the worker is not replaced

    def close(self, error: BaseException | None = None) -> None:
        """Close the children that are still open, newest first, then undo what was entered, last in first out.

        Everything is closed, also when one closing fails. A second call does nothing.

        :param error: what has ended the work that the scope was for; what was entered is told of it, so that it does
            not take half of that work for the whole.
        :raises ExceptionGroup: of what failed, with each failure's note naming the scope and the resource. What is no
            Exception, a Stop say, is raised itself, after everything is closed.
        """
        if self.closed:
            return
        self.closed = True
        if self._outer is not None and self._within(self.current):
            outer = self._outer
            while outer.closed and outer._outer is not None:  # closed before this one, out of order
                outer = outer._outer
            self.cell[0] = outer
        errors: list[Exception] = []
        other: BaseException | None = None
        for child in reversed(self.children):
            try:
                child.close(error)
            except ExceptionGroup as group:
                errors.extend(group.exceptions)
            except BaseException as failure:
                other = other or failure
        self.children.clear()
        while self._exits:
            exit, text = self._exits.pop()
            try:
                exit(error)
            except Exception as failure:
                if failure is not error:
                    failure.add_note(f"while scope {self.path!r} was closed: {text}")
                    errors.append(failure)
            except BaseException as failure:
                if failure is not error:
                    other = other or failure
        if self.parent is not None and not self.parent.closed:
            self.parent.children.remove(self)
        failed = ExceptionGroup(f"scope {self.path!r} did not close cleanly", errors) if errors else None
        if other is not None:
            raise other from failed
        if failed is not None:
            raise failed

    def _within(self, scope: "Scope | None") -> bool:
        while scope is not None and scope is not self:
            scope = scope.parent
        return scope is self

    def tree(self, depth: int = 0) -> Iterator[str]:
        """This scope and those inside it, a line each, indented."""
        where = f", opened at {self.opened_at}" if self.opened_at else ""
        yield f"{'  ' * depth}{self.name}: {len(self._exits)} held{where}"
        for child in self.children:
            yield from child.tree(depth + 1)


class Scoped(Protocol):
    """Something of a plugin's that has a scope of its own, made only if it is used: an open transaction, say."""

    def make_scope(self) -> None:
        """Make it, inside the current one, and enter it."""


def caller(depth: int) -> str:
    """``file:line`` of the frame *depth* above this function's caller's; past the frames of contextlib."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"

"""Scopes: closed as a whole, in order, whatever fails; and what a tick leaves open."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import StartHost, notes

from bghost.shared.errors import Stop
from bghost.worker.scope import Scope, ScopeClosed


@contextlib.contextmanager
def resource(name: str, log: list[str], fails: BaseException | None = None) -> Iterator[str]:
    log.append(f"open {name}")
    try:
        yield name
    except Exception as error:
        log.append(f"{name}: {error}")
        raise
    finally:
        log.append(f"close {name}")
        if fails is not None:
            raise fails


def test_a_scope_is_undone_in_reverse() -> None:
    """What was entered, and what is to be called, is undone last in first out; children first, newest first."""
    log: list[str] = []
    root = Scope("root")
    assert root.enter(resource("one", log)) == "one"
    first = root.child("first")
    first.callback(log.append, "first")
    root.callback(log.append, "two")
    second = root.child("second")
    second.child("inner").callback(log.append, "inner")
    second.callback(log.append, "second")
    root.enter(resource("three", log))
    root.close()
    assert log == ["open one", "open three", "inner", "second", "first", "close three", "two", "close one"]
    assert all(scope.closed for scope in (root, first, second))
    root.close()  # once more does nothing
    assert log[-1] == "close one"


def test_everything_is_closed_though_something_fails() -> None:
    """Each failure is told with the scope and the resource that it came from, and keeps nothing else from closing."""
    log: list[str] = []
    root = Scope("root")
    root.callback(log.append, "last")
    root.callback(int, "x")
    inner = root.child("outer").child("inner")
    inner.enter(resource("one", log, OSError("no luck")))
    inner.callback(log.append, "first")
    with pytest.raises(ExceptionGroup, match="scope 'root' did not close cleanly") as caught:
        root.close()
    assert log == ["open one", "first", "close one", "last"]
    told = [(type(error), getattr(error, "__notes__", [])) for error in caught.value.exceptions]
    assert [kind for kind, _ in told] == [OSError, ValueError]
    assert re.search(r"while scope 'root/outer/inner' was closed: .*resource", told[0][1][0])
    assert told[1][1] == ["while scope 'root' was closed: int"]
    assert root.current is root


def test_a_stop_does_not_keep_a_scope_from_closing() -> None:
    """What is no Exception goes on when everything is closed, with the failures as its cause."""
    log: list[str] = []
    root = Scope("root")
    root.callback(log.append, "last")
    root.callback(int, "x")
    root.child("inner").enter(resource("one", log, Stop(0)))
    with pytest.raises(Stop) as caught:
        root.close()
    assert log == ["open one", "close one", "last"]
    assert isinstance(caught.value.__cause__, ExceptionGroup)


def test_a_resource_is_told_how_its_block_ended() -> None:
    """A scope that is left by an error hands the error to its resources, so that none takes half of the work for done.

    They cannot swallow it, and that they raise it again is no failure of theirs.
    """
    log: list[str] = []
    root = Scope("root")
    with pytest.raises(ValueError, match="half done"), root.child("work") as scope:
        scope.enter(resource("one", log))
        scope.enter(contextlib.suppress(ValueError))
        scope.child("inner").enter(resource("two", log))
        raise ValueError("half done")
    assert log == ["open one", "open two", "two: half done", "close two", "one: half done", "close one"]


def test_the_current_scope() -> None:
    """Within a block the scope is the tree's current one, and at its end, good or bad, the one before it is again."""
    root = Scope("root")
    assert root.current is root
    with root.child("one") as one:
        assert root.current is one
        two = root.child("two")
        assert root.current is one  # it is current only when entered
        with pytest.raises(ValueError, match="three"), one.child("three") as three:
            assert (root.current, three.path) == (three, "root/one/three")
            raise ValueError("three")
        assert root.current is one
        with two:
            assert root.current is two
        assert root.current is one
    assert root.current is root


def test_closing_out_of_order_never_leaves_a_closed_scope_current() -> None:
    root = Scope("root")
    one = root.child("one").__enter__()
    inner = one.child("inner").__enter__()
    two = root.child("two").__enter__()
    one.close()
    assert inner.closed
    assert root.current is two
    two.close()
    assert root.current is root

    one = root.child("one").__enter__()
    one.child("inner").__enter__()
    one.close()
    assert root.current is root


def test_a_scope_is_entered_once() -> None:
    root = Scope("root")
    with root.child("one") as one:
        with pytest.raises(RuntimeError, match="scope 'root/one' has been entered before"):
            one.__enter__()
        assert root.current is one
    with pytest.raises(ScopeClosed):
        one.__enter__()


def test_a_closed_scope_refuses_use() -> None:
    """The error names the scope, and what belonged to it; nothing is entered."""
    log: list[str] = []
    root = Scope("root")
    with root.child("one") as one:
        one.check_open("connection 5")
        inner = one.child("inner")
    for use in (
        lambda: one.callback(log.append, "called"),
        lambda: one.enter(resource("r", log)),
        lambda: one.child("late"),
    ):
        with pytest.raises(ScopeClosed, match="scope 'root/one' is closed"):
            use()
    with pytest.raises(ScopeClosed, match="connection 5 belonged to scope 'root/one', which is closed"):
        one.check_open("connection 5")
    with pytest.raises(ScopeClosed, match="scope 'root/one/inner' is closed"):
        inner.callback(log.append, "called")
    assert log == []


def test_nothing_is_added_to_a_scope_that_is_being_closed() -> None:
    root = Scope("root")
    root.callback(lambda: root.callback(print))
    with pytest.raises(ExceptionGroup) as caught:
        root.close()
    assert isinstance(caught.value.exceptions[0], ScopeClosed)


def test_a_resource_that_cannot_be_entered_is_not_left() -> None:
    log: list[str] = []

    class Broken(contextlib.AbstractContextManager[None]):
        def __enter__(self) -> None:
            raise OSError("no luck")

        def __exit__(self, *error: object) -> None:
            log.append("left")

    root = Scope("root")
    with pytest.raises(OSError, match="no luck"):
        root.enter(Broken())
    root.close()
    assert log == []


def test_the_tree_is_shown_with_the_lines_that_opened_it() -> None:
    root = Scope("root")
    root.callback(print)
    root.child("one").child("two")
    line = test_the_tree_is_shown_with_the_lines_that_opened_it.__code__.co_firstlineno + 3
    assert list(root.tree()) == [
        "root: 1 held",
        f"  one: 0 held, opened at {__file__}:{line}",
        f"    two: 0 held, opened at {__file__}:{line}",
    ]


STEPS = st.lists(st.tuples(st.sampled_from(["child", "enter", "callback", "fail", "close"]), st.integers(0, 5)))


@given(STEPS)
def test_whatever_is_done_to_a_tree(steps: list[tuple[str, int]]) -> None:
    """Each callback is called once, after those that came later in its scope or inside it; nothing stays open."""
    root = Scope("root")
    scopes = [root]
    given: list[tuple[Scope, int]] = []
    called: list[tuple[Scope, int]] = []

    def call(scope: Scope, number: int, *, fail: bool) -> None:
        called.append((scope, number))
        if fail:
            raise ValueError(number)

    def close(scope: Scope) -> None:
        with contextlib.suppress(ExceptionGroup):
            scope.close()

    for number, (what, which) in enumerate(steps):
        scope = scopes[which % len(scopes)]
        if scope.closed:
            continue
        if what == "child":
            scopes.append(scope.child(str(number)))
        elif what == "enter":
            scopes.append(scope.child(str(number)).__enter__())
        elif what == "close" and scope is not root:
            close(scope)
        elif what in ("callback", "fail"):
            scope.callback(call, scope, number, fail=what == "fail")
            given.append((scope, number))
        assert not root.current.closed
    close(root)
    assert all(scope.closed for scope in scopes)
    assert sorted(called, key=lambda item: item[1]) == given
    place = {number: position for position, (_, number) in enumerate(called)}
    for scope, number in given:
        for other, later in given:
            inside = other.path == scope.path or other.path.startswith(f"{scope.path}/")
            if inside and (later > number or other is not scope):
                assert place[later] < place[number]


KIND = """
import contextlib
import bghost
from bghost.worker.scope import ScopeClosed

class Settings(bghost.Settings):
    naptime: float = 0.0

@contextlib.contextmanager
def resource(worker, name):
    try:
        yield name
    except BaseException as error:
        worker.log.info("note: {} is told of {!r}", name, error)
        raise
    finally:
        worker.log.info("note: {} closed", name)

class Kind:
    Settings = Settings
    rounds = 0
    last = None

    @bghost.hookimpl
    def bghost_setup(self, worker):
        self.root = worker.scope
        worker.log.info("note: set up in {}", worker.scope.path)

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        round = getattr(self, f"round_{self.rounds}", None)
        if self.last is not None:
            assert self.last.closed
        assert self.root.current is self.root and not self.root.children
        if round is None:
            return bghost.UNTIL_WOKEN
        worker.log.info("note: round {} in {}", self.rounds, worker.scope.path)
        self.last = worker.scope
        return round(worker)

    @bghost.hookimpl
    def bghost_recover(self, worker, error):
        if isinstance(error, ValueError):
            worker.scope.enter(resource(worker, "recovery's"))
"""


def test_the_scope_of_a_tick(bghost_host: StartHost) -> None:
    """Each tick has a scope of its own: it is closed at the tick's end, and knows how that came; so is all above it."""
    source = (
        KIND
        + """
    def round_1(self, worker):
        assert worker.scope is worker.scope
        worker.scope.enter(resource(worker, "first"))
        with worker.scope.child("inner"):
            worker.scope.enter(resource(worker, worker.scope.path))
        worker.log.info("note: the end of the tick")

    def round_2(self, worker):
        try:
            self.last = None
            worker.scope.enter(resource(worker, "second"))
            raise ValueError("no luck")
        finally:
            worker.log.info("note: the end of the tick")

    def round_3(self, worker):  # left open, one of them not inside the tick's scope
        worker.scope.child("other").enter(resource(worker, "third"))
        self.root.child("stray").__enter__().enter(resource(worker, "fourth"))

    def round_4(self, worker):
        worker.scope.close()
        worker.scope.enter(resource(worker, "fifth"))
        try:
            self.last.callback(print)
        except ScopeClosed as error:
            worker.log.info("note: {}", error)

    def round_5(self, worker):
        worker.scope.enter(resource(worker, "sixth"))
        worker.scope.callback(int, "no number")
        worker.scope.enter(resource(worker, "seventh"))

    def round_6(self, worker):
        worker.scope.enter(resource(worker, "eighth"))
        worker.wait(bghost.UNTIL_WOKEN)
"""
    )
    host = bghost_host(kinds={"scopes": source}, args=["run", "scopes"])
    host.wait_line("note: round 6")
    assert host.client.stop("scopes", mode="fast")["killed"] == []
    assert notes(host, "scopes") == [
        "set up in scopes",
        "round 1 in scopes/tick",
        "scopes/tick/inner closed",
        "the end of the tick",
        "first closed",
        "round 2 in scopes/tick",
        "the end of the tick",
        "second is told of ValueError('no luck')",
        "second closed",
        "recovery's closed",
        "round 3 in scopes/tick",
        "fourth closed",
        "third closed",
        "round 4 in scopes/tick",
        "scope 'scopes/tick' is closed",
        "fifth closed",
        "round 5 in scopes/tick",
        "seventh closed",
        "sixth closed",
        "round 6 in scopes/tick",
        "eighth is told of Stop()",
        "eighth closed",
    ]
    text = host.text()
    left = re.findall(r"left open at the end of the tick, and closed: scope '(.*)', opened at (\S+):([0-9]+)\n", text)
    assert [path for path, _, _ in left] == ["scopes/tick/other", "scopes/stray"]
    for path, file, line in left:
        assert f'child("{path.split("/")[-1]}")' in Path(file).read_text().splitlines()[int(line) - 1]
    assert re.findall(r" ERROR +\[scopes\] (.*)", text) == [
        "ValueError: no luck",
        "ExceptionGroup: scope 'scopes/tick' did not close cleanly (1 sub-exception)",
    ]


def test_a_scope_left_open_is_an_error_where_the_host_is_strict(bghost_host: StartHost) -> None:
    """It names the file and the line that opened the scope, and the scope is closed all the same."""
    source = (
        KIND
        + """
    def round_1(self, worker):
        worker.scope.child("forgotten").enter(resource(worker, "first"))
"""
    )
    host = bghost_host(
        kinds={"scopes": source}, config="host.strict = true\nworker = [{kind = 'scopes'}]", args=["run"]
    )
    row = host.wait_row("scopes", lambda row: row["errors"])
    what = (
        r"LeftOpen: left open at the end of the tick: scope 'scopes/tick/forgotten', opened at .*/test_kind_scopes.py"
    )
    assert re.fullmatch(rf"{what}:[0-9]+", row["last_error"] or "")
    host.wait_line("note: first closed")


def test_scopes_around_a_main_loop_stay_open(bghost_host: StartHost) -> None:
    """A loop of the author's own may have a scope around it: the ticks' scopes are inside that, and only they close."""
    source = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_main(self, worker):
        note = worker.log.info
        with worker.scope.child("main"):
            worker.scope.callback(note, "note: main closed")
            for number in range(2):
                with worker.recovery():
                    note("note: {}", worker.scope.path)
                    worker.scope.callback(note, "note: tick {} closed", number)
            assert worker.scope.path == "looper/main"
"""
    host = bghost_host(kinds={"looper": source}, args=["run", "looper"], answering=False)
    assert host.wait() == 0
    assert notes(host, "looper") == [
        "looper/main/tick",
        "tick 0 closed",
        "looper/main/tick",
        "tick 1 closed",
        "main closed",
    ]
    assert "left open" not in host.text()

"""The hook loader: what is refused at load, who is called in which order, and what an extension's error can not do."""

import asyncio
import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, TypeVar

import msgspec
import pluggy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Sandbox

import bghost
from bghost import Canceled, ConfigError, GiveUp, PluginError, Recovery, Stop, WorkerSpec, hookimpl, hookspecs
from bghost.shared.hooks import HostHooks, WorkerHooks, host_hooks, worker_hooks
from bghost.shared.plugins import EXTENSIONS, KINDS, Found, discover
from bghost.shared.verify import SPECS, expected, verify

F = TypeVar("F", bound=Callable[..., Any])


def impl(**options: Any) -> Callable[[F], F]:
    """hookimpl with options that come in a dict."""
    marker: Callable[[F], F] = hookimpl(**options)
    return marker


@dataclass
class Loaded:
    """Plugins of one test, what was reported of them, and what they noted down."""

    module: ModuleType
    reports: list[tuple[str, str, BaseException]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def found(self, name: str, plugin: object, group: str = KINDS) -> Found:
        setattr(self.module, name, plugin)
        return Found(name, group, f"{self.module.__name__}:{name}", f"{name}-dist", "1.0")

    def report(self, name: str, hook: str, error: BaseException) -> None:
        assert sys.exception() is error or isinstance(error, RuntimeError)
        self.reports.append((name, hook, error))

    @property
    def reported(self) -> list[tuple[str, str, str]]:
        return [(name, hook, str(error)) for name, hook, error in self.reports]

    def tables(
        self, extensions: Mapping[str, object], tables: Mapping[str, dict[str, Any]]
    ) -> dict[str, tuple[Found, dict[str, Any]]]:
        return {
            name: (self.found(name, extension, EXTENSIONS), tables.get(name, {}))
            for name, extension in extensions.items()
        }

    def worker(
        self,
        kind: object,
        extensions: Mapping[str, object] | None = None,
        tables: Mapping[str, dict[str, Any]] | None = None,
        drive: Callable[[Any], Any] = asyncio.run,
    ) -> WorkerHooks:
        found = self.found("kind", kind)
        return worker_hooks(
            found, found.load(), self.tables(extensions or {}, tables or {}), report=self.report, drive=drive
        )

    def host(self, kinds: Mapping[str, object], extensions: Mapping[str, object] | None = None) -> HostHooks:
        found = {name: (self.found(name, kind), kind) for name, kind in kinds.items()}
        return host_hooks(found, self.tables(extensions or {}, {}), report=self.report)


@pytest.fixture
def load() -> Iterator[Loaded]:
    module = ModuleType("plugins_of_a_test")
    sys.modules[module.__name__] = module
    yield Loaded(module)
    del sys.modules[module.__name__]


WORKER: Any = object()  # the loader hands it through, and looks at nothing of it
HOST: Any = object()


class Ticks:
    """A kind that ticks."""

    @hookimpl
    def bghost_tick(self, worker: Any) -> float:
        assert worker is WORKER
        return 1.5


# What plain pluggy gets wrong


def test_an_extensions_error_skips_nobody(load: Loaded) -> None:
    """With plain pluggy the first error ends the call: later extensions and the kind would not be called."""

    class Kind(Ticks):
        @hookimpl
        def bghost_setup(self) -> None:
            load.calls.append("kind")

    class Bad:
        @hookimpl
        def bghost_setup(self) -> None:
            load.calls.append("bad")
            raise ValueError("of an extension")

    class Good:
        @hookimpl
        def bghost_setup(self) -> None:
            load.calls.append("good")

    hooks = load.worker(Kind, {"bad": Bad, "good": Good})

    hooks.setup(WORKER)
    hooks.setup(WORKER)

    assert load.calls == ["bad", "good", "kind"] * 2
    assert load.reported == [("bad", "bghost_setup", "of an extension")] * 2


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
def test_a_wrapper_that_fails_before_its_yield_does_not_stop_the_call(style: str, load: Loaded) -> None:
    class Bad:
        @impl(**{style: True})
        def bghost_tick(self) -> Any:
            if load.calls == []:
                raise ValueError("too early")
            yield

    hooks = load.worker(Ticks, {"bad": Bad})

    assert hooks.tick is not None and hooks.tick(WORKER) == 1.5
    assert load.reported == [("bad", "bghost_tick", "too early")]


def test_host_hooks_are_called_without_an_instance_of_the_kind(load: Loaded) -> None:
    class Kind(Ticks):
        def __init__(self) -> None:
            raise AssertionError("made in the host")

        @classmethod
        @hookimpl
        def bghost_workers(cls, settings: Any) -> list[WorkerSpec]:
            return [WorkerSpec(kind="kind", name=f"kind.{n}") for n in range(settings)]

        @hookimpl
        @staticmethod
        def bghost_host_setup(host: Any) -> None:
            assert host is HOST
            load.calls.append("setup")

        @hookimpl
        @classmethod
        def bghost_host_cleanup(cls) -> None:
            load.calls.append(f"cleanup of {cls.__name__}")

    hooks = load.host({"kind": Kind})

    settings: Any = 2
    assert [spec.name for spec in hooks.workers("kind", settings) or ()] == ["kind.0", "kind.1"]
    hooks.host_setup(HOST)
    hooks.host_cleanup(HOST)
    assert load.calls == ["setup", "cleanup of Kind"]


def test_wrappers_see_the_result_of_an_async_hook_and_not_its_coroutine(load: Loaded) -> None:
    class Kind:
        @hookimpl
        async def bghost_tick(self, worker: Any) -> float:
            await asyncio.sleep(0)
            return 2.0

    class Adds:
        @hookimpl(wrapper=True)
        def bghost_tick(self) -> Any:
            return (yield) + 1

    hooks = load.worker(Kind, {"adds": Adds})

    assert hooks.is_async
    assert hooks.tick is not None and hooks.tick(WORKER) == 3.0


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
def test_a_wrapper_that_fails_after_its_yield_does_not_replace_the_result(style: str, load: Loaded) -> None:
    class Bad:
        @impl(**{style: True})
        def bghost_tick(self) -> Any:
            outcome = yield
            if style == "hookwrapper":
                outcome.force_result(7.0)
            raise ValueError("too late")

    hooks = load.worker(Ticks, {"bad": Bad})

    assert hooks.tick is not None and hooks.tick(WORKER) == 1.5
    assert load.reported == [("bad", "bghost_tick", "too late")]


# The guard, in full


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize("yields", [0, 2, 3])
@pytest.mark.parametrize("fails", [False, True])
def test_a_wrapper_has_to_yield_once(style: str, yields: int, fails: bool, load: Loaded) -> None:
    class Kind:
        @hookimpl
        def bghost_tick(self) -> float:
            if fails:
                raise LookupError("of the kind")
            return 1.5

    class Bad:
        @impl(**{style: True})
        def bghost_tick(self) -> Any:
            for _ in range(yields):
                try:
                    yield
                except BaseException:
                    load.calls.append("an exception")  # even GeneratorExit is not heeded

    hooks = load.worker(Kind, {"bad": Bad})

    assert hooks.tick is not None
    if fails:
        with pytest.raises(LookupError, match="of the kind"):
            hooks.tick(WORKER)
    else:
        assert hooks.tick(WORKER) == 1.5
    wrong = {
        0: "the wrapper did not yield",
        2: "the wrapper yielded a second time",
        3: "generator ignored GeneratorExit",
    }
    assert load.reported == [("bad", "bghost_tick", wrong[yields])]


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize("error", [LookupError("of the kind"), StopIteration(3), Stop(0), GiveUp("enough"), Canceled()])
def test_the_kinds_exception_passes_through_a_wrapper_that_fails_over_it(
    style: str, error: BaseException, load: Loaded
) -> None:
    """It stays the very same object, and gets no context that is not its own."""

    class Kind:
        @hookimpl
        def bghost_tick(self) -> float:
            raise error

    class Bad:
        @impl(**{style: True})
        def bghost_tick(self) -> Any:
            try:
                outcome = yield
                outcome.get_result()
            finally:
                raise ValueError("while handling it")

    hooks = load.worker(Kind, {"bad": Bad})

    assert hooks.tick is not None
    try:
        hooks.tick(WORKER)
    except BaseException as raised:
        assert raised is error
        assert raised.__context__ is None
    assert load.reported == [("bad", "bghost_tick", "while handling it")]


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize("error", [LookupError("of the kind"), StopIteration(3), Stop(0)])
def test_the_kinds_exception_passes_through_a_wrapper_that_lets_it(
    style: str, error: BaseException, load: Loaded
) -> None:
    class Kind:
        @hookimpl
        def bghost_tick(self) -> float:
            raise error

    class Good:
        @impl(**{style: True})
        def bghost_tick(self) -> Any:
            return (yield)

    hooks = load.worker(Kind, {"good": Good, "fine": Good})

    assert hooks.tick is not None
    try:
        hooks.tick(WORKER)
    except BaseException as raised:
        assert raised is error
    assert load.reports == []


def test_a_wrapper_that_works_may_change_the_result(load: Loaded) -> None:
    class Kind:
        @hookimpl
        def bghost_tick(self) -> float:
            raise LookupError("of the kind")

    class Heals:
        @hookimpl(wrapper=True)
        def bghost_tick(self) -> Any:
            try:
                return (yield)
            except LookupError:
                return 1.0

    class Doubles:
        @hookimpl(hookwrapper=True, tryfirst=True)
        def bghost_tick(self) -> Any:
            outcome = yield
            outcome.force_result(2 * outcome.get_result())

    hooks = load.worker(Kind, {"heals": Heals, "doubles": Doubles})

    assert hooks.tick is not None and hooks.tick(WORKER) == 2.0
    assert load.reports == []


def test_an_exception_that_a_wrapper_forces_is_an_error_of_the_extension(load: Loaded) -> None:
    class Forces:
        @hookimpl(hookwrapper=True)
        def bghost_tick(self) -> Any:
            outcome = yield
            outcome.force_exception(ValueError("forced"))

    hooks = load.worker(Ticks, {"forces": Forces})

    assert hooks.tick is not None and hooks.tick(WORKER) == 1.5
    assert load.reported == [("forces", "bghost_tick", "forced")]


@pytest.mark.parametrize("decision", [Stop(0), SystemExit(3), KeyboardInterrupt(), GiveUp("enough"), Canceled()])
def test_no_wrapper_can_swallow_what_decides_over_the_worker(decision: BaseException, load: Loaded) -> None:
    class Kind:
        @hookimpl
        def bghost_tick(self) -> float:
            raise decision

    class Swallows:
        @hookimpl(wrapper=True)
        def bghost_tick(self) -> Any:
            try:
                return (yield)
            except BaseException:
                return 1.0

    class Forces:
        @hookimpl(hookwrapper=True)
        def bghost_tick(self) -> Any:
            outcome = yield
            outcome.force_result(1.0)

    hooks = load.worker(Kind, {"swallows": Swallows, "forces": Forces})

    assert hooks.tick is not None
    with pytest.raises(type(decision)) as raised:
        hooks.tick(WORKER)
    assert raised.value is decision


@pytest.mark.parametrize("decision", [Stop(0), SystemExit(3), KeyboardInterrupt(), GiveUp("enough"), Canceled()])
@pytest.mark.parametrize("place", ["plain", "before", "after", "over an error"])
def test_what_an_extension_decides_over_the_worker_passes(place: str, decision: BaseException, load: Loaded) -> None:
    class Kind(Ticks):
        @hookimpl
        def bghost_setup(self) -> None:
            load.calls.append("kind")
            if place == "over an error":
                raise LookupError

    class Plain:
        @hookimpl
        def bghost_setup(self) -> None:
            raise decision

    class Wraps:
        @hookimpl(wrapper=True)
        def bghost_setup(self) -> Any:
            if place == "before":
                raise decision
            try:
                yield
            finally:
                raise decision

    hooks = load.worker(Kind, {"decides": Plain if place == "plain" else Wraps})

    with pytest.raises(type(decision)) as raised:
        hooks.setup(WORKER)
    assert raised.value is decision
    assert load.calls == ([] if place in ("plain", "before") else ["kind"])
    assert load.reports == []


def test_an_exception_that_went_through_wrappers_is_held_by_nobody(load: Loaded) -> None:
    """No frame of the loader keeps it in a cycle: what the tick had in its hands is free without a collection."""

    class Payload:
        pass

    seen: list[weakref.ref[Payload]] = []

    class Kind:
        @hookimpl
        def bghost_tick(self) -> float:
            payload = Payload()
            seen.append(weakref.ref(payload))
            raise LookupError

        @hookimpl
        def bghost_cleanup(self) -> None:
            self.bghost_tick()

    class Plain:
        @hookimpl
        def bghost_cleanup(self) -> None:
            pass

    class New(Plain):
        @hookimpl(wrapper=True)
        def bghost_tick(self) -> Any:
            return (yield)

    class Old(Plain):
        @hookimpl(hookwrapper=True)
        def bghost_tick(self) -> Any:
            yield

    hooks = load.worker(Kind, {"new": New, "old": Old})
    gc.collect()
    gc.disable()
    try:
        for call, args in ((hooks.tick, [WORKER]), (hooks.cleanup, [WORKER, None])):
            assert call is not None
            try:
                call(*args)
            except LookupError:
                pass
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


# Order


class Notes:
    """Makes extensions and kinds that note which of their hooks was called."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def extension(self, name: str, **options: bool) -> type:
        calls = self.calls

        class Extension:
            @impl(**options)
            def bghost_setup(self) -> None:
                calls.append(name)

            @impl(**options)
            def bghost_reload(self) -> None:
                calls.append(name)

            @impl(**options)
            def bghost_cleanup(self) -> None:
                calls.append(name)

            @impl(**options)
            def bghost_host_setup(self) -> None:
                calls.append(name)

            @impl(**options)
            def bghost_host_cleanup(self) -> None:
                calls.append(name)

        return Extension

    def kind(self, name: str, **options: bool) -> type:
        calls = self.calls

        class Kind(Ticks):
            bghost_setup = self.extension(name, **options).bghost_setup  # type: ignore[attr-defined]
            bghost_reload = self.extension(name, **options).bghost_reload  # type: ignore[attr-defined]
            bghost_cleanup = self.extension(name, **options).bghost_cleanup  # type: ignore[attr-defined]

            @staticmethod
            @impl(**options)
            def bghost_host_setup() -> None:
                calls.append(name)

            @staticmethod
            @impl(**options)
            def bghost_host_cleanup() -> None:
                calls.append(name)

        return Kind

    def taken(self) -> str:
        text = " ".join(self.calls)
        self.calls.clear()
        return text


@pytest.mark.parametrize("options", [{}, {"tryfirst": True}, {"trylast": True}])
def test_extensions_come_before_the_kind_and_in_a_cleanup_after_it_in_reverse(
    options: dict[str, bool], load: Loaded
) -> None:
    """tryfirst and trylast of an extension hold among the extensions, in either direction; a kind's change nothing."""
    notes = Notes(load.calls)
    extensions = {
        "a": notes.extension("a"),
        "last": notes.extension("last", trylast=True),
        "b": notes.extension("b"),
        "first": notes.extension("first", tryfirst=True),
    }
    worker = load.worker(notes.kind("kind", **options), extensions)
    host = load.host({"one": notes.kind("one", **options), "two": notes.kind("two", **options)}, extensions)

    worker.setup(WORKER)
    assert notes.taken() == "first a b last kind"
    worker.reload(WORKER, None, None)
    assert notes.taken() == "first a b last kind"
    worker.cleanup(WORKER, None)
    assert notes.taken() == "kind first b a last"
    host.host_setup(HOST)
    setup = notes.taken().split()
    host.host_cleanup(HOST)
    cleanup = notes.taken().split()
    assert setup[:4] == ["first", "a", "b", "last"]
    assert cleanup[2:] == ["first", "b", "a", "last"]
    assert setup[4:] == cleanup[1::-1]
    if "trylast" not in options:
        assert setup[4:] == ["one", "two"]


def test_every_cleanup_runs_whoever_fails(load: Loaded) -> None:
    """Then the kind's error is raised; a second one, of whatever class, can only be reported."""
    notes = Notes(load.calls)

    class Kind(Ticks):
        @hookimpl
        def bghost_cleanup(self) -> None:
            load.calls.append("kind")
            raise LookupError("of the kind")

    class Leaves:
        @hookimpl
        def bghost_cleanup(self) -> None:
            load.calls.append("leaves")
            raise SystemExit(4)

    class Bad:
        @hookimpl
        def bghost_cleanup(self) -> None:
            load.calls.append("bad")
            raise ValueError("of an extension")

    hooks = load.worker(Kind, {"a": notes.extension("a"), "bad": Bad, "leaves": Leaves})

    with pytest.raises(LookupError, match="of the kind"):
        hooks.cleanup(WORKER, None)

    assert notes.taken() == "kind leaves bad a"
    assert load.reported == [("leaves", "bghost_cleanup", "4"), ("bad", "bghost_cleanup", "of an extension")]


def test_every_host_cleanup_runs_and_the_first_error_of_a_kind_is_raised(load: Loaded) -> None:
    def kind(name: str) -> type:
        class Kind(Ticks):
            @staticmethod
            @hookimpl
            def bghost_host_cleanup() -> None:
                load.calls.append(name)
                raise LookupError(f"of {name}")

        return Kind

    notes = Notes(load.calls)
    hooks = load.host({"one": kind("one"), "two": kind("two")}, {"a": notes.extension("a")})

    with pytest.raises(LookupError, match="of two"):
        hooks.host_cleanup(HOST)

    assert notes.taken() == "two one a"
    assert load.reported == [("one", "bghost_host_cleanup", "of one")]


@pytest.mark.parametrize("hook", ["setup", "reload"])
def test_a_kinds_own_error_leaves_the_call(hook: str, load: Loaded) -> None:
    class Kind(Ticks):
        @hookimpl
        def bghost_setup(self) -> None:
            raise LookupError("of the kind")

        @hookimpl
        def bghost_reload(self, old: Any, new: Any) -> None:
            raise LookupError("of the kind")

    notes = Notes(load.calls)
    hooks = load.worker(Kind, {"a": notes.extension("a")})

    with pytest.raises(LookupError, match="of the kind"):
        hooks.setup(WORKER) if hook == "setup" else hooks.reload(WORKER, 1, 2)

    assert load.calls == ["a"]


# What the runtime gets


def test_a_hook_that_the_kind_alone_implements_is_its_own_bound_method(load: Loaded) -> None:
    class Kind(Ticks):
        @hookimpl
        def bghost_setup(self, worker: Any) -> None: ...

        @hookimpl
        def bghost_recover(self, worker: Any, error: Exception) -> Recovery:
            return Recovery.STOP

    hooks = load.worker(Kind, {"other": type("Other", (), {"bghost_cleanup": hookimpl(lambda self: None)})})

    assert hooks.tick == hooks.kind_object.bghost_tick
    assert hooks.setup == hooks.kind_object.bghost_setup
    assert hooks.recover == hooks.kind_object.bghost_recover
    assert hooks.main is None
    assert hooks.is_async is False


def test_hooks_that_nobody_implements_share_one_call_that_does_nothing(load: Loaded) -> None:
    hooks = load.worker(Ticks)

    assert hooks.setup is hooks.reload is hooks.recover is hooks.cleanup
    assert hooks.recover(WORKER, LookupError()) is None


def test_a_hook_takes_those_arguments_that_it_wants_in_any_order(load: Loaded) -> None:
    class Kind:
        @hookimpl
        def bghost_main(self) -> None:
            load.calls.append("main")

        @hookimpl
        def bghost_reload(self, new: str, old: str = "") -> None:
            load.calls.append(f"{old} to {new}")

        @hookimpl
        @staticmethod
        def bghost_cleanup(reason: str) -> None:
            load.calls.append(reason)

        @hookimpl
        def bghost_recover(self, error: Exception, /) -> Recovery:
            load.calls.append(str(error))
            return Recovery.RESTART

    hooks = load.worker(Kind)

    assert hooks.main is not None and hooks.tick is None
    hooks.main(WORKER)
    hooks.reload(WORKER, "old", "new")
    hooks.cleanup(WORKER, "done")
    assert hooks.recover(WORKER, LookupError("lost")) is Recovery.RESTART
    assert load.calls == ["main", "old to new", "done", "lost"]


def test_recover_can_be_wrapped_where_the_kind_has_none(load: Loaded) -> None:
    class Wraps:
        @hookimpl(wrapper=True)
        def bghost_recover(self, error: Exception) -> Any:
            load.calls.append(str(error))
            return (yield)

    hooks = load.worker(Ticks, {"wraps": Wraps})

    assert hooks.recover(WORKER, LookupError("lost")) is None
    assert load.calls == ["lost"]


def test_a_module_is_a_kind_and_another_an_extension(load: Loaded) -> None:
    kind = ModuleType("kind_module")
    exec("import bghost\n@bghost.hookimpl\ndef bghost_tick(): return 4.0", kind.__dict__)
    extension = ModuleType("extension_module")

    def bghost_setup(worker: Any) -> None:
        load.calls.append("extension")

    extension.bghost_setup = hookimpl(bghost_setup)  # type: ignore[attr-defined]
    extension.bghost_postgres = ModuleType("bghost_postgres")  # type: ignore[attr-defined]
    extension.bghost_connect = test_a_module_is_a_kind_and_another_an_extension  # type: ignore[attr-defined]

    hooks = load.worker(kind, {"extension": extension})

    hooks.setup(WORKER)
    assert hooks.tick is not None and hooks.tick(WORKER) == 4.0
    assert hooks.kind_object is kind
    assert hooks.extensions == {"extension": extension}
    assert load.calls == ["extension"]


class Levels(bghost.Settings):
    level: Annotated[int, msgspec.Meta(gt=0)] = 1


class WithSettings:
    Settings = Levels

    def __init__(self, settings: Levels) -> None:
        self.settings = settings


def test_an_extension_is_made_once_in_each_process_with_its_settings(load: Loaded) -> None:
    instance = type("Value", (), {})()
    extensions = {"settings": WithSettings, "none": Ticks.__base__, "instance": instance}

    hooks = load.worker(Ticks, extensions, {"settings": {"level": 3}})

    assert list(hooks.extensions) == ["settings", "none", "instance"]
    assert hooks.extensions["settings"].settings == Levels(level=3)
    assert hooks.extensions["instance"] is instance
    host = load.host({"kind": Ticks}, extensions)
    assert host.extensions["settings"].settings == Levels(level=1)


def test_settings_that_do_not_fit_an_extension_are_an_error_of_the_config(load: Loaded) -> None:
    with pytest.raises(ConfigError) as wrong:
        load.worker(Ticks, {"ext": WithSettings}, {"ext": {"level": 0}})

    assert str(wrong.value).startswith("ext.level = 0 is not allowed")


def test_the_kinds_types_are_told(load: Loaded) -> None:
    class Index(bghost.Args):
        index: int = 0

    class Kind(Ticks):
        Settings = Levels
        Args = Index

    worker, host = load.worker(Kind), load.host({"kind": Kind, "plain": Ticks})

    assert (worker.settings_type, worker.args_type) == (Levels, Index)
    assert (host.settings_type("kind"), host.args_type("kind")) == (Levels, Index)
    assert (host.settings_type("plain"), host.args_type("plain")) == (None, None)
    assert host.workers("plain", bghost.Settings()) is None


def test_an_extension_that_cannot_be_used_is_left_out_and_the_rest_works(load: Loaded) -> None:
    class Fails:
        def __init__(self) -> None:
            raise ValueError("not today")

    class Async:
        @hookimpl
        async def bghost_setup(self) -> None: ...

    notes = Notes(load.calls)
    tables = load.tables({"fails": Fails, "async": Async, "good": notes.extension("good")}, {})
    tables["gone"] = Found("gone", EXTENSIONS, "no_such_module:Ext", "gone-dist", "2.0"), {}
    tables["taken"] = Found("taken", EXTENSIONS, "os", "taken-dist", "2.0", problem="offered by two"), {}

    hooks = worker_hooks(load.found("kind", Ticks), Ticks, tables, report=load.report, drive=asyncio.run)

    hooks.setup(WORKER)
    assert load.calls == ["good"]
    assert list(hooks.extensions) == ["good"]
    assert {(name, hook): type(error) for name, hook, error in load.reports} == {
        (name, "load"): PluginError for name in ("fails", "async", "gone", "taken")
    }
    texts = {name: str(error) for name, _, error in load.reports}
    assert texts["gone"].startswith("extension 'gone' of gone-dist 2.0 cannot be loaded: ModuleNotFoundError")
    assert texts["taken"] == "extension 'taken' of taken-dist 2.0 is refused: offered by two"
    assert texts["fails"].startswith("extension 'fails' of fails-dist 1.0 cannot be made: ValueError: not today, at")


def test_a_kind_that_cannot_be_made_is_an_error_of_the_plugin(load: Loaded) -> None:
    class Kind(Ticks):
        def __init__(self) -> None:
            raise ValueError("not today")

    with pytest.raises(PluginError, match="^kind 'kind' of kind-dist 1.0 cannot be made: ValueError: not today, at"):
        load.worker(Kind)


def test_a_kind_may_give_up_while_it_is_made(load: Loaded) -> None:
    class Kind(Ticks):
        def __init__(self) -> None:
            raise GiveUp("enough")

    with pytest.raises(GiveUp):
        load.worker(Kind)


def test_a_class_that_goes_by_two_names_has_its_host_hooks_called_once(load: Loaded) -> None:
    class Kind(Ticks):
        @staticmethod
        @hookimpl
        def bghost_host_setup() -> None:
            load.calls.append("setup")

        @staticmethod
        @hookimpl
        def bghost_workers() -> list[WorkerSpec]:
            return [WorkerSpec(kind=name) for name in load.calls]

    hooks = load.host({"one": Kind, "two": Kind})
    hooks.host_setup(HOST)

    assert load.calls == ["setup"]
    load.calls[:] = ["two"]
    assert [spec.kind for spec in hooks.workers("two", bghost.Settings()) or ()] == ["two"]


def test_one_object_cannot_be_two_extensions(load: Loaded) -> None:
    module = ModuleType("extension_module")

    hooks = load.worker(Ticks, {"one": module, "two": module})

    assert list(hooks.extensions) == ["two"]
    ((name, hook, text),) = load.reported
    assert (name, hook) == ("one", "load")
    assert text.startswith("extension 'one' of one-dist 1.0 is refused: ValueError: Plugin already registered")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, "a value of type int"),
        ("kind", "a value of type str"),
        (["kind"], "a list with a value of type str in it"),
        ([WorkerSpec(kind="kind"), None], "a list with a value of type NoneType in it"),
        ([WorkerSpec(kind="other")], "a WorkerSpec of kind 'other'"),
    ],
)
def test_what_bghost_workers_returns_is_looked_at(value: Any, what: str, load: Loaded) -> None:
    class Kind(Ticks):
        @staticmethod
        @hookimpl
        def bghost_workers() -> Any:
            return value

    hooks = load.host({"kind": Kind})

    with pytest.raises(PluginError) as wrong:
        hooks.workers("kind", bghost.Settings())
    assert str(wrong.value) == (
        f"kind 'kind' of kind-dist 1.0: bghost_workers returned {what} "
        "(a list of bghost.WorkerSpec(kind='kind', ...), or None)"
    )


# What is refused at load

TICK = """
    @bghost.hookimpl
    def bghost_tick(self, worker): ...
"""
EXPECT_TICK = " (expected: def bghost_tick(self, worker: Worker[Any]) -> float | None)"
EXPECT_SETUP = " (expected: def bghost_setup(self, worker: Worker[Any]) -> None)"
EXPECT_HOST = " (expected: @classmethod def bghost_host_setup(cls, host: HostView) -> None)"
EXPECT_WRAPPER = (
    " (expected: @bghost.hookimpl(wrapper=True) "
    "def bghost_tick(self, worker: Worker[Any]) -> Generator[None, float | None, float | None])"
)
NEAR = " (did you mean {}?)"

KIND_PROBLEMS = {
    "an argument that the hook has not": (
        "@hookimpl\ndef bghost_tick(self, wroker): ...",
        "bghost_tick has no argument 'wroker'",
        EXPECT_TICK,
    ),
    "an argument with a default that the hook has not": (
        "@hookimpl\ndef bghost_tick(self, worker, speed=1): ...",
        "bghost_tick has no argument 'speed'",
        EXPECT_TICK,
    ),
    "no self": ("@hookimpl\ndef bghost_tick(): ...", "bghost_tick lacks its first argument, self", EXPECT_TICK),
    "keywords": (
        "@hookimpl\ndef bghost_tick(self, **kw): ...",
        "bghost_tick cannot have *, ** or keyword-only arguments, such as 'kw'",
        EXPECT_TICK,
    ),
    "a keyword-only argument": (
        "@hookimpl\ndef bghost_tick(self, *, worker): ...",
        "bghost_tick cannot have *, ** or keyword-only arguments, such as 'worker'",
        EXPECT_TICK,
    ),
    "an unknown hook": (
        "@hookimpl\ndef bghost_tikc(self, worker): ...",
        "there is no hook bghost_tikc",
        NEAR.format("bghost_tick"),
    ),
    "a marked function of some other name": (
        "@hookimpl\ndef setup(self, worker): ...",
        "there is no hook setup",
        NEAR.format("bghost_setup"),
    ),
    "an unmarked function with nearly a hook's name": (
        "def bghost_clean_up(self): ...",
        "there is no hook bghost_clean_up",
        NEAR.format("bghost_cleanup"),
    ),
    "an unmarked function with no hook's name": (
        "def bghost_xyz(self): ...",
        "there is no hook bghost_xyz",
        " (the hooks are bghost_workers, bghost_pools, bghost_host_setup, bghost_host_cleanup, bghost_setup, "
        "bghost_main, bghost_tick, bghost_reload, bghost_recover, bghost_cleanup, bghost_pool_launch_failed, "
        "bghost_pool_started, bghost_pool_exited, bghost_pool_died)",
    ),
    "a hook that is not marked": (
        "def bghost_setup(self, worker): ...",
        "bghost_setup is not marked as a hook: add @bghost.hookimpl",
        EXPECT_SETUP,
    ),
    "no function": ("bghost_setup = 3", "bghost_setup is of type int, not a function", EXPECT_SETUP),
    "a property": (
        "@property\ndef bghost_setup(self): ...",
        "bghost_setup is of type property, not a function",
        EXPECT_SETUP,
    ),
    "a generator": (
        "@hookimpl\ndef bghost_tick(self, worker): yield",
        "bghost_tick has a yield, but is no wrapper",
        EXPECT_TICK,
    ),
    "an async generator": (
        "@hookimpl\nasync def bghost_tick(self, worker): yield",
        "bghost_tick is an async generator",
        EXPECT_TICK,
    ),
    "a wrapper of its own": (
        "@hookimpl(wrapper=True)\ndef bghost_tick(self, worker): return (yield)",
        "bghost_tick is a wrapper, but wrapping is for extensions",
        EXPECT_TICK,
    ),
    "another name": (
        "@hookimpl(specname='bghost_tick')\ndef tick(self, worker): ...",
        "tick has a specname, but a hook goes by its own name",
        "",
    ),
    "an instance method in the host": (
        "@hookimpl\ndef bghost_host_setup(self, host): ...",
        "bghost_host_setup runs in the host, which makes no instance: it has to be a class or static method",
        EXPECT_HOST,
    ),
    "async in the host": (
        "@classmethod\n@hookimpl\nasync def bghost_host_setup(cls, host): ...",
        "bghost_host_setup is async def, which only a kind's hooks in a worker may be",
        EXPECT_HOST,
    ),
    "a class method without cls": (
        "@classmethod\n@hookimpl\ndef bghost_host_setup(): ...",
        "bghost_host_setup lacks its first argument, cls",
        EXPECT_HOST,
    ),
    "neither tick nor main": (
        "@hookimpl\ndef bghost_setup(self): ...",
        "it has neither bghost_tick nor bghost_main",
        EXPECT_TICK,
    ),
    "settings of its own making": (
        "class Settings: ...",
        "its Settings does not derive from bghost.Settings",
        "",
    ),
    "args that are no class": ("Args = {}", "its Args does not derive from bghost.Args", ""),
    "a constructor with arguments": (
        "def __init__(self, worker): ...",
        "it is made without arguments, and there is missing a required argument: 'worker'",
        "",
    ),
}
EXTENSION_PROBLEMS = {
    "the kind's hook": (
        "@hookimpl\ndef bghost_tick(self, worker): ...",
        "bghost_tick is the kind's, and an extension may only wrap it",
        EXPECT_WRAPPER,
    ),
    "a wrapper of bghost_workers": (
        "@hookimpl(wrapper=True)\ndef bghost_workers(self, settings): return (yield)",
        "bghost_workers is for kinds alone",
        " (expected: def bghost_workers(self, settings: Settings) -> Sequence[WorkerSpec] | None)",
    ),
    "a wrapper without a yield": (
        "@hookimpl(wrapper=True)\ndef bghost_tick(self, worker): ...",
        "bghost_tick is a wrapper without a yield",
        EXPECT_WRAPPER,
    ),
    "a wrapper of both styles": (
        "@hookimpl(wrapper=True, hookwrapper=True)\ndef bghost_tick(self, worker): yield",
        "bghost_tick is marked both wrapper and hookwrapper",
        EXPECT_WRAPPER,
    ),
    "an async wrapper": (
        "@hookimpl(wrapper=True)\nasync def bghost_tick(self, worker): yield",
        "bghost_tick is an async generator",
        EXPECT_WRAPPER,
    ),
    "an async hook": (
        "@hookimpl\nasync def bghost_setup(self, worker): ...",
        "bghost_setup is async def, which only a kind's hooks in a worker may be",
        EXPECT_SETUP,
    ),
    "a constructor that takes no settings": (
        "Settings = bghost.Settings",
        "it is made with its settings as the one argument, and there is too many positional arguments",
        "",
    ),
}


@pytest.mark.parametrize(
    ("group", "name"), [(KINDS, name) for name in KIND_PROBLEMS] + [(EXTENSIONS, name) for name in EXTENSION_PROBLEMS]
)
def test_what_is_wrong_is_told_at_load_with_place_and_signature(
    group: str, name: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole message, of a plugin in a distribution of its own; nothing of it has been made or called."""
    body, problem, hint = (KIND_PROBLEMS if group == KINDS else EXTENSION_PROBLEMS)[name]
    lines = [
        "import bghost",
        "from bghost import hookimpl",
        "class Bad:",
        *("    " + line for line in body.splitlines()),
    ]
    if group == KINDS and "bghost_tick" not in problem:
        lines += TICK.splitlines()
    sandbox.distribution("bad-dist", {"bad_hooks": "\n".join(lines)}, {group: {"bad": "bad_hooks:Bad"}}, version="0.3")
    monkeypatch.syspath_prepend(str(sandbox.site))
    monkeypatch.delitem(sys.modules, "bad_hooks", raising=False)
    catalog = discover()
    found = (catalog.kinds if group == KINDS else catalog.extensions)["bad"]

    with pytest.raises(PluginError) as refused:
        verify(found, found.load())

    of_the_whole = problem.startswith(("it ", "its ")) or " is of type " in problem
    place = "entry point bad_hooks:Bad" if of_the_whole else f"{sandbox.site / 'bad_hooks.py'}:4"
    word = "kind" if group == KINDS else "extension"
    assert str(refused.value) == f"{word} 'bad' of bad-dist 0.3: {problem}: at {place}{hint}"
    assert refused.value.exit_code == 1
    monkeypatch.delitem(sys.modules, "bad_hooks")


def test_a_kind_is_a_class_or_a_module(load: Loaded) -> None:
    with pytest.raises(PluginError) as refused:
        load.worker(Ticks())

    assert str(refused.value) == (
        "kind 'kind' of kind-dist 1.0: it is of type Ticks, not a class or a module: "
        "at entry point plugins_of_a_test:kind"
    )


def test_a_hook_of_another_version_of_bghost_may_be_there_if_it_is_optional(load: Loaded) -> None:
    class Kind(Ticks):
        @hookimpl(optionalhook=True)
        def bghost_of_the_future(self, worker: Any, anything: Any) -> None: ...

    assert load.worker(Kind).tick is not None


def test_a_plugin_that_cannot_even_be_looked_at_is_left_out(load: Loaded) -> None:
    module = ModuleType("extension_module")
    exec("def __getattr__(name): raise OSError(f'no {name} here')", module.__dict__)

    hooks = load.worker(Ticks, {"odd": module})

    assert hooks.extensions == {}
    ((_, _, text),) = load.reported
    assert text.startswith("extension 'odd' of odd-dist 1.0 cannot be looked over: OSError: no Settings here, at ")


def test_the_host_refuses_a_kind_for_its_worker_hooks_too(load: Loaded) -> None:
    class Kind(Ticks):
        @hookimpl
        def bghost_setup(self, wroker: Any) -> None: ...

    with pytest.raises(PluginError, match="bghost_setup has no argument 'wroker'"):
        load.host({"kind": Kind})


@pytest.mark.parametrize("hook", SPECS)
def test_the_signature_that_is_shown_is_a_hook_as_it_can_be_written(hook: str, load: Loaded) -> None:
    source = f"@hookimpl\n{expected(hook)}: ..."
    names = {
        "hookimpl": hookimpl,
        "Any": Any,
        **dict.fromkeys(("HostView", "Settings", "Recovery", "Reason", "Event"), Any),
    }
    names.update(dict.fromkeys(("Worker", "Sequence", "Pool", "PoolSpec"), list), WorkerSpec=WorkerSpec)
    exec(source, names)

    assert tuple(inspect.signature(names[hook]).parameters) == tuple(inspect.signature(SPECS[hook]).parameters)  # type: ignore[arg-type]


# Any set of extensions

STYLES = st.sampled_from(["plain", "wrapper", "hookwrapper"])
POINTS = st.sampled_from(["never", "before", "no yield", "after", "second yield", "over the error"])
OPTIONS = st.sampled_from([{}, {"tryfirst": True}, {"trylast": True}])


def extension(hook: str, style: str, point: str, options: dict[str, bool]) -> type:
    """An extension that fails at *point*, and changes nothing where it does not."""

    if style == "plain":

        def function(self: Any) -> Any:
            if point != "never":
                raise ValueError(point)

    else:

        def function(self: Any) -> Any:
            if point == "before":
                raise ValueError(point)
            if point == "no yield":
                return None
            try:
                outcome = yield
                if style == "hookwrapper" and outcome.exception is not None:
                    raise outcome.exception
            except LookupError:
                if point == "over the error":
                    raise ValueError(point) from None
                raise
            if point == "after":
                raise ValueError(point)
            if point == "second yield":
                yield
            return outcome

        options = {**options, style: True}
    function.__name__ = hook
    return type("Extension", (), {hook: impl(**options)(function)})


@given(
    extensions=st.lists(st.tuples(STYLES, POINTS, OPTIONS), max_size=6),
    hook=st.sampled_from(["setup", "tick", "recover", "reload", "cleanup", "main"]),
    fails=st.booleans(),
    is_async=st.booleans(),
)
def test_whatever_extensions_do_the_kinds_hook_runs_once_and_its_outcome_counts(
    extensions: list[tuple[str, str, dict[str, bool]]], hook: str, fails: bool, is_async: bool
) -> None:
    """Plain ones, wrappers of both styles, in any order, good or failing at any point."""
    module = ModuleType("plugins_of_a_test")
    sys.modules[module.__name__] = module
    load = Loaded(module)
    error = LookupError("of the kind")

    def outcome(self: Any) -> Any:
        load.calls.append("kind")
        if fails:
            raise error
        return 1.5

    async def later(self: Any) -> Any:
        return outcome(self)

    name = f"bghost_{hook}"
    kind = type("Kind", (Ticks,), {name: hookimpl(later if is_async else outcome)})
    made = {
        f"e{number}": extension(name, style, point, options)
        for number, (style, point, options) in enumerate(extensions)
        if style != "plain" or hook in ("setup", "reload", "cleanup")
    }
    hooks = load.worker(kind, made)
    call = getattr(hooks, hook)
    try:
        result = call(*[WORKER] * len(inspect.signature(SPECS[name]).parameters))
    except LookupError as raised:
        assert fails and raised is error
    else:
        assert not fails
        if hook in ("tick", "recover", "main"):
            assert result == 1.5
    finally:
        del sys.modules[module.__name__]
    assert load.calls == ["kind"]
    assert list(hooks.extensions) == list(made)
    failing = {number for number, (style, point, _) in enumerate(extensions) if _fails(style, point, fails)}
    assert {name for name, _, _ in load.reports} == {f"e{number}" for number in failing} & set(made)


def _fails(style: str, point: str, fails: bool) -> bool:
    if style == "plain":
        return point != "never"
    return point in ("before", "no yield") or point in (("over the error",) if fails else ("after", "second yield"))


@given(
    extensions=st.lists(st.tuples(st.sampled_from(["wrapper", "hookwrapper"]), OPTIONS), max_size=6),
    fails=st.booleans(),
)
def test_wrappers_that_work_do_what_they_do_under_plain_pluggy(
    extensions: list[tuple[str, dict[str, bool]]], fails: bool
) -> None:
    """The same order, the same result, where nobody fails."""
    module = ModuleType("plugins_of_a_test")
    sys.modules[module.__name__] = module
    load = Loaded(module)

    class Kind:
        @hookimpl
        def bghost_tick(self) -> Any:
            load.calls.append("kind")
            if fails:
                raise LookupError
            return ["kind"]

    def wrapper(number: int, style: str, options: dict[str, bool]) -> type:
        def new(self: Any) -> Any:
            load.calls.append(f"{number} before")
            try:
                result = yield
            except LookupError:
                result = []
            load.calls.append(f"{number} after")
            return [*result, number]

        def old(self: Any) -> Any:
            load.calls.append(f"{number} before")
            outcome = yield
            load.calls.append(f"{number} after")
            outcome.force_result([*([] if outcome.exception else outcome.get_result()), number])

        function = new if style == "wrapper" else old
        return type("Wrapper", (), {"bghost_tick": impl(**{style: True}, **options)(function)})

    made = {f"e{number}": wrapper(number, *one) for number, one in enumerate(extensions)}
    manager = pluggy.PluginManager("bghost")
    manager.add_hookspecs(hookspecs)
    for one in reversed(made.values()):
        manager.register(one())
    manager.register(Kind())
    hooks = load.worker(Kind, made)
    del sys.modules[module.__name__]
    assert hooks.tick is not None

    def outcome(call: Callable[[], object]) -> tuple[object, list[str]]:
        load.calls.clear()
        try:
            return call(), list(load.calls)
        except LookupError:
            return "LookupError", list(load.calls)

    tick = hooks.tick
    assert outcome(lambda: tick(WORKER)) == outcome(lambda: manager.hook.bghost_tick(worker=WORKER))

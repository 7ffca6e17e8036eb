"""The hook loader: makes one plain call of all that implement a hook, in the host and in a worker.

pluggy keeps, binds and orders the implementations. The calls are our own, since pluggy's end with the first one that
raises, and let a wrapper that fails replace what it wraps. What holds of ours:

- Of errors, only the kind's leaves a call. An extension's goes to the reporter, and keeps nobody else from running.
- A wrapper that works may change a result. One that fails, before its yield or after, changes nothing.
- What decides over the worker (:func:`_decides`) passes through everything, and no wrapper can swallow it.
- Extensions come before the kind; in a clean-up they come after it, in reverse, and every one runs whoever raises.
- A hook that the kind alone implements is called with nothing in between.
"""

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pluggy

from bghost import hookspecs
from bghost.hookspecs import HOST_HOOKS
from bghost.shared.errors import BghostError, Canceled, GiveUp, PluginError
from bghost.shared.plugins import WORDS, Found
from bghost.shared.pools import Layout
from bghost.shared.settings import convert
from bghost.shared.spec import Args, Settings, WorkerSpec
from bghost.shared.verify import ARGS, SPECS, Mark, Plugin, verify

Call = Callable[..., Any]
Reporter = Callable[[str, str, BaseException], None]
"""Told an extension's name, the hook (``load``: it is left out) and the error, which is being handled just then."""
Drive = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs the coroutine of an ``async def`` hook to its end, and gives its result."""
Tables = Mapping[str, tuple[Found, Mapping[str, Any]]]
"""The active extensions by name, each with the table of its settings."""


@dataclass(frozen=True, slots=True)
class WorkerHooks:
    """The hooks of one worker process, to be called with their arguments by position.

    :param kind_object: the kind's instance, or its module.
    :param extensions: what is called of each extension, by name; those that failed to load are left out.
    :param main: ``None`` if the kind has none, and so *tick*.
    """

    kind_object: Any
    extensions: Mapping[str, Any]
    is_async: bool
    has_pools: bool
    settings_type: type[Settings] | None
    args_type: type[Args] | None
    setup: Call
    main: Call | None
    tick: Call | None
    reload: Call
    recover: Call
    cleanup: Call
    pool_launch_failed: Call
    pool_started: Call
    pool_exited: Call
    pool_died: Call


def worker_hooks(found: Found, kind: object, tables: Tables, *, report: Reporter, drive: Drive) -> WorkerHooks:
    """Make the kind and the extensions, and their hooks ready to be called. Runs in: worker.

    :param kind: what ``found.load()`` gave.
    :raises PluginError: if the kind is not in order, or could not be made.
    :raises ConfigError: if the settings of an extension do not fit.
    """
    plugin = verify(found, kind)
    manager = _Manager(frozenset(SPECS) - HOST_HOOKS, report, drive)
    extensions = manager.add_extensions(tables)
    made = _make(plugin)
    manager.add(plugin, made)
    return WorkerHooks(
        kind_object=made,
        extensions=extensions,
        is_async=any(inspect.iscoroutinefunction(getattr(made, hook)) for hook in plugin.marks),
        has_pools="bghost_pools" in plugin.marks,
        settings_type=plugin.settings_type,
        args_type=plugin.args_type,
        setup=manager.call("bghost_setup"),
        main=manager.call("bghost_main") if "bghost_main" in plugin.marks else None,
        tick=manager.call("bghost_tick") if "bghost_tick" in plugin.marks else None,
        reload=manager.call("bghost_reload"),
        recover=manager.call("bghost_recover"),
        cleanup=manager.call("bghost_cleanup"),
        pool_launch_failed=manager.call("bghost_pool_launch_failed"),
        pool_started=manager.call("bghost_pool_started"),
        pool_exited=manager.call("bghost_pool_exited"),
        pool_died=manager.call("bghost_pool_died"),
    )


class HostHooks:
    """The hooks that run in the host, of the kinds named at its start and of the extensions. Made by host_hooks()."""

    def __init__(self, kinds: Mapping[str, Plugin], extensions: Mapping[str, Any], manager: "_Manager") -> None:
        self.extensions: Final = extensions
        self.host_setup: Final = manager.call("bghost_host_setup")
        """Takes the HostView. The first error of a kind is raised, and ends the call."""
        self.host_cleanup: Final = manager.call("bghost_host_cleanup")
        """Takes the HostView. All of them run, then the first error of a kind is raised."""
        self._kinds = kinds
        self._workers = {id(impl.plugin): _adapted(impl, "bghost_workers") for impl in manager.impls("bghost_workers")}
        self._pools = {id(impl.plugin): _adapted(impl, "bghost_pools") for impl in manager.impls("bghost_pools")}

    def workers(self, kind: str, settings: Settings) -> Sequence[WorkerSpec] | None:
        """The workers that *kind* asks for; ``None`` if it does not say.

        :raises PluginError: if its hook returned anything else. What the hook raises is raised.
        """
        plugin = self._kinds[kind]
        specs = self._workers.get(id(plugin.object), _nothing)(settings)
        if specs is None:
            return None
        if not isinstance(specs, (list, tuple)):
            raise _no_specs(plugin, f"a value of type {type(specs).__name__}")
        for spec in specs:
            if not isinstance(spec, WorkerSpec):
                raise _no_specs(plugin, f"a list with a value of type {type(spec).__name__} in it")
            if spec.kind != kind:
                raise _no_specs(plugin, f"a WorkerSpec of kind {spec.kind!r}")
        return specs

    def pools(self, kind: str, settings: Settings) -> Sequence[Layout]:
        """The pools that *kind* manages.

        :raises PluginError: if its hook returned anything else. What the hook raises is raised.
        """
        plugin = self._kinds[kind]
        specs = self._pools.get(id(plugin.object), _nothing)(settings)
        if specs is None:
            return ()
        from bghost.shared.poolspec import PoolSpec

        if not isinstance(specs, (list, tuple)) or not all(isinstance(spec, PoolSpec) for spec in specs):
            raise PluginError(f"{plugin.found}: bghost_pools gave {specs!r}", hint="a list of PoolSpecs is expected")
        return [spec.layout(kind) for spec in specs]

    def settings_type(self, kind: str) -> type[Settings] | None:
        """The ``Settings`` that *kind* declares, if any."""
        return self._kinds[kind].settings_type

    def args_type(self, kind: str) -> type[Args] | None:
        """The ``Args`` that *kind* declares, if any."""
        return self._kinds[kind].args_type


def host_hooks(kinds: Mapping[str, tuple[Found, object]], tables: Tables, *, report: Reporter) -> HostHooks:
    """Make the extensions, and the hooks that run in the host ready to be called. Runs in: host.

    :param kinds: by name, each with what its ``load()`` gave; their order is that of their hooks.
    :raises PluginError: if a kind is not in order.
    :raises ConfigError: if the settings of an extension do not fit.
    """
    plugins = {name: verify(found, kind) for name, (found, kind) in kinds.items()}
    manager = _Manager(HOST_HOOKS, report)
    extensions = manager.add_extensions(tables)
    for plugin in reversed(plugins.values()):
        if not manager.is_registered(plugin.object):  # a class may go by two names; its hooks are called once
            manager.add(plugin, plugin.object)
    return HostHooks(plugins, extensions, manager)


def _no_specs(plugin: Plugin, what: str) -> PluginError:
    hint = f"a list of bghost.WorkerSpec(kind={plugin.found.name!r}, ...), or None"
    return PluginError(f"{plugin.found}: bghost_workers returned {what}", hint=hint)


def _make(plugin: Plugin, *arguments: object) -> Any:
    if not inspect.isclass(plugin.object):
        return plugin.object
    try:
        return plugin.object(*arguments)
    except Exception as error:
        if _decides(error):
            raise
        raise plugin.found.failure("cannot be made", error) from error


class _Manager(pluggy.PluginManager):
    """pluggy's manager, for the hooks of one side; of a plugin it takes what verify() has seen and no more."""

    def __init__(self, hooks: frozenset[str], report: Reporter, drive: Drive | None = None) -> None:
        super().__init__("bghost")
        self._side = hooks
        self.add_hookspecs(hookspecs)
        self._report = report
        self._drive = drive
        self._marks: Mapping[str, Mark] = {}

    def parse_hookspec_opts(self, namespace: object, name: str) -> pluggy.HookspecOpts | None:
        return getattr(SPECS[name], "bghost_spec", None) if name in self._side else None

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Mark | None:
        return self._marks.get(name) if name in self._side else None

    def add(self, plugin: Plugin, made: object) -> None:
        """Register *made*, which came of *plugin*.

        :raises PluginError: if it is registered already.
        """
        self._marks = plugin.marks
        try:
            self.register(made, f"{WORDS[plugin.found.group]} {plugin.found.name}")
        except (ValueError, pluggy.PluginValidationError) as error:
            raise plugin.found.failure("is refused", error) from error

    def add_extensions(self, tables: Tables) -> dict[str, Any]:
        """Load, make and register extensions; give back those that could be. The others are reported."""
        extensions = {}
        for name in reversed(list(tables)):  # of two plugins, pluggy calls first the one that was registered last
            found, table = tables[name]
            try:
                plugin = verify(found, found.load())
                settings = plugin.settings_type and convert(table, plugin.settings_type, name)
                extensions[name] = _make(plugin) if settings is None else _make(plugin, settings)
                self.add(plugin, extensions[name])
            except PluginError as error:
                extensions.pop(name, None)
                self._report(name, "load", error)
        return {name: extensions[name] for name in tables if name in extensions}

    def impls(self, hook: str) -> list[pluggy.HookImpl]:
        """The implementations of *hook*, wrappers first, in pluggy's order of calls."""
        caller: pluggy.HookCaller = getattr(self.hook, hook)
        return caller.get_hookimpls()[::-1]

    def call(self, hook: str) -> Call:
        """The one call of all that implement *hook*."""
        impls = self.impls(hook)
        plain = [impl for impl in impls if not (impl.wrapper or impl.hookwrapper)]
        kinds = [(_name(impl), self._of_kind(impl, hook)) for impl in plain if _is_kind(impl)]
        others = [impl for impl in plain if not _is_kind(impl)]
        cleanup = hook.endswith("_cleanup")
        if cleanup:
            kinds.reverse()
            others.reverse()
            others.sort(key=lambda impl: impl.trylast - impl.tryfirst)  # these two mean what they say here, too
        guarded = [(_name(impl), self._guarded(impl, hook)) for impl in others]
        steps = kinds + guarded if cleanup else guarded + kinds
        if len(steps) > 1:
            call = self._every(steps, hook) if cleanup else _in_turn([step for _, step in steps])
        else:
            call = steps[0][1] if steps else _nothing
        for impl in reversed(impls):
            if impl.wrapper or impl.hookwrapper:
                call = self._wrapped(impl, hook, call)
        return call

    def _of_kind(self, impl: pluggy.HookImpl, hook: str) -> Call:
        call, drive = _adapted(impl, hook), self._drive
        if drive is None or not inspect.iscoroutinefunction(impl.function):
            return call
        return lambda *args: drive(call(*args))  # here, below the wrappers: they see results, not coroutines

    def _guarded(self, impl: pluggy.HookImpl, hook: str) -> Call:
        inner, failed = _adapted(impl, hook), partial(self._report, _name(impl), hook)
        # What the host cannot do without, an extension says so: the host does not start then.
        passes = BghostError if hook == "bghost_host_setup" else ()

        def call(*args: object) -> None:
            try:
                inner(*args)
            except passes:
                raise
            except Exception as error:
                if _decides(error):
                    raise
                failed(error)

        return call

    def _every(self, steps: Sequence[tuple[str, Call]], hook: str) -> Call:
        report = self._report

        def call(*args: object) -> None:
            first: BaseException | None = None
            try:
                for name, step in steps:
                    try:
                        step(*args)
                    except BaseException as error:
                        if first is None:
                            first = error
                        else:
                            report(name, hook, error)  # only one can be raised
                if first is not None:
                    raise first
            finally:
                del first  # its traceback holds this frame

        return call

    def _wrapped(self, impl: pluggy.HookImpl, hook: str, inner: Call) -> Call:
        start, failed = _adapted(impl, hook), partial(self._report, _name(impl), hook)
        old = impl.hookwrapper

        def call(*args: object) -> object:
            wrapper = start(*args)  # a generator: nothing of it runs yet
            begun = False
            try:
                next(wrapper)
                begun = True
            except StopIteration:
                failed(RuntimeError("the wrapper did not yield"))
            except Exception as error:
                if _decides(error):
                    raise
                failed(error)
            if not begun:
                return inner(*args)
            result = raised = None
            try:
                try:
                    result = inner(*args)
                except BaseException as error:
                    raised = error
                try:
                    changed = _finish(wrapper, result, raised, old=old)
                    if not _decides(raised):
                        return changed
                except BaseException as error:
                    # A StopIteration cannot leave a generator; it comes out inside of a RuntimeError.
                    if error is not raised and not (isinstance(raised, StopIteration) and error.__cause__ is raised):
                        if _decides(error):
                            raise
                        failed(error)
                # Not in an except block, where the kind's exception would be given a context that is none of its own.
                if raised is not None:
                    raise raised
                return result
            finally:
                del raised  # its traceback holds this frame

        return call


def _finish(wrapper: Any, result: object, raised: BaseException | None, *, old: bool) -> object:
    """Tell *wrapper* how the call that it wraps ended; give what it makes of that, or raise what it raises."""
    outcome: pluggy.Result[object] = pluggy.Result(result, raised)
    try:
        try:
            if old:
                wrapper.send(outcome)
            elif raised is not None:
                wrapper.throw(raised)
            else:
                wrapper.send(result)
        except StopIteration as end:
            result = end.value
        else:
            wrapper.close()
            raise RuntimeError("the wrapper yielded a second time")
        if not old:
            return result
        if outcome.exception is not None:
            raise outcome.exception  # get_result() would do that from a frame that holds it
        return outcome.get_result()
    finally:
        del raised, outcome


def _in_turn(steps: Sequence[Call]) -> Call:
    def call(*args: object) -> None:
        for step in steps:
            step(*args)

    return call


def _nothing(*_: object) -> None:
    """The call of a hook that nobody implements."""


def _decides(error: BaseException | None) -> bool:
    """Whether *error* decides over the worker: Stop, SystemExit and whatever else is no Exception, GiveUp, Canceled."""
    return error is not None and (not isinstance(error, Exception) or isinstance(error, (GiveUp, Canceled)))


def _is_kind(impl: pluggy.HookImpl) -> bool:
    return impl.plugin_name.startswith("kind ")


def _name(impl: pluggy.HookImpl) -> str:
    return impl.plugin_name.partition(" ")[2]


def _adapted(impl: pluggy.HookImpl, hook: str) -> Call:
    """*impl*'s function as one of all the hook's arguments, by position; the very function where it is such a one."""
    function, taken, given = impl.function, (*impl.argnames, *impl.kwargnames), ARGS[hook]
    if taken == given:
        return function
    if not taken and len(given) == 1:
        return lambda _: function()
    places = [given.index(name) for name in taken]
    return lambda *args: function(*[args[place] for place in places])

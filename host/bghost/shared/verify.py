"""Whether a plugin is what a kind or an extension has to be: found out when it is loaded, not when a hook is called."""

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any, Final

import pluggy

from bghost import hookspecs
from bghost.hookspecs import HOST_HOOKS, KIND_HOOKS
from bghost.shared.errors import PluginError
from bghost.shared.plugins import KINDS, Found
from bghost.shared.spec import Args, Settings

Mark = pluggy.HookimplOpts
SPECS: Final[Mapping[str, FunctionType]] = {
    name: item for name, item in vars(hookspecs).items() if name.startswith("bghost_")
}
ARGS: Final = {name: tuple(inspect.signature(spec).parameters) for name, spec in SPECS.items()}
"""For each hook the names of its arguments."""

_BY_PLACE: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A kind or an extension that is in order.

    :param object: what was loaded: a class, a module, or (an extension) an instance.
    :param marks: for each hook that it implements, what its ``hookimpl`` was given.
    """

    found: Found
    object: Any
    marks: Mapping[str, Mark]
    settings_type: type[Settings] | None
    args_type: type[Args] | None


def verify(found: Found, loaded: object) -> Plugin:
    """See whether *loaded*, which *found* gave, is a kind or an extension. Makes no instance, calls no hook.

    :raises PluginError: telling the first thing that is wrong, where, and how the hook is written.
    """
    home: Any = loaded if inspect.isclass(loaded) or isinstance(loaded, ModuleType) else type(loaded)
    try:
        return Plugin(found, loaded, *_examined(found, home, home is not loaded))
    except PluginError:
        raise
    except Exception as error:  # of a metaclass, a module's __getattr__, or whatever else answers when it is looked at
        raise found.failure("cannot be looked over", error) from error


@cache  # what the host has verified, the workers that it forks need not
def _examined(found: Found, home: Any, is_instance: bool) -> tuple[dict[str, Mark], Any, Any]:
    return _Examination(found, home, is_instance).run()


def expected(hook: str, first: str = "", *, wrapper: bool = False) -> str:
    """How *hook* is written, taken from hookspecs.py.

    :param first: its argument ``self`` or ``cls``, if it has one.
    """

    def words(annotation: object) -> str:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        return re.sub(r"\b(\w+\.)+", "", text)

    signature = inspect.signature(SPECS[hook])
    arguments = [f"{name}: {words(argument.annotation)}" for name, argument in signature.parameters.items()]
    if first:
        arguments.insert(0, first)
    result = words(signature.return_annotation)
    if wrapper:
        result = f"Generator[None, {result}, {result}]"
    decorator = "@bghost.hookimpl(wrapper=True) " if wrapper else "@classmethod " if first == "cls" else ""
    return f"{decorator}def {hook}({', '.join(arguments)}) -> {result}"


def _mark(item: object) -> Mark | None:
    # Nothing is asked of an object that is no function: there are some that answer to every name.
    if isinstance(item, (FunctionType, classmethod, staticmethod)):
        for holder in (item, getattr(item, "__func__", None)):  # @hookimpl above @classmethod, or below it
            mark: Mark | None = getattr(holder, "bghost_impl", None)
            if mark is not None:
                return mark
    return None


class _Examination:
    def __init__(self, found: Found, home: Any, is_instance: bool) -> None:
        self.found = found
        self.home = home  # where the hooks are defined: the class, or the module
        self.is_instance = is_instance
        self.is_module = isinstance(home, ModuleType)
        self.is_kind = found.group == KINDS

    def run(self) -> tuple[dict[str, Mark], type[Settings] | None, type[Args] | None]:
        if self.is_kind and self.is_instance:
            raise self.refused(f"it is of type {self.home.__name__}, not a class or a module")
        marks = {}
        for name in dir(self.home):
            mark = self.hook(name, inspect.getattr_static(self.home, name, None))
            if mark is not None:
                marks[name] = mark
        if self.is_kind and "bghost_tick" not in marks and "bghost_main" not in marks:
            raise self.refused("it has neither bghost_tick nor bghost_main", hook="bghost_tick")
        settings_type = self.struct("Settings", Settings)
        args_type = self.struct("Args", Args) if self.is_kind else None
        if not self.is_module and not self.is_instance:
            self.constructor(with_settings=settings_type is not None and not self.is_kind)
        return marks, settings_type, args_type

    def hook(self, name: str, item: object) -> Mark | None:
        """The mark of *item* as an implementation of the hook *name*; ``None`` if it is not meant as one."""
        function = item if self.is_module else getattr(item, "__func__", item)
        mark = _mark(item)
        refused = partial(self.refused, function=function, hook=name)
        if mark is not None and mark["specname"]:
            raise refused(f"{name} has a specname, but a hook goes by its own name")
        if name not in SPECS:
            self.unknown(name, function, mark)
            return None
        if not isinstance(function, FunctionType):
            raise refused(f"{name} is of type {type(item).__name__}, not a function")
        if mark is None:
            raise refused(f"{name} is not marked as a hook: add @bghost.hookimpl")

        wraps = mark["wrapper"] or mark["hookwrapper"]
        if mark["wrapper"] and mark["hookwrapper"]:
            raise refused(f"{name} is marked both wrapper and hookwrapper")
        if self.is_kind and wraps:
            raise refused(f"{name} is a wrapper, but wrapping is for extensions")
        if not self.is_kind and name in KIND_HOOKS & HOST_HOOKS:
            raise refused(f"{name} is for kinds alone")
        if not self.is_kind and name in KIND_HOOKS and not wraps:
            raise refused(f"{name} is the kind's, and an extension may only wrap it")

        if inspect.isasyncgenfunction(function):
            raise refused(f"{name} is an async generator")
        if inspect.iscoroutinefunction(function) and not (self.is_kind and name not in HOST_HOOKS):
            raise refused(f"{name} is async def, which only a kind's hooks in a worker may be")
        if wraps and not inspect.isgeneratorfunction(function):
            raise refused(f"{name} is a wrapper without a yield")
        if not wraps and inspect.isgeneratorfunction(function):
            raise refused(f"{name} has a yield, but is no wrapper")

        if self.is_kind and not self.is_module and name in HOST_HOOKS and function is item:
            raise refused(f"{name} runs in the host, which makes no instance: it has to be a class or static method")
        given = list(inspect.signature(function).parameters.values())
        if not self.is_module and not isinstance(item, staticmethod):
            if not given or given[0].kind not in _BY_PLACE:
                raise refused(f"{name} lacks its first argument, {self.first(name)}")
            del given[0]
        for argument in given:
            if argument.kind not in _BY_PLACE:
                raise refused(f"{name} cannot have *, ** or keyword-only arguments, such as {argument.name!r}")
            if argument.name not in ARGS[name]:
                raise refused(f"{name} has no argument {argument.name!r}")
        return mark

    def unknown(self, name: str, function: object, mark: Mark | None) -> None:
        if mark is not None and mark["optionalhook"]:
            return  # a hook of another version of bghost
        if mark is None:
            # A module may import functions of such names for its own use; in a class they are meant as hooks.
            imported = self.is_module and getattr(function, "__module__", None) != self.home.__name__
            if imported or not (isinstance(function, FunctionType) and name.startswith("bghost_")):
                return
        # Without the prefix, which would make all of them alike.
        words = [hook.removeprefix("bghost_") for hook in SPECS]
        matches = difflib.get_close_matches(name.removeprefix("bghost_"), words, n=1, cutoff=0.5)
        hint = f"did you mean bghost_{matches[0]}?" if matches else f"the hooks are {', '.join(SPECS)}"
        raise self.refused(f"there is no hook {name}", function=function, hint=hint)

    def struct(self, name: str, base: type[Any]) -> type[Any] | None:
        declared: type[Any] | None = getattr(self.home, name, None)
        if declared is not None and not (inspect.isclass(declared) and issubclass(declared, base)):
            raise self.refused(f"its {name} does not derive from bghost.{name}")
        return declared

    def constructor(self, *, with_settings: bool) -> None:
        try:
            inspect.signature(self.home).bind(*(None,) * with_settings)
        except TypeError as error:
            how = "with its settings as the one argument" if with_settings else "without arguments"
            raise self.refused(f"it is made {how}, and there is {error}") from None
        except ValueError:
            pass  # a class that does not tell; making one will

    def first(self, hook: str) -> str:
        return "" if self.is_module else "cls" if self.is_kind and hook in HOST_HOOKS else "self"

    def refused(self, problem: str, *, function: object = None, hook: str = "", hint: str = "") -> PluginError:
        place = f"entry point {self.found.value}"
        if isinstance(function, FunctionType):
            code = inspect.unwrap(function).__code__
            place = f"{code.co_filename}:{code.co_firstlineno}"
        if hook in SPECS:
            wrapper = not self.is_kind and hook in KIND_HOOKS - HOST_HOOKS
            hint = f"expected: {expected(hook, self.first(hook), wrapper=wrapper)}"
        return PluginError(f"{self.found}: {problem}", detail=f"at {place}", hint=hint)

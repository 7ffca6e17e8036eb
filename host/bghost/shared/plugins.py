"""Discovery: what the installed distributions offer by entry point, found without importing any of it."""

import importlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final

from bghost.shared.errors import LaunchError, NotFound, PluginError, Stop, UsageError
from bghost.shared.names import check_name, near

KINDS: Final = "bghost.kinds"
EXTENSIONS: Final = "bghost.plugins"
COMMANDS: Final = "bghost.commands"
WORDS: Final = {KINDS: "kind", EXTENSIONS: "extension", COMMANDS: "command"}
"""The groups, and the word for what each of them holds."""

_VALUE: Final = re.compile(r"[\w.]+\s*(:\s*[\w.]+\s*)?(\[.*\]\s*)?")


@dataclass(frozen=True, slots=True)
class Found:
    """One entry point that a distribution declares; nothing of it has been imported.

    :param name: the entry point's name: that of the kind, the extension or the command.
    :param group: :data:`KINDS`, :data:`EXTENSIONS` or :data:`COMMANDS`.
    :param value: where the object is, ``package.module:object``.
    :param dist_name: the distribution's name, as its metadata has it.
    :param version: the distribution's version.
    :param requires: normalised names of what the distribution requires, its extras left out.
    :param problem: why it is refused, or ``None``.
    """

    name: str
    group: str
    value: str
    dist_name: str
    version: str
    requires: tuple[str, ...] = ()
    problem: str | None = None

    def __str__(self) -> str:
        return f"{WORDS[self.group]} {self.name!r} of {self.dist_name} {self.version}"

    def load(self) -> object:
        """Import the object.

        :raises PluginError: if it is refused, or whatever its import raised; a SystemExit, too, is but a failed import.
        """
        if self.problem is not None:
            raise PluginError(f"{self} is refused", detail=self.problem)
        module, _, path = self.value.partition("[")[0].partition(":")
        try:
            loaded: object = importlib.import_module(module.strip())
            for name in filter(None, path.strip().split(".")):
                loaded = getattr(loaded, name)
        except (KeyboardInterrupt, Stop):
            raise
        except BaseException as error:
            raise self.failure("cannot be loaded", error) from error
        return loaded

    def failure(self, what: str, error: BaseException) -> PluginError:
        """The error that says *what* went wrong, of which type and where in the plugin's code *error* came from."""
        try:
            text = " ".join(str(error).split())
        except Exception:
            text = ""
        place = _place(error, self.value.partition(".")[0].partition(":")[0])
        shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return PluginError(f"{self} {what}", detail=f"{shown}, at {place or 'entry point ' + self.value}")


def _place(error: BaseException, package: str) -> str | None:
    """File and line where *error* left *package*'s own code, or of what could not be compiled."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    place = None
    step: TracebackType | None = error.__traceback__
    while step is not None:
        if str(step.tb_frame.f_globals.get("__name__")).partition(".")[0] == package:
            place = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return place


class Catalog:
    """All that was found; of each group a dict by name.

    A name that two distributions offer is in its dict once, with a ``problem`` that names them all, and in
    :attr:`found` once for each of them.
    """

    def __init__(self, found: Iterable[Found]) -> None:
        self.found: Final = tuple(_judge(sorted(found, key=lambda one: (one.name, one.dist_name))))
        self.kinds: Final = self._group(KINDS)
        self.extensions: Final = self._group(EXTENSIONS)
        self.commands: Final = self._group(COMMANDS)

    def _group(self, group: str) -> dict[str, Found]:
        named: dict[str, Found] = {}
        for one in self.found:
            # One that is not refused has the name to itself, or it is bghost's own.
            if one.group == group and (one.name not in named or one.problem is None):
                named[one.name] = one
        return named

    def kind(self, name: str) -> Found:
        """The kind of that name.

        :raises NotFound: if there is none; the hint has near matches.
        :raises LaunchError: if it is refused.
        """
        found = self.kinds.get(name)
        if found is None:
            raise NotFound(f"there is no kind {name!r}", hint=near(name, list(self.kinds)))
        if found.problem is not None:
            raise LaunchError(f"kind {name!r} is refused", detail=found.problem)
        return found

    def active(self, names: Sequence[str] | None = None) -> list[Found]:
        """The active extensions, those that are refused among them: loading one of these says why.

        :param names: those to take, in this order (``[host] plugins``); ``None``: all that are installed, by name.
        :raises NotFound: if one of *names* is not installed.
        """
        for name in names or ():
            if name not in self.extensions:
                raise NotFound(f"there is no extension {name!r}", hint=near(name, list(self.extensions)))
        return [self.extensions[name] for name in (self.extensions if names is None else names)]


def discover() -> Catalog:
    """Look for entry points in all distributions on ``sys.path``; imports none of them.

    A distribution whose entry points cannot be read is passed over; one that does not tell its name and version has
    its entry points refused.
    """
    import importlib_metadata

    found: list[Found] = []
    seen: set[str] = set()
    for dist in importlib_metadata.distributions():
        try:
            # Most distributions have nothing for us: they cost the reading of one small file, and no parsing.
            if "[bghost." in (dist.read_text("entry_points.txt") or ""):
                found += _offers(dist, seen)
        except Exception:
            continue  # whose metadata may be as broken as it likes
    return Catalog(found)


def _offers(dist: Any, seen: set[str]) -> Iterator[Found]:
    import importlib_metadata

    problem = None
    requires: tuple[str, ...] = ()
    try:
        name = dist.metadata["Name"]
        if _normal(name) in seen:
            return
        # sys.path may show a distribution twice, even in two versions. Python imports the first, so that is the one.
        dist = importlib_metadata.distribution(name)
        version = str(dist.metadata["Version"] or "without version")
        requires = tuple(sorted({_normal(one) for one in dist.requires or () if "extra ==" not in one}))
    except Exception as error:
        name, version = os.path.basename(getattr(dist, "_path", "a distribution")), "without metadata"
        problem = f"its name cannot be read ({type(error).__name__}: {error})"
    seen.add(_normal(name))
    for entry in dist.entry_points:
        if entry.group in WORDS:
            yield Found(entry.name, entry.group, entry.value, name, version, requires, problem or _bad(entry))


def _normal(requirement: str) -> str:
    """The normalised name that a requirement begins with."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else requirement


def _bad(entry: Any) -> str | None:
    if not _VALUE.fullmatch(entry.value):
        return f"{entry.value!r} does not say where an object is, as package.module:object does"
    try:
        check_name(entry.name, "kind, extension or command")
    except UsageError as error:
        return str(error)
    return None


def _judge(found: Sequence[Found]) -> Iterator[Found]:
    """Refuse what several offer under one name; never the last, or the first, wins.

    bghost's own names are the exception: what somebody installs must not be able to take ``bghost stop`` away.
    """
    offers: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        if one not in offers.setdefault((one.group, one.name), []):
            offers[one.group, one.name].append(one)
    for rivals in offers.values():
        *some, last = [f"{one.dist_name} {one.version}" for one in rivals]
        problem = f"offered by {', '.join(some)} and {last}; only one of them can be installed" if some else None
        has_owner = any(one.dist_name == "bghost" for one in rivals)
        for one in rivals:
            own = has_owner and one.dist_name == "bghost"
            yield one if own or not problem else replace(one, problem=one.problem or problem)

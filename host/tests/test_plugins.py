"""Discovery: what is found, what is refused, how a failed import is told, and what ``bghost plugins`` shows of it."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import Sandbox

from bghost import BghostError, LaunchError, NotFound, PluginError
from bghost.commands.own import OWN
from bghost.shared.plugins import Catalog, Found, discover

KIND = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        pass
"""


@pytest.fixture
def installed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Catalog]]:
    """Discovery, in this process, of what the sandbox has installed; its modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(sandbox.site))
    yield discover
    for module in set(sys.modules) - before:
        if str(sandbox.root) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def test_discovery_tells_what_is_there_and_imports_none_of_it(
    sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    sandbox.distribution(
        "Some.Plugin",
        {"found_unimported": "raise AssertionError('imported')"},
        {
            "bghost.kinds": {"some_kind": "found_unimported:Kind"},
            "bghost.plugins": {"some_extension": "found_unimported:Extension [extra]"},
            "bghost.commands": {"some-command": "found_unimported:command"},
            "other.group": {"other": "found_unimported"},
        },
        version="2.1",
        requires=["bghost>=0.1", "Bghost_Postgres[embedded] ; python_version > '3'", "pytest; extra == 'test'"],
    )

    catalog = installed()

    requires = ("bghost", "bghost-postgres")
    common: dict[str, Any] = {"dist_name": "Some.Plugin", "version": "2.1", "requires": requires}
    assert catalog.kind("some_kind") == Found("some_kind", "bghost.kinds", "found_unimported:Kind", **common)
    assert catalog.extensions["some_extension"].value == "found_unimported:Extension [extra]"
    assert catalog.commands["some-command"].group == "bghost.commands"
    assert [one.name for one in catalog.found if one.dist_name == "Some.Plugin"] == [
        "some-command",
        "some_extension",
        "some_kind",
    ]
    assert "found_unimported" not in sys.modules


@pytest.mark.parametrize("group", ["bghost.kinds", "bghost.plugins", "bghost.commands"])
def test_a_name_that_two_distributions_offer_is_refused_to_both(
    group: str, sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    for name, version in ("first-dist", "1.0"), ("second-dist", "2.0"):
        sandbox.distribution(name, {}, {group: {"twice": "nowhere:Kind"}}, version=version)

    found = [one for one in installed().found if one.name == "twice"]

    problem = "offered by first-dist 1.0 and second-dist 2.0; only one of them can be installed"
    assert [(one.dist_name, one.problem) for one in found] == [("first-dist", problem), ("second-dist", problem)]
    word = {"bghost.kinds": "kind", "bghost.plugins": "extension", "bghost.commands": "command"}[group]
    for one in found:
        with pytest.raises(PluginError) as refused:
            one.load()
        assert str(refused.value) == f"{word} 'twice' of {one.dist_name} {one.version} is refused: {problem}"


def test_a_refused_kind_cannot_be_asked_for(sandbox: Sandbox, installed: Callable[[], Catalog]) -> None:
    for name in "one", "two", "three":
        sandbox.distribution(name, {}, {"bghost.kinds": {"thrice": "nowhere"}})

    with pytest.raises(LaunchError) as refused:
        installed().kind("thrice")

    assert str(refused.value) == (
        "kind 'thrice' is refused: offered by one 1.0, three 1.0 and two 1.0; only one of them can be installed"
    )
    assert refused.value.exit_code == 1


def test_one_name_for_a_kind_and_for_an_extension_is_no_conflict(
    sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    sandbox.distribution("one", {}, {"bghost.kinds": {"shared_name": "nowhere"}})
    sandbox.distribution("two", {}, {"bghost.plugins": {"shared_name": "nowhere"}})

    catalog = installed()

    assert catalog.kinds["shared_name"].problem is None
    assert catalog.extensions["shared_name"].problem is None


def test_a_distribution_that_declares_a_name_twice_is_refused(
    sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    sandbox.distribution("one", {}, {"bghost.kinds": {"again": "here:Kind\nagain = there:Kind"}})

    assert installed().kinds["again"].problem == "offered by one 1.0 and one 1.0; only one of them can be installed"


def test_bghosts_own_names_cannot_be_taken_away(sandbox: Sandbox, installed: Callable[[], Catalog]) -> None:
    sandbox.distribution("thief", {}, {"bghost.commands": {"stop": "nowhere:stop"}})

    catalog = installed()

    assert (catalog.commands["stop"].dist_name, catalog.commands["stop"].problem) == ("bghost", None)
    (thief,) = (one for one in catalog.found if one.dist_name == "thief")
    assert thief.problem is not None and thief.problem.startswith("offered by bghost ")


def test_bghosts_own_commands_are_those_of_its_entry_points() -> None:
    """They are called without a look at what is installed, and are what that look would have found."""
    assert {name: one.value for name, one in discover().commands.items() if one.dist_name == "bghost"} == OWN


@pytest.mark.parametrize("version", ["1.0", "0.9"])
def test_a_distribution_that_sys_path_shows_twice_is_no_conflict(
    version: str, sandbox: Sandbox, installed: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files, or an older version behind: Python imports from the first entry, so that one counts."""
    sandbox.distribution("seen-twice", {}, {"bghost.kinds": {"twice_seen": "new:Kind"}})
    other = sandbox.root / "other"
    (sandbox.site / "seen_twice-1.0.dist-info").rename(sandbox.root / "kept")
    sandbox.distribution(
        "Seen.Twice", {}, {"bghost.kinds": {"twice_seen": "old:Kind", "gone": "old:Gone"}}, version=version
    )
    other.mkdir()
    (sandbox.site / f"Seen.Twice-{version}.dist-info").rename(other / f"Seen.Twice-{version}.dist-info")
    (sandbox.root / "kept").rename(sandbox.site / "seen_twice-1.0.dist-info")
    monkeypatch.setattr(sys, "path", [*sys.path, str(other)])

    catalog = installed()

    assert catalog.kind("twice_seen").value == "new:Kind"
    assert "gone" not in catalog.kinds


@pytest.mark.parametrize("name", ["two words", "..", "x" * 64, "pool/one"])
def test_a_name_that_is_no_plain_word_is_refused(name: str, sandbox: Sandbox, installed: Callable[[], Catalog]) -> None:
    sandbox.distribution("one", {}, {"bghost.kinds": {name: "nowhere:Kind"}})

    problem = installed().kinds[name].problem

    assert problem is not None and "is no name for a kind, extension or command" in problem


@pytest.mark.parametrize("value", ["import works", "module:", ":object", "module:two:three"])
def test_an_entry_point_of_no_known_form_is_refused(
    value: str, sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    sandbox.distribution("one", {}, {"bghost.kinds": {"formless": value}})

    problem = installed().kinds["formless"].problem

    assert problem == f"{value!r} does not say where an object is, as package.module:object does"


def test_broken_metadata_breaks_nothing_else(sandbox: Sandbox, installed: Callable[[], Catalog]) -> None:
    sandbox.distribution("well", {}, {"bghost.kinds": {"well": "nowhere:Kind"}})
    for name in "nameless", "garbled", "unreadable", "empty", "no-utf8":
        sandbox.distribution(name, {}, {"bghost.kinds": {name: "nowhere:Kind"}})
    info = {path.name.partition("-")[0]: path for path in sandbox.site.glob("*.dist-info")}
    (info["nameless"] / "METADATA").unlink()
    (info["garbled"] / "entry_points.txt").write_text("[bghost.kinds]\nno equals sign\n")
    (info["unreadable"] / "METADATA").unlink()
    (info["unreadable"] / "METADATA").mkdir()
    (info["empty"] / "METADATA").write_text("")
    (info["no_utf8"] / "entry_points.txt").write_bytes(b"[bghost.kinds]\nx = \xff\xfe\n")

    catalog = installed()

    assert catalog.kind("well").problem is None
    for name in "nameless", "unreadable", "empty":
        problem = catalog.kinds[name].problem
        assert problem is not None and problem.startswith("its name cannot be read (")
        assert catalog.kinds[name].dist_name == f"{name}-1.0.dist-info"


def test_an_unknown_kind_is_answered_with_those_that_are_near(
    sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    sandbox.distribution("one", {}, {"bghost.kinds": {"counting": "nowhere:Kind"}})

    with pytest.raises(NotFound) as unknown:
        installed().kind("countign")

    assert str(unknown.value) == "there is no kind 'countign' (did you mean counting?)"
    assert unknown.value.exit_code == 5


def test_extensions_are_active_when_installed_unless_some_are_listed() -> None:
    catalog = Catalog(Found(name, "bghost.plugins", "nowhere", name, "1.0") for name in ("b", "a", "c"))

    assert [one.name for one in catalog.active()] == ["a", "b", "c"]
    assert [one.name for one in catalog.active(["c", "a"])] == ["c", "a"]
    assert catalog.active([]) == []
    with pytest.raises(NotFound, match="there is no extension 'd'"):
        catalog.active(["a", "d"])


FAILURES = {
    "a module that is missing": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'", 1),
    "a name that is missing": (
        "\nfrom os import no_such_name",
        "ImportError: cannot import name 'no_such_name' from 'os'",
        2,
    ),
    "no Python": ("x = 1\nclass Kind(\n", "SyntaxError: '(' was never closed", 2),
    "an exception of several lines": ("raise ValueError('one\\n  two')", "ValueError: one two", 1),
    "an exception without text": ("def f():\n    raise KeyError\nf()", "KeyError", 2),
    "an exception whose text fails": (
        "class Bad(Exception):\n    def __str__(self): raise OSError\nraise Bad",
        "Bad",
        3,
    ),
    "an error in somebody else's code": (
        "import json\njson.loads('{')",
        "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        2,
    ),
    "a SystemExit": ("import sys\n\nsys.exit(3)", "SystemExit: 3", 3),
    "a BaseException": ("raise GeneratorExit('out')", "GeneratorExit: out", 1),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_import_is_told_in_one_line(name: str, sandbox: Sandbox, installed: Callable[[], Catalog]) -> None:
    """Distribution, version, type, message, and the line of the plugin's own code that it came from."""
    source, what, line = FAILURES[name]
    sandbox.distribution("bad-dist", {"import_fails": source}, {"bghost.kinds": {"bad": "import_fails:Kind"}})

    with pytest.raises(PluginError) as failed:
        installed().kind("bad").load()

    text = str(failed.value)
    assert text.startswith(f"kind 'bad' of bad-dist 1.0 cannot be loaded: {what}")
    assert text.endswith(f", at {sandbox.site / 'import_fails.py'}:{line}")
    assert "\n" not in text
    assert failed.value.exit_code == 1
    assert isinstance(failed.value, BghostError)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("import_works:Nothing", "AttributeError: module 'import_works' has no attribute 'Nothing'"),
        ("import_works_not:Kind", "ModuleNotFoundError: No module named 'import_works_not'"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_named(
    value: str, what: str, sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    sandbox.distribution("bad-dist", {"import_works": ""}, {"bghost.kinds": {"bad": value}})

    with pytest.raises(PluginError) as failed:
        installed().kind("bad").load()

    assert str(failed.value).startswith(f"kind 'bad' of bad-dist 1.0 cannot be loaded: {what}")
    assert str(failed.value).endswith(f", at entry point {value}")


def test_an_interrupt_during_an_import_is_no_failure_of_the_plugin(
    sandbox: Sandbox, installed: Callable[[], Catalog]
) -> None:
    sandbox.distribution("one", {"interrupted": "raise KeyboardInterrupt"}, {"bghost.kinds": {"one": "interrupted"}})

    with pytest.raises(KeyboardInterrupt):
        installed().kind("one").load()


def rows(sandbox: Sandbox, timeout: float = 20.0) -> dict[tuple[str, str], dict[str, Any]]:
    """What ``bghost plugins --json`` says, by name and distribution."""
    result = sandbox.bghost("plugins", "--json", timeout=timeout)
    assert (result.code, result.stderr) == (0, "")
    return {(row["name"], row["distribution"]): row for row in result.json()}


def test_plugins_lists_what_works_and_what_does_not(sandbox: Sandbox) -> None:
    """Each entry point is loaded and looked over, whatever the others do to the process that they are tried in."""
    crash = "import os\nimport signal\nos.kill(os.getpid(), signal.SIGSEGV)"
    sandbox.distribution(
        "mixed",
        {
            "mixed_well": KIND + "print('noise')",
            "mixed_exit": "import os\nos._exit(0)",
            "mixed_crash": crash,
            "mixed_raise": "raise RuntimeError('not today')",
        },
        {
            "bghost.kinds": {
                "mixed_well": "mixed_well:Kind",
                "mixed_exit": "mixed_exit:Kind",
                "mixed_raise": "mixed_raise:Kind",
            },
            "bghost.plugins": {"mixed_crash": "mixed_crash:Extension", "mixed_kind": "mixed_well:Kind"},
            "bghost.commands": {"mixed_command": "mixed_well:Kind"},
        },
    )
    for name in "left", "right":
        sandbox.distribution(name, {"mixed_" + name: KIND}, {"bghost.kinds": {"both": f"mixed_{name}:Kind"}})

    told = rows(sandbox)

    expected = {
        "mixed_well": ("kind", "ok", None),
        "mixed_exit": (
            "kind",
            "broken",
            "kind 'mixed_exit' of mixed 1.0 cannot be loaded: its import ended the process (exit code 0)",
        ),
        "mixed_raise": (
            "kind",
            "broken",
            "kind 'mixed_raise' of mixed 1.0 cannot be loaded: RuntimeError: not today, "
            f"at {sandbox.site / 'mixed_raise.py'}:1",
        ),
        "mixed_crash": (
            "extension",
            "broken",
            "extension 'mixed_crash' of mixed 1.0 cannot be loaded: its import ended the process (SIGSEGV)",
        ),
        "mixed_kind": (
            "extension",
            "refused",
            "extension 'mixed_kind' of mixed 1.0: bghost_tick is the kind's, and an extension may only wrap it: "
            f"at {sandbox.site / 'mixed_well.py'}:5 (expected: @bghost.hookimpl(wrapper=True) "
            "def bghost_tick(self, worker: Worker[Any]) -> Generator[None, float | None, float | None])",
        ),
        "mixed_command": (
            "command",
            "refused",
            "command 'mixed_command' of mixed 1.0: it is of type type, not a click command",
        ),
    }
    for name, (kind, state, problem) in expected.items():
        row = told[name, "mixed"]
        assert (row["type"], row["state"], row["problem"]) == (kind, state, problem)
    for name in "left", "right":
        assert told["both", name] == {
            "type": "kind",
            "name": "both",
            "distribution": name,
            "version": "1.0",
            "entry_point": f"mixed_{name}:Kind",
            "state": "refused",
            "problem": "offered by left 1.0 and right 1.0; only one of them can be installed",
        }
    assert {row["state"] for (_, distribution), row in told.items() if distribution == "bghost"} == {"ok"}


def test_plugins_prints_a_table_for_people(sandbox: Sandbox) -> None:
    sandbox.kinds({"good": KIND, "bad": "raise RuntimeError('[bold]no\\x1b[31m')"})

    result = sandbox.bghost("plugins")

    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert result.code == 0
    assert lines[0].split() == ["TYPE", "NAME", "DISTRIBUTION", "VERSION", "STATE", "PROBLEM"]
    assert lines[1].split(maxsplit=5) == [
        "kind",
        "bad",
        "test-kind-bad",
        "1.0",
        "broken",
        "kind 'bad' of test-kind-bad 1.0 cannot be loaded: RuntimeError: [bold]no\\x1b[31m, "
        f"at {sandbox.site / 'test_kind_bad.py'}:1",
    ]
    assert ["kind", "good", "test-kind-good", "1.0", "ok"] in [line.split() for line in lines]


def test_plugins_gives_up_on_an_import_that_hangs(sandbox: Sandbox) -> None:
    sandbox.kinds({"hangs": "import signal\nwhile True:\n    signal.pause()", "good": KIND})

    told = rows(sandbox, timeout=40.0)

    assert told["good", "test-kind-good"]["state"] == "ok"
    assert told["hangs", "test-kind-hangs"]["state"] == "broken"
    assert told["hangs", "test-kind-hangs"]["problem"] == (
        "kind 'hangs' of test-kind-hangs 1.0 cannot be loaded: its import took longer than 10 s"
    )

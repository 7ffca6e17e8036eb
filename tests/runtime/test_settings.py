"""Settings: a table made into a kind's struct, or refused with what is wrong; and what a reload changes."""

import json
import math
import os
import signal
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Host, StartHost

from bghost import Settings, WorkerSpec, start_only
from bghost.shared.errors import USAGE, ConfigError
from bghost.shared.settings import Text, convert, keep_start_only, layers
from bghost.shared.settings import start_only as start_only_of


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    depth: Annotated[int, msgspec.Meta(ge=0)] = 0


class Sample(Settings):
    naptime: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    count: int = 1
    label: str = "label"
    word: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")] = "word"
    on: bool = False
    mode: Literal["fast", "slow"] = "slow"
    tags: list[str] = []
    limit: int | None = None
    inner: Inner = Inner()


class Required(Settings):
    dsn: str


def refusal(table: dict[str, Any], type: type[Settings] = Sample) -> str:
    with pytest.raises(ConfigError) as caught:
        convert(table, type, "sample")
    assert caught.value.exit_code == USAGE
    return str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"naptime": -1}, "sample.naptime = -1 is not allowed: expected `float` > 0.0"),
        ({"naptime": math.nan}, "sample.naptime = NaN is not allowed: expected `float` > 0.0"),
        ({"naptime": "soon"}, 'sample.naptime = "soon" is not allowed: expected `float`, got `str`'),
        ({"naptime": Text("soon")}, 'sample.naptime = "soon" is not allowed: expected `float`, got `str`'),
        ({"naptime": Text("-1")}, "sample.naptime = -1 is not allowed: expected `float` > 0.0"),
        ({"count": 1.5}, "sample.count = 1.5 is not allowed: expected `int`, got `float`"),
        ({"count": Text("1.5")}, "sample.count = 1.5 is not allowed: expected `int`, got `float`"),
        ({"count": True}, "sample.count = true is not allowed: expected `int`, got `bool`"),
        ({"label": 5}, "sample.label = 5 is not allowed: expected `str`, got `int`"),
        ({"word": Text("5")}, "sample.word = \"5\" is not allowed: expected `str` matching regex '^[a-z]+$'"),
        ({"mode": "fats"}, "sample.mode = \"fats\" is not allowed: invalid enum value 'fats'"),
        ({"mode": Text("5")}, "sample.mode = \"5\" is not allowed: invalid enum value '5'"),
        ({"tags": Text('["a", 5]')}, 'sample.tags[1] = ["a", 5] is not allowed: expected `str`, got `int`'),
        ({"tags": Text("a,b")}, 'sample.tags = "a,b" is not allowed: expected `array`, got `str`'),
        ({"inner": {"depth": -1}}, "sample.inner.depth = -1 is not allowed: expected `int` >= 0"),
        ({"naptme": 1}, "sample has no setting 'naptme' (did you mean naptime?)"),
        ({"inner": {"width": 1}}, "sample.inner has no setting 'width' (did you mean depth?)"),
    ],
)
def test_what_is_refused(table: dict[str, Any], message: str) -> None:
    """The message names the key, its value as it was given, and what would be allowed."""
    assert refusal(table) == message


def test_a_setting_that_has_to_be_given() -> None:
    assert refusal({}, Required) == "sample: object missing required field `dsn`"
    assert convert({"dsn": Text("service=x")}, Required, "sample").dsn == "service=x"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("naptime", "1", 1.0),
        ("naptime", "1e-3", 0.001),
        ("count", "-5", -5),
        ("label", "plain", "plain"),
        ("label", "123", "123"),
        ("label", "true", "true"),
        ("label", "null", "null"),
        ("label", '{"a": 1}', '{"a": 1}'),
        ("label", '"123"', "123"),
        ("label", "", ""),
        ("label", "[" * 100_000, "[" * 100_000),
        ("label", "9" * 10_000, "9" * 10_000),
        ("on", "true", True),
        ("mode", "fast", "fast"),
        ("mode", '"fast"', "fast"),
        ("tags", '["a", "b"]', ["a", "b"]),
        ("limit", "null", None),
        ("limit", "7", 7),
        ("inner", '{"depth": 3}', Inner(3)),
    ],
)
def test_a_text_from_a_command_line(key: str, text: str, value: object) -> None:
    """It is JSON where JSON gives what is wanted, and else itself."""
    assert getattr(convert({key: Text(text)}, Sample, "sample"), key) == value


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "naptime": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "count": st.integers(-(2**63), 2**63 - 1),
        "label": st.text(),
        "word": st.from_regex("[a-z]+", fullmatch=True),
        "on": st.booleans(),
        "mode": st.sampled_from(["fast", "slow"]),
        "tags": st.lists(st.text()),
        "limit": st.none() | st.integers(0, 100),
        "inner": st.fixed_dictionaries({}, optional={"depth": st.integers(0, 9)}),
    },
)


@given(VALUES)
def test_every_way_to_say_a_value_says_the_same(values: dict[str, Any]) -> None:
    """Values from a file make the same settings as their JSON on a command line; what is not said is the default."""
    from_file = convert(values, Sample, "sample")
    from_line = convert({key: Text(json.dumps(value)) for key, value in values.items()}, Sample, "sample")
    assert from_file == from_line
    for key in Sample.__struct_fields__:
        if key not in values:
            assert getattr(from_file, key) == getattr(Sample(), key)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*Sample.__struct_fields__, "other", ""])


@given(st.dictionaries(KEYS, JSON | st.text().map(Text) | JSON.map(json.dumps).map(Text), max_size=4))
def test_anything_else_is_refused_in_one_line(table: dict[str, Any]) -> None:
    """Whatever a table holds, it makes settings, or an error that a person can act on."""
    try:
        made = convert(table, Sample, "sample")
    except ConfigError as error:
        assert str(error).startswith("sample")
        assert "\n" not in str(error)
    else:
        assert made.naptime > 0


def test_layers() -> None:
    """What the worker's own table says counts before what ``run --set`` said, and that before the file."""
    document = {
        "kinds": {"k": {"count": 1, "label": "file", "on": True}, "other": {"count": 9}},
        "sets": {"k": {"count": "2", "label": "set"}},
    }
    spec = WorkerSpec(kind="k", settings={"count": 3})
    made = convert(layers(document, spec), Sample, "k")
    assert (made.count, made.label, made.on) == (3, "set", True)


class Part(Settings):
    width: int = 1
    label: str = ""
    port: Annotated[int, start_only] = 1


class Outer(Settings):
    first: Part = Part()
    second: Part | None = None


def test_layers_of_structs() -> None:
    """Each layer says single keys of a struct within; a struct that is typed whole takes the place of another."""

    def made(sets: dict[str, str], own: dict[str, Any] | None = None) -> Outer:
        document = {"kinds": {"k": {"first": {"width": 2, "label": "file"}}}, "sets": {"k": sets}}
        return convert(layers(document, WorkerSpec(kind="k", settings=own or {})), Outer, "k")

    assert made({"first.width": "3", "second.label": "7"}) == Outer(Part(3, "file"), Part(label="7"))
    assert made({"first.width": "3"}, {"first": {"width": 4}}) == Outer(Part(4, "file"))
    assert made({"first": '{"label": "all"}', "first.width": "5"}) == Outer(Part(5, "all"))
    assert made({"first.width": "5", "first": '{"label": "all"}'}) == Outer(Part(label="all"))
    assert made({"second": "null"}) == Outer(Part(2, "file"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("first.widht", "1", "k.first has no setting 'widht' (did you mean width?)"),
        ("first.width", "wide", 'k.first.width = "wide" is not allowed: expected `int`, got `str`'),
        ("first.width.x", "1", 'k.first.width = {"x": 1} is not allowed: expected `int`, got `object`'),
        ("first", "1", "k.first = 1 is not allowed: expected `object`, got `int`"),
        ("a." * 40 + "b", "1", "no setting lies as deep as " + "a." * 20 + "..."),
    ],
)
def test_errors_in_structs(key: str, value: str, expected: str) -> None:
    """They name the key with all that it lies in."""
    with pytest.raises(ConfigError) as caught:
        convert(layers({"kinds": {}, "sets": {"k": {key: value}}}, WorkerSpec(kind="k")), Outer, "k")
    assert str(caught.value) == expected


def test_start_only_settings_of_structs_are_kept() -> None:
    """And told, by the keys that a config has for them."""
    old = Outer(Part(1, "a", 2), None)
    new = Outer(Part(3, "b", 4), Part(5, "c", 6))
    assert keep_start_only(old, new) == Outer(Part(3, "b", 2), Part(5, "c", 6))
    assert dict(start_only_of(new)) == {"first.port": 4, "second.port": 6}


class Renamed(Settings, rename="kebab"):
    log_file: Annotated[str, start_only] = "first"
    batch_size: Annotated[int, start_only, msgspec.Meta(gt=0)] = 1
    top_speed: Annotated[int | None, start_only] = None
    word: str = "first"


def test_start_only_settings_are_kept() -> None:
    """Also where they have bounds, and where the config calls them by other names than the code."""
    old = convert({"log-file": "a", "batch-size": 2, "word": "b"}, Renamed, "renamed")
    new = convert({"log-file": "c", "batch-size": 3, "top-speed": 4, "word": "d"}, Renamed, "renamed")
    assert keep_start_only(old, new) == Renamed(log_file="a", batch_size=2, top_speed=None, word="d")


KIND = """
from typing import Annotated
import bghost

class Settings(bghost.Settings):
    word: str = "none"
    port: Annotated[int, bghost.start_only] = 1

class Kind:
    Settings = Settings

    @bghost.hookimpl
    def bghost_setup(self, worker):
        worker.log.info("note: starts with {}", worker.settings)

    @bghost.hookimpl
    def bghost_reload(self, worker, old, new):
        assert worker.settings is new and old is self.last
        worker.log.info("note: {} becomes {}", old, new)

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.last = worker.settings
        worker.log.info("note: tick, {}", sorted(worker.woken))
        return bghost.UNTIL_WOKEN
"""


WORKER = "worker = [{kind = 'set', restart_after = 0.01}]"


def reload(host: Host, word: str, port: int) -> None:
    host.sandbox.config(f"{WORKER}\nkind.set = {{word = '{word}', port = {port}}}")
    host.client.reload()


def test_a_reload_and_what_waits_for_the_next_start(bghost_host: StartHost) -> None:
    """A reload brings the new settings but for those that are start-only, which the worker's next process has.

    The hook is called only where the worker's settings change by that.
    """
    host = bghost_host(kinds={"set": KIND}, config=f"{WORKER}\nkind.set.word = 'one'", args=["run"])
    line = host.wait_line(r"note: tick, \[\]")
    reload(host, "two", 2)
    line = host.wait_line(r"note: Settings\(word='one', port=1\) becomes Settings\(word='two', port=1\)", after=line)
    line = host.wait_line(r"note: tick, \['reload'\]", after=line)
    reload(host, "two", 3)
    line = host.wait_line(r"note: tick, \['reload'\]", after=line)
    assert host.text().count(" becomes ") == 1
    pid = host.row("set")["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    host.wait_line(r"note: starts with Settings\(word='two', port=3\)", after=line)

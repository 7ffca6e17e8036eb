"""The config: read whole, checked whole; what is wrong with it is told by file, line and key."""

import grp
import os
import pwd
import random
import re
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Sandbox

from bghost import Bytes, Seconds, Settings
from bghost.commands import group
from bghost.host import lines
from bghost.host.files import read
from bghost.host.reading import Sources
from bghost.shared.errors import USAGE, BghostError, ConfigError
from bghost.shared.plugins import Catalog, discover
from bghost.shared.secrets import masked
from bghost.shared.settings import convert

SOAK: Final = os.environ.get("BGHOST_SOAK", "") not in ("", "0")

WORKER: Final = "[[worker]]\nkind = 'exec'\n"
NAME_RULE: Final = "(a letter or _, then letters, digits, _ - and single dots inside, at most 63 characters)"
SECONDS: Final = 'expected seconds from 0 to 1000000000, or a text such as "500ms", "5s", "2m", "1h"'
WORKER_KEYS: Final = (
    "(there is kind, name, args, settings, restart, restart_after, restart_max, ready_timeout, tick_timeout, "
    "stop_timeout, after, start, user, count)"
)

BAD: Final = [
    # What is no TOML.
    ("[host]\nmax_workers = ", "{}:2: no TOML: invalid value, at its end"),
    ("[host]\nmax_workers = 1\nmax_workers = 2", "{}:3: no TOML: cannot overwrite a value, at its end"),
    ("[host\nstrict = true", "{}:1: no TOML: expected ']' at the end of a table declaration, column 6"),
    ("a = '''\n\n", "{}:1: no TOML: expected \"'''\", at its end"),
    ("x = " + "[" * 3000, "{}: nested too deep"),
    ("x = " + "9" * 5000, "{}: a number of more digits than can be read"),
    # Keys that there are not.
    ("[hots]\n", "{}:1: there is no table [hots] (did you mean host?)"),
    ("\n[worker_spi]\n", "{}:2: there is no table [worker_spi] (write [kind.worker_spi])"),
    ("[host]\nmax_worker = 1", "{}:2: host has no setting 'max_worker' (did you mean max_workers?)"),
    ("[host]\n\nlog.levle = 'INFO'", "{}:3: host.log has no setting 'levle' (did you mean level?)"),
    (WORKER + "nmae = 'x'", "{}:3: worker has no setting 'nmae' (did you mean name?)"),
    (WORKER + "qqqqqqqq = 'x'", "{}:3: worker has no setting 'qqqqqqqq' " + WORKER_KEYS),
    ("[kind.worker_spi]\nnaptme = 1", "{}:2: worker_spi has no setting 'naptme' (did you mean naptime?)"),
    ("[kind.exce]\n", "{}:1: there is no kind 'exce' (did you mean exec?)"),
    ("[plugin.postgrse]\n", "{}:1: there is no extension 'postgrse' (did you mean postgres?)"),
    (
        "[postgres]\ndns = ''",
        "{}:2: postgres has no setting 'dns' (did you mean dsn?)",
    ),
    # Tables that are none.
    ("host = 1", "{}:1: host is not a table (write [host], settings below)"),
    ("kind.exec = 1", "{}:1: kind.exec is not a table (write [kind.exec], settings below)"),
    ("[worker]\nkind = 'exec'", "{}:1: worker is not an array of tables (write [[worker]] and not [worker])"),
    ("worker = ['exec']", "{}:1: worker is not an array of tables (write [[worker]] and not [worker])"),
    # Values of the wrong type, out of bounds, or that cannot be meant.
    ("[host]\nmax_workers = true", "{}:2: host.max_workers = true is not allowed: expected `int`, got `bool`"),
    ("[host]\nmax_workers = 0", "{}:2: host.max_workers = 0 is not allowed: expected `int` >= 1"),
    ("[host]\nmax_workers = -1", "{}:2: host.max_workers = -1 is not allowed: expected `int` >= 1"),
    ("[host]\nmax_workers = 1e18", "{}:2: host.max_workers = 1e+18 is not allowed: expected `int`, got `float`"),
    ("[host]\nmax_workers = 1000000", "{}:2: host.max_workers = 1000000 is not allowed: expected `int` <= 100000"),
    (
        "[host]\nmax_workers = 99999999999999999999",
        "{}:2: host.max_workers = 99999999999999999999 is not allowed: expected a number of at most 64 bits",
    ),
    ("[host]\nmax_workers = ''", '{}:2: host.max_workers = "" is not allowed: expected `int`, got `str`'),
    ("[host]\nstop_timeout = nan", "{}:2: host.stop_timeout = nan is not allowed: expected a number that is one"),
    ("[host]\nstop_timeout = inf", "{}:2: host.stop_timeout = inf is not allowed: expected a number that is one"),
    ("[host]\nstop_timeout = -1", "{}:2: host.stop_timeout = -1 is not allowed: " + SECONDS),
    ("[host]\nstop_timeout = true", "{}:2: host.stop_timeout = true is not allowed: expected `float`, got `bool`"),
    ("[host]\nstop_timeout = 0", "{}:2: host.stop_timeout = 0 is not allowed: expected `float` > 0.0"),
    ("[host]\nstop_timeout = 1e18", "{}:2: host.stop_timeout = 1e+18 is not allowed: " + SECONDS),
    ("[host]\nstop_timeout = '2 days'", '{}:2: host.stop_timeout = "2 days" is not allowed: ' + SECONDS),
    ("[host]\nstop_timeout = '2d'", '{}:2: host.stop_timeout = "2d" is not allowed: expected `float` <= 86400.0'),
    ("[host]\nkinds = 'exec'", '{}:2: host.kinds = "exec" is not allowed: expected `array`, got `str`'),
    ("host.on_crash = 'panic'", "{}:1: host.on_crash = \"panic\" is not allowed: invalid enum value 'panic'"),
    (
        WORKER + "restart_after = nan",
        "{}:3: worker[1].restart_after = nan is not allowed: expected a number that is one",
    ),
    (WORKER + "count = 0", "{}:3: worker.count = 0 is not allowed: expected `int` >= 1"),
    (WORKER + "count = 101", "{}:3: 101 workers are more than host.max_workers, 100 (raise max_workers in [host])"),
    ("[[worker]]\nname = 'x'", "{}:1: worker: object missing required field `kind`"),
    ("[kind.worker_spi]\nnaptime = 0", "{}:2: worker_spi.naptime = 0 is not allowed: expected `float` > 0.0"),
    (
        "[[worker]]\nkind = 'worker_spi'\n[worker.settings]\ntotal_workers = 'many'",
        '{}:4: worker_spi.total_workers = "many" is not allowed: expected `int`, got `str`',
    ),
    # Names, and who waits for whom.
    (WORKER + "name = ''", "{}:3: '' is no name for a worker " + NAME_RULE),
    (WORKER + "name = '../x'", "{}:3: '../x' is no name for a worker " + NAME_RULE),
    (WORKER + 'name = "a\\nb"', "{}:3: 'a\\nb' is no name for a worker " + NAME_RULE),
    (WORKER + f"name = '{'x' * 300}'", "{}:3: '" + "x" * 37 + "...' is no name for a worker " + NAME_RULE),
    (WORKER + WORKER, "{}:3: a second worker exec: the first is at {}:1 (give one of them another name)"),
    (
        WORKER + "count = 2\n" + WORKER + "name = 'exec.2'",
        "{}:6: a second worker exec.2: the first is at {}:1 (give one of them another name)",
    ),
    (WORKER + "after = ['exce']", "{}:3: worker exec is to start after 'exce', which there is not"),
    (
        WORKER + "name = 'a'\nafter = [\n  'b']\n" + WORKER + "name = 'b'\nafter = ['a']",
        "{}:4: workers wait for each other: a after b after a (take one 'after' away)",
    ),
    (WORKER + "after = ['exec']", "{}:3: workers wait for each other: exec after exec (take one 'after' away)"),
    ("[[worker]]\nkind = 'exce'", "{}:2: there is no kind 'exce' (did you mean exec?)"),
    ("[host]\nkinds = ['exec',\n 'exce']", "{}:3: there is no kind 'exce' (did you mean exec?)"),
    ("[host]\nplugins = ['postgre']", "{}:2: there is no extension 'postgre' (did you mean postgres?)"),
]


def complaint(*args: str) -> BghostError:
    """The error of a command that ends with the exit code for a config that is not valid."""
    with pytest.raises(BghostError) as caught:
        group.run(args)
    assert caught.value.exit_code == USAGE
    return caught.value


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes bghost.toml, and gives its path."""
    monkeypatch.setenv("BGHOST_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("BGHOST_CONFIG", raising=False)

    def write(text: str) -> str:
        file = tmp_path / "bghost.toml"
        file.write_text(text)
        return str(file)

    return write


@pytest.mark.parametrize(("text", "expected"), BAD, ids=[text[-40:] for text, _ in BAD])
def test_what_is_refused(write: Callable[[str], str], text: str, expected: str) -> None:
    """One line with the place, the key, what was given, and what would be right."""
    file = write(text)
    error = str(complaint("config", "check", file))
    assert error == expected.replace("{}", file)


def test_the_exit_code(sandbox: Sandbox) -> None:
    """One that is not good ends a command with 2 and one line: config check, run; a good one is said to be good."""
    sandbox.config("[host]\nmax_workers = true")
    expected = f"{sandbox.config_file}:2: host.max_workers = true is not allowed: expected `int`, got `bool`"
    for result in sandbox.bghost_each(["config", "check"], ["config", "show"], ["run"], ["run", "exec"]):
        said = [line for line in result.stderr.splitlines() if " WARNING " not in line]
        assert (result.code, said, result.stdout) == (2, [f"bghost: {expected}"], "")
    sandbox.config(WORKER + "count = 2\nargs.command = ['true']")
    good = sandbox.bghost("config", "check")
    assert (good.code, good.stdout, good.stderr) == (0, f"{sandbox.config_file}: good, 2 workers", "")


def test_what_a_start_refuses(sandbox: Sandbox) -> None:
    """What only a kind or an extension knows: it is said in the same words by a check and by a start."""
    cases = {
        "[[worker]]\nkind = 'exec'\nname = 'x'\nargs.comand = ['true']": (
            "{}:4: args of x has no setting 'comand' (did you mean command?)"
        ),
        "[[worker]]\nkind = 'worker_spi'\n[worker.settings]\nnaptime = 0": (
            "{}:4: worker_spi.naptime = 0 is not allowed: expected `float` > 0.0"
        ),
        "[kind.worker_spi]\nnaptime = 0\n[[worker]]\nkind = 'worker_spi'": (
            "{}:2: worker_spi.naptime = 0 is not allowed: expected `float` > 0.0"
        ),
        "[host]\nkinds = ['exec']\n[postgres]\n\nrole = ''": (
            '{}:5: postgres.role = "" is not allowed: expected `str` of length >= 1'
        ),
    }
    for number, (text, expected) in enumerate(cases.items()):
        sandbox.config(text)
        start = sandbox.start("run", "--instance", f"i{number}")
        file = str(sandbox.config_file)
        assert str(complaint("config", "check", file)) == expected.replace("{}", file)
        result = start.result(20)
        [said] = [line for line in result.stderr.splitlines() if " WARNING " not in line]
        assert (result.code, said) == (2, "bghost: " + expected.replace("{}", file))


# Files that are none, or not to be trusted


def unreadable(file: Path) -> list[tuple[str, str, Callable[[], object]]]:
    """Of each sort: what is said of it, with the file as {}, and what makes the file so."""

    def make(size: int = 0, mode: int = 0o600, owner: int = -1, group: int = -1) -> None:
        file.touch()
        os.truncate(file, size)
        file.chmod(mode)
        os.chown(file, owner, group)

    sorts: list[tuple[str, str, Callable[[], object]]] = [
        ("missing", "the config file {} cannot be read: No such file or directory", lambda: None),
        ("FIFO", "the config file {} is no regular file", lambda: os.mkfifo(file)),
        ("directory", "the config file {} is no regular file", file.mkdir),
        ("device", "the config file {} is no regular file", lambda: file.symlink_to("/dev/zero")),
        ("gigabyte", "the config is longer than 1048576 bytes: {} goes beyond that", lambda: make(1 << 30)),
        ("binary", "{}:2: the config file is not UTF-8: byte 3", lambda: file.write_bytes(b"a\n#\xff\n")),
        ("zeros", "{}:1: no TOML: invalid statement, column 1", lambda: file.write_bytes(bytes(100))),
        (
            "writable by all",
            "the config file {} can be written by others: its mode is 0666 (chmod go-w {})",
            lambda: make(mode=0o666),
        ),
    ]
    if os.geteuid() == 0:
        theirs = "the config file {} belongs to user 65534: we are user 0 (it has to be ours or root's: chown 0 {})"
        sorts.append(("somebody else's", theirs, lambda: make(owner=65534)))
        group = "the config file {} can be written by others: its mode is 0620 (chmod go-w {})"
        sorts.append(("writable by its group", group, lambda: make(mode=0o620, group=65534)))
    return sorts


@pytest.mark.parametrize("sort", [sort for sort, _, _ in unreadable(Path())])
def test_files_that_are_none(tmp_path: Path, sort: str) -> None:
    """Refused at once, whatever it is that bears the name."""
    file = tmp_path / "bghost.toml"
    [(expected, make)] = [(expected, make) for name, expected, make in unreadable(file) if name == sort]
    make()
    error = complaint("config", "check", str(file))
    assert str(error) == expected.replace("{}", str(file))


def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    """It is taken whole, or refused; what is there at some moment may be half of it."""
    file = tmp_path / "bghost.toml"
    text = "".join(f"[kind.k{number}]\n" for number in range(500))
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            with open(file, "w", buffering=64) as writer:
                for line in text.splitlines(keepends=True):
                    writer.write(line)

    def refused() -> bool:
        try:
            read(str(file))
        except ConfigError as error:
            return "is being written (try again when that is done)" in str(error)
        return False

    file.touch(0o600)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert any(refused() for _ in range(100_000))  # one in a hundred is
    finally:
        over.set()
        writer.join()
    assert read(str(file))[0].text == text


def test_conf_d_that_others_can_write(write: Callable[[str], str], tmp_path: Path) -> None:
    """Whoever can put a file there says what runs with our rights."""
    write("")
    directory = tmp_path / "conf.d"
    directory.mkdir()
    directory.chmod(0o777)
    expected = f"the directory {directory} can be written by others: its mode is 0777 (chmod go-w {directory})"
    assert str(complaint("config", "check")) == expected


# Where values come from


def test_which_value_holds(sandbox: Sandbox) -> None:
    """Of two the later one: default, bghost.toml, conf.d by name, environment, command line; each with its place."""
    sandbox.config(
        """\
        [host]
        max_workers = 10
        stop_timeout = "2m"
        strict = false
        [kind.worker_spi]
        naptime = 3
        [postgres]
        dsn = "postgresql://joe:geheim@db/x"
        [[worker]]
        kind = "exec"
        args.command = ["true"]
        """
    )
    directory = sandbox.root / "conf.d"
    directory.mkdir()
    (directory / "20.toml").write_text(
        "[host]\nstrict = true\n[[worker]]\nkind = 'exec'\nname = 'more'\nargs.command=['x']"
    )
    (directory / "10.toml").write_text(
        "[kind.worker_spi]\ndatabase = 'ten'\n[host]\nstrict = false\nmax_workers = 11\n"
    )
    (directory / "30.toml~").write_text("no TOML at all")
    sandbox.env |= {"BGHOST_HOST_MAX_WORKERS": "12", "BGHOST_HOST_LOG_LEVEL": "DEBUG", "BGHOST_HOST_KINDS": ""}
    sets = ("--set", "host.max_workers=13", "--set", "worker_spi.naptime=0.5")
    main, ten, twenty = sandbox.config_file, directory / "10.toml", directory / "20.toml"
    result = sandbox.bghost("config", "show", "--json", *sets)
    assert result.code == 0, result.stderr
    shown = {value["key"]: (value["value"], value["source"]) for value in result.json()}
    expected = {
        "host.max_workers": (13, "--set"),
        "host.stop_timeout": (120.0, f"{main}:3"),
        "host.strict": (True, f"{twenty}:2"),
        "host.log.level": ("DEBUG", "BGHOST_HOST_LOG_LEVEL"),
        "host.on_crash": ("restart", "default"),
        "kind.worker_spi.naptime": (0.5, "--set"),
        "kind.worker_spi.database": ("ten", f"{ten}:2"),
        "kind.worker_spi.total_workers": (shown["kind.worker_spi.total_workers"][0], "default"),
        "plugin.postgres.dsn": ("postgresql://joe:****@db/x", f"{main}:8"),
        "worker exec: kind": ("exec", f"{main}:10"),
        "worker more: name": ("more", f"{twenty}:5"),
        "worker more: count": (1, "default"),
    }
    assert {key: shown.get(key) for key in expected} == expected
    people = sandbox.bghost("config", "show", *sets).stdout
    assert "geheim" not in people + result.stdout
    assert 'kind.worker_spi.database = "ten"' in people and f"# {ten}:2\n" in people


WITHIN: Final = """
    import bghost, msgspec

    class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        rows: int = 1
        word: str = ""

    class Settings(bghost.Settings):
        limits: Limits = Limits()

    class Kind:
        Settings = Settings

        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("note: {}", worker.settings.limits)
            return bghost.UNTIL_WOKEN
"""


def test_settings_within_settings(sandbox: Sandbox) -> None:
    """Each layer says single keys of them: the file, run --set, launch --set; errors and listings name them whole."""
    sandbox.kinds({"k": WITHIN})
    sandbox.config("[kind.k.limits]\nrows = 2\nword = 'file'\n")
    host = sandbox.start_host("run", "k", "--set", "k.limits.rows=3")
    host.wait_line(r"\[k\] note: Limits\(rows=3, word='file'\)")
    wrong = ["config", "check", "--set", "k.limits.rwos=4"], ["launch", "k", "--set", "k.limits.rows=x"]
    launch = ["launch", "k", "--name", "w", "--set", "k.limits.word=7"]
    shown, check, refused, launched = sandbox.bghost_each(
        ["config", "show", "--set", "k.limits.rows=3"], *wrong, launch
    )
    assert re.search(r"^kind\.k\.limits\.rows = 3 +# --set$", shown.stdout, re.MULTILINE), shown
    assert re.search(r'^kind\.k\.limits\.word = "file" +# .*:3$', shown.stdout, re.MULTILINE), shown
    assert (check.code, refused.code, launched.code) == (2, 2, 0)
    assert check.stderr == "bghost: --set: k.limits has no setting 'rwos' (did you mean rows or word?)"
    assert refused.stderr.startswith('bghost: k.limits.rows = "x" is not allowed: expected `int`')
    host.wait_line(r"\[w\] note: Limits\(rows=3, word='7'\)")


def test_what_is_wrong_in_the_environment_and_on_the_command_line(
    write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named by what it comes from; an empty variable is none."""
    write("")
    sets = ("config", "check", "--set")
    wrong = "host.max_workers = 0 is not allowed: expected `int` >= 1"
    assert str(complaint(*sets, "host.max_workers=0")) == f"--set: {wrong}"
    assert str(complaint(*sets, "host.maxworkers=0")) == (
        "--set: host has no setting 'maxworkers' (did you mean max_workers?)"
    )
    monkeypatch.setenv("BGHOST_HOST_MAX_WORKERS", "0")
    assert str(complaint("config", "check")) == f"BGHOST_HOST_MAX_WORKERS: {wrong}"
    monkeypatch.setenv("BGHOST_HOST_MAX_WORKERS", "")
    monkeypatch.setenv("BGHOST_HOST_STICT", "true")
    assert str(complaint("config", "check")) == (
        "BGHOST_HOST_STICT in the environment is no setting of [host] (did you mean STRICT?)"
    )


def test_a_kind_that_does_harm(sandbox: Sandbox) -> None:
    """One whose import ends the process, and one that is none, are found out, and named."""
    sandbox.kinds({"deadly": "import os; os._exit(3)", "empty": "class Kind: pass"})
    for kind, expected in (
        ("deadly", "ends the process that imports it: exit code 3"),
        ("empty", "it has neither bghost_tick nor bghost_main"),
    ):
        sandbox.config(f"[[worker]]\nkind = '{kind}'")
        result = sandbox.bghost("config", "check")
        assert result.code == 1
        assert f"kind '{kind}' of test-kind-{kind} 1.0" in result.stderr and expected in result.stderr


# Units


class Timed(Settings):
    naptime: Annotated[Seconds, msgspec.Meta(gt=0)] = 1.0
    limit: Seconds | None = None
    size: Bytes = 0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("naptime", "500ms", 0.5),
        ("naptime", "5s", 5.0),
        ("naptime", "1.5 m", 90.0),
        ("naptime", "2min", 120.0),
        ("limit", "1h", 3600.0),
        ("limit", "1d", 86_400.0),
        ("limit", 7, 7.0),
        ("limit", None, None),
        ("size", "64MiB", 64 << 20),
        ("size", "1kB", 1000),
        ("size", "0.5KiB", 512),
        ("size", 4096, 4096),
    ],
)
def test_units(key: str, value: object, expected: object) -> None:
    """A length of time or a size is a number, or a text with its unit."""
    assert getattr(convert({key: value}, Timed, "timed"), key) == expected


NO_TIMES: Final[list[object]] = [
    True,
    0,
    -1,
    float("nan"),
    float("inf"),
    1e18,
    [],
    "0s",
    "5",
    "",
    "s",
    "-5s",
    "5S",
    "5 s s",
    "1e3s",
    "nans",
    "5s\n",
    "٥s",
    "9" * 400 + "s",
]
NO_SIZES: Final[list[object]] = ["64M", "1.5B", "1e400MiB", "9" * 400 + "MiB", -1, 1.5, True, 1 << 63]


@pytest.mark.parametrize(
    ("key", "value"), [*(("naptime", value) for value in NO_TIMES), *(("size", value) for value in NO_SIZES)]
)
def test_what_is_no_length_of_time_and_no_size(key: str, value: object) -> None:
    """It is refused, and the message names the key and the rule."""
    with pytest.raises(ConfigError, match=rf"^timed\.{key} = .* is not allowed: expected "):
        convert({key: value}, Timed, "timed")


# Secrets


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("dsn", "host=db password=geheim user=joe", "host=db password=**** user=joe"),
        ("dsn", r"password='ge\'heim x' user=joe", "password=**** user=joe"),
        (
            "dsn",
            "postgresql://joe:geheim@db/x?sslpassword=geheim2&a=b",
            "postgresql://joe:****@db/x?sslpassword=****&a=b",
        ),
        ("dsn", "postgresql://joe@db/x", "postgresql://joe@db/x"),
        ("password", "geheim", "****"),
        ("api_key", 5, "****"),
        (
            "settings",
            {"token": "geheim", "urls": ["http://u:geheim@x"]},
            {"token": "****", "urls": ["http://u:****@x"]},
        ),
        ("key", "value", "value"),
        ("password_required", True, True),
    ],
)
def test_passwords_are_not_shown(key: str, value: object, shown: object) -> None:
    """Neither in a listing nor in an error."""
    assert masked(key, value) == shown


def test_passwords_in_errors(write: Callable[[str], str]) -> None:
    """The value that is not allowed may be one."""
    write("[host]\npassword = 'geheim'\nlog.level = 'postgresql://joe:geheim@db/x'")
    assert "geheim" not in str(complaint("config", "check"))


# Lines

ODD: Final = '''\
a = 1
"b c".d = """
[e]
f = 1 """""
'g.h' . i = { j = 1, "k" = [1, 2], l.m = "}" } # [n]
o = [ # ]
  "x, y", 'z # w',
  [ [1], { p = 1979-05-27 07:32:00 } ],
]

[q . "r"]
s = \'\'\'
'it''s' = 2\'\'\'\'\'
[[t]]
u = 1
[t.v]
w = "\\"#" # "
[[t]]
[[t.x]]
y = 1
[[t.x]]
y = 2
"\\u00e9" = 3
'''


def paths(value: Any, path: lines.Path = ()) -> Iterator[lines.Path]:
    """Everything in what tomllib has made of a text."""
    if path:
        yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(each, (*path, key))


def test_lines_of_odd_toml() -> None:
    """Of strings over several lines, quoted and dotted keys, inline tables, arrays of arrays and of tables."""
    found = lines.lines(ODD)
    assert found.keys() == {*paths(tomllib.loads(ODD))}
    expected: dict[lines.Path, int] = {
        ("a",): 1,
        ("b c", "d"): 2,
        ("g.h", "i", "j"): 5,
        ("g.h", "i", "k", 1): 5,
        ("g.h", "i", "l", "m"): 5,
        ("o",): 6,
        ("o", 1): 7,
        ("o", 2, 1, "p"): 8,
        ("q", "r"): 11,
        ("q", "r", "s"): 12,
        ("t", 0, "u"): 15,
        ("t", 0, "v"): 16,
        ("t", 1): 18,
        ("t", 1, "x", 1, "y"): 22,
        ("t", 1, "x", 1, "é"): 23,
    }
    assert {path: found[path] for path in expected} == expected


class Toml:
    """Writes TOML at random, each key of its own, and keeps the line of each."""

    STRINGS: Final = ('"a # b"', "'[x]'", '"""\n[y]\nz = 1\n"""', "'''\n'q' ''\n'''", '"\\"]"', '"""a""\\""""')
    SCALARS: Final = ("1", "-1.5e3", "true", "1979-05-27T07:32:00Z", "0x_f".replace("_", ""), *STRINGS)

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.text = ""
        self.expected: dict[str, int] = {}

    def key(self) -> str:
        name = f"k{len(self.expected)}"
        self.expected[name] = self.text.count("\n") + 1
        return self.chance.choice((name, f'"{name}"', f"'{name}'"))

    def gap(self) -> None:
        self.text += self.chance.choice(("", " ", "\t", "\n", " # ] } ' \"\n", "\n\n"))

    def value(self, depth: int) -> None:
        sort = self.chance.random()
        if depth and sort < 0.2:
            self.text += "["
            for _ in range(self.chance.randrange(4)):
                self.gap()
                self.value(depth - 1)
                self.gap()
                self.text += ","
            self.text += "]"
        elif depth and sort < 0.4:
            self.text += "{"
            for number in range(self.chance.randrange(3)):
                self.text += ", " if number else " "
                self.pair(depth - 1)
            self.text += " }"
        else:
            self.text += self.chance.choice(self.SCALARS)

    def pair(self, depth: int) -> None:
        for _ in range(self.chance.randrange(2)):
            self.text += self.key() + self.chance.choice((".", " . "))
        self.text += self.key() + self.chance.choice(("=", " = "))
        self.value(depth)

    def document(self) -> None:
        for _ in range(self.chance.randrange(1, 8)):
            header = self.chance.random()
            if header < 0.5:
                bracket = 1 + (header < 0.25)
                self.text += "[" * bracket
                self.text += self.key()
                self.text += "]" * bracket
                self.text += self.chance.choice(("\n", " # [c]\n"))
            else:
                self.pair(3)
                self.text += self.chance.choice(("\n", "\r\n", " # c = [\n"))
            self.gap_between()

    def gap_between(self) -> None:
        self.text += self.chance.choice(("", "\n", "# [d]\n"))


@settings(max_examples=1000 if SOAK else 60)
@given(st.randoms(use_true_random=False))
def test_lines_of_any_toml(chance: random.Random) -> None:
    """All that tomllib finds in a text has a line, nothing else has, and it is the line that its key is in."""
    toml = Toml(chance)
    toml.document()
    tables = tomllib.loads(toml.text)
    found = lines.lines(toml.text)
    assert found.keys() == {*paths(tables)}
    for path, line in found.items():
        if isinstance(path[-1], str):
            assert line == toml.expected[path[-1]], (path, toml.text)


# Whatever is written there

GOOD: Final = """\
[host]
max_workers = 20
stop_timeout = "2m"
log.level = "DEBUG"

[[worker]]
kind = "exec"
name = "first"
count = 2
args = { command = ["sleep", "1"] }
after = ["second"]

[[worker]]
kind = "worker_spi"
name = "second"
[worker.settings]
naptime = 1.5

[kind.worker_spi]
total_workers = 2
[postgres]
dsn = ""
"""
PIECES: Final = (
    *"[]{}=\"'\n.,#\\-09",
    *(
        "true",
        "nan",
        "inf",
        "-1",
        "1e18",
        "''",
        '"../x"',
        "[[worker]]",
        "[worker]",
        "[host]",
        "\0",
        "\ufeff",
        "\x1b[31m",
    ),
    *("{}", "[]", "1979-05-27", "'''", '"""', "kind", "name", "after", "count", "worker.kind = 1", "\ud7ff", "9" * 30),
)


def mutated(chance: random.Random, text: str) -> bytes:
    """*text* with some of it taken away, doubled, moved, replaced."""
    for _ in range(chance.randrange(1, 5)):
        begin = chance.randrange(len(text) + 1)
        end = min(len(text), begin + chance.choice((0, 1, 2, 5, 20)))
        piece = chance.choice((chance.choice(PIECES), text[begin:end] * 2, ""))
        text = text[:begin] + piece + text[end:]
    data = text.encode()
    return data[: chance.randrange(len(data) + 1)] if chance.random() < 0.1 else data


def test_whatever_is_written(tmp_path: Path) -> None:
    """A config of any content is taken or refused, in one line that names the file; nothing else comes of it."""
    catalog: Catalog = discover()
    file = tmp_path / "bghost.toml"
    taken = refused = 0
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(20_000 if SOAK else 1000):
        data = mutated(chance, GOOD)
        file.write_bytes(data)
        try:
            Sources(str(file)).read(catalog).config().document(1)
            taken += 1
        except ConfigError as error:
            refused += 1
            assert str(file) in str(error), (seed, data)
            assert str(error).replace(str(file), "").isprintable(), (seed, data, error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data!r}") from error
    assert taken and refused > taken


def test_a_group_of_ones_own(write: Callable[[str], str]) -> None:
    """Where each user has one, a umask of 002 is usual, and what it lets be written is no danger."""
    user = pwd.getpwuid(os.geteuid())
    own = grp.getgrgid(user.pw_gid)
    if user.pw_name != own.gr_name or {*own.gr_mem} - {user.pw_name}:
        pytest.skip(f"{user.pw_name} has no group of their own")
    os.chmod(write(""), 0o664)
    assert group.run(["config", "check"]) == 0

"""Reload is a transaction: all of a config is taken, or nothing has changed; and what runs well is left alone."""

import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from support import SLOW, Host, StartHost, until

from bghost import BghostError, ConfigError, PluginError, UsageError
from bghost.host.config import Config, HostTable, WorkerTable
from bghost.host.difference import Difference, compare, host_pending

SOAK: Final = os.environ.get("BGHOST_SOAK", "") not in ("", "0")

SLEEPER: Final = """
import os, time
from typing import Annotated
import bghost, msgspec

class Settings(bghost.Settings):
    word: str = "none"
    bad: str = ""
    port: Annotated[int, bghost.start_only] = 1
    naptime: Annotated[bghost.Seconds, msgspec.Meta(gt=0)] = 1000.0

class Args(bghost.Args):
    x: int = 0

class Sleeper:
    Settings = Settings
    Args = Args

    @bghost.hookimpl
    def bghost_setup(self, worker):
        worker.log.info("note: starts with {} {}", worker.settings.word, worker.args.x)
        if worker.name in worker.settings.bad:
            raise ValueError("bad " + worker.settings.bad)

    @bghost.hookimpl
    def bghost_reload(self, worker, old, new):
        worker.log.info("note: {} becomes {}", old.word, new.word)
        if worker.name in new.bad:
            worker.wait(0.5)  # long after the others are ready
            raise bghost.GiveUp("bad " + new.bad)

    @bghost.hookimpl
    def bghost_tick(self, worker):
        if worker.settings.word == "busy":
            with worker.interruptible():
                time.sleep(30)

Kind = Sleeper
"""


DEAF_SETUP: Final = """bghost_setup(self, worker):
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    @bghost.hookimpl
    def bghost_main(self, worker):
        time.sleep(100)

    def unused(self, worker):"""


def workers(*tables: str, more: str = "") -> str:
    """A config with workers of the kind sleeper: each a name, and what else its table has."""
    texts = []
    for table in tables:
        name, _, rest = table.partition(" ")
        texts.append(
            f"[[worker]]\nkind = 'sleeper'\nname = '{name}'\nrestart_after = 0.05\n" + rest.replace("; ", "\n")
        )
    return "\n".join([more, *texts]) + "\n"


@pytest.fixture
def start(bghost_host: StartHost) -> Any:
    """Starts a host with such a config, and waits until its workers are ready."""

    def start(*tables: str, more: str = "", kinds: Mapping[str, str] | None = None, **how: Any) -> Host:
        config = workers(*tables, more=more)
        host = bghost_host(kinds={"sleeper": SLEEPER, **(kinds or {})}, args=["run"], config=config, **how)
        host.client.wait("all", timeout=10 * SLOW)
        return host

    return start


def write(host: Host, *tables: str, more: str = "") -> None:
    """A new config, put in the place of the old one at once."""
    new = host.sandbox.root / "new"
    new.write_text(workers(*tables, more=more))
    new.rename(host.sandbox.config_file)


def pids(host: Host) -> dict[str, int | None]:
    return {row["name"]: row["pid"] for row in host.client.ps()}


def states(host: Host) -> dict[str, str]:
    return {row["name"]: row["state"] for row in host.client.ps()}


def changes(reloaded: Mapping[str, Any]) -> dict[str, list[str]]:
    """What there is of changes."""
    keys = ("start", "stop", "restart", "revive", "settings", "pending_restart")
    return {key: reloaded[key] for key in keys if reloaded[key]}


# What is different


def test_the_difference() -> None:
    """Workers by name and table, settings by key; the host's start-only keys against those that it runs with."""

    def table(name: str, **more: Any) -> WorkerTable:
        return WorkerTable(kind="k", name=name, **more)

    a, b = table("a"), table("b", count=2)
    old = Config(HostTable(), (a, b), {"k": {"x": 1, "y": {"z": 1}}}, {"e": {"dsn": "1"}})
    new = Config(
        HostTable(max_workers=7, strict=True),
        (table("c"), table("b", count=3), table("a", args={"x": 1})),
        {"k": {"x": 1, "y": {"z": 2}}},
        {},
    )
    settings = ("host.max_workers", "host.strict", "kind.k.y.z", "plugin.e.dsn")
    assert compare(old, new) == Difference(("c", "b.3"), (), ("a",), settings)
    assert compare(new, old) == Difference((), ("c", "b.3"), ("a",), settings)
    assert compare(old, new, workers=False) == Difference(settings=settings)
    assert compare(old, old) == Difference()
    assert host_pending(old.host, new.host) == ["host.max_workers"]


# What a reload does


def test_only_what_has_changed_is_touched(start: Any) -> None:
    """The removed stops, the new one starts, a changed one starts anew, a count adds or takes away, the rest stays."""
    host = start("same", "gone", "other args.x = 1", "many count = 3", "few count = 3")
    before = pids(host)
    write(host, "same", "other args.x = 2", "many count = 4", "few count = 2", "fresh after = ['same', 'many']")
    dry = host.client.reload(dry_run=True)
    expected = {"start": ["many.4", "fresh"], "stop": ["gone", "few.3"], "restart": ["other"]}
    assert changes(dry) == expected
    assert (dry["config"], dry["dry_run"], pids(host)) == (1, True, before)
    reloaded = host.client.reload(wait=True, timeout=20 * SLOW)
    assert changes(reloaded) == expected
    assert reloaded["config"] == 2
    after = pids(host)
    kept = ("same", "many.1", "many.2", "many.3", "few.1", "few.2")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["other"] not in (None, before["other"])
    assert set(reloaded["acknowledged"]) == {*kept, "other", "many.4", "fresh"}
    assert set(reloaded["acknowledged"].values()) == {2}
    assert reloaded["failed"] == {}
    host.client.wait("gone", "few.3", until="stopped", timeout=10 * SLOW)
    assert "note: starts with none 2" in host.text()
    assert changes(host.client.reload(dry_run=True)) == {}


def test_a_name_that_comes_back(start: Any) -> None:
    """Also while its process still ends; and a kind may go by another worker's old name."""
    host = start("a", "busy settings.word = 'busy'; stop_timeout = 60")
    host.wait_row("busy", lambda row: row["doing"] == "active")
    first = pids(host)["busy"]
    assert first is not None
    write(host, "a")
    host.client.reload()
    assert states(host)["busy"] == "stopping"
    write(host, "a", "busy args.x = 9")
    host.client.reload()
    os.kill(first, signal.SIGTERM)  # it would end its tick first
    host.wait_row("busy", lambda row: row["state"] == "ready" and row["pid"] not in (None, first))
    host.wait_line(r"\[busy\] note: starts with none 9")
    write(host, "a", more="[[worker]]\nkind='exec'\nname='busy'\nargs.command=['sleep','100']")
    host.client.reload(wait=True, timeout=20 * SLOW)
    assert host.row("busy")["kind"] == "exec"


def test_settings_are_handed_out(start: Any) -> None:
    """Workers of the kind have the new ones and keep their pids; what is start-only is pending until a restart."""
    host = start("a", "b settings.word = 'own'", more="[kind.sleeper]\nword = 'one'")
    before = pids(host)
    more = "[kind.sleeper]\nword = 'two'\nport = 2\n[host]\nmax_workers = 50\nkinds = ['sleeper']\nstop_timeout = '4s'"
    write(host, "a", "b settings.word = 'own'", more=more)
    reloaded = host.client.reload(wait=True, timeout=10 * SLOW)
    pending = ["host.max_workers", "host.kinds"]
    assert changes(reloaded) == {
        "settings": ["host.kinds", "host.max_workers", "host.stop_timeout", "kind.sleeper.port", "kind.sleeper.word"],
        "pending_restart": pending,
    }
    host.wait_line(r"\[a\] note: one becomes two")
    assert pids(host) == before
    assert [row["pending_restart"] for row in host.client.ps()] == [["sleeper.port"]] * 2
    assert host.client.status()["pending_restart"] == pending
    assert re.search(r"^a .* ready pending ", host.bghost("ps").stdout, re.MULTILINE)
    host.client.restart("a")
    assert host.row("a")["pending_restart"] == []
    assert host.row("b")["pending_restart"] == ["sleeper.port"]
    write(host, "a", "b settings.word = 'own'", more="[kind.sleeper]\nword = 'one'")
    host.client.reload()
    assert [row["pending_restart"] for row in host.client.ps()] == [["sleeper.port"], []]
    assert host.client.status()["pending_restart"] == []


def test_the_guard_knows_the_new_stop_timeout(start: Any) -> None:
    """What the host's death leaves behind is ended by the time that was in force then."""
    deaf = SLEEPER.replace("bghost_setup(self, worker):", DEAF_SETUP)
    host = start("a", more="host.stop_timeout = 60\n[[worker]]\nkind = 'deaf'", kinds={"deaf": deaf})
    write(host, "a", more="host.stop_timeout = 0.5\n[[worker]]\nkind = 'deaf'")
    assert changes(host.client.reload()) == {"settings": ["host.stop_timeout"]}
    host.wait_line("there is a new guard, which knows the new stop_timeout")
    until(lambda: "bghost: guard (default)" in host.sandbox.processes().values(), 10, "a guard that is at its post")
    os.kill(host.pid, signal.SIGKILL)
    assert host.sandbox.wait_empty(10) == {}


def test_what_somebody_has_stopped_stays_stopped_and_what_has_failed_is_revived(start: Any) -> None:
    """A stop lasts over a reload, also of a worker whose table has changed: that counts from its next start on."""
    host = start("a", "b", "c")
    write(host, "a", "b", "c", more="kind.sleeper.bad = 'c'")
    host.client.reload()
    host.wait_row("c", lambda row: row["state"] == "failed")
    host.client.stop("a", "b")
    write(host, "a", "b args.x = 5", "c")
    reloaded = host.client.reload(wait=True, timeout=10 * SLOW)
    assert changes(reloaded) == {"restart": ["b"], "revive": ["c"], "settings": ["kind.sleeper.bad"]}
    assert states(host) == {"a": "stopped", "b": "stopped", "c": "ready"}
    host.client.restart("b")
    host.wait_line(r"\[b\] note: starts with none 5")


def test_workers_that_were_launched_by_hand(start: Any) -> None:
    """A reload leaves them alone, gives them their kind's settings, and does not take their names."""
    host = start("a")
    assert host.bghost("launch", "sleeper", "--name", "mine", "--wait").code == 0
    before = pids(host)
    write(host, "a", more="[kind.sleeper]\nword = 'new'")
    reloaded = host.client.reload(wait=True, timeout=10 * SLOW)
    assert (reloaded["acknowledged"], pids(host)) == ({"a": 2, "mine": 2}, before)
    write(host, "a", "mine")
    with pytest.raises(BghostError, match="worker mine is to be started, and there is one of that name"):
        host.client.reload()
    assert pids(host) == before
    host.client.stop("mine")
    host.client.reload(wait=True, timeout=10 * SLOW)
    assert states(host) == {"a": "ready", "mine": "ready"}


def test_slots_of_those_that_go(start: Any) -> None:
    """New workers wait for the slots of the old ones, and for each other; too many for all slots are refused."""
    host = start("a1", "a2", "a3", more="host.max_workers = 3")
    write(host, "b1 after = ['b3']", "b2", "b3", more="host.max_workers = 3")
    host.client.reload(wait=True, timeout=20 * SLOW)
    assert states(host) == {"b1": "ready", "b2": "ready", "b3": "ready"}
    begun = re.findall(r"\[(b\d)\] started", host.text())
    assert begun.index("b3") < begun.index("b1")
    write(host, "b1", "b2", "b3", "b4", more="host.max_workers = 4")
    with pytest.raises(BghostError, match="no slots for 4 workers, of which the config has 4: there are 3"):
        host.client.reload()


def test_a_kind_that_was_installed_meanwhile(start: Any) -> None:
    """It is imported in its workers, and its settings are checked all the same."""
    host = start("a")
    host.sandbox.kinds({"later": SLEEPER.replace("Sleeper", "Later")})
    later = "[[worker]]\nkind = 'later'\nsettings.port = {}"
    write(host, "a", more=later.format("'x'"))
    with pytest.raises(BghostError, match=r':3: later\.port = "x" is not allowed'):
        host.client.reload()
    write(host, "a", more=later.format("3"))
    host.client.reload(wait=True, timeout=20 * SLOW)
    assert states(host) == {"a": "ready", "later": "ready"}
    write(host, "a", more=later.format("4"))
    host.client.reload(wait=True, timeout=20 * SLOW)


def test_a_kind_with_pools_that_was_not_named(start: Any) -> None:
    """Pools are made before the first fork: the error says what to do."""
    host = start("a")
    pools = "    @bghost.hookimpl\n    @staticmethod\n    def bghost_pools(settings): return []\n"
    host.sandbox.kinds({"pooled": SLEEPER.replace("    Args = Args\n", "    Args = Args\n" + pools)})
    write(host, "a", more="[[worker]]\nkind = 'pooled'")
    expected = (
        f"{host.sandbox.config_file}:2: kind 'pooled' has pools, and was not named at the host's start "
        "(add 'pooled' to kinds in [host], and start the host again)"
    )
    with pytest.raises(ConfigError) as caught:
        host.client.reload()
    assert str(caught.value) == expected
    assert host.bghost("config", "check").code == 0


POOLED: Final = """
import ctypes
import bghost

class Settings(bghost.Settings):
    capacity: int = 4

class Word(ctypes.Structure):
    _fields_ = [("value", ctypes.c_uint32)]

class Kind:
    Settings = Settings

    @bghost.hookimpl
    @staticmethod
    def bghost_pools(settings):
        if settings.capacity == 13:
            raise ValueError("not 13")
        return [bghost.PoolSpec("words", kind="pooled", key=Word, data=Word, capacity=settings.capacity)]

    @bghost.hookimpl
    def bghost_tick(self, worker):
        return bghost.UNTIL_WOKEN
"""


def test_a_pool_that_has_changed(bghost_host: StartHost) -> None:
    """It stays as it is until the host starts again, and shows as pending; one that cannot be is refused."""
    config = "[kind.pooled]\ncapacity = {}\n[[worker]]\nkind = 'pooled'\n"
    host = bghost_host(kinds={"pooled": POOLED}, args=["run"], config=config.format(4))
    host.client.wait("pooled")
    host.sandbox.config(config.format(5))
    assert changes(host.client.reload(dry_run=True)) == {
        "settings": ["kind.pooled.capacity"],
        "pending_restart": ["pool.words"],
    }
    assert host.client.status()["pending_restart"] == []
    assert host.client.reload()["pending_restart"] == ["pool.words"] == host.client.status()["pending_restart"]
    host.sandbox.config(config.format(13))
    with pytest.raises(PluginError, match="kind 'pooled' .* fails in bghost_pools: ValueError: not 13, at .*:18"):
        host.client.reload()
    assert host.client.status()["pending_restart"] == ["pool.words"]
    host.sandbox.config(config.format(4))
    assert host.client.reload()["pending_restart"] == [] == host.client.status()["pending_restart"]


def test_the_settings_of_an_extension(bghost_host: StartHost) -> None:
    """They are checked; every process makes its extensions once, so a change is pending until it starts again."""
    extension = """
    import bghost
    class Settings(bghost.Settings):
        level: int = 1
    class Extension:
        Settings = Settings
        def __init__(self, settings):
            self.settings = settings
        @bghost.hookimpl
        def bghost_setup(self, worker):
            worker.log.info("note: level {}", self.settings.level)
    """
    host = bghost_host(
        kinds={"sleeper": SLEEPER},
        extensions={"loud": extension},
        args=["run"],
        config=workers("a", more="loud.level = 2"),
    )
    host.wait_line("note: level 2")
    write(host, "a", more="[loud]\nlevel = 'x'")
    with pytest.raises(BghostError, match=r'bghost\.toml:2: loud\.level = "x" is not allowed: expected `int`'):
        host.client.reload()
    write(host, "a", more="[loud]\nlevel = 3")
    host.client.reload()
    assert host.row("a")["pending_restart"] == ["loud.level"] == host.client.status()["pending_restart"]
    host.client.restart("a")
    assert host.row("a")["pending_restart"] == []
    assert host.client.status()["pending_restart"] == ["loud.level"]


def test_what_the_config_has_no_longer(start: Any) -> None:
    """It is not revived, and comes back only where its own name is said; what has failed before it left stays so."""
    host = start("a", "b count = 2", "c", more="kind.sleeper.port = 1")
    write(host, "a", "b count = 2", "c", more="kind.sleeper.bad = 'c'")
    host.client.reload()
    host.wait_row("c", lambda row: row["state"] == "failed")
    write(host, "a", "b")
    host.client.reload(wait=True, timeout=10 * SLOW)
    expected = {"a": "ready", "b": "ready", "b.1": "stopped", "b.2": "stopped", "c": "failed"}
    host.client.wait("b.1", "b.2", until="stopped", timeout=10 * SLOW)
    host.client.reload(wait=True, timeout=10 * SLOW)
    assert states(host) == expected
    host.client.restart("all")
    assert states(host) == expected
    host.client.restart("b.2")
    assert states(host) == {**expected, "b.2": "ready"}


# What is refused


def test_a_config_that_is_not_good_changes_nothing(start: Any) -> None:
    """Neither workers nor settings; log, status, ps and the command say what is wrong, until a good one is taken."""
    host = start("a", "b", more="[kind.sleeper]\nword = 'one'")
    before = pids(host)
    write(host, "a", "c", more="[kind.sleeper]\nword = 'two'\nport = true")
    expected = f"{host.sandbox.config_file}:3: sleeper.port = true is not allowed: expected `int`, got `bool`"
    refused = host.bghost("reload")
    assert (refused.code, refused.stderr) == (2, f"bghost: {expected}")
    status = host.client.status()
    assert (status["config"], status["config_error"], pids(host)) == (1, expected, before)
    assert host.bghost("ps").stderr == f"config refused, the old one stays: {expected}"
    assert host.bghost("ps", "--json").json()[0]["name"] == "a"
    host.wait_line(re.escape(f"config refused, the old one stays: {expected}"))
    dry = host.bghost("reload", "--dry-run")
    assert (dry.code, dry.stderr) == (2, f"bghost: {expected}")
    write(host, "a", "b", more="[kind.sleeper]\nword = 'three'")
    assert host.bghost("reload", "--wait").code == 0
    assert host.client.status()["config_error"] is None
    host.wait_line(r"\[a\] note: one becomes three")
    assert "becomes two" not in host.text()
    assert pids(host) == before


@pytest.mark.parametrize("sort", ["FIFO", "directory", "half", "gigabyte", "missing", "others"])
def test_what_is_no_config_file(start: Any, sort: str) -> None:
    """Refused within a second with its reason, and the host answers as ever meanwhile."""
    host = start("a")
    before = pids(host)
    file: Path = host.sandbox.config_file
    text = file.read_text()
    file.unlink()
    expected = "is no regular file"
    if sort == "FIFO":
        os.mkfifo(file)
    elif sort == "directory":
        file.mkdir()
    elif sort == "half":
        file.write_text(text[: len(text) // 2])
        expected = "no TOML"
    elif sort == "gigabyte":
        file.touch()
        os.truncate(file, 1 << 30)
        expected = "longer than 1048576 bytes"
    elif sort == "missing":
        expected = "No such file"
    else:
        file.write_text(text)
        file.chmod(0o666)
        expected = "can be written by others"
    with pytest.raises(BghostError, match=expected) as caught:
        host.client.reload()
    assert caught.value.exit_code == 2
    assert pids(host) == before


def test_the_loop_does_not_wait_for_an_import(start: Any) -> None:
    """A kind whose import takes its time holds up the reload, and nobody else; a second reload waits its turn."""
    host = start("a")
    gate = host.sandbox.root / "gate"
    os.mkfifo(gate)
    host.sandbox.kinds({"slow": f"open({str(gate)!r}).read()\n" + SLEEPER})
    write(host, "a", more="[[worker]]\nkind = 'slow'")
    done: dict[str, Any] = {}

    def reload(which: str) -> None:
        done[which] = host.client.reload()

    first = threading.Thread(target=reload, args=["first"])
    first.start()
    with gate.open("w"):  # opens when the import does
        second = threading.Thread(target=reload, args=["second"])
        second.start()
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert [row["state"] for row in host.client.ps()] == ["ready"]
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 0.25 * SLOW
        assert not done
        gate.unlink()  # the imports that follow are of a file that there is not: they fail
        gate.write_text("")
    first.join(20 * SLOW)
    second.join(20 * SLOW)
    assert (done["first"]["config"], done["second"]["config"]) == (2, 3)
    host.client.wait("slow", timeout=10 * SLOW)


def test_a_check_that_dies(start: Any) -> None:
    """A kind that ends the process that imports it is refused with its name, and the host is none the worse."""
    host = start("a")
    host.sandbox.kinds({"deadly": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"})
    write(host, "a", more="[[worker]]\nkind = 'deadly'")
    with pytest.raises(BghostError, match="kind 'deadly' .* ends the process that imports it: SIGKILL"):
        host.client.reload()
    assert states(host) == {"a": "ready"}


@pytest.mark.skipif(not SOAK, reason="takes the ten seconds that a check has")
def test_a_check_that_hangs(start: Any) -> None:
    """A kind that is not imported in time is noted, and its settings are its workers' affair."""
    host = start("a")
    host.sandbox.kinds({"hangs": "import time\ntime.sleep(1000)"})
    write(host, "a", more="[[worker]]\nkind = 'hangs'")
    reloaded = host.client.reload(timeout=30 * SLOW)
    assert "was not imported in time" in reloaded["notes"][0]


# Waiting, and going back


def test_waiting_for_what_does_not_become_ready(start: Any) -> None:
    """reload --wait says which workers have failed and why, with exit code 1; the config stays."""
    host = start("a", "b")
    write(host, "a", "b restart = 'never'; args.x = 1", more="kind.sleeper.bad = 'b'")
    result = host.bghost("reload", "--wait")
    assert result.code == 1
    assert result.stderr == "bghost: config 2 is in force, but failed: b (in set-up: ValueError: bad b)"
    assert "  restart: b\n" in result.stdout and "acknowledged: a 2" in result.stdout
    assert host.client.status()["config"] == 2


def test_waiting_has_its_limit(start: Any) -> None:
    """A worker in a long tick has not taken the config yet; the wait ends with 4, and the config stays."""
    host = start("a", "slow settings.word = 'busy'; stop_timeout = 0.2")
    host.wait_row("slow", lambda row: row["doing"] == "active")
    write(host, "a", "slow settings.word = 'busy'; stop_timeout = 0.2", more="kind.sleeper.port = 2")
    said = ""
    while "not over within 0.5 s: reload" not in said:  # a host that is short of time has not answered
        result = host.bghost("reload", "--wait", "-t", "0.5")
        assert result.code == 4
        said = result.stderr
    until(lambda: host.client.status()["config"] == 2)
    host.client.shutdown("immediate")


@pytest.mark.parametrize("how", ["set-up fails", "reload hook gives up", "does not take it"])
def test_going_back(start: Any, how: str) -> None:
    """If a worker does not get along with the new config, all of the old one is put back, with a new number."""
    busy = "c settings.word = 'busy'; stop_timeout = 0.2; ready_timeout = 1"
    tables = ["a", "b args.x = 1", busy if how == "does not take it" else "c", "gone"]
    host = start(*tables, more="[kind.sleeper]\nword = 'one'")
    if how == "does not take it":
        host.wait_row("c", lambda row: row["doing"] == "active")
    before = pids(host)
    bad = {"set-up fails": "b", "reload hook gives up": "a", "does not take it": ""}[how]
    new = ["a", "b args.x = 2", tables[2], "fresh"]
    write(host, *new, more=f"[kind.sleeper]\nword = 'two'\nbad = '{bad}'")
    result = host.bghost("reload", "--rollback")
    assert result.code == 1
    why = {
        "set-up fails": "worker b: in set-up: ValueError: bad b",
        "reload hook gives up": "worker a: gave up: bad a",
        "does not take it": "worker c: has not taken it within 1 s",
    }[how]
    expected = f"config 2 was taken back, config 3 is as the one before: {why}"
    assert result.stderr == f"bghost: {expected}"
    status = host.client.status()
    assert (status["config"], status["config_error"]) == (3, expected)
    host.client.wait("a", "b", "c", "gone", timeout=20 * SLOW)
    host.client.wait("fresh", until="stopped", timeout=20 * SLOW)
    after = pids(host)
    untouched = ("a", "c") if how != "reload hook gives up" else ("c",)
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    assert re.findall(r"\[b\] note: starts with (\w+) (\d)", host.text())[-1] == ("one", "1")
    if how == "does not take it":
        host.client.shutdown("immediate")


def test_not_going_back(start: Any) -> None:
    """If all of them do, the new config stays, and the answer comes when that is known."""
    host = start("a", "b")
    write(host, "a", "b args.x = 2", "c", more="kind.sleeper.word = 'two'")
    reloaded = host.client.reload(rollback=True, timeout=20 * SLOW)
    assert reloaded["acknowledged"] == {"a": 2, "b": 2, "c": 2}
    assert host.client.status()["config_error"] is None


def test_going_back_after_a_time(start: Any) -> None:
    """-t with --rollback is how long all of it may take."""
    host = start("a", "slow settings.word = 'busy'; stop_timeout = 0.2")
    host.wait_row("slow", lambda row: row["doing"] == "active")
    write(host, "a", "slow settings.word = 'busy'; stop_timeout = 0.2", more="kind.sleeper.port = 2")
    result = host.bghost("reload", "--rollback", "-t", "0.5")
    assert (result.code, host.client.status()["config"]) == (1, 3)
    assert "config 2 was taken back, config 3 is as the one before: " in result.stderr
    assert "worker slow: not ready within 0.5 s" in result.stderr
    host.client.shutdown("immediate")


# When there is none


def test_no_reload_during_a_stop(start: Any) -> None:
    """Neither by HUP nor by the command, which says so; the stop is not held up, and nothing is born."""
    host = start("busy settings.word = 'busy'", more="host.stop_timeout = 60")
    host.wait_row("busy", lambda row: row["doing"] == "active")
    host.signal(signal.SIGTERM)
    host.wait_line("stopping, smart")
    write(host, "busy settings.word = 'busy'", "late")
    host.signal(signal.SIGHUP)
    result = host.bghost("reload")
    assert (result.code, result.stderr) == (1, "bghost: the host is stopping, no config is read any more")
    host.client.shutdown("immediate")
    host.wait()
    assert "late" not in host.text() and "config 2" not in host.text()


def test_a_stop_during_a_reload(start: Any) -> None:
    """The reload is given up, its client told, and its process is gone."""
    host = start("a")
    gate = host.sandbox.root / "gate"
    os.mkfifo(gate)
    host.sandbox.kinds({"slow": f"open({str(gate)!r}).read()\n" + SLEEPER})
    write(host, "a", more="[[worker]]\nkind = 'slow'")
    errors: list[BghostError] = []

    def reload() -> None:
        try:
            host.client.reload()
        except BghostError as error:
            errors.append(error)

    client = threading.Thread(target=reload)
    client.start()
    with gate.open("w"):
        host.signal(signal.SIGTERM)
        assert host.wait() == 0
    client.join(10 * SLOW)
    assert [str(error) for error in errors] == ["the host is stopping, no config is read any more"]


def test_a_host_that_runs_what_its_command_line_names(bghost_host: StartHost) -> None:
    """A reload gives it the settings of the file, and none of the file's workers; --set outlives it."""
    host = bghost_host(
        kinds={"sleeper": SLEEPER}, args=["run", "sleeper", "--set", "sleeper.word=set"], config="kind.sleeper.port = 1"
    )
    host.client.wait("sleeper", timeout=10 * SLOW)
    write(host, "other", more="[kind.sleeper]\nword = 'file'\nport = 2")
    reloaded = host.client.reload(wait=True, timeout=10 * SLOW)
    assert changes(reloaded) == {"settings": ["kind.sleeper.port", "kind.sleeper.word"]}
    assert states(host) == {"sleeper": "ready"}
    assert "becomes" not in host.text()


# Often


def fds(host: Host) -> int:
    return len(os.listdir(f"/proc/{host.pid}/fd"))


def resident(host: Host) -> int:
    """KiB."""
    status = Path(f"/proc/{host.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


def test_reloads_with_crashes_between(start: Any) -> None:
    """Good configs and bad ones, workers killed meanwhile: the last good one is in force, and the host is as before."""
    host = start("a", "b count = 2", more="[kind.sleeper]\nword = 'w0'")
    good = "w0"
    for number in range(1, 4):  # what is made once
        write(host, "a", "b count = 2", more=f"[kind.sleeper]\nword = 'w{number % 2}'")
        host.client.reload()
    before, size = fds(host), resident(host)
    for number in range(1000 if SOAK else 40):
        kind = ("good", "bad", "good", "half")[number % 4]
        more = f"[kind.sleeper]\nword = 'w{number}'\n"
        if kind == "bad":
            more += "port = true\n"
        elif kind == "half":
            more += "port = "
        else:
            good = f"w{number}"
        write(host, "a", f"b count = {2 + number // 4 % 2}", more=more)
        for pid in list(pids(host).values())[:: 1 + number % 3]:
            if pid is not None and number % 2 == 0:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if number % 3:
            host.signal(signal.SIGHUP)
        else:
            try:
                host.client.reload()
                assert kind == "good"
            except ConfigError:
                assert kind in ("bad", "half")
    write(host, "a", "b count = 2", more=f"[kind.sleeper]\nword = '{good}'\nport = true")
    with pytest.raises(ConfigError):
        host.client.reload()
    write(host, "a", "b count = 2", more="[kind.sleeper]\nword = 'last'")
    host.client.reload(timeout=30 * SLOW)
    host.client.restart("all", timeout=30 * SLOW)
    until(lambda: set(states(host).values()) <= {"ready", "stopped"})
    lasts = re.findall(r"\[(\S+)\] note: starts with last", host.text())
    assert {"a", "b.1", "b.2"} <= set(lasts)
    until(lambda: fds(host) <= before, 10, "descriptors as before")
    grown = resident(host) - size
    print(f"{before} descriptors as before, memory {grown} KiB more")
    assert grown < 8 << 10
    assert os.listdir(f"/proc/{host.pid}/task") == [str(host.pid)]
    text = host.text()
    assert "a bug of bghost" not in text and "Traceback" not in text


def test_many_hups(start: Any) -> None:
    """They need not be counted: at least one reload follows the last; one at a time, and nothing piles up."""
    host = start("a")
    before = fds(host)
    words = itertools.count()
    ends = time.monotonic() + 2
    while time.monotonic() < ends:
        write(host, "a", more=f"[kind.sleeper]\nword = 'w{next(words)}'")
        for _ in range(50):
            host.signal(signal.SIGHUP)
    write(host, "a", more="[kind.sleeper]\nword = 'last'")
    host.signal(signal.SIGHUP)
    host.wait_line("note: .* becomes last", timeout=20)
    until(lambda: fds(host) <= before, 10, "descriptors as before")
    assert host.client.status()["config_error"] is None


def test_clients_that_reload_at_the_same_time(start: Any) -> None:
    """Each is told of a reload that was begun after it had asked."""
    host = start("a")
    told: list[int] = []
    clients = [threading.Thread(target=lambda: told.append(host.client.reload()["config"])) for _ in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(30 * SLOW)
    assert len(told) == 20
    assert min(told) >= 2 and max(told) == host.client.status()["config"] <= 21


def test_systemd_is_told(start: Any, tmp_path: Path) -> None:
    """RELOADING, then READY, for a good config and for a bad one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        path = tmp_path / "n"
        systemd.bind(str(path))
        systemd.settimeout(10 * SLOW)
        host = start("a", env={"NOTIFY_SOCKET": str(path)})

        def told() -> str:
            while (text := systemd.recv(4096).decode()).startswith("STATUS="):
                pass
            return text.split("\n")[0]

        assert told() == "READY=1"
        host.client.reload()
        assert (told(), told()) == ("RELOADING=1", "READY=1")
        write(host, "a", more="x = ")
        with pytest.raises(BghostError):
            host.client.reload()
        assert (told(), told()) == ("RELOADING=1", "READY=1")


def test_a_request_of_wrong_form(start: Any) -> None:
    """It is refused, and no reload comes of it."""
    host = start("a")
    wrong: list[dict[str, Any]] = [{"dry_run": 1}, {"wait": "x"}, {"rollback": []}, {"within": -1}, {"within": "x"}]
    for args in wrong:
        with pytest.raises(UsageError):
            host.client.request("reload", **args)
    assert host.client.status()["config"] == 1
    assert host.bghost("reload", "--dry-run", "--wait").code == 2

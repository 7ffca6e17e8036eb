"""What a user types, and what comes back: the commands against a host that runs, and every exit code."""

import os
import re
import signal
import subprocess
import sys
import termios
import time
import uuid
from pathlib import Path

import pytest
from support import BGHOST, SLOW, Host, Result, Sandbox, StartHost, until, within

from bghost.shared.spec import WorkerSpec

TICKER = """
    import bghost
    from typing import Annotated
    import msgspec

    class Settings(bghost.Settings):
        naptime: Annotated[float, msgspec.Meta(gt=0)] = 30.0
        label: str = "none"

    class Kind:
        Settings = Settings

        @bghost.hookimpl
        def bghost_setup(self, worker):
            worker.log.info("setup {} {} {}", worker.name, worker.settings.label, worker.args)

        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("tick of {}", worker.name)
"""

# Nothing but a SIGKILL ends its tick.
DEAF = """
    import bghost, signal, time

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            worker.log.info("deaf")
            while True:
                time.sleep(60)
"""

FAILING = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            raise bghost.GiveUp("no water")

        @bghost.hookimpl
        def bghost_tick(self, worker):
            pass
"""

FIELDS = {
    "name",
    "kind",
    "pid",
    "state",
    "doing",
    "since",
    "starts",
    "generation",
    "ticks",
    "errors",
    "restarts",
    "exit",
    "last_error",
    "activity",
    "wait",
    "backend_pid",
    "flags",
    "pool",
    "key",
    "pending_restart",
}


def says(result: Result, code: int, text: str) -> None:
    """Assert that a command ended with *code* and told one line, *text*, on stderr."""
    assert (result.code, result.stdout, result.stderr) == (code, "", "bghost: " + text)


@pytest.fixture
def host(bghost_host: StartHost) -> Host:
    """A host with one worker, ready."""
    host = bghost_host(kinds={"ticker": TICKER, "deaf": DEAF, "failing": FAILING}, args=["run", "ticker"])
    host.client.wait("ticker", timeout=10)
    return host


# ps


def test_ps_shows_a_line_for_each_worker(host: Host) -> None:
    shown = host.bghost("ps")
    heads, line = shown.stdout.splitlines()
    assert shown.code == 0
    assert shown.stderr == ""
    assert heads.split() == ["NAME", "KIND", "PID", "STATE", "DOING", "FOR", "TICKS", "ERRORS", "RESTARTS", "NOTE"]
    assert re.fullmatch(r"ticker +ticker +\d+ +ready +\w+ +\d+s +\d+ +0 +0.*", line)
    assert line.index(str(host.row("ticker")["pid"])) + len(str(host.row("ticker")["pid"])) == heads.index("PID") + 3


def test_ps_json_is_a_list_of_objects_with_every_field(host: Host) -> None:
    """Which are those that the docs promise; the values are what the client's own method gives."""
    (row,) = host.bghost("ps", "--json").json()
    assert set(row) >= FIELDS
    assert (row["name"], row["kind"], row["state"], row["restarts"]) == ("ticker", "ticker", "ready", 0)
    assert row["pid"] == host.row("ticker")["pid"]
    assert abs(time.time() - row["since"]) < 60


def test_ps_of_names(host: Host) -> None:
    """Names choose, a name that nobody has is exit code 5, with those that are near."""
    host.bghost("launch", "ticker", "--name", "other", "--wait")
    assert [row["name"] for row in host.bghost("ps", "other", "--json").json()] == ["other"]
    assert [row["name"] for row in host.bghost("ps", "--json").json()] == ["ticker", "other"]
    says(host.bghost("ps", "tikcer"), 5, "no worker 'tikcer' (did you mean ticker or other?)")


def test_ps_says_the_same_by_both_of_its_ways(host: Host) -> None:
    """It is answered without click where it can be: with ``--config``, which it has no use for, it cannot."""
    host.sandbox.config("")
    host.wait_row("ticker", lambda row: row["ticks"] == 1 and row["doing"] == "idle")
    (quick,), (slow,) = (host.bghost("ps", "--json", *more).json() for more in ((), ("--config", "x")))
    assert quick.pop("since") == pytest.approx(slow.pop("since"))
    assert quick == slow
    for args in (["ps", "nobody"], ["ps", "--instance", "none"], ["--instance=none", "ps", "--json"]):
        said = host.bghost(*args)
        assert said == host.bghost("--config", "x", *args)
        assert said.code in (3, 5)


def test_ps_imports_nothing_that_it_does_not_need(host: Host) -> None:
    """It has the time of a Python's own start, and little more."""
    script = "import sys, runpy; sys.argv = ['bghost', 'ps', '--json']; runpy.run_module('bghost', run_name='__main__')"
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-P", "-c", script],
        env=host.sandbox.env,
        capture_output=True,
        text=True,
        timeout=20 * SLOW,
    )
    imported = {
        line.rpartition("|")[2].strip() for line in shown.stderr.splitlines() if line.startswith("import time:")
    }
    assert shown.returncode == 0
    assert "bghost.shared.client" in imported
    heavy = {
        "typing",
        "socket",
        "click",
        "msgspec",
        "platformdirs",
        "importlib_metadata",
        "loguru",
        "pluggy",
        "rich",
        "bghost.host",
    }
    assert not imported & heavy


LOUD = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            raise bghost.GiveUp("one\\ntwo \\x1b[31mthree")

        @bghost.hookimpl
        def bghost_tick(self, worker):
            pass
"""


def test_ps_keeps_what_a_worker_says_on_its_line_and_from_the_terminal(bghost_host: StartHost) -> None:
    """No line breaks, and nothing that a terminal obeys."""
    host = bghost_host(kinds={"loud": LOUD, "ticker": TICKER}, args=["run", "ticker", "loud"])
    host.wait_row("loud", lambda row: row["state"] == "failed")
    line = host.bghost("ps").stdout.splitlines()[-1]
    assert re.search(r"^loud .* failed .*one\W+two .*three", line)
    assert "\x1b" not in line


def test_ps_on_a_terminal_has_no_line_longer_than_that(host: Host) -> None:
    """Into a pipe or a file lines are whole."""
    (whole,) = host.bghost("ps").stdout.splitlines()[1:]
    master, terminal = os.openpty()
    try:
        termios.tcsetwinsize(terminal, (24, 40))
        assert outcome(host.sandbox, ["ps"], terminal, terminal) == 0
        lines = os.read(master, 10_000).decode().splitlines()
    finally:
        os.close(master)
        os.close(terminal)
    assert len(whole) > 40
    assert [len(line) for line in lines] == [40, 40]


# status, launch, wait, reload


def test_status_tells_of_the_host_itself(host: Host) -> None:
    status = host.bghost("status", "--json").json()
    assert status["pid"] == host.pid
    assert status["instance"] == "default"
    assert abs(time.time() - status["since"]) < 60
    shown = host.bghost("status")
    assert shown.code == 0
    assert re.search(rf"^pid +{host.pid}$", shown.stdout, re.MULTILINE)


def test_launch_adds_a_worker(host: Host) -> None:
    """With a name, args that are JSON where they can be, and settings for it alone."""
    launched = host.bghost(
        "launch", "ticker", "--name", "extra", "--arg", "index=4", "--arg", "text=a=b", "--arg", "list=[1, null]",
        "--arg", "nan=NaN", "--set", "ticker.label=mine", "--wait",
    )  # fmt: skip
    assert launched.code == 0
    assert launched.stdout == f"extra is ready, pid {host.row('extra')['pid']}"
    line = host.wait_line(r"setup extra (\w+) (.*)")
    assert line.match[1] == "mine"
    assert line.match[2] == "{'index': 4, 'text': 'a=b', 'list': [1, None], 'nan': 'NaN'}"


def test_launch_json_gives_the_address(host: Host) -> None:
    launched = host.bghost("launch", "ticker", "--json", "--wait").json()
    assert set(launched) == {"name", "pid", "state", "slot", "generation", "run_id"}
    assert launched["name"] == "ticker.1"
    assert host.row("ticker.1")["pid"] == launched["pid"]


def test_launch_refuses_what_cannot_be(host: Host) -> None:
    """A kind that nobody has, a name that is taken or is none, a setting that is none, arguments of a wrong form."""
    says(host.bghost("launch", "tickr"), 5, "there is no kind 'tickr' (did you mean ticker?)")
    says(host.bghost("launch", "ticker", "--name", "ticker"), 1, "there is a worker ticker already: it is ready")
    assert host.bghost("launch", "ticker", "--name", "a/b").code == 2
    refused = host.bghost("launch", "ticker", "--set", "ticker.naptime=-1")
    says(refused, 2, "ticker.naptime = -1 is not allowed: expected `float` > 0.0")
    says(
        host.bghost("launch", "ticker", "--arg", "x"), 2, "--arg 'x' is not of the form key=value (as in --arg index=4)"
    )
    refused = host.bghost("launch", "ticker", "--set", "deaf.x=1")
    says(refused, 2, "--set deaf... is not for this worker (its settings are ticker.KEY)")
    assert [row["name"] for row in host.client.ps()] == ["ticker"]


def test_launch_wait_tells_that_a_worker_did_not_become_ready(host: Host) -> None:
    result = host.bghost("launch", "failing", "--wait")
    assert result.code == 1
    assert re.fullmatch("bghost: worker failing did not become ready: .*no water.*", result.stderr)


def test_wait_returns_when_it_is_so_and_says_when_it_is_not(host: Host) -> None:
    """0 once the worker is ready or has stopped, 4 when the time is over, 5 for nobody."""
    host.bghost("launch", "ticker", "--name", "other", "--wait")
    assert host.bghost("wait", "ticker", "-t", "5").code == 0
    waiting = host.sandbox.start("wait", "ticker", "--for", "stopped")
    over = host.bghost("wait", "ticker", "--for", "stopped", "-t", "0.2")
    says(over, 4, "not over within 0.2 s: wait ticker")
    assert waiting.alive
    assert host.bghost("stop", "ticker").code == 0
    assert waiting.result() == Result(0, "", "")
    assert host.bghost("wait", "nobody").code == 5


def test_reload_takes_all_of_the_config_or_nothing(bghost_host: StartHost) -> None:
    """The new number is printed; what is wrong with a config is told with its file, and is exit code 2."""
    host = bghost_host(kinds={"ticker": TICKER}, args=["run", "ticker"], config="[kind.ticker]\nlabel = 'one'\n")
    host.client.wait("ticker", timeout=10)
    before = host.client.status()["config"]
    host.sandbox.config("[kind.ticker]\nlabel = 'two'\n")
    done = host.bghost("reload")
    assert done == Result(0, f"config {before + 1} is in force\n  changed: kind.ticker.label", "")
    host.sandbox.config("[kind.ticker\n")
    refused = host.bghost("reload")
    assert refused.code == 2
    assert str(host.sandbox.config_file) in refused.stderr
    assert host.client.status()["config"] == before + 1


# stop, shutdown


def test_stop_waits_until_the_worker_has_stopped(host: Host) -> None:
    """It is there still, stopped, and stopping it once more is no error."""
    host.bghost("launch", "ticker", "--name", "other", "--wait")
    assert host.bghost("stop", "ticker") == Result(0, "", "")
    row = host.row("ticker")
    assert (row["state"], row["pid"]) == ("stopped", None)
    assert host.row("other")["state"] == "ready"
    assert host.bghost("stop", "ticker", "--fast").code == 0
    says(host.bghost("stop", "nobody"), 5, "no worker 'nobody' (there is other, ticker)")


def test_stop_of_several(bghost_host: StartHost) -> None:
    """A name stands for all of its numbered workers."""
    host = bghost_host(kinds={"ticker": TICKER}, args=["run", "ticker", "--count", "3"])
    host.client.wait("ticker", timeout=10)
    assert host.bghost("stop", "ticker.2").code == 0
    assert [row["state"] for row in host.client.ps()] == ["ready", "stopped", "ready"]
    host.bghost("stop", "ticker")
    assert host.wait() == 0


def test_a_worker_that_had_to_be_killed_is_exit_code_1(host: Host) -> None:
    host.client.launch(WorkerSpec(kind="deaf"), wait=True)
    host.wait_line("deaf$")
    says(host.bghost("stop", "deaf", "--now"), 1, "stopped, but had to be killed: deaf")
    assert "SIGKILL" in str(host.row("deaf")["exit"])


def test_shutdown_returns_when_nothing_is_left(host: Host) -> None:
    """The host's process has ended, the lock is free, the socket gone, and another host may start at once."""
    assert host.bghost("shutdown") == Result(0, "", "")
    assert host.wait(0.5) == 0
    assert host.sandbox.processes() == {}
    assert not os.path.exists(host.directories.socket)
    says(host.bghost("ps"), 3, f"no host of instance 'default' is running: nobody listens at {host.directories.socket}")
    again = host.sandbox.start_host("run", "ticker")
    again.wait_answering()


def test_a_shutdown_that_had_to_kill_is_exit_code_1(bghost_host: StartHost) -> None:
    """And so is the host's own."""
    host = bghost_host(kinds={"deaf": DEAF}, args=["run", "deaf"])
    host.wait_line("deaf$")
    says(host.bghost("shutdown", "--now"), 1, "stopped, but had to be killed: deaf")
    assert host.wait() == 1


def test_a_stop_is_fast_or_now_and_not_both(host: Host) -> None:
    for command in (["stop", "ticker"], ["shutdown"]):
        says(host.bghost(*command, "--fast", "--now"), 2, "--fast and --now exclude each other")
    assert host.row("ticker")["state"] == "ready"


# A host that is not there, or does not answer


def test_without_a_host_every_command_is_exit_code_3(sandbox: Sandbox) -> None:
    commands = ["ps", "ps --json", "status", "stop x", "shutdown", "launch x", "reload", "wait x"]
    for result in sandbox.bghost_each(*(command.split() for command in commands)):
        where = sandbox.directories.socket
        says(result, 3, f"no host of instance 'default' is running: nobody listens at {where}")


def test_a_stopped_host_is_exit_code_4_after_5_seconds(host: Host) -> None:
    """Of commands that ask and of commands that wait; it is named, with what it is in and how it goes on."""
    host.signal(signal.SIGSTOP)

    def attempt() -> float:
        began = time.monotonic()
        commands = [host.sandbox.start(*args) for args in (["ps"], ["stop", "ticker"], ["shutdown", "--now"])]
        for command in commands:
            ended = command.result(30)
            assert ended.code == 4
            assert re.fullmatch(
                rf"bghost: the host of instance 'default' does not answer: pid {host.pid}, stopped by a signal, "
                rf"silent for \d+\.\d s \(kill -CONT {host.pid} lets it go on\)",
                ended.stderr,
            )
        took = time.monotonic() - began
        assert took >= 5
        return took

    within(7, attempt)
    host.signal(signal.SIGCONT)
    host.wait_answering()
    assert host.row("ticker")["state"] == "ready"  # what was given up on was not asked of it


# run


def test_run_of_a_kind_that_nobody_has_is_exit_code_5(sandbox: Sandbox) -> None:
    sandbox.kinds({"ticker": TICKER})
    result = sandbox.bghost("run", "tikcer")
    assert result.code == 5
    assert last(result) == "bghost: there is no kind 'tikcer' (did you mean ticker?)"


def last(result: Result) -> str:
    """The line that tells the error; the host's log may stand before it."""
    return result.stderr.splitlines()[-1]


def test_a_set_of_a_wrong_form_is_exit_code_2(sandbox: Sandbox) -> None:
    """What was given and what is wanted are told."""
    sandbox.kinds({"ticker": TICKER})
    wrong = ["naptime=1", "ticker.naptime", "ticker=1", "=1", ".naptime=1", "ticker.=1", ""]
    refused = sandbox.bghost_each(*(["run", "ticker", "--set", given] for given in wrong))
    for given, result in zip(wrong, refused, strict=True):
        says(result, 2, f"--set {given!r} is not of the form kind.key=value (as in --set counter.naptime=1)")


def test_a_set_that_does_not_fit_is_exit_code_2(sandbox: Sandbox) -> None:
    """Key, value and what is allowed are told."""
    sandbox.kinds({"ticker": TICKER})
    wrong = {
        "ticker.naptime=-1": "ticker.naptime = -1 is not allowed: expected `float` > 0.0",
        "ticker.naptime=fast": 'ticker.naptime = "fast" is not allowed: expected `float`, got `str`',
        "ticker.nap=1": "ticker has no setting 'nap' (did you mean naptime?)",
    }
    refused = sandbox.bghost_each(
        *(["run", "ticker", "--instance", f"i{number}", "--set", given] for number, given in enumerate(wrong))
    )
    for text, result in zip(wrong.values(), refused, strict=True):
        assert (result.code, last(result)) == (2, "bghost: --set: " + text)
        assert "Traceback" not in result.stderr


def test_a_set_that_fits_is_taken(bghost_host: StartHost) -> None:
    """The later of two holds, and a text that looks like a number is text where text is wanted."""
    host = bghost_host(
        kinds={"ticker": TICKER}, args=["run", "ticker", "--set", "ticker.label=x", "--set=ticker.label=7"]
    )
    host.wait_line("setup ticker 7")


def test_run_refuses_what_makes_no_sense(sandbox: Sandbox) -> None:
    sandbox.kinds({"ticker": TICKER, "deaf": DEAF})
    wrong = {
        "ticker ticker": "a kind is named twice (--count N runs several workers of it)",
        "ticker deaf --name x": "--name is for the workers of one kind: 2 were named",
        "--name x": "--name is for the workers of one kind: 0 were named",
        "--count 2": "--count is for kinds that are named (the config file has 'count' in its [[worker]])",
        "ticker --count 0": "invalid value for '--count': 0 is not in the range x>=1 (see 'bghost run --help')",
        "ticker --count x": "invalid value for '--count': 'x' is not a valid integer range (see 'bghost run --help')",
        "ticker --name a/b": "'a/b' is no name for a worker (a letter or _, then letters, digits, _ - and single dots "
        "inside, at most 63 characters)",
    }
    refused = sandbox.bghost_each(*(["run", *args.split()] for args in wrong))
    for text, result in zip(wrong.values(), refused, strict=True):
        says(result, 2, text)


def test_workers_have_the_name_that_was_given(bghost_host: StartHost) -> None:
    host = bghost_host(kinds={"ticker": TICKER}, args=["run", "ticker", "--name", "t", "--count", "2"])
    assert [row["name"] for row in host.client.ps()] == ["t.1", "t.2"]


def test_run_ends_with_0_when_a_stop_was_asked_for(host: Host) -> None:
    host.signal(signal.SIGINT)
    assert host.wait() == 0


def test_run_ends_with_1_when_a_worker_failed_for_good(sandbox: Sandbox) -> None:
    sandbox.kinds({"failing": FAILING})
    assert sandbox.bghost("run", "failing").code == 1


def test_a_second_host_of_the_instance_is_exit_code_1(host: Host) -> None:
    """It names the first and since when it runs, and leaves what the first has alone."""
    files = {name: os.stat(os.path.join(host.directories.runtime, name)).st_ino for name in ("lock", "control.sock")}
    second = host.bghost("run", "ticker")
    assert second.code == 1
    since = time.strftime("%Y-%m-%d %H:%M:", time.localtime(host.client.status()["since"]))
    assert re.fullmatch(
        rf"bghost: instance default has a host already: pid {host.pid}, since {since}\d\d .*", last(second)
    )
    assert {name: os.stat(os.path.join(host.directories.runtime, name)).st_ino for name in files} == files
    assert host.row("ticker")["state"] == "ready"


def test_a_runtime_directory_that_is_not_safe_is_exit_code_1(sandbox: Sandbox) -> None:
    """A symlink, somebody else's, or one that others may enter; path and reason are told in one line."""
    sandbox.kinds({"ticker": TICKER})
    runtime = Path(sandbox.directories.runtime)
    (sandbox.root / "real").mkdir(0o700)
    runtime.symlink_to(sandbox.root / "real")
    result = sandbox.bghost("run", "ticker")
    assert result.code == 1
    assert last(result).startswith(f"bghost: the directory {runtime} is a symlink")
    assert os.listdir(sandbox.root / "real") == []
    runtime.unlink()
    runtime.mkdir()
    runtime.chmod(0o755)
    result = sandbox.bghost("run", "ticker")
    assert result.code == 1
    assert last(result).startswith(f"bghost: the directory {runtime} is open to others, mode 0755")
    if os.geteuid() == 0:
        runtime.chmod(0o700)
        os.chown(runtime, 54321, -1)
        result = sandbox.bghost("run", "ticker")
        assert result.code == 1
        assert last(result).startswith(f"bghost: the directory {runtime} belongs to user 54321, and we are user 0")
    assert "Traceback" not in result.stderr


def test_it_works_without_an_environment(sandbox: Sandbox) -> None:
    """No HOME, no XDG variables, no terminal, no PATH: the host runs, and a client finds it."""
    sandbox.kinds({"ticker": TICKER})
    bare: dict[str, str | None] = dict.fromkeys(sandbox.env)
    kept = ("PYTHONPATH", "BGHOST_STATE_DIR", "BGHOST_DATA_DIR", "BGHOST_TEST_RUN", "PYTHONDEVMODE", "PYTHONWARNINGS")
    bare |= {name: sandbox.env.get(name) for name in kept}
    name = f"t{uuid.uuid4().hex[:12]}"
    host = sandbox.start("run", "ticker", "--instance", name, env=bare)
    try:
        host.wait_line("tick of ticker")
        assert sandbox.bghost("ps", "--json", "--instance", name, env=bare).json()[0]["name"] == "ticker"
        assert sandbox.bghost("shutdown", "--instance", name, env=bare).code == 0
        assert host.wait() == 0
        assert "Warning" not in host.text()
    finally:
        for base in (f"/tmp/bghost-{os.geteuid()}", f"/run/user/{os.geteuid()}/bghost"):
            Path(base, name, "lock").unlink(missing_ok=True)
            if Path(base, name).exists():
                Path(base, name).rmdir()


# Options that may stand anywhere


def test_the_instance_may_be_named_anywhere(sandbox: Sandbox) -> None:
    """Before the command, after it, and in the environment; the option wins."""
    sandbox.kinds({"ticker": TICKER})
    host = sandbox.start_host("run", "ticker", env={"BGHOST_INSTANCE": "blue"})
    host.wait_answering()
    assert sandbox.bghost("status", "--json", env={"BGHOST_INSTANCE": "blue"}).json()["instance"] == "blue"
    ways = (
        ["--instance", "blue", "status"],
        ["status", "--instance", "blue"],
        ["--instance=red", "status", "--instance=blue"],
        ["--instance", "blue", "ps"],
        ["ps", "--json", "--instance=blue"],
    )
    assert [result.code for result in sandbox.bghost_each(*ways, ["ps"], ["status"])] == [0, 0, 0, 0, 0, 3, 3]
    sandbox.env["BGHOST_INSTANCE"] = "green"
    assert [result.code for result in sandbox.bghost_each(*ways)] == [0] * 5


@pytest.mark.parametrize("args", [["ps", "--instance", "../x"], ["--instance", "../x", "stop", "y"]], ids=" ".join)
def test_an_instance_that_is_no_plain_word_is_exit_code_2(sandbox: Sandbox, args: list[str]) -> None:
    result = sandbox.bghost(*args)
    assert result.code == 2
    assert result.stderr.startswith("bghost: '../x' is no name for ")
    assert sandbox.bghost("ps", env={"BGHOST_INSTANCE": "a b"}).code == 2


def test_the_config_file_may_be_named_anywhere(sandbox: Sandbox) -> None:
    bad = sandbox.root / "bad.toml"
    bad.write_text("[nonsense]\n")
    sandbox.kinds({"ticker": TICKER})
    for args in (["--config", "bad.toml", "run", "ticker"], ["run", "ticker", "--config", "bad.toml"]):
        result = sandbox.bghost(*args)
        assert (result.code, last(result).split(" (")[0]) == (2, f"bghost: {bad}:1: there is no table [nonsense]")
    assert sandbox.bghost("run", "ticker", env={"BGHOST_CONFIG": str(bad)}).code == 2


# The command line itself


def test_help_lists_every_command_and_the_exit_codes(sandbox: Sandbox) -> None:
    shown = sandbox.bghost("--help")
    assert (shown.code, shown.stderr) == (0, "")
    commands = ("launch", "ps", "reload", "run", "shutdown", "status", "stop", "wait")
    for command, own in zip(commands, sandbox.bghost_each(*((name, "--help") for name in commands)), strict=True):
        assert re.search(rf"^  {command} +[A-Z]", shown.stdout, re.MULTILINE)
        assert (own.code, own.stderr) == (0, "")
        assert "--instance NAME" in own.stdout
        assert "--config FILE" in own.stdout
    assert "Exit codes: 0 done" in shown.stdout
    assert sandbox.bghost() == shown


def test_version(sandbox: Sandbox) -> None:
    assert re.fullmatch(r"bghost \d+\.\d+\.\d+\S*", sandbox.bghost("--version").stdout)


def test_a_command_that_nobody_has_is_exit_code_2(sandbox: Sandbox) -> None:
    says(sandbox.bghost("stopp"), 2, "there is no command 'stopp' (did you mean stop or top?)")
    assert sandbox.bghost("--nonsense").code == 2


def test_usage_errors_are_one_line_that_says_where_to_look(sandbox: Sandbox) -> None:
    says(sandbox.bghost("stop"), 2, "missing argument 'NAME...' (see 'bghost stop --help')")
    result = sandbox.bghost("wait", "x", "-t", "nan")
    says(
        result,
        2,
        "invalid value for '-t' / '--timeout': 'nan' is no number of seconds above 0 (see 'bghost wait --help')",
    )


HELLO = """
    import click

    @click.command()
    def command():
        "Say hello."
        print("hello")
"""


def test_what_is_installed_brings_its_commands(sandbox: Sandbox) -> None:
    """They take ``--instance`` like all others."""
    sandbox.commands({"hello": HELLO})
    assert sandbox.bghost("hello", "--instance", "blue") == Result(0, "hello", "")
    assert re.search("^  hello +Say hello.", sandbox.bghost("--help").stdout, re.MULTILINE)


def test_no_warning_of_a_library_reaches_the_user(sandbox: Sandbox) -> None:
    """Unless it was asked for."""
    source = HELLO + '        import warnings; warnings.warn("my own affair")\n'
    sandbox.commands({"hello": source})
    quiet: dict[str, str | None] = {"PYTHONDEVMODE": None, "PYTHONWARNINGS": None}
    assert sandbox.bghost("hello", env=quiet) == Result(0, "hello", "")
    assert "my own affair" in sandbox.bghost("hello", env={"PYTHONWARNINGS": "always"}).stderr


def test_a_broken_command_does_no_harm_to_others(sandbox: Sandbox) -> None:
    """It is named in the help and when it is called, with its distribution and what is wrong with it."""
    sandbox.commands({"hello": HELLO, "broken": "import nowhere_to_be_found", "number": "command = 5"})
    why = "command 'broken' of test-command-broken 1.0 cannot be loaded: ModuleNotFoundError: No module named"
    shown = sandbox.bghost("--help")
    assert shown.code == 0
    text = " ".join(shown.stdout.split())
    assert "hello Say hello." in text
    assert f"broken [not usable] {why}" in text
    called = sandbox.bghost("broken")
    assert called.code == 1
    assert called.stderr.startswith(f"bghost: {why} 'nowhere_to_be_found', at ")
    number = sandbox.bghost("number")
    says(number, 1, "command 'number' of test-command-number 1.0 is no click command: test_command_number:command is 5")
    assert sandbox.bghost("hello").code == 0


def test_two_distributions_with_one_command_are_both_refused(sandbox: Sandbox) -> None:
    """But bghost's own command stays its own."""
    for name in ("one", "two"):
        points = {"hello": f"hello_{name}:command", "ps": f"hello_{name}:command"}
        sandbox.distribution(f"hello-{name}", {f"hello_{name}": HELLO}, {"bghost.commands": points})
    refused = sandbox.bghost("hello")
    assert refused.code == 1
    assert "hello-one 1.0 and hello-two 1.0" in refused.stderr
    assert sandbox.bghost("ps", "--config", "x").code == 3


def test_a_bug_is_exit_code_70_with_a_traceback(sandbox: Sandbox) -> None:
    source = "import click\n@click.command()\ndef command():\n    1 / 0\n"
    sandbox.commands({"buggy": source})
    result = sandbox.bghost("buggy")
    assert result.code == 70
    assert result.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in result.stderr
    assert last(result) == "bghost: this is a bug of test-command-buggy 1.0"


def test_ctrl_c_ends_a_command_silently_with_130(host: Host) -> None:
    """And the host does what it was asked for, whoever still waits for it."""
    waiting = host.sandbox.start("wait", "ticker", "--for", "stopped")
    until(lambda: has_connected(waiting.pid), what="a connection of the command")
    waiting.signal(signal.SIGINT)
    assert waiting.result() == Result(130, "", "")
    assert host.row("ticker")["state"] == "ready"


def has_connected(pid: int) -> bool:
    """Whether a process has a socket."""
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:") for fd in os.listdir(f"/proc/{pid}/fd"))
    except FileNotFoundError:  # it was closed just now
        return False


def outcome(sandbox: Sandbox, args: list[str], stdout: int, stderr: int) -> int:
    return subprocess.run(
        [*BGHOST, *args], env=sandbox.env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, timeout=20 * SLOW
    ).returncode


@pytest.mark.parametrize("args", [["ps", "--json"], ["status"]], ids=" ".join)
def test_a_reader_that_has_enough_is_no_error_to_tell(host: Host, tmp_path: Path, args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(tmp_path / "stderr", "w") as stderr:
        assert outcome(host.sandbox, args, write, stderr.fileno()) == 1
    os.close(write)
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("args", [["ps", "--json"], ["status"], ["--help"]], ids=" ".join)
def test_output_that_cannot_be_written_is_exit_code_1(host: Host, tmp_path: Path, args: list[str]) -> None:
    with open("/dev/full", "w") as full, open(tmp_path / "stderr", "w") as stderr:
        assert outcome(host.sandbox, args, full.fileno(), stderr.fileno()) == 1
    told = (tmp_path / "stderr").read_text()
    assert told == "bghost: the output cannot be written: No space left on device\n"


def test_it_works_with_no_output_at_all(sandbox: Sandbox) -> None:
    """Descriptors 0 to 2 may be closed; the exit code tells all the same."""
    closed = 'exec 0<&- 1>&- 2>&-; exec "$@"'
    for args, code in ((["ps"], 3), (["status"], 3), (["nonsense"], 2), (["--help"], 0)):
        result = subprocess.run(["/bin/sh", "-c", closed, "sh", *BGHOST, *args], env=sandbox.env, timeout=20 * SLOW)
        assert result.returncode == code

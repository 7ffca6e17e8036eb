"""Options that every command takes, their twins in the environment, and completion."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest
from support import BGHOST, Process, Result, Sandbox, StartHost, until

from bghost import BghostError
from bghost.commands import group
from bghost.commands.group import bghost

ROOT: Final = Path(__file__).resolve().parents[2]
EVERYWHERE: Final = {"--instance", "--config", "-q", "--quiet", "-v", "--verbose"}

KIND = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            worker.log.debug("in detail")
            worker.log.info("as usual")
            worker.log.warning("of note")

        @bghost.hookimpl
        def bghost_tick(self, worker):
            return bghost.UNTIL_WOKEN
"""


def test_quiet(bghost_host: StartHost) -> None:
    """Nothing but errors and exit codes; a host logs warnings and worse."""
    host = bghost_host(kinds={"says": KIND}, args=["run", "-q", "says"])
    host.wait_line("of note")
    assert "as usual" not in host.text()
    for args in (["-q", "ps"], ["status", "--quiet"], ["launch", "says", "-q", "--wait"]):
        assert host.bghost(*args) == (0, "", "")
    result = host.bghost("stop", "-q", "nobody")
    assert (result.code, result.stdout) == (5, "") and "nobody" in result.stderr


def test_verbose(bghost_host: StartHost) -> None:
    """Which instance, directory and file are meant, once, on stderr; a host logs debug records."""
    host = bghost_host(kinds={"says": KIND}, args=["-v", "run", "says"])
    host.wait_line("in detail")
    for args in (["-v", "status", "--json"], ["status", "--json", "--verbose", "--instance", "default"]):
        result = host.bghost(*args)
        assert result.json()["instance"] == "default"
        assert result.stderr.count("instance: default") == 1
        assert f"runtime directory: {host.directories.runtime}" in result.stderr


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, click.Command]]:
    """Each command with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


def test_each_option_has_a_variable() -> None:
    """BGHOST_COMMAND_OPTION, for each command of each distribution; those of all commands have one for all."""
    found = dict(commands(bghost))
    assert {"ps", "config show", "stop", "logs"} <= found.keys()
    for name, command in found.items():
        for option in command.params:
            if isinstance(option, click.Option) and not {*option.opts} & EVERYWHERE:
                word = max(option.opts, key=len).lstrip("-")
                assert option.envvar == re.sub(r"\W", "_", f"bghost {name} {word}").upper(), (name, option)
        assert not EVERYWHERE - {word for option in command.params for word in option.opts}, name


def test_variables_say_what_options_would(bghost_host: StartHost) -> None:
    """A flag, a text, a number; what is written on the command line counts before them."""
    host = bghost_host(kinds={"says": KIND}, args=["run", "says"])
    host.client.wait("says")

    def result(*args: str, **variables: str) -> Result:
        return host.sandbox.bghost(*args, env=variables)

    assert result("status", BGHOST_STATUS_JSON="1").json()["pid"] == host.pid
    assert result("ps", BGHOST_PS_JSON="1").json()[0]["name"] == "says"
    assert result("launch", "says", BGHOST_LAUNCH_NAME="named").stdout.startswith("named is ")
    assert result("launch", "says", "--name", "other", BGHOST_LAUNCH_NAME="named").stdout.startswith("other is ")
    assert result("stop", "says", BGHOST_STOP_TIMEOUT="0").code == 2
    assert result("ps", BGHOST_INSTANCE="other").code == 3
    assert result("ps", BGHOST_QUIET="1") == (0, "", "")


SLOW_KIND: Final = """
    import threading
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_setup(self, worker):
            if worker.name == "begins":
                threading.Event().wait()

        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("in a tick")
            threading.Event().wait()
"""


def test_a_time_limit(bghost_host: StartHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits does so for -t seconds: then the exit code is 4, and the host goes on with it."""
    host = bghost_host(kinds={"slow": SLOW_KIND}, args=["run", "slow", "--count", "2"])
    host.wait_line(r"\[slow\.1\] in a tick")
    host.wait_line(r"\[slow\.2\] in a tick")
    for name, value in host.sandbox.env.items():
        monkeypatch.setenv(name, value)
    for command in (
        "wait slow --for stopped", "stop slow.1", "restart slow.2", "launch slow --name begins --wait",
        "wait begins", "reload --wait", "shutdown",
    ):  # fmt: skip
        said = ""
        while "not over within 0.1 s" not in said:  # a host that is short of time may not even say that it is well
            with pytest.raises(BghostError) as caught:
                group.run([*command.split(), "-t", "0.1"])
            said = str(caught.value)
            assert caught.value.exit_code == 4, command
        assert ("the host goes on with it" in said) == (not command.startswith("wait")), command
    host.client.shutdown("immediate")


def test_the_exit_codes(sandbox: Sandbox) -> None:
    """Each that the docs have an example of is that of the example."""
    text = (ROOT / "docs/operations.md").read_text().partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    sandbox.config(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0])
    host = sandbox.start_host("run")
    host.wait_answering()
    host.client.wait("web")
    examples = re.findall(r"^\| (\d+) \|.*\| `bghost (.*)` \|$", text, re.MULTILINE)
    assert [int(code) for code, _ in examples] == [0, 1, 2, 3, 4, 5]
    results = sandbox.bghost_each(*(command.split() for _, command in examples))
    assert [result.code for result in results] == [0, 1, 2, 3, 4, 5], results
    assert all(result.stderr.startswith("bghost: ") and result.stderr.count("\n") == 0 for result in results[1:])


def complete(sandbox: Sandbox, words: str) -> list[str]:
    """What bash would be told that the last of *words* can become."""
    env = {"_BGHOST_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    process = Process(BGHOST, sandbox.environ(env), sandbox.root)
    return [line.partition(",")[2] for line in process.result().stdout.splitlines()]


def test_completion(bghost_host: StartHost) -> None:
    """Of commands, options, and workers' names, for which the host is asked."""
    host = bghost_host(kinds={"says": KIND}, args=["run", "says", "--count", "2"])
    host.client.wait("says")
    assert complete(host.sandbox, "bghost sta") == ["status"]
    assert "--json" in complete(host.sandbox, "bghost why --")
    until(lambda: complete(host.sandbox, "bghost stop s") == ["says.1", "says.2"])  # the host has a second to answer
    host.client.shutdown()
    assert complete(host.sandbox, "bghost stop s") == []
    assert complete(host.sandbox, "bghost nonsense x") == []
    source = Process(BGHOST, host.sandbox.environ({"_BGHOST_COMPLETE": "zsh_source"}), host.sandbox.root).result()
    assert source.code == 0 and "compdef" in source.stdout

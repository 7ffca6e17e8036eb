"""The chapters on logs and on what is wrong: their configs are taken, and their commands print what stands there."""

import re
import subprocess
from pathlib import Path
from typing import Final

import pytest
from support import BGHOST, SLOW, Host, Sandbox, until

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/operations.md"

_TIMES: Final = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{3})?|\b\d+\.\d s\b|\b\d+s\b(?= ago|$)|(?<=for )\d+s|(?<=after )\d+s"
)


def general(text: str) -> str:
    """*text* without what differs from one run to another."""
    return re.sub(r"pid \d+", "pid PID", _TIMES.sub("TIME", text))


def run_commands(host: Host, chapter: str) -> int:
    """Run each command of the chapter's sessions, and compare what it prints; how many there were."""
    programs = host.sandbox.root / "bin"
    programs.mkdir()
    (programs / "bghost").write_text(f'#!/bin/sh\nexec {" ".join(BGHOST)} "$@"\n')
    (programs / "bghost").chmod(0o755)
    environment = host.sandbox.environ() | {"PATH": f"{programs}:{host.sandbox.env['PATH']}"}
    commands = 0
    for block in re.findall(r"```console\n(.*?)```", chapter, re.DOTALL):
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            ran = subprocess.run(
                ["sh", "-c", command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=20 * SLOW,
            )
            assert general(ran.stdout) == expected, command
            commands += 1
    return commands


@pytest.mark.parametrize("heading", ["Logs", "When something is wrong"])
def test_a_chapter(sandbox: Sandbox, heading: str) -> None:
    """As a new user would: the config as it is shown, then one command after the other."""
    text = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    directory = sandbox.root / "log"
    directory.mkdir(0o700)
    (config,) = re.findall(r"bghost.toml -->\n```toml\n(.*?)```", text, re.DOTALL)
    sandbox.config(config.replace("/var/log/bghost", str(directory)))
    host = sandbox.start_host("run")
    host.wait_answering()
    if heading == "Logs":
        until(lambda: "no such page" in (directory / "bghost.log").read_text())
    else:
        host.wait_row("mail", lambda row: row["state"] == "backoff")
    assert run_commands(host, text) >= 2

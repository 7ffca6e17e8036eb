"""The chapter on the config says what is so: its files are taken, and its commands print what stands there."""

import re
import subprocess
from pathlib import Path
from typing import Final

from support import BGHOST, SLOW, Sandbox

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/operations.md"


def chapter(heading: str) -> str:
    """The text from *heading* to the next one of its sort."""
    return PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_chapter_on_the_config(sandbox: Sandbox) -> None:
    """As a new user would: the files as they are shown, then one command after the other; a host runs meanwhile."""
    text = chapter("Config")
    directory = Path(sandbox.env["BGHOST_CONFIG_DIR"])
    for name, content in re.findall(r"<!-- /etc/bghost/(\S+) -->\n```toml\n(.*?)```", text, re.DOTALL):
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    programs = sandbox.root / "bin"
    programs.mkdir()
    (programs / "bghost").write_text(f'#!/bin/sh\nexec {" ".join(BGHOST)} "$@"\n')
    (programs / "bghost").chmod(0o755)
    environment = sandbox.environ() | {"PATH": f"{programs}:{sandbox.env['PATH']}"}
    host = sandbox.start_host("run")
    host.wait_answering()
    host.client.wait("all", timeout=10 * SLOW)
    commands = 0
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            ran = subprocess.run(
                ["sh", "-c", command.replace("/etc/bghost", str(directory))],
                env=environment,
                cwd=sandbox.root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=20 * SLOW,
            )
            told = ran.stdout.replace(str(directory), "/etc/bghost")
            assert re.sub(" {2,}", "  ", told) == re.sub(" {2,}", "  ", expected), command  # columns have any width
            commands += 1
    assert commands >= 10
    host.client.shutdown()

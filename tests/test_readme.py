"""README.md says what is so: its listings are files, its commands are run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from support import Sandbox

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    file: str | None
    language: str
    text: str


BLOCKS: Final = [
    Block(*match.groups())
    for match in re.finditer(r"(?:<!-- (\S+) -->\n)?^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
COMMANDS: Final = [line[2:] for block in BLOCKS for line in block.text.splitlines() if line.startswith("$ ")]
MAKE: Final = [command for command in COMMANDS if command.startswith("make ")]
OWN: Final = COMMANDS[COMMANDS.index(". .venv/bin/activate") :]


def test_every_command_is_tried() -> None:
    """What is not made by make, and not tried below, is what test_demo.py looks at."""
    assert [command for command in COMMANDS if command not in MAKE + OWN] == [".venv/bin/bghost ps --instance demo"]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("python", "toml")], ids=lambda b: b.file)
def test_listings_are_files(block: Block) -> None:
    """Each listing names the file that it is a copy of."""
    assert block.file
    assert block.text == (ROOT / block.file).read_text()


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_its_targets(command: str) -> None:
    """What is to be made can be made (that `make demo` and `make test` work is seen elsewhere)."""
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    """Each link is to a file of the repository."""
    assert (ROOT / link).exists()


def test_a_worker_of_ones_own(newcomer: Sandbox) -> None:
    """The commands of the section, one after the other, install the example and have it count; `stop` ends it all."""
    _, install, create, run = OWN
    newcomer.env["PATH"] = f"{sys.prefix}/bin:{os.environ['PATH']}"
    newcomer.env["PYTHONPATH"] = str(newcomer.site)

    def shell(command: str, **env: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env={**newcomer.env, **env}, capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Into a folder of the test's own, and built with what is here ("0" is how pip is told so by a variable).
    shell(install, PIP_TARGET=str(newcomer.site), PIP_NO_DEPS="1", PIP_NO_BUILD_ISOLATION="0")
    assert "SELECT 1" in shell(create)
    host = newcomer.start_host(*shlex.split(run)[1:])
    host.wait_answering()
    host.wait_row("counter", lambda row: row["ticks"] >= 2, timeout=20)
    assert int(shell("bghost postgres psql -Atc 'select n from counted'")) >= 2
    assert "counter" in shell("bghost ps")
    shell("bghost stop counter")
    assert host.wait() == 0

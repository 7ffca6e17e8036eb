"""``make install`` on a machine that lacks something says so in one line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent


def make_install(python: str, tmp_path: Path) -> list[str]:
    """What `make install` with that python prints to stderr, make's own last line left out; it must fail."""
    done = subprocess.run(
        ["make", "install", f"PYTHON={python}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 2
    assert not (tmp_path / "venv").exists()
    return [line for line in done.stderr.splitlines() if not line.startswith("make")]


@pytest.mark.parametrize(
    ("prelude", "expected"),
    [
        ("sys.version_info = (3, 9, 2)", "bghost needs Python 3.11 or newer: {} is 3.9.2 (name another one: "),
        ("sys.modules['ensurepip'] = None", " cannot make virtual environments: it lacks ensurepip (on Debian"),
    ],
)
def test_a_python_that_will_not_do(tmp_path: Path, prelude: str, expected: str) -> None:
    """A Python that is too old, or one without ensurepip (Debian's, without python3-venv), is refused with the cure."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$1" "import sys; {prelude}\n$2" "$3"\n')
    python.chmod(0o755)
    [line] = make_install(str(python), tmp_path)
    assert expected.format(python) in line


def test_no_python_at_all(tmp_path: Path) -> None:
    """Where there is no such program, the error says so, and how to name another."""
    [line] = make_install("no-such-python", tmp_path)
    assert "there is no 'no-such-python' here" in line
    assert "make install PYTHON=" in line

"""The repository's own promises: what is pinned, what is licensed."""

import importlib.metadata
import re
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parent.parent
OURS: Final = ("bghost", "bghost-postgres[embedded]", "bghost-worker-spi")


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pins.items()}


def needed() -> set[str]:
    """What ``make install`` brings to this Python: the Makefile's tools, and all that our distributions require."""
    tools = re.search(r"^TOOLS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tools
    todo = [Requirement(text) for text in (*OURS, *tools[1].split())]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        for extra in ("", *requirement.extras):
            name = canonicalize_name(requirement.name)
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    todo.append(further)
    return {name for name, _ in seen} - {canonicalize_name(Requirement(text).name) for text in OURS}


def test_constraints_are_names_and_exact_versions() -> None:
    """constraints.txt names packages and exact versions, and says nothing of where they come from."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line), line


def test_everything_that_is_installed_is_pinned_and_nothing_else() -> None:
    """Each package that comes with the tools and our distributions is pinned, at the version that is here."""
    assert {name: importlib.metadata.version(name) for name in needed()} == {
        name: version for name, version in pinned().items() if name in needed()
    }
    assert pinned().keys() - needed() <= {"typing-extensions"}, "pins that nothing asks for"


def test_every_distribution_carries_the_licence() -> None:
    """Each folder that is built into a distribution holds the root's LICENSE, README.md and CHANGELOG.md of its own."""
    folders = [ROOT / "host", *ROOT.glob("plugins/*/"), *ROOT.glob("contrib/*/")]
    assert len(folders) >= 3
    for folder in folders:
        assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
        assert (folder / "README.md").is_file()
        assert (folder / "CHANGELOG.md").is_file()

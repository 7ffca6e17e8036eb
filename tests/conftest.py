"""Where the tests of the whole run: as somebody who has just come."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Sandbox


@pytest.fixture
def newcomer() -> Iterator[Sandbox]:
    """A home directory and nothing else."""
    # Open to all, as homes often are: a server that root starts runs as somebody else, who has to get in.
    root = Path(tempfile.mkdtemp(prefix="bghost-home-"))
    root.chmod(0o755)
    box = Sandbox(root, Path(tempfile.mkdtemp(prefix="bghost-")))
    home = root / "home"
    home.chmod(0o755)
    # The runtime directory keeps this run apart from a demo that somebody runs on this machine.
    kept = ("PATH", "BGHOST_TEST_RUN", "BGHOST_RUNTIME_DIR")
    box.env = {"HOME": str(home), **{key: box.env[key] for key in kept}}
    try:
        yield box
    finally:
        box.end()
        shutil.rmtree(root)

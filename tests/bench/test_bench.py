"""The benchmarks run: once, small, for what they compute; how fast anything is, no test says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "options", "subject"),
    [
        ("turn.py", ("--count", "100", "--rounds", "1"), "bghost turn"),
        ("mutex.py", ("--count", "100", "--rounds", "1"), None),
        ("pools.py", ("--count", "100", "--rounds", "1"), "get by key, bytes"),
        ("queues.py", ("--count", "1000", "--rounds", "1"), None),
        ("postgres.py", ("--json", "--count", "20", "--rounds", "1"), None),
    ],
)
def test_it_measures(script: str, options: tuple[str, ...], subject: str | None) -> None:
    """Each prints, as JSON, a spread of times that are above zero for each of its subjects."""
    result = subprocess.run(
        [sys.executable, script, *options], cwd=HERE, capture_output=True, text=True, timeout=50, check=False
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured
    if subject is not None:
        assert measured[subject]["median"] > 0

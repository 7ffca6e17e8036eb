"""The fixtures that run a real host, for the tests of every distribution; they live in host/tests/support.py."""

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")

from support import bghost_host, sandbox, sandboxes  # noqa: E402

# What an example takes says how busy the machine is; a test as a whole has its deadline from pytest-timeout.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

__all__ = ["bghost_host", "sandbox", "sandboxes"]

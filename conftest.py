"""The fixtures that run a real host, for the tests of every distribution; they live in host/tests/support.py."""

import pytest

pytest.register_assert_rewrite("support")

from support import bghost_host, sandbox, sandboxes  # noqa: E402

__all__ = ["bghost_host", "sandbox", "sandboxes"]

"""Names: what can be one, and which one somebody may have meant. Imports next to nothing: every command does it."""

import re
from collections.abc import Sequence
from typing import Final

from bghost.shared.errors import UsageError

NAME_LIMIT: Final = 63  # bytes; where PostgreSQL cuts application_name
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*", re.ASCII)


def check_name(name: str, what: str = "worker") -> str:
    """Return *name* if it is a plain word, dots allowed inside.

    :raises UsageError: if it is not.
    """
    if not _NAME.fullmatch(name) or len(name) > NAME_LIMIT:
        shown = name if len(name) <= 40 else name[:37] + "..."
        raise UsageError(
            f"{shown!r} is no name for {'an' if what[0] in 'aeiou' else 'a'} {what}",
            hint=f"a letter or _, then letters, digits, _ - and single dots inside, at most {NAME_LIMIT} characters",
        )
    return name


def near(name: str, known: Sequence[str]) -> str:
    """A hint that names the nearest of *known*, or all of them where few, or nothing."""
    import difflib

    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if matches:
        return "did you mean " + " or ".join(matches) + "?"
    if 0 < len(known) <= 16:
        return "there is " + ", ".join(known)
    return ""

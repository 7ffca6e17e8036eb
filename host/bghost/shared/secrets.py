"""Passwords in settings: what is shown of a config, in an error or a listing, has none of them."""

import re
from typing import Any, Final

MASK: Final = "****"

_NAMES: Final = re.compile(
    r"passw|pwd|passphrase|secret|token|credential|(?:api|private|access)[_-]?key", re.IGNORECASE
)
_IN_URI: Final = re.compile(r"(\w+://[^/@\s:]*:)[^/\s]*(?=@)")
_IN_OPTIONS: Final = re.compile(r"(passw\w*\s*=\s*)(?:'(?:[^'\\]|\\.)*'?|[^\s&;]+)", re.IGNORECASE)


def masked(key: str, value: Any) -> Any:
    """*value* of the setting *key* without passwords: all of it where the key says so, else parts of its texts."""
    if isinstance(value, dict):
        return {name: masked(name, each) for name, each in value.items()}
    if _NAMES.search(key) and isinstance(value, (str, int, float, list)) and not isinstance(value, bool):
        return MASK
    if isinstance(value, list):
        return [masked("", each) for each in value]
    if isinstance(value, str):
        return _IN_OPTIONS.sub(rf"\1{MASK}", _IN_URI.sub(rf"\1{MASK}", value))
    return value

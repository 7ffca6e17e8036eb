"""Lengths of time and sizes as people write them: "500ms", "2m", "64MiB". A plain number is seconds, or bytes."""

import math
import re
from typing import Annotated, Any, Final

import msgspec

Seconds = Annotated[float, msgspec.Meta(extra={"unit": "seconds"})]
"""A setting that is a length of time: ``5``, ``0.5``, ``"500ms"``, ``"5s"``, ``"2m"``, ``"1h"`` or ``"1d"``; the worker
sees seconds. It is finite and not negative; narrower bounds as usual: ``Annotated[Seconds, msgspec.Meta(gt=0)]``."""

Bytes = Annotated[int, msgspec.Meta(extra={"unit": "bytes"})]
"""A setting that is a size: ``4096``, ``"64KiB"``, ``"64MiB"``, ``"1GiB"``; with kB, MB, GB as powers of 1000."""

LONGEST: Final = 1_000_000_000  # seconds, some 31 years: above, the kernel's and Python's clocks overflow one by one
LARGEST: Final = 1 << 62

_FACTORS: Final[dict[str, dict[str, float]]] = {
    "seconds": {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400},
    "bytes": {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30},
}
_RULES: Final = {
    "seconds": f'expected seconds from 0 to {LONGEST}, or a text such as "500ms", "5s", "2m", "1h"',
    "bytes": f'expected bytes from 0 to {LARGEST}, or a text such as "64KiB", "10MB", "1GiB"',
}
_TEXT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", re.ASCII)


def number(value: Any, unit: str) -> Any:
    """*value* in seconds or bytes; what is neither a number nor a text is given back as it is.

    :param unit: ``seconds`` or ``bytes``.
    :raises ValueError: if it is no length of time, or no size; the text is the rule.
    """
    if isinstance(value, str):
        match = _TEXT.fullmatch(value)
        factor = _FACTORS[unit].get(match[2]) if match else None
        if match is None or factor is None:
            raise ValueError(_RULES[unit])
        value = float(match[1]) * factor
        if unit == "bytes":
            if not (math.isfinite(value) and value == int(value)):
                raise ValueError(_RULES[unit])
            value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        most = LONGEST if unit == "seconds" else LARGEST
        if not (math.isfinite(value) and 0 <= value <= most):
            raise ValueError(_RULES[unit])
    return value

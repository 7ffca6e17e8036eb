"""What may be a pool's key and data: the author's ctypes types, checked once, and keys in their canonical form."""

import ctypes
import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from bghost.shared.errors import UsageError

KEY_LIMIT: Final = 256  # bytes
DATA_LIMIT: Final = 4096

_SIMPLE: Final = ctypes._SimpleCData  # the base of all that is one C value
_POINTERS: Final = frozenset("PzZO")  # type codes: void *, char *, wchar_t *, PyObject *
_FLOATS: Final = frozenset("fd")


def check(struct: Any, what: str, limit: int) -> int:
    """See that values of *struct* mean the same in every process, and can be stored; its size in bytes.

    :param what: "key" or "data", for messages.
    :raises UsageError: naming the field that is at fault, and why.
    """
    if not (inspect.isclass(struct) and issubclass(struct, ctypes.Structure | ctypes.Union)):
        raise UsageError(f"{what} type {struct!r} is no ctypes.Structure or Union")
    size = ctypes.sizeof(struct)
    if size == 0:
        raise UsageError(f"{what} type {struct.__name__} has no fields")
    if size > limit:
        raise UsageError(f"{what} type {struct.__name__} has {size} bytes", detail=f"the limit is {limit}")
    _check_fields(struct, struct.__name__, what)
    return size


def _check_fields(struct: Any, path: str, what: str) -> None:
    for base in reversed(struct.__mro__):
        for field in base.__dict__.get("_fields_", ()):
            name, kind, *bits = field
            at = f"{path}.{name}"
            if bits:
                raise UsageError(f"field {at} of the {what} is a bit field", hint="use whole integers")
            _check_type(kind, at, what)
            if issubclass(kind, _SIMPLE) and getattr(struct, name).offset % ctypes.sizeof(kind):
                raise UsageError(f"field {at} of the {what} is not aligned", hint="do without _pack_")


def _check_type(kind: Any, at: str, what: str) -> None:
    if issubclass(kind, ctypes.Array):
        _check_type(kind._type_, f"{at}[]", what)
    elif issubclass(kind, ctypes.Structure | ctypes.Union):
        _check_fields(kind, at, what)
    elif not issubclass(kind, _SIMPLE) or kind._type_ in _POINTERS:
        raise UsageError(f"field {at} of the {what} is a {kind.__name__}: a pointer means nothing in another process")
    elif kind._type_ == "g" and what == "key":
        raise UsageError(f"field {at} of the key is a {kind.__name__}, which has bytes that mean nothing")


def canonical(key: ctypes.Structure | ctypes.Union) -> bytes:
    """The bytes by which *key* is compared: equal for keys whose fields are equal.

    Texts end at their first NUL, padding is zero, -0.0 is 0.0. A key of integers without padding is its own bytes; of a
    union all bytes count, for nobody knows which of its fields does.

    :raises UsageError: if it holds a NaN, which equals nothing.
    """
    raw, struct = bytes(key), type(key)
    plan = _PLANS.get(struct)
    if plan is None:
        plan = _make_plan(struct)
    if not plan:
        return raw
    made = bytearray(len(raw))
    for at, end, clean, path in plan:
        made[at:end] = raw[at:end] if clean is None else clean(raw[at:end], path)
    return bytes(made)


def make_hashable(struct: Any) -> None:
    """Let instances of *struct* be keys of a dict, compared as pools compare them; unless its author has seen to that.

    ctypes' own have no hash, and are equal to themselves alone.
    """
    if struct.__hash__ in (None, ctypes.Structure.__hash__, ctypes.Union.__hash__):
        struct.__hash__ = lambda self: hash(canonical(self))
        struct.__eq__ = lambda self, other: type(other) is type(self) and canonical(other) == canonical(self)


Clean = Callable[[bytes, str], bytes]
_PLANS: Final[dict[type, list[tuple[int, int, Clean | None, str]]]] = {}
"""By type: which bytes mean something, how they are made canonical (``None``: they are), and the name of the field.
Empty where each byte means something as it is."""


def is_plain(struct: Any) -> bool:
    """Whether keys of this type are compared by all of their bytes."""
    return not (_PLANS[struct] if struct in _PLANS else _make_plan(struct))


def _make_plan(struct: Any) -> list[tuple[int, int, Clean | None, str]]:
    plan = _joined(sorted(_pieces(struct, 0, struct.__name__), key=lambda piece: piece[0]))
    if len(plan) == 1 and plan[0][:3] == (0, ctypes.sizeof(struct), None):
        plan = []
    _PLANS[struct] = plan
    return plan


def _pieces(kind: Any, at: int, path: str) -> Iterator[tuple[int, int, Clean | None, str]]:
    size = ctypes.sizeof(kind)
    if issubclass(kind, ctypes.Structure):
        for base in kind.__mro__:
            for name, inner, *_ in base.__dict__.get("_fields_", ()):
                yield from _pieces(inner, at + getattr(base, name).offset, f"{path}.{name}")
    elif issubclass(kind, ctypes.Array):
        element = kind._type_
        if issubclass(element, _SIMPLE) and element._type_ in "cu":
            yield at, at + size, partial(_text, ctypes.sizeof(element)), path
        else:
            for index in range(kind._length_):
                yield from _pieces(element, at + index * ctypes.sizeof(element), f"{path}[{index}]")
    elif issubclass(kind, _SIMPLE) and kind._type_ in _FLOATS:
        yield at, at + size, partial(_number, kind), path
    else:
        yield at, at + size, None, path


def _joined(pieces: list[tuple[int, int, Clean | None, str]]) -> list[tuple[int, int, Clean | None, str]]:
    """With neighbours that are copied as they are in one."""
    joined: list[tuple[int, int, Clean | None, str]] = []
    for piece in pieces:
        if joined and piece[2] is None is joined[-1][2] and piece[0] == joined[-1][1]:
            joined[-1] = (joined[-1][0], piece[1], None, joined[-1][3])
        else:
            joined.append(piece)
    return joined


def _text(unit: int, raw: bytes, path: str) -> bytes:
    """Up to the first NUL, which takes *unit* bytes."""
    if unit == 1:
        return raw.partition(b"\0")[0].ljust(len(raw), b"\0")
    end = next((at for at in range(0, len(raw), unit) if not any(raw[at : at + unit])), len(raw))
    return raw[:end].ljust(len(raw), b"\0")


def _number(kind: Any, raw: bytes, path: str) -> bytes:
    value = kind.from_buffer_copy(raw).value
    if math.isnan(value):
        raise UsageError(f"field {path} of the key is not a number, which equals nothing")
    return bytes(kind(value + 0.0))  # -0.0 becomes 0.0

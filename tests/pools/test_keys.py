"""What may be a key or data, and which keys are one."""

import ctypes
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bghost import PoolSpec, UsageError
from bghost.shared.keys import canonical


def struct(*fields: Any, base: Any = ctypes.Structure, **names: Any) -> Any:
    return type("Of", (base,), {**names, "_fields_": list(fields)})


class Good(ctypes.Structure):
    _fields_ = [("n", ctypes.c_uint32)]


class Number(ctypes.c_uint32):
    """A type of the author's own that is no pointer."""


REFUSED = {
    "void pointer": (struct(("p", ctypes.c_void_p)), "Of.p of the key is a c_void_p: a pointer"),
    "text pointer": (struct(("p", ctypes.c_char_p)), "Of.p of the key is a c_char_p: a pointer"),
    "wide text pointer": (struct(("p", ctypes.c_wchar_p)), "Of.p"),
    "pointer": (struct(("n", ctypes.c_int), ("p", ctypes.POINTER(ctypes.c_int))), "Of.p of the key is a LP_c_int"),
    "object": (struct(("o", ctypes.py_object)), "Of.o"),
    "function": (struct(("f", ctypes.CFUNCTYPE(ctypes.c_int))), "Of.f"),
    "pointer in a structure": (struct(("s", struct(("p", ctypes.c_void_p)))), "Of.s.p"),
    "pointer in a union": (struct(("u", struct(("p", ctypes.c_void_p), base=ctypes.Union))), "Of.u.p"),
    "pointers in an array": (struct(("a", ctypes.c_void_p * 2)), r"Of.a\[\] of the key"),
    "pointers in an array of arrays": (struct(("a", ctypes.c_void_p * 2 * 2)), r"Of.a\[\]\[\]"),
    "structures with pointers in an array": (struct(("a", struct(("p", ctypes.c_void_p)) * 2)), r"Of.a\[\].p"),
    "inherited pointer": (struct(("n", ctypes.c_int), base=struct(("p", ctypes.c_void_p))), "Of.p"),
    "bits": (struct(("b", ctypes.c_int, 3)), "Of.b of the key is a bit field"),
    "packed": (struct(("c", ctypes.c_char), ("n", ctypes.c_int), _pack_=1), "Of.n of the key is not aligned"),
    "long double": (struct(("x", ctypes.c_longdouble)), "Of.x of the key"),
    "empty": (struct(), "has no fields"),
    "too long": (struct(("t", ctypes.c_char * 257)), "has 257 bytes: the limit is 256"),
    "no type": (7, "is no ctypes.Structure or Union"),
    "simple": (ctypes.c_int, "is no ctypes.Structure or Union"),
    "an instance": (Good(), "is no ctypes.Structure or Union"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """At definition, with the field's name."""
    kind, says = REFUSED[name]
    with pytest.raises(UsageError, match=says):
        PoolSpec("p", kind="k", key=kind, data=Good, capacity=1)


def test_what_is_refused_of_data_and_of_the_rest() -> None:
    """Data may be longer, and has no pointers either; times and numbers are some that can be."""
    PoolSpec("p", kind="k", key=Good, data=struct(("t", ctypes.c_char * 4096)), capacity=1)
    PoolSpec("p", kind="k", key=struct(("n", Number)), data=Good, capacity=1, retry_after=86_400.0)
    options: dict[str, tuple[dict[str, Any], str]] = {
        "data": ({"data": struct(("p", ctypes.c_void_p))}, "Of.p of the data"),
        "long data": ({"data": struct(("t", ctypes.c_char * 4097))}, "4097"),
        "capacity": ({"capacity": 0}, "capacity"),
        "no time to get ready": ({"ready_timeout": 0}, "ready_timeout"),
        "retry": ({"retry_after": math.nan}, "retry_after"),
        "restart": ({"restart": "sometimes"}, "restart"),
        "half of a group": ({"group_limit": 1}, "go together"),
        "name": ({"name": "no name"}, "no name"),
    }
    for changes, says in options.values():
        given: dict[str, Any] = {"name": "p", "kind": "k", "key": Good, "data": Good, "capacity": 1, **changes}
        with pytest.raises(UsageError, match=says):
            PoolSpec(**given)


class Inner(ctypes.Structure):
    _fields_ = [("flag", ctypes.c_uint8), ("x", ctypes.c_double)]  # seven bytes of padding between


class Key(ctypes.Structure):
    _fields_ = [
        ("small", ctypes.c_uint8),
        ("text", ctypes.c_char * 5),
        ("wide", ctypes.c_wchar * 3),
        ("inner", Inner * 2),
        ("grid", (ctypes.c_char * 3) * 2),
        ("f", ctypes.c_float * 2),
    ]


texts = st.binary(max_size=5).map(lambda text: text.partition(b"\0")[0])
floats = st.floats(allow_nan=False, width=32)
values = st.tuples(
    st.integers(0, 255), texts, st.text("abc", max_size=2), floats, st.binary(max_size=2), floats, st.integers(0, 255)
)


def fill(key: Key, value: tuple[Any, ...]) -> Key:
    key.small, key.text, key.wide, key.inner[1].x, key.grid[1].value, key.f[0], key.inner[0].flag = value
    return key


def seen(key: Key) -> tuple[Any, ...]:
    """Its fields, as Python compares them."""
    inner = [(each.flag, each.x) for each in key.inner]
    return key.small, key.text, key.wide, inner, [each.value for each in key.grid], list(key.f)


@settings(max_examples=200)
@given(values, values, st.binary(min_size=ctypes.sizeof(Key), max_size=ctypes.sizeof(Key)))
def test_keys_are_equal_where_their_fields_are(value: tuple[Any, ...], other: tuple[Any, ...], noise: bytes) -> None:
    """Whatever was in their memory before; and different where a field differs."""
    clean, used = fill(Key(), value), Key()
    ctypes.memmove(ctypes.byref(used), bytes(0x41 if byte == 0 else byte for byte in noise), len(noise))
    for number in range(2):
        used.inner[number].x, used.f[number], used.inner[number].flag, used.grid[number].value = 0.0, -0.0, 0, b""
    assert canonical(fill(used, value)) == canonical(clean)
    second = fill(Key(), other)
    assert (canonical(second) == canonical(clean)) == (seen(second) == seen(clean))
    again = Key.from_buffer_copy(canonical(clean))
    assert canonical(again) == canonical(clean) and seen(again) == seen(clean)


def test_what_is_not_a_number_is_no_key() -> None:
    """The field is named."""
    key = Key()
    key.inner[1].x = math.nan
    with pytest.raises(UsageError, match=r"field Key.inner\[1\].x of the key is not a number"):
        canonical(key)


def test_keys_can_be_in_a_dict() -> None:
    """They are hashed as they are compared, once a pool is declared with them."""
    PoolSpec("p", kind="k", key=Key, data=Good, capacity=1)
    one, two = Key(), Key()
    one.text, one.text = b"longe", b"ab"
    two.text = b"ab"
    assert {one: 1}[two] == 1
    two.text = b"abc"
    assert two not in {one: 1}


def test_another_byte_order() -> None:
    """Fields of the other byte order are their own bytes, too."""
    kind = struct(("x", ctypes.c_double), ("n", ctypes.c_uint64), base=ctypes.BigEndianStructure)
    key, zero = kind(-0.0, 5), kind(0.0, 5)
    assert canonical(key) == canonical(zero) == bytes(8) + (5).to_bytes(8, "big")
    assert canonical(kind(1.5, 0))[:2] == b"\x3f\xf8"

"""Settings and args: tables made into a kind's own struct, with errors that name key, value and what is allowed."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final, TypeVar

import msgspec

from bghost.shared import units
from bghost.shared.errors import ConfigError
from bghost.shared.names import near
from bghost.shared.secrets import masked
from bghost.shared.spec import WorkerSpec

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T", bound=msgspec.Struct)

_DEPTH: Final = 32  # tables in tables, of a key that somebody has typed
_PATH: Final = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")


class Text(str):
    """A value from a command line: meant as JSON where that gives what is wanted, else as text."""

    __slots__ = ()


class SettingError(ConfigError):
    """A setting that is not valid.

    :param where: whose it is: a kind's or an extension's name, for one.
    :param key: which, with dots where it lies deeper; empty if it is the table as a whole.
    """

    def __init__(self, message: str, *, where: str, key: str, detail: str = "", hint: str = "") -> None:
        super().__init__(message, detail=detail, hint=hint)
        self.where = where
        self.key = key


def _json(value: Any) -> Any:
    if isinstance(value, Text):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return str(value)
    if isinstance(value, dict):
        return {key: _json(each) for key, each in value.items()}
    return value


def convert(table: Mapping[str, Any], type: type[S], where: str) -> S:
    """*table* as a *type*. Texts with a unit are made numbers where the field is :data:`~bghost.Seconds` or such.

    :param where: what the table is called in messages, such as ``worker_spi`` or ``args of worker_spi.1``.
    :raises SettingError: if it does not fit.
    """
    try:
        plain: dict[str, Any] = _json(dict(table))
        leaves = sum(1 for _ in _leaves(table))
    except RecursionError:
        raise SettingError(f"{where}: nested too deep", where=where, key="") from None
    first: dict[str, tuple[str, Any]] = {}
    for _ in range(leaves + 1):
        try:
            return msgspec.convert(_in_units(plain, type, where), type)
        except msgspec.ValidationError as error:
            text = str(error)
        match = _PATH.search(text)
        key = match["path"] if match else ""
        raw, seen = _get(table, key), _get(plain, key)
        if isinstance(raw, Text) and not isinstance(seen, str):
            first[key] = text, seen
            _put(plain, key, str(raw))  # "123" for a setting that is text
            continue
        break
    if key in first and text.startswith("Expected ") and "got `str`" in text:
        # It is no text that was wanted: what was wrong with the number, or whatever it is, is to be told.
        text, seen = first[key]
        _put(plain, key, seen)
    raise _error(text, key, plain, type, where)


def _leaves(table: Mapping[str, Any]) -> Any:
    for value in table.values():
        yield from _leaves(value) if isinstance(value, dict) else (value,)


def _get(table: Mapping[str, Any], key: str) -> Any:
    """The value at *key*, of dots; ``None`` if there is none, or it is in an array."""
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        table = table[part]
    table[last] = value


def _error(text: str, key: str, plain: Mapping[str, Any], type: Any, where: str) -> SettingError:
    unknown = _UNKNOWN.match(text)
    if unknown:
        name = unknown["field"]
        for part in key.split(".") if key else ():
            type = type and _fields(type).get(part, (None, None))[1]
        if type is not None:
            here, known = f"{where}.{key}" if key else where, type.__struct_encode_fields__
            inner = f"{key}.{name}" if key else name
            return SettingError(f"{here} has no setting {name!r}", where=where, key=inner, hint=near(name, known))
    rule = _PATH.sub("", text)
    rule = rule[:1].lower() + rule[1:]
    if not key:
        return SettingError(f"{where}: {rule}", where=where, key="")
    value = _get(plain, key.partition("[")[0])
    return _not_allowed(where, key, value, rule)


def _not_allowed(where: str, key: str, value: Any, rule: str) -> SettingError:
    shown = json.dumps(masked(key, value), default=str)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return SettingError(f"{where}.{key} = {shown} is not allowed", where=where, key=key.partition("[")[0], detail=rule)


# Units


@cache
def _fields(type: type[msgspec.Struct]) -> dict[str, tuple[str | None, Any]]:
    """For each setting of *type*, by the name that a config calls it: its unit, and its struct, where it has such."""
    return {field.encode_name: (_unit(field.type), _struct(field.type)) for field in _struct_info(type).fields}


def _unit(type: msgspec.inspect.Type) -> str | None:
    if isinstance(type, msgspec.inspect.Metadata):
        unit: str | None = (type.extra or {}).get("unit")
        return unit or _unit(type.type)
    if isinstance(type, msgspec.inspect.UnionType):
        return next((unit for each in type.types if (unit := _unit(each))), None)
    return None


def _struct(type: msgspec.inspect.Type) -> Any:
    if isinstance(type, msgspec.inspect.Metadata):
        return _struct(type.type)
    if isinstance(type, msgspec.inspect.UnionType):
        return next((struct for each in type.types if (struct := _struct(each))), None)
    return type.cls if isinstance(type, msgspec.inspect.StructType) else None


def _in_units(table: Mapping[str, Any], type: Any, where: str) -> dict[str, Any]:
    made = dict(table)
    for key, (unit, struct) in _fields(type).items():
        if unit and key in made:
            try:
                made[key] = units.number(made[key], unit)
            except ValueError as error:
                raise _not_allowed(where, key, made[key], str(error)) from None
        elif struct is not None and isinstance(made.get(key), dict):
            try:
                made[key] = _in_units(made[key], struct, f"{where}.{key}")
            except SettingError as error:
                error.key = f"{key}.{error.key}"
                raise
    return made


def start_only(settings: msgspec.Struct, path: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value of each of *settings* that is start-only, those of structs in it included."""
    for field in _struct_info(type(settings)).fields:
        key, value = path + field.encode_name, getattr(settings, field.name)
        if _is_start_only(field):
            yield key, value
        elif isinstance(value, msgspec.Struct):
            yield from start_only(value, f"{key}.")


def keep_start_only(old: T, new: T) -> T:
    """*new*, but for the settings that are declared start-only: those stay as in *old*."""
    kept: dict[str, Any] = {}
    for field in _struct_info(type(new)).fields:
        was, will = getattr(old, field.name), getattr(new, field.name)
        if _is_start_only(field):
            kept[field.name] = was
        elif isinstance(will, msgspec.Struct) and type(was) is type(will):
            kept[field.name] = keep_start_only(was, will)
    return msgspec.structs.replace(new, **kept) if kept else new


def _struct_info(type: type[msgspec.Struct]) -> msgspec.inspect.StructType:
    info = msgspec.inspect.type_info(type)
    assert isinstance(info, msgspec.inspect.StructType)
    return info


def _is_start_only(field: msgspec.inspect.Field) -> bool:
    return isinstance(field.type, msgspec.inspect.Metadata) and bool((field.type.extra or {}).get("start_only"))


# Layers


def layers(document: Mapping[str, Any], spec: WorkerSpec) -> dict[str, Any]:
    """The table of a worker's settings: its kind's, under what ``run --set`` said, under the worker's own."""
    return _merged(document["kinds"].get(spec.kind, {}), typed(document["sets"].get(spec.kind, {})), spec.settings)


def extension_layers(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The table of an extension's settings: the file's, under what ``run --set`` said."""
    return _merged(document["plugins"].get(name, {}), typed(document["sets"].get(name, {})))


def typed(sets: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody has typed, by keys with dots, as a table: its texts are :class:`Text`.

    :raises ConfigError: if a key has more dots than any setting.
    """
    for key in sets:
        if key.count(".") > _DEPTH:
            raise ConfigError(f"no setting lies as deep as {key[:40]}...")
    return _merged(*(_nested(key, Text(value) if isinstance(value, str) else value) for key, value in sets.items()))


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Of two that say the same key the later holds; of two tables, key by key."""
    made: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            below = _json(made.get(key)) if isinstance(value, dict) else None
            made[key] = _merged(below, value) if isinstance(below, dict) else value
    return made

"""Where in a TOML text each key stands, which tomllib does not tell; for texts that it has taken.

Errors of values come up when all tables have been merged and made into structs; then somebody wants to know the line.
"""

import re
from typing import Final

Path = tuple[str | int, ...]

_SPACE: Final = re.compile(r"[ \t]*")
_GAP: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")  # also between the elements of an array
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR: Final = re.compile(r"[^,\]}#\n]*")
_STRINGS: Final = (
    # The longest quotes first; a multi-line text may end in up to two more of its quotes.
    ('"""', re.compile(r'(?:[^"\\]|\\.|"(?!""))*"""(?:"(?!"))?"{0,2}', re.DOTALL)),
    ("'''", re.compile(r"(?:[^']|'(?!''))*'''(?:'(?!'))?'{0,2}", re.DOTALL)),
    ('"', re.compile(r'(?:[^"\\\n]|\\.)*"')),
    ("'", re.compile(r"[^'\n]*'")),
)


def lines(text: str) -> dict[Path, int]:
    """For each table, key and element of an array in *text*, which is valid TOML, its first line, from 1."""
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._counted = 0  # newlines up to here are in _line
        self._found: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}  # how many tables each array of tables has so far

    def run(self) -> dict[Path, int]:
        table: Path = ()
        while True:
            self._skip(_GAP)
            if self._at >= len(self._text):
                return self._found
            if self._text.startswith("[[", self._at):
                self._at += 2
                table = self._element(self._key())
                self._at += 2
            elif self._text[self._at] == "[":
                self._at += 1
                table = self._resolved(self._key())
                self._note(table)
                self._at += 1
            else:
                self._pair(table)

    def _note(self, path: Path) -> None:
        """Where *path* and the tables that it implies begin, unless that is known."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        for length in range(1, len(path) + 1):
            self._found.setdefault(path[:length], self._line)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise AssertionError(f"no TOML at {self._at}")
        self._at = match.end()
        return match[0]

    def _resolved(self, keys: Path) -> Path:
        """The path of a table's header: an array of tables in it means that array's last table."""
        path: Path = ()
        for key in keys:
            path = (*path, key)
            if path in self._arrays:
                path = (*path, self._arrays[path] - 1)
        return path

    def _element(self, keys: Path) -> Path:
        array = (*self._resolved(keys[:-1]), keys[-1])
        index = self._arrays.get(array, 0)
        self._arrays[array] = index + 1
        self._note((*array, index))
        return (*array, index)

    def _key(self) -> Path:
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            if self._text[self._at] in "\"'":
                keys.append(self._string())
            else:
                keys.append(self._skip(_BARE))
            self._skip(_SPACE)
            if not self._text.startswith(".", self._at):
                return tuple(keys)
            self._at += 1

    def _string(self) -> str:
        begin = self._at
        for quotes, rest in _STRINGS:
            if self._text.startswith(quotes, begin):
                self._at += len(quotes)
                self._skip(rest)
                break
        raw = self._text[begin : self._at]
        if "\\" in raw and quotes == '"':
            import tomllib

            value: str = tomllib.loads(f"x = {raw}")["x"]
            return value
        return raw[len(quotes) : -len(quotes)]

    def _pair(self, table: Path) -> None:
        keys = self._key()
        self._note((*table, *keys))
        self._at += 1  # the equals sign
        self._skip(_SPACE)
        self._value((*table, *keys))

    def _value(self, path: Path) -> None:
        begins = self._text[self._at]
        if begins in "\"'":
            self._string()
        elif begins == "[":
            self._at += 1
            index = 0
            while not self._closes("]"):
                self._note((*path, index))
                self._value((*path, index))
                index += 1
                self._comma()
        elif begins == "{":
            self._at += 1
            while not self._closes("}"):
                self._pair(path)
                self._comma()
        else:
            self._skip(_SCALAR)

    def _closes(self, bracket: str) -> bool:
        self._skip(_GAP)
        if self._text.startswith(bracket, self._at):
            self._at += 1
            return True
        return False

    def _comma(self) -> None:
        self._skip(_GAP)
        if self._text.startswith(",", self._at):
            self._at += 1

"""Config files: read whole or not at all, trusted if nobody else can write them, parsed, each key with its line."""

import os
import re
import stat
import tomllib
from functools import cached_property
from typing import Any, Final

import msgspec

from bghost.host import lines
from bghost.host.lines import Path
from bghost.shared.errors import ConfigError

SIZE_LIMIT: Final = 1 << 20  # bytes of all files together; nobody writes as much by hand

_WHERE: Final = re.compile(r" \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")


class File:
    """One file, read and parsed.

    :param limit: bytes that it may have.
    :raises ConfigError: if it is not to be had, not to be trusted, or no TOML.
    """

    def __init__(self, path: str, limit: int) -> None:
        self.path = path
        self.text = _text(path, limit)
        try:
            # Dates and times as texts, which JSON can carry, and which settings of such types can be made of.
            self.tables: dict[str, Any] = msgspec.to_builtins(tomllib.loads(self.text))
        except tomllib.TOMLDecodeError as error:
            raise self._no_toml(str(error)) from None
        except RecursionError:
            raise ConfigError(f"{path}: nested too deep") from None
        except ValueError:
            raise ConfigError(f"{path}: a number of more digits than can be read") from None

    def _no_toml(self, text: str) -> ConfigError:
        match = _WHERE.search(text)
        rule = _WHERE.sub("", text)
        rule = rule[:1].lower() + rule[1:]
        if match is None or match["line"] is None:
            last = self.text.rstrip().count("\n") + 1
            return ConfigError(f"{self.path}:{last}: no TOML", detail=f"{rule}, at its end")
        return ConfigError(f"{self.path}:{match['line']}: no TOML", detail=f"{rule}, column {match['column']}")

    @cached_property
    def _lines(self) -> dict[Path, int]:
        try:
            return lines.lines(self.text)
        except RecursionError:
            return {}

    def place(self, path: Path) -> str:
        """File and line of *path*, or of the table that it is missing from."""
        while path and path not in self._lines:
            path = path[:-1]
        return f"{self.path}:{self._lines[path]}" if path else self.path


def read(path: str) -> list[File]:
    """The file, and those in conf.d beside it, by name.

    :raises ConfigError: of the first that is not as it has to be.
    """
    files: list[File] = []
    left = SIZE_LIMIT
    for each in (path, *_beside(path)):
        files.append(File(each, left))
        left -= len(files[-1].text.encode())
    return files


def _beside(path: str) -> list[str]:
    directory = os.path.join(os.path.dirname(path), "conf.d")
    try:
        status = os.stat(directory)
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"the directory {directory} cannot be read", detail=error.strerror or str(error)) from None
    _trust(directory, status)
    return [os.path.join(directory, name) for name in sorted(names) if name.endswith(".toml") and name[0] != "."]


def _text(path: str, limit: int) -> str:
    """The file's text; never waits for a FIFO, never reads a device or more than is sensible."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read", detail=error.strerror or str(error)) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the config file {path} is no regular file")
        _trust(path, status)
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
        after = os.fstat(fd)
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read", detail=error.strerror or str(error)) from None
    finally:
        os.close(fd)
    if len(data) > limit:
        raise ConfigError(f"the config is longer than {SIZE_LIMIT} bytes", detail=f"{path} goes beyond that")
    if (status.st_size, status.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != status.st_size:
        raise ConfigError(f"the config file {path} is being written", hint="try again when that is done")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the config file is not UTF-8", detail=f"byte {error.start}") from None


def _trust(path: str, status: os.stat_result) -> None:
    """Whoever can write the config says what runs with our rights."""
    what = "directory" if stat.S_ISDIR(status.st_mode) else "config file"
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"the {what} {path} belongs to user {status.st_uid}",
            detail=f"we are user {os.geteuid()}",
            hint=f"it has to be ours or root's: chown {os.geteuid()} {path}",
        )
    if status.st_mode & 0o002 or (status.st_mode & 0o020 and not _is_private(status)):
        raise ConfigError(
            f"the {what} {path} can be written by others",
            detail=f"its mode is {stat.S_IMODE(status.st_mode):04o}",
            hint=f"chmod go-w {path}",
        )


def _is_private(status: os.stat_result) -> bool:
    """Whether the group is its owner's own, with nobody else in it: where users have such, a umask of 002 is usual."""
    import grp
    import pwd

    try:
        owner = pwd.getpwuid(status.st_uid)
        group = grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return owner.pw_gid == status.st_gid and owner.pw_name == group.gr_name and {*group.gr_mem} <= {owner.pw_name}

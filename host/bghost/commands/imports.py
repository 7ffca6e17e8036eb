"""``bghost import``: the bghost.toml for what another supervisor was told to run."""

import configparser
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any, Final

import click

from bghost.commands.listing import plain
from bghost.shared.errors import BghostError, ConfigError, UsageError
from bghost.shared.names import check_name

_PROCESS: Final = re.compile(r"([A-Za-z0-9_-]+):\s*(.+)")
_SHELL: Final = re.compile(r"[$`|&;<>*?(){}~\n]")
_EXPANSION: Final = re.compile(r"%\(([^)]*)\)[sd]")
_RESTART: Final = {"true": "always", "false": "never", "unexpected": "on-failure"}

Left = list[str]
"""What could not be carried over, a line each."""


class Program:
    """A worker of the kind exec, as a table ``[[worker]]``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[str, Any] = {}
        self.args: dict[str, Any] = {}

    def lines(self) -> Iterator[str]:
        """The table, in TOML."""
        yield "[[worker]]"
        yield 'kind = "exec"'
        for key, value in {"name": self.name, **self.keys}.items():
            yield f"{key} = {_toml(value)}"
        yield f"args = {_toml(self.args)}"


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--output", metavar="FILE", help="Write to FILE, which is not there yet, instead of stdout.")
def imports(file: str, output: str | None) -> None:
    """Write the bghost.toml for a supervisord.conf or a Procfile.

    Each program becomes a worker of the kind exec. What could not be carried over is listed on stderr, and as comments
    at the head of what is written: look through it before you use it.
    """
    try:
        with open(file, encoding="utf-8") as source:
            text = source.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    left: Left = []
    is_supervisor = re.search(r"^\[(program:|supervisord)", text, re.MULTILINE)
    read = supervisor if is_supervisor else procfile
    programs = read(text, file, left)
    if not programs:
        raise ConfigError(f"{file} has no program in it", hint="it is neither a supervisord.conf nor a Procfile")
    written = document(os.path.basename(file), programs, left)
    if output is None:
        sys.stdout.write(written)
    else:
        try:
            with open(output, "x", encoding="utf-8") as target:
                target.write(written)
        except OSError as error:
            raise BghostError(f"{output} cannot be written: {error.strerror}") from None
    for line in left:
        print(plain(f"not carried over: {line}"), file=sys.stderr)


def document(source: str, programs: list[Program], left: Left) -> str:
    """The text of bghost.toml."""
    lines = [f"# From {source}, by bghost import.", *(plain(f"# Not carried over: {line}") for line in left)]
    for program in programs:
        lines += ["", *program.lines()]
    return "\n".join(lines) + "\n"


def procfile(text: str, path: str, left: Left) -> list[Program]:
    """A program for each line ``name: command``, which a shell runs there.

    :raises ConfigError: if a line is none.
    """
    programs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _PROCESS.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"{path}:{number}: a line of a Procfile is NAME: COMMAND")
        program = Program(_name(match[1], left))
        program.args["command"] = _shell(match[2])
        program.args["cwd"] = os.path.dirname(os.path.abspath(path))
        program.keys["restart"] = "on-failure"
        if "$PORT" in match[2] or "${PORT" in match[2]:
            left.append(f"{match[1]}: PORT is not set by bghost; write env = {{ PORT = ... }} into its args")
        programs.append(program)
    return programs


def supervisor(text: str, path: str, left: Left) -> list[Program]:
    """A program for each section ``[program:NAME]``.

    :raises ConfigError: if it cannot be parsed.
    """
    parser = configparser.RawConfigParser(
        inline_comment_prefixes=(" ;", "\t;"), comment_prefixes=("#", ";"), strict=False, delimiters=("=", ":")
    )
    try:
        parser.read_string(text, path)
    except configparser.Error as error:
        raise ConfigError(f"{path} is no supervisord.conf: {' '.join(str(error).split())}") from None
    found = []
    for section in parser.sections():
        kind, _, name = section.partition(":")
        if kind == "program":
            found.append((_order(parser[section]), _program(name, dict(parser[section]), left)))
        elif kind in ("include", "group", "eventlistener", "fcgi-program"):
            left.append(f"[{section}]: " + _SECTIONS[kind])
    return [program for _, program in sorted(found, key=lambda pair: pair[0])]


_SECTIONS: Final = {
    "include": "import those files one by one",
    "group": "bghost takes a pattern, NAME*, where supervisor takes a group",
    "eventlistener": "bghost has no events for programs; a plugin's hooks tell what happens to workers",
    "fcgi-program": "bghost binds no sockets for programs",
}

# Keys that say what bghost does anyway, or that have no meaning once bghost has the log.
_DROPPED: Final = frozenset({
    "process_name", "stopasgroup", "killasgroup", "redirect_stderr", "startsecs", "stdout_capture_maxbytes",
    "stderr_capture_maxbytes", "stdout_events_enabled", "stderr_events_enabled", "stdout_syslog", "stderr_syslog",
    "priority", "serverurl",
})  # fmt: skip


def _order(section: Any) -> int:
    try:
        return int(section.get("priority", "999"))
    except ValueError:
        return 999


def _program(name: str, keys: dict[str, str], left: Left) -> Program:
    program = Program(_name(name, left))
    restart = "on-failure"
    for key, value in keys.items():
        value = value.strip()
        if _EXPANSION.search(value) and key not in _DROPPED:
            expansions = ", ".join(sorted(set(_EXPANSION.findall(value))))
            left.append(f"{name}: {key} has %({expansions})s in it, which bghost does not put in")
        if key == "command":
            program.args["command"] = _words(value, f"[program:{name}]")
        elif key == "directory":
            program.args["cwd"] = value
        elif key == "environment":
            program.args["env"] = _environment(name, value, left)
        elif key == "numprocs" and value != "1":
            program.keys["count"] = _number(name, key, value, left)
        elif key == "autorestart":
            restart = _RESTART.get(value.lower(), restart)
        elif key == "autostart" and value.lower() in ("false", "no", "off", "0"):
            left.append(f"{name}: autostart = false; leave its table out, and launch it when it is wanted")
        elif key == "stopsignal":
            program.args["stop_signal"] = value.upper().removeprefix("SIG")
        elif key == "stopwaitsecs":
            program.keys["stop_timeout"] = _number(name, key, value, left)
        elif key == "user":
            program.keys["user"] = value
        elif key not in _DROPPED and key not in ("numprocs", "autostart"):
            left.append(f"{name}: {key} = {value}" + _HINTS.get(key, ""))
    program.keys["restart"] = restart
    if "command" not in program.args:
        raise ConfigError(f"[program:{name}] has no command")
    return program


_HINTS: Final = {
    "stdout_logfile": "; what it prints goes to bghost's log, see 'bghost logs'",
    "stderr_logfile": "; what it prints goes to bghost's log, see 'bghost logs'",
    "startretries": "; bghost gives up after 10 unhealthy runs",
    "exitcodes": "; bghost takes 0 for success",
    "umask": "; set it in the command",
}


def _words(command: str, path: str) -> list[str]:
    """The words of a command that no shell is to see.

    :raises ConfigError: if a quote is not closed, or there are none.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{path}: {command!r} is no command: {error}") from None
    if not words:
        raise ConfigError(f"{path}: a command is empty")
    return words


def _shell(command: str) -> list[str]:
    """The words of a command that was written for a shell; without one where that makes no difference."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words and not _SHELL.search(command) and "=" not in words[0]:
        return words
    simple = words and not re.search(r"[;&|\n]", command) and "=" not in words[0]
    return ["sh", "-c", f"exec {command}" if simple else command]  # exec: signals are for the program, not its shell


def _environment(name: str, text: str, left: Left) -> dict[str, str]:
    """What ``KEY="value",KEY=value`` says."""
    found = {}
    lexer = shlex.shlex(text, posix=True)
    lexer.wordchars += "/.+-():%$@!*~&^#?[]{}|<>\\"
    lexer.commenters = ""
    tokens = [token for token in lexer if token != ","]
    while len(tokens) >= 3 and tokens[1] == "=":
        found[tokens[0]] = tokens[2]
        del tokens[:3]
    if tokens:
        left.append(f"{name}: of environment, {' '.join(tokens)}")
    return found


def _number(name: str, key: str, value: str, left: Left) -> int:
    try:
        return max(1, int(value))
    except ValueError:
        left.append(f"{name}: {key} = {value}")
        return 1


def _name(name: str, left: Left) -> str:
    """A name that bghost takes."""
    new = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    new = new if re.match(r"[A-Za-z_]", new) else f"_{new}"
    if new != name:
        left.append(f"{name}: it is called {new}")
    return check_name(new)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # A basic string of TOML is one of JSON, but for U+007F.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)

"""``bghost postgres``: the server that workers use, from the command line."""

import json
import os
import shutil
import sys
import time
import tomllib
from typing import Any

import click

from bghost import ConfigError, HostError
from bghost_postgres.extension import PostgresSettings, named_elsewhere


@click.group()
def postgres() -> None:
    """The PostgreSQL server that workers use: the configured or the embedded one."""


@postgres.command()
def uri() -> None:
    """Print the connection string in use."""
    settings = _settings()
    print(_elsewhere(settings) or _embedded_uri(settings))


@postgres.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
def psql(args: tuple[str, ...]) -> None:
    """Run psql on the server in use; the embedded one runs as long as psql does.

    ARGS are psql's own.
    """
    settings = _settings()
    program = _psql()
    dsn = _elsewhere(settings)
    if not dsn:
        from bghost_postgres.embedded.lease import take

        lease = take(say=_say)
        os.set_inheritable(lease.fd, True)  # psql's share now: it goes with psql
        dsn = _as_role(lease.uri, settings)
    sys.stdout.flush()
    os.execv(program, [program, "-d", dsn, *args])


@postgres.command()
def start() -> None:
    """Keep the embedded server running, also while no host uses it."""
    from bghost_postgres.embedded.holder import hold
    from bghost_postgres.embedded.lease import take
    from bghost_postgres.embedded.locks import claimant

    lease = take(say=_say)
    try:
        pid = claimant(lease.place.hold_lock) or hold(lease)
    except BaseException:
        lease.leave()
        raise
    print(f"the embedded PostgreSQL runs, kept by pid {pid}: {lease.uri}")


@postgres.command()
def stop() -> None:
    """Stop the embedded server, unless a host uses it."""
    from bghost_postgres.embedded.holder import release
    from bghost_postgres.embedded.lease import stop_unused
    from bghost_postgres.embedded.place import locate

    place = locate()
    released = release(place)
    if users := stop_unused(place):
        raise HostError(
            f"the embedded PostgreSQL is in use by {_named(users)}",
            detail="it is not kept any longer, and stops with the last of them" if released else "",
            hint="stop the host with 'bghost shutdown'",
        )
    print("the embedded PostgreSQL is stopped")


@postgres.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """Show the embedded server: running or not, since when, where, for whom."""
    from bghost_postgres.embedded import lease
    from bghost_postgres.embedded.place import locate

    answer: dict[str, Any] = lease.status(locate())._asdict()
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    if answer["since"] is not None:
        answer["since"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer["since"]))
    answer["running"] = "yes" if answer["running"] else "no"
    answer["users"] = ", ".join(map(str, answer["users"]))
    width = max(map(len, answer))
    for key, value in answer.items():
        print(f"{key.replace('_', ' '):{width}}  {'-' if value in (None, '') else value}")


def _settings() -> PostgresSettings:
    """What the config file says in ``[postgres]`` or ``[plugin.postgres]``.

    :raises ConfigError: if it cannot be read or is not valid.
    """
    from bghost.shared.paths import directories
    from bghost.shared.settings import convert

    named = os.environ.get("BGHOST_CONFIG")
    folder = directories().config
    path = named or (os.path.join(folder, "bghost.toml") if folder is not None else None)
    if path is None:
        return PostgresSettings()
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        if named is None and isinstance(error, FileNotFoundError):
            return PostgresSettings()
        raise ConfigError(f"the config file {path} cannot be read", detail=str(error.strerror)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    plugins = tables.get("plugin", {})
    table = tables.get("postgres", plugins.get("postgres", {}) if isinstance(plugins, dict) else {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: postgres is not a table", hint="write [postgres] and its settings below")
    return convert(table, PostgresSettings, f"{path}: postgres")


def _elsewhere(settings: PostgresSettings) -> str:
    """The connection string of the server that was configured; empty where the embedded one is meant."""
    if settings.dsn is not None:
        return _as_role(settings.dsn, settings)
    if settings.embedded == "always" or (settings.embedded == "auto" and not named_elsewhere()):
        return ""
    from psycopg.conninfo import make_conninfo
    from psycopg.pq import Conninfo

    said = {
        option.keyword.decode(): option.val.decode()
        for option in Conninfo.get_defaults()
        if option.val is not None and option.envvar is not None and os.environ.get(option.envvar.decode())
    }
    said.pop("password", None)  # stays in the environment, where libpq finds it
    return _as_role(make_conninfo("", **said) or "postgresql://", settings)


def _embedded_uri(settings: PostgresSettings) -> str:
    from bghost_postgres.embedded.place import locate

    return _as_role(locate().uri, settings)


def _as_role(dsn: str, settings: PostgresSettings) -> str:
    if settings.role is None:
        return dsn
    from psycopg.conninfo import make_conninfo

    return make_conninfo(dsn, user=settings.role)


def _psql() -> str:
    """psql of the wheel, else of the path.

    :raises HostError: if there is none.
    """
    from bghost_postgres.embedded.binaries import find

    try:
        return find().program("psql")
    except HostError as error:
        if found := shutil.which("psql"):
            return found
        raise HostError("there is no psql", hint=error.hint) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _named(pids: list[int]) -> str:
    """Processes, with their names where they can be read."""
    named = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            words = ""
        named.append(f"pid {pid} ({words[:60]})" if words else f"pid {pid}")
    return ", ".join(named)

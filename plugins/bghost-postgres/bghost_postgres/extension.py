"""The extension ``postgres``: the settings in ``[postgres]``, and the embedded server where a host needs it."""

import os
import re
from typing import TYPE_CHECKING, Annotated, Final, Literal

from msgspec import Meta

import bghost
from bghost import ConfigError

if TYPE_CHECKING:
    from bghost.host.facade import HostView
    from bghost_postgres.embedded.lease import Lease

PLACES: Final = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE")
"""Variables of libpq that say which server is meant: where one is set, no embedded server is used."""

URI: Final = "BGHOST_POSTGRES_URI"
"""In the environment of a host that uses the embedded server, and so of its workers and their programs: its uri."""

TOKEN: Final = "BGHOST_POSTGRES_HOST"
"""In the environment of a host's workers: the host, for what they share while a server is down."""

_DISTRIBUTION: Final = "bghost-postgres"


class PostgresSettings(bghost.Settings):
    """Settings of bghost-postgres, ``[postgres]`` in bghost.toml, ``--set postgres.KEY=VALUE``."""

    dsn: Annotated[str, Meta(description="the server: a connection string or URI of libpq")] | None = None
    role: Annotated[str, Meta(min_length=1, description="the role to connect as")] | None = None
    statement_timeout: Annotated[float, Meta(ge=0, description="seconds that a statement may take; 0: any")] | None = (
        None
    )
    search_path: Annotated[str, Meta(description="schemas, in SQL's notation")] | None = None
    embedded: Annotated[
        Literal["auto", "always", "never"],
        Meta(description="start the embedded server: for kinds that need one and have no other, always, never"),
    ] = "auto"

    def __post_init__(self) -> None:
        if self.dsn is not None and (problem := problem_of_dsn(self.dsn)):
            raise ValueError(f"dsn is {problem}")
        if self.dsn is not None and self.embedded == "always":
            raise ValueError("dsn and embedded = 'always' exclude each other")


def problem_of_dsn(dsn: str) -> str:
    """What is wrong with *dsn*, without a word of it that may be a password; empty if it parses."""
    from psycopg import OperationalError
    from psycopg.pq import Conninfo

    try:
        options = Conninfo.parse(dsn.encode())
    except OperationalError as error:
        # libpq quotes what it did not understand.
        reason = re.sub(r'".*"', '"..."', str(error).strip().partition("\n")[0], flags=re.DOTALL)
        return f"not a connection string: {reason}"
    # libpq looks at these only when it connects, which would be in every worker, again and again.
    for option in options:
        if option.keyword in (b"port", b"connect_timeout") and option.val:
            for part in option.val.split(b","):
                if part and not part.strip().isdigit():
                    return f"not a connection string: {option.keyword.decode()} is not a number"
    return ""


class Postgres:
    """One in the host, which uses the embedded server for it, and one in each worker, which knows where it is."""

    Settings = PostgresSettings

    def __init__(self, settings: PostgresSettings) -> None:
        self.settings = settings
        self._lease: Lease | None = None

    @property
    def conninfo(self) -> str:
        """What to connect to; empty where libpq's own environment says it.

        :raises ConfigError: if there is no server to use.
        """
        if self.settings.dsn is not None:
            return self.settings.dsn
        if uri := os.environ.get(URI):
            return uri
        if self.settings.embedded == "never" or named_elsewhere():
            return ""
        raise ConfigError(
            "there is no database to connect to",
            detail=f"the embedded server is started for kinds of distributions that require {_DISTRIBUTION}, "
            "and this host was started without one",
            hint="configure a server (postgres.dsn), or set postgres.embedded to 'always'",
        )

    @bghost.hookimpl
    def bghost_host_setup(self, host: "HostView") -> None:
        """Take a share in the embedded server, and start it if need be."""
        os.environ.pop(URI, None)  # that of a host which started this one from a worker
        os.environ[TOKEN] = str(host.run_id)
        if not self._wanted(host):
            return
        from bghost_postgres.embedded.lease import take

        self._lease = take(say=lambda text: host.log.info("{}", text))
        os.environ[URI] = self._lease.uri
        host.log.info("using the embedded PostgreSQL: {}", self._lease.uri)

    @bghost.hookimpl
    def bghost_host_cleanup(self, host: "HostView") -> None:
        """Give the share back; the last one out stops the server."""
        lease, self._lease = self._lease, None
        if lease is not None:
            users = lease.leave()
            if users:
                host.log.info("the embedded PostgreSQL stays, used by pid {}", ", ".join(map(str, users)))
            else:
                host.log.info("the embedded PostgreSQL is stopped")

    def _wanted(self, host: "HostView") -> bool:
        settings = self.settings
        if settings.embedded != "auto":
            return settings.embedded == "always"
        if settings.dsn is not None or named_elsewhere():
            return False
        return any(_DISTRIBUTION in kind.requires for kind in host.kinds.values())


def named_elsewhere() -> bool:
    """Whether libpq's environment says which server is meant."""
    return any(os.environ.get(name) for name in PLACES)

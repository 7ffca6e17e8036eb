"""Where the embedded server's files lie, and the account that the server runs as.

As an ordinary user: ``postgres/`` below bghost's data directory, everything owned by that user. PostgreSQL refuses to
run as root, so there the server runs as ``postgres`` where that account exists, else as ``nobody`` (an existing
cluster's owner is kept), and needs directories that this account can enter: ``postgres/`` below the data directory if
it can be entered, else one below ``/var/lib/bghost`` (BGHOST_SYSTEM_DIR). Rights of directories that were not made here
are never changed.
"""

import contextlib
import hashlib
import os
import pwd
import stat
import subprocess
from collections.abc import Iterator
from typing import Final, NamedTuple
from urllib.parse import quote

from bghost import HostError

SYSTEM_DIR: Final = "/var/lib/bghost"
"""For a server that root starts, and whose account cannot enter root's own directories."""

SUPERUSER: Final = "postgres"  # the role that initdb makes; also the database
PORT: Final = 5432  # names the socket; nothing listens on the network
SOCKET_LIMIT: Final = 107  # bytes of a Unix socket's path
_HINT: Final = "set BGHOST_DATA_DIR to a directory that can be written, or configure a server: postgres.dsn"


class Account(NamedTuple):
    """The account that the server runs as, where that is not the caller's own."""

    name: str
    uid: int
    gid: int

    def can_enter(self, directory: str) -> bool:
        """Whether this account may enter *directory*, by the kernel's own judgement (rights, ACLs, all of it)."""
        return self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", directory])

    def can_run(self, program: str) -> bool:
        """Whether this account may run *program*, which must know ``--version``."""
        return self.run([program, "--version"])

    def run(self, argv: list[str]) -> bool:
        """Whether *argv* succeeds as this account."""
        try:
            return (
                subprocess.run(
                    argv,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    user=self.uid,
                    group=self.gid,
                    extra_groups=[],
                ).returncode
                == 0
            )
        except (PermissionError, FileNotFoundError):
            return False


class Place(NamedTuple):
    """The cluster's directory and everything in it."""

    home: str
    account: Account | None = None
    system: str = SYSTEM_DIR

    @property
    def data(self) -> str:
        """PostgreSQL's data directory; there as a whole or not at all."""
        return f"{self.home}/data"

    @property
    def unfinished(self) -> str:
        """Where initdb works; renamed to :attr:`data` when it is done."""
        return f"{self.home}/data.unfinished"

    @property
    def log(self) -> str:
        """The log of the server and of its keeper."""
        return f"{self.home}/server.log"

    @property
    def use_lock(self) -> str:
        """flock: shared by whoever uses the server, exclusive for whoever stops it."""
        return f"{self.home}/use.lock"

    @property
    def start_lock(self) -> str:
        """flock, exclusive: whoever comes or goes, held until the server accepts connections or is gone."""
        return f"{self.home}/start.lock"

    @property
    def keeper_lock(self) -> str:
        """flock, exclusive: the keeper, as long as it lives; its record lock tells the pid."""
        return f"{self.home}/keeper.lock"

    @property
    def server_lock(self) -> str:
        """flock, exclusive: inherited by every process of the server, so free only when the last of them is gone."""
        return f"{self.home}/server.lock"

    @property
    def hold_lock(self) -> str:
        """Record lock: the process of ``bghost postgres start``."""
        return f"{self.home}/hold.lock"

    @property
    def socket_dir(self) -> str:
        """The directory of the server's socket: in the cluster's, or below /tmp where the path would be too long."""
        inside = f"{self.home}/socket"
        if len(os.fsencode(f"{inside}/.s.PGSQL.{PORT}")) <= SOCKET_LIMIT:
            return inside
        return f"/tmp/bghost-postgres-{_digest(self.home)}"

    @property
    def uri(self) -> str:
        """What a client connects to."""
        return f"postgresql://{SUPERUSER}@/{SUPERUSER}?host={quote(self.socket_dir, safe='')}&port={PORT}"

    def make(self) -> None:
        """Make the directories that are missing, and check those that are there.

        :raises HostError: if one cannot be made, or is not ours.
        """
        enter = 0o711 if self.account else 0o700  # the server's account passes through, and sees no names
        with said(self.home):
            _make_parents(os.path.dirname(self.home), enter)
            _make_own(self.home, enter, None)
        self.make_private(self.socket_dir)

    def make_private(self, directory: str) -> None:
        """Make *directory* for the server's account alone.

        :raises HostError: if it cannot be made, or is not that account's alone.
        """
        with said(directory):
            _make_own(directory, 0o700, self.account)


def locate() -> Place:
    """The place of the caller's embedded server; touches nothing.

    :raises HostError: if there is no data directory, or no account for a server that root starts.
    """
    base = _base()
    home = f"{base}/postgres"
    if os.geteuid() != 0:
        return Place(home)
    system = os.path.abspath(os.environ.get("BGHOST_SYSTEM_DIR") or SYSTEM_DIR)
    account = _account(home)
    if not account.can_enter(_nearest(home)):
        # A directory of one's own choice keeps a cluster of its own, also when it cannot be entered.
        home = f"{system}/postgres-{_digest(base)}" if os.environ.get("BGHOST_DATA_DIR") else f"{system}/postgres"
        account = _account(home)
    return Place(home, account, system)


def _base() -> str:
    """Bghost's data directory, which all instances of a user share.

    :raises HostError: if there is none.
    """
    if named := os.environ.get("BGHOST_DATA_DIR"):
        return os.path.abspath(named)
    import platformdirs

    found = platformdirs.user_data_dir("bghost", appauthor=False)
    if not os.path.isabs(found):  # "~/..." as it stands: neither HOME nor the user database knows a home
        raise HostError(f"user {os.geteuid()} has no home directory", hint="set HOME or BGHOST_DATA_DIR")
    return found


@contextlib.contextmanager
def said(path: str) -> Iterator[None]:
    """Turn an OSError inside into an error that a person can act on."""
    try:
        yield
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename is not None else path
        raise HostError(
            "the embedded PostgreSQL has no directory to live in", detail=f"{where}: {error.strerror}", hint=_HINT
        ) from None


def _account(home: str) -> Account:
    """Whose the cluster in *home* is; where there is none, ``postgres`` if that account exists, else ``nobody``."""
    try:
        uid = os.stat(f"{home}/data").st_uid
        if uid != 0:
            entry = pwd.getpwuid(uid)
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    except (OSError, KeyError):
        pass
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise HostError(
        "PostgreSQL does not run as root, and there is no account to run it as",
        hint="add an account 'nobody' or 'postgres', run bghost as an ordinary user, or set postgres.dsn",
    )


def _digest(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def _nearest(path: str) -> str:
    """The nearest directory on the way up from *path* that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _make_parents(path: str, mode: int) -> None:
    if os.path.isdir(path):
        return
    _make_parents(os.path.dirname(path), mode)
    try:
        os.mkdir(path)
    except FileExistsError:
        return  # somebody else was faster, and it is as they made it
    os.chmod(path, mode)  # mkdir's mode goes through the umask


def _make_own(path: str, mode: int, owner: Account | None) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    else:
        if owner is not None:
            os.chown(path, owner.uid, owner.gid)
        os.chmod(path, mode)
        return
    found = os.lstat(path)
    uid = os.geteuid() if owner is None else owner.uid
    if owner is not None and found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode) and not os.listdir(path):
        os.chown(path, owner.uid, owner.gid)  # ours, from a start that ended between the two calls above
    elif not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
        raise HostError(
            f"{path} is not a directory of {'this user' if owner is None else owner.name} alone",
            detail=f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}",
            hint="move it away, or set BGHOST_DATA_DIR to another directory",
        )

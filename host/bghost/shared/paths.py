"""Where an instance keeps its things, and whether a directory is safe to keep them in.

The runtime directory is looked up by every command, and all of ``bghost ps`` is to take little more than Python's own
start: platformdirs comes in only for directories that ``ps`` does not need.
"""

from __future__ import annotations

import os
import stat

from bghost.shared.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET_LIMIT = 107
"""Bytes that the path of a Unix socket may have."""


class Directories:
    """The directories and files of one instance, looked up when asked for; none of them need exist.

    :param instance: the instance's name, a plain word.
    :param environ: where the ``BGHOST_*`` and ``XDG_*`` variables are looked up.
    """

    def __init__(self, instance: str, environ: Mapping[str, str]) -> None:
        self.instance = instance
        self._environ = environ

    @property
    def named(self) -> bool:
        """Whether the user named :attr:`base`."""
        return bool(self._environ.get("BGHOST_RUNTIME_DIR"))

    @property
    def base(self) -> str:
        """What the runtime directories of all instances of this user lie in.

        :raises HostError: if that would be in an XDG_RUNTIME_DIR that is not safe.
        """
        if named := self._environ.get("BGHOST_RUNTIME_DIR"):
            return os.path.abspath(named)
        xdg = self._environ.get("XDG_RUNTIME_DIR")
        # A service, cron and su have no XDG_RUNTIME_DIR, and must find the host that a login session started.
        session = os.path.abspath(xdg or f"/run/user/{os.geteuid()}")
        if os.path.lexists(session):
            why = problem(session, shared=True)
            if not why:
                return os.path.join(session, "bghost")
            if xdg:
                raise HostError(f"XDG_RUNTIME_DIR {session} {why}", hint="unset it, or set BGHOST_RUNTIME_DIR")
        # Not platformdirs: what it falls back to differs between its versions, and is shared with other programs.
        return f"/tmp/bghost-{os.geteuid()}"

    @property
    def runtime(self) -> str:
        """Where the control socket and the lock are."""
        return os.path.join(self.base, self.instance)

    @property
    def socket(self) -> str:
        """The control socket.

        :raises HostError: if its path is longer than a socket's may be.
        """
        path = os.path.join(self.runtime, "control.sock")
        if (length := len(os.fsencode(path))) > SOCKET_LIMIT:
            raise HostError(
                f"the control socket's path {path} is too long",
                detail=f"{length} bytes, the most is {SOCKET_LIMIT}",
                hint="set BGHOST_RUNTIME_DIR to a shorter one",
            )
        return path

    @property
    def notify_socket(self) -> str:
        """Where programs that workers have become say that they are ready."""
        return os.path.join(self.runtime, "notify.sock")

    @property
    def lock(self) -> str:
        """The file whose lock the host and all its workers hold."""
        return os.path.join(self.runtime, "lock")

    @property
    def state(self) -> str:
        """For what outlives the host and may be lost, such as logs.

        :raises HostError: if the user has no home directory for it to be in.
        """
        return os.path.join(self._required("BGHOST_STATE_DIR", "user_state_dir"), self.instance)

    @property
    def data(self) -> str:
        """For what outlives the host and may not be lost.

        :raises HostError: if the user has no home directory for it to be in.
        """
        return os.path.join(self._required("BGHOST_DATA_DIR", "user_data_dir"), self.instance)

    @property
    def config(self) -> str | None:
        """Where bghost.toml is looked for, unless ``--config`` or BGHOST_CONFIG names a file; one for all instances.

        ``None`` if the user has no home directory for it to be in.
        """
        return self._find("BGHOST_CONFIG_DIR", "user_config_dir")

    def _required(self, variable: str, method: str) -> str:
        found = self._find(variable, method)
        if found is None:
            raise HostError(f"user {os.geteuid()} has no home directory", hint=f"set HOME or {variable}")
        return found

    def _find(self, variable: str, method: str) -> str | None:
        if named := self._environ.get(variable):
            return os.path.abspath(named)
        import warnings

        import platformdirs

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Where neither HOME nor the user database knows a home, some versions raise, others give "~/..." as it is.
            try:
                found: str = getattr(platformdirs, method)("bghost", appauthor=False)
            except RuntimeError:
                return None
        return found if os.path.isabs(found) else None


def directories(instance: str | None = None, environ: Mapping[str, str] = os.environ) -> Directories:
    """The directories of *instance*; without a name, of BGHOST_INSTANCE or else ``default``.

    :raises UsageError: if the name is no plain word.
    """
    name = (environ.get("BGHOST_INSTANCE") or "default") if instance is None else instance
    # The check proper brings in msgspec, whose import takes longer than all the rest of "bghost ps".
    if not (name.isascii() and name.isidentifier() and len(name) < 64):
        from bghost.shared.names import check_name

        check_name(name, "instance")
    return Directories(name, environ)


def prepare(directories: Directories) -> None:
    """Make the runtime directory of an instance and verify that it is ours alone.

    :raises HostError: if it cannot be made or is not safe, or if the socket's path is too long; with path, reason and
        cure.
    """
    _ = directories.socket  # for the check of its length
    # One that was named may be the system's, such as systemd's RuntimeDirectory=; what lies in it is ours all the same.
    private(directories.base, shared=directories.named)
    private(directories.runtime)


def private(path: str, *, shared: bool = False, variable: str = "BGHOST_RUNTIME_DIR") -> None:
    """Make a directory, and what is missing above it, with mode 0700 under any umask, and verify that it is safe.

    :param shared: whether it is enough that nobody else can replace what we make in it.
    :param variable: what a user sets to have it elsewhere; for the error.
    :raises HostError: if it cannot be made or is not safe; with path, reason and cure.
    """
    umask = os.umask(0o077)
    try:
        os.makedirs(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise HostError(f"the directory {path} cannot be made: {error.strerror}", hint=f"set {variable}") from None
    finally:
        os.umask(umask)
    if why := problem(path, shared=shared):
        raise HostError(f"the directory {path} {why}", hint=f"mend that, or set {variable} to one of your own")


def problem(path: str, *, shared: bool = False) -> str:
    """Why *path* is not a directory that is safe to keep a socket in, or nothing.

    Safe is one of our own that nobody else may enter; a *shared* one may belong to root, and others may look, but not
    replace what is in it. It is not followed where it is a symlink.
    """
    try:
        found = os.lstat(path)
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return "is a symlink"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    us = os.geteuid()
    if found.st_uid != us and not (shared and found.st_uid == 0):
        return f"belongs to user {found.st_uid}, and we are user {us}"
    sticky = shared and found.st_mode & stat.S_ISVTX  # as in /tmp: others cannot rename or remove what is ours
    if found.st_mode & (0o022 if shared else 0o077) and not sticky:
        return f"is open to others, mode {stat.S_IMODE(found.st_mode):04o}"
    return ""

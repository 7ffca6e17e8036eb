"""Other users, whom a host that is root has workers run as."""

import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bghost.shared.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class User:
    """Whom a process becomes, with all groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def find(name: str) -> User:
    """The user of that name. Asks the system's user database, which may be slow: never in the host's loop.

    :raises UsageError: if there is none, or this process may not become it.
    """
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise UsageError(f"there is no user {name!r}") from None
    if os.geteuid() not in (0, entry.pw_uid):
        raise UsageError(
            f"only a host that is root can have workers run as {name!r}", detail=f"this one has uid {os.geteuid()}"
        )
    groups = tuple(os.getgrouplist(name, entry.pw_gid))
    return User(name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)


def become(user: User) -> None:
    """Be *user* for good: groups, gid, uid, in that order, and what the environment says of it.

    The kernel forgets the death signal with that: the caller asks for it again.

    :raises OSError: as the kernel answers.
    """
    if os.geteuid() == 0:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    os.environ.update(USER=user.name, LOGNAME=user.name, HOME=user.home)


def asked_by(name: str | None, ask: Callable[[], T]) -> Callable[[], T]:
    """*ask*, in a process that is thrown away after it, as that user; ``None``: as whoever it is."""

    def asked() -> T:
        if name is not None:
            become(find(name))
        return ask()

    return asked

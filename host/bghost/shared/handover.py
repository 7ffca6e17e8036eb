"""A worker's birth handed over an exec: to an interpreter of its own, by descriptors that it inherits.

What goes over is pickled: it comes from the host, and goes to a child of it that runs the host's own code.
"""

import os
import pickle
from dataclasses import fields
from typing import Any, Final

from bghost.shared import linux, logs
from bghost.shared.birth import Birth
from bghost.shared.pools import PoolTable
from bghost.shared.table import Table

_MAPPED: Final = ("table", "pools", "loaded")  # what is made anew from descriptors, or imported again


def give(birth: Birth) -> int:
    """In a child that is about to exec: have everything inherited; the descriptor of what :func:`take` takes.

    :raises OSError: EMFILE and the like.
    """
    inherited = [birth.lock, birth.bell, *birth.table.fds(), *logs.fds()]
    inherited += [fd for fd in (birth.host_pidfd, birth.channel) if fd >= 0]
    for pool in birth.pools.values():
        inherited += pool.fds()
    said = {
        "birth": {field.name: getattr(birth, field.name) for field in fields(birth) if field.name not in _MAPPED},
        "table": birth.table.fds(),
        "pools": {name: (pool.layout, pool.fds()) for name, pool in birth.pools.items()},
        "log": logs.give(),
        "inherited": inherited,
    }
    data = pickle.dumps(said)
    file = linux.memfd("bghost-birth", len(data))
    os.pwrite(file, data, 0)
    for fd in (*inherited, file):
        os.set_inheritable(fd, True)
    return file


def take(file: int) -> Birth:
    """In the new interpreter: the birth, and the log, as if it had been forked."""
    with open(file, "rb") as reader:
        said: dict[str, Any] = pickle.loads(reader.read())
    for fd in said["inherited"]:
        os.set_inheritable(fd, False)
    logs.take(said["log"])
    ends = said["table"]
    return Birth(
        **said["birth"],
        table=Table((len(ends) - 2) // 2, ends),
        pools={name: PoolTable(layout, fds) for name, (layout, fds) in said["pools"].items()},
        loaded=None,
    )

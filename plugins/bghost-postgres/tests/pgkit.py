"""A kind of which a test writes only what matters to it, a server's door at which is noted who comes, and who waits for
whose probe."""

import contextlib
import os
import select
import socket
import struct
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from support import Host, Sandbox, accepted, until

ACCEPTS: Final = 0x10000  # __SO_ACCEPTCON, of the flags in /proc/net/unix
CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


HEAD: Final = """\
import asyncio, contextlib
import bghost, bghost_postgres, psycopg

class Settings(bghost.Settings):
    naptime: float = 0.05

class Kind:
    Settings = Settings

"""


def start(sandbox: Sandbox, body: str, *args: str, requires: bool = False) -> Host:
    """A host with a kind ``probe``, whose class has *body* beside its settings; it answers, and may not be ready.

    :param requires: whether the kind's distribution requires bghost-postgres.
    """
    sandbox.distribution(
        "probe-kind",
        {"probe_kind": HEAD + textwrap.indent(textwrap.dedent(body), "    ")},
        {"bghost.kinds": {"probe": "probe_kind:Kind"}},
        requires=("bghost", "bghost-postgres") if requires else ("bghost",),
    )
    host = sandbox.start_host("run", "probe", *args)
    host.wait_answering()
    return host


class Door:
    """A server's Unix socket that notes which process comes, and leaves the connection to a function.

    The kernel says who it is, as of its connect(): however late it is looked at here.
    """

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        # A socket's path has 107 bytes, and that of a test's own directory may be longer.
        self._directory = tempfile.TemporaryDirectory(prefix="bghost-")
        self.dsn: Final = f"host={self._directory.name} port=5432 user=postgres dbname=postgres"
        self.pids: list[int] = []
        """Of those who came, one for each time."""
        self._serve = serve
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"{self._directory.name}/.s.PGSQL.5432")
        self._socket.listen(128)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        for connection in accepted(self._socket):
            pid, _, _ = CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            )
            self.pids.append(pid)
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def forget(self) -> None:
        """Forget those who have come so far, be it that they are not noted yet: who comes now is noted after them."""
        with socket.socket(socket.AF_UNIX) as mine:
            mine.connect(self._socket.getsockname())
            until(lambda: os.getpid() in self.pids, 30)
        self.pids.clear()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        self._directory.cleanup()


def forward(connection: socket.socket, path: str) -> None:
    """Carry what is said between a client and the server at *path*."""
    with contextlib.suppress(OSError), connection, socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        other = {connection: server, server: connection}
        while True:
            for end in select.select(list(other), [], [])[0]:
                if not (data := end.recv(1 << 16)):
                    return
                other[end].sendall(data)


def prober(host: Host, followers: int) -> int:
    """The pid of the worker that listens on the abstract name by which a server's prober is known, once so many others
    are connected to it, else 0: who looks between its bind and its listen is refused, and probes for itself once."""
    listening: dict[str, str] = {}  # inodes, by name
    connected: Counter[str] = Counter()
    for fields in map(str.split, Path("/proc/net/unix").read_text().splitlines()[1:]):
        if not fields[-1].startswith("@bghost-postgres-"):
            continue
        if int(fields[3], 16) & ACCEPTS:
            listening[fields[-1]] = f"socket:[{fields[6]}]"
        elif int(fields[1], 16) > 2:  # the other end is there; the prober takes none of them while the server is down
            connected[fields[-1]] += 1
    awaited = {socket for name, socket in listening.items() if connected[name] == followers}
    for row in host.client.ps():
        if row["pid"] and awaited & descriptors(row["pid"]):
            return row["pid"]
    return 0


def descriptors(pid: int) -> set[str]:
    """What a process' descriptors are."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has gone
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found

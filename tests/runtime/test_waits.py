"""worker.wait(): what ends it, what it tells, and that nothing runs while nothing happens."""

import os
import platform
import re
import select
import signal
import time
from pathlib import Path

import pytest
from support import SLOW, Host, StartHost, notes, until

FOR_EVER = """
import os
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        worker.log.info("note: woken by {}, {}", sorted(worker.woken), os.getpid())
        return bghost.UNTIL_WOKEN

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        worker.log.info("note: ends: {}", reason)
"""

IN_A_TICK = """
import os
import bghost

class Kind:
    rounds = 0

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        worker.log.info("note: round {}, {}", self.rounds, os.getpid())
        try:
            woken = worker.wait(bghost.UNTIL_WOKEN)
        except BaseException as error:
            worker.log.info("note: {!r}", error)
            raise
        worker.log.info("note: woken in the tick by {}", sorted(woken))
        return 0

    @bghost.hookimpl
    def bghost_cleanup(self, worker, reason):
        worker.log.info("note: ends: {}", reason)
"""

SETTINGS = """
class Settings(bghost.Settings):
    word: str = "first"
"""


def with_settings(source: str) -> str:
    """The source of a kind that has settings, so that a config can change them."""
    head, tail = source.split("class Kind:")
    return f"{head}{SETTINGS}\nclass Kind:\n    Settings = Settings\n{tail}"


def change(host: Host, kind: str, word: str) -> None:
    """Have *kind*'s settings changed by a reload."""
    host.sandbox.config(f"host.kinds = ['{kind}']\nworker = [{{kind = '{kind}'}}]\nkind.{kind}.word = '{word}'")
    host.client.reload()


def started(host: Host, name: str) -> int:
    """The pid of a worker that has noted it, and so has come to its first wait, or is about to."""
    return int(host.wait_line(rf"\[{name}\] note: .*, ([0-9]+)$").match[1])


@pytest.mark.parametrize("source", [FOR_EVER, IN_A_TICK], ids=["between ticks", "in a tick"])
def test_what_ends_a_wait(source: str, bghost_host: StartHost) -> None:
    """A wake-up and a reload end a wait that would last for ever, at once, and it tells of them; so does a stop.

    In a tick a smart stop is a wake-up; the tick goes on to its end.
    """
    host = bghost_host(kinds={"sleeper": with_settings(source)}, config="worker = [{kind = 'sleeper'}]", args=["run"])
    in_a_tick = source is IN_A_TICK
    pid = started(host, "sleeper")
    os.kill(pid, signal.SIGUSR1)
    line = host.wait_line(r"note: woken.* by \['wake'\]")
    if in_a_tick:
        line = host.wait_line("note: round 2", after=line)
    change(host, "sleeper", "second")
    line = host.wait_line(r"note: woken.* by \['reload'\]", after=line)
    if in_a_tick:
        line = host.wait_line("note: round 3", after=line)
    assert host.client.stop("sleeper")["killed"] == []
    host.wait_line("note: ends: stop", after=line)
    assert len(re.findall("note: woken in the tick", host.text())) == (3 if in_a_tick else 0)
    assert host.row("sleeper")["errors"] == 0


def test_a_cancel_in_a_tick(bghost_host: StartHost) -> None:
    """INT raises Canceled from a wait in a tick, and the worker goes on after that; TERM raises Stop."""
    host = bghost_host(kinds={"sleeper": IN_A_TICK}, args=["run", "sleeper"])
    pid = started(host, "sleeper")
    os.kill(pid, signal.SIGINT)
    canceled = host.wait_line(r"note: Canceled\('canceled by SIGINT'\)")
    host.wait_line(f"note: round 2, {pid}", after=canceled)
    os.kill(pid, signal.SIGTERM)
    host.wait_line(r"note: Stop\(", after=canceled)
    assert host.wait_line("note: ends: ").text.endswith("stop")
    assert host.row("sleeper")["errors"] == 1


def test_a_cancel_between_ticks(bghost_host: StartHost) -> None:
    """INT finds nothing to cancel between ticks: it is counted, and the wait goes on."""
    kind = """
        import os
        import bghost
        from bghost.shared.table import DROPPED

        class Kind:
            @bghost.hookimpl
            def bghost_tick(self, worker):
                dropped = worker.slot.stats[DROPPED]
                worker.log.info("note: {}, dropped {}, {}", sorted(worker.woken), dropped, os.getpid())
                return bghost.UNTIL_WOKEN
    """
    host = bghost_host(kinds={"sleeper": kind}, args=["run", "sleeper"])
    pid = started(host, "sleeper")
    until(lambda: blocked(pid), what="the worker waits")
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGUSR1)
    host.wait_line(r"note: \['wake'\], dropped 1")
    assert host.row("sleeper")["errors"] == 0


def blocked(pid: int) -> str | None:
    """The system call that a process sleeps in; its number, or ``None`` if it runs."""
    try:
        call = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return None if call == "running" else call


def switches(pid: int) -> list[str]:
    """How often a process has been put to sleep or taken off its processor: any system call of a sleeper adds one."""
    return re.findall(r"ctxt_switches:\s+([0-9]+)", Path(f"/proc/{pid}/status").read_text())


def test_nothing_runs_while_nothing_happens(bghost_host: StartHost) -> None:
    """A host, and workers that wait for ever, make no system call: none of them so much as wakes up in a second."""
    host = bghost_host(kinds={"idle": FOR_EVER, "inside": IN_A_TICK}, args=["run", "idle", "inside"])
    host.client.wait("idle", "inside")
    pids = [host.pid, started(host, "idle"), started(host, "inside")]
    until(lambda: all(blocked(pid) for pid in pids), what="all of them wait")
    deadline = time.monotonic() + 20 * SLOW
    while True:  # the host may still have a client's last words to see to
        before = [switches(pid) for pid in pids]
        time.sleep(1.0)
        if [switches(pid) for pid in pids] == before or time.monotonic() > deadline:
            break
    assert [switches(pid) for pid in pids] == before
    assert all(blocked(pid) for pid in pids)


FILTER = """
import ctypes, os, struct

WRITE, EXIT = {"x86_64": (1, 231), "aarch64": (64, 94)}[os.uname().machine]


def no_system_calls():
    '''From now on any system call ends this process with SIGSYS, but writing and ending.'''

    def code(op, value, yes=0, no=0):
        return struct.pack("HBBI", op, yes, no, value)

    program = b"".join((
        code(0x20, 0),  # the system call's number
        code(0x15, WRITE, 2),
        code(0x15, EXIT, 1),
        code(0x06, 0x80000000),  # kill the process
        code(0x06, 0x7FFF0000),  # allow
    ))
    buffer = ctypes.create_string_buffer(program)
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "no new privileges"
    assert libc.prctl(22, 2, ctypes.create_string_buffer(fprog)) == 0, "a filter of system calls"
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the filter knows two processors' numbers")
def test_a_turn_makes_no_system_call(bghost_host: StartHost) -> None:
    """Ten thousand turns of a worker that has always something to do make no system call at all."""
    kind = (
        FILTER
        + """
import bghost

class Kind:
    rounds = 0

    @bghost.hookimpl
    def bghost_tick(self, worker):
        self.rounds += 1
        if self.rounds == 1000:
            no_system_calls()
        if self.rounds == 11_000:
            os.write(1, b"note: not one\\n")
            os._exit(0)
        if self.rounds % 2:
            worker.check_interrupts()
            worker.wait(0)
        return 0
"""
    )
    host = bghost_host(kinds={"busy": kind}, args=["run", "busy"], answering=False)
    host.wait_line("note: not one")


def test_what_a_wait_takes(bghost_host: StartHost) -> None:
    """Timeouts and descriptors, good and bad ones."""
    kind = """
        import contextlib, math, os, time
        import bghost

        class Settings(bghost.Settings):
            naptime: float = 0.05

        @contextlib.contextmanager
        def refused(kind):
            try:
                yield
            except kind:
                return
            raise AssertionError("it was taken")

        class Kind:
            Settings = Settings

            @bghost.hookimpl
            def bghost_tick(self, worker):
                for bad in (-1, -0.001, math.nan, -math.inf):
                    with refused(ValueError):
                        worker.wait(bad)
                for seconds in (0, 0.0, 0.05, None):
                    began = time.monotonic()
                    assert worker.wait(seconds) == worker.woken == {"timeout"}
                    took = time.monotonic() - began
                    assert took >= (0.05 if seconds is None else seconds), took

                # A descriptor ends a wait once it can be read, and is watched no more after it
                near, far = os.pipe()
                assert worker.wait(0, near) == {"timeout"}
                os.write(far, b"x")
                assert worker.wait(math.inf, near) == {"fd"}
                assert worker.wait(0, near) == {"fd"}
                assert worker.wait(0.05) == {"timeout"}
                assert worker.wait(0, near, near) == {"fd"}
                os.read(near, 1)
                assert worker.wait(0, near, near) == {"timeout"}
                os.close(far)
                assert worker.wait(math.inf, near) == {"fd"}  # at its end it can be read, too

                # One that cannot be watched is refused, and leaves nothing watched
                with refused(ValueError):
                    worker.wait(0, near, -1)
                with refused((TypeError, ValueError)):
                    worker.wait(0, near, "3")
                assert worker.wait(0.05) == {"timeout"}
                os.close(near)

                # Those that every wait watches stay watched
                worker.wake()
                assert "wake" in worker.wait(math.inf, *worker.wakeup_fds)
                assert worker.wait(0.05, *worker.wakeup_fds) == {"timeout"}
                worker.wake()
                assert worker.wait(math.inf) == {"wake"}

                # A wake-up is told of once, by the next wait, also by one that only looks
                worker.wake()
                worker.wake()
                assert worker.wait(0) == {"wake"}
                assert worker.wait(0) == {"timeout"}
                worker.log.info("note: passed")
                return bghost.UNTIL_WOKEN
    """
    host = bghost_host(kinds={"probe": kind}, args=["run", "probe"], answering=False)
    assert "passed" in host.wait_line("note: passed|Error").text


ALARM = """
import datetime
import os
import time
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_main(self, worker):
        moment = time.time() + float(worker.args["seconds"])
        nap = worker.until(datetime.datetime.fromtimestamp(moment, datetime.timezone.utc))
        began = time.monotonic()
        worker.log.info("note: sleeps, {}", os.getpid())
        woken = sorted(worker.wait(nap))
        took, late = time.monotonic() - began, time.time() - moment
        worker.log.info("note: woken by {} after {:.3f}, late {:.3f}", woken, took, late)
"""

CLOCK = os.environ.get("BGHOST_TEST_CLOCK", "") not in ("", "0")
"""Whether the clock of this machine may be set to another time, for a second."""


def ahead() -> float:
    """Seconds that the wall clock is ahead of the monotonic one; nothing came between the looks at the two."""
    while True:
        before, wall, after = time.monotonic(), time.time(), time.monotonic()
        if after - before < 0.001:
            return wall - before


def set_clock(to: float) -> None:
    """Have :func:`ahead` be *to*: once more where this process was held up between reading and setting."""
    while True:
        time.clock_settime(time.CLOCK_REALTIME, time.monotonic() + to)
        if abs(ahead() - to) < 0.01:
            return


@pytest.mark.parametrize(
    ("seconds", "shift"),
    [
        (0.6, 0.0),
        pytest.param(1.0, -1.5, marks=pytest.mark.skipif(not CLOCK, reason="sets the clock with BGHOST_TEST_CLOCK")),
        pytest.param(61.0, 60.0, marks=pytest.mark.skipif(not CLOCK, reason="sets the clock with BGHOST_TEST_CLOCK")),
    ],
)
def test_a_nap_to_a_moment_follows_the_wall_clock(seconds: float, shift: float, bghost_host: StartHost) -> None:
    """It ends at that moment as the clock has it, however often that is set meanwhile, also to what it shows."""
    host = bghost_host(
        kinds={"alarm": ALARM}, args=["run"], config=f"worker = [{{kind = 'alarm', args = {{seconds = {seconds}}}}}]"
    )
    pid = started(host, "alarm")
    until(lambda: blocked(pid), what="the worker waits")
    right = ahead()
    try:
        set_clock(right + shift)
    except PermissionError:
        pytest.skip("this user may not set the clock")
    try:
        for _ in range(5):
            set_clock(right + shift)
        said = host.wait_line(r"note: woken by \['timeout'\] after ([0-9.]+), late (-?[0-9.]+)", 30.0)
    finally:
        if shift:
            set_clock(right)
    # Who did not follow the clock would sleep a minute when it was set on, and be early when it was set back.
    assert float(said.match[1]) < 60.0
    assert float(said.match[2]) >= 0.0


def test_a_wake_up_outlives_a_cancel(bghost_host: StartHost) -> None:
    """Where a cancel ends a wait that a wake-up was about to end, the next wait tells of the wake-up."""
    kind = """
        import signal
        import bghost
        from bghost.worker import waiting

        class Kind:
            @bghost.hookimpl
            def bghost_tick(self, worker):
                worker.wake()
                steps = waiting.sleep(worker, float("inf"))
                assert next(steps)[0] == 0  # it has found the wake-up, and looks for descriptors once more
                signal.raise_signal(signal.SIGINT)
                try:
                    steps.send([])
                except bghost.Canceled:
                    assert worker.wait(0) == {"wake"}
                    worker.log.info("note: passed")
                return bghost.UNTIL_WOKEN
    """
    host = bghost_host(kinds={"probe": kind}, args=["run", "probe"], answering=False)
    assert "passed" in host.wait_line("note: passed|Error").text


def test_a_reload_that_a_tick_was_told_of(bghost_host: StartHost) -> None:
    """A reload ends a wait in a tick, and the next tick has its settings, though a sleep for ever is between them."""
    kind = """
        import os
        import bghost

        class Settings(bghost.Settings):
            word: str = "first"

        class Kind:
            Settings = Settings

            @bghost.hookimpl
            def bghost_tick(self, worker):
                word = worker.settings.word
                worker.log.info("note: {}, {}", word, os.getpid())
                if word == "first":
                    assert worker.wait(bghost.UNTIL_WOKEN) == {"reload"}
                    assert worker.wait(0) == {"timeout"}  # it is told of once
                    assert worker.settings.word == word
                return bghost.UNTIL_WOKEN
    """
    host = bghost_host(kinds={"sleeper": kind}, config="worker = [{kind = 'sleeper'}]", args=["run"])
    started(host, "sleeper")
    change(host, "sleeper", "second")
    host.wait_line("note: second")
    assert host.row("sleeper")["errors"] == 0


def test_a_reload_whose_signal_is_late(bghost_host: StartHost) -> None:
    """A wait that sees a new config before the signal for it has come ends, and the next tick has its settings."""
    kind = """
        import os, signal, time
        import bghost
        from bghost.shared.table import CONFIG_NUMBER

        class Settings(bghost.Settings):
            word: str = "first"

        class Kind:
            Settings = Settings

            @bghost.hookimpl
            def bghost_tick(self, worker):
                word = worker.settings.word
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
                worker.log.info("note: {}, {}, {}", word, sorted(worker.woken), os.getpid())
                deadline = time.monotonic() + 20.0
                while word == "first" and worker._table.head[CONFIG_NUMBER] == 1 and time.monotonic() < deadline:
                    time.sleep(0.001)
                return bghost.UNTIL_WOKEN
    """
    host = bghost_host(kinds={"sleeper": kind}, config="worker = [{kind = 'sleeper'}]", args=["run"])
    started(host, "sleeper")
    change(host, "sleeper", "second")
    host.wait_line(r"note: second, \['reload'\]")


def test_the_wait_after_an_error(bghost_host: StartHost) -> None:
    """It lasts for the delay: a wake-up does not cut it short, and is told of after it; a reload and a stop do.

    A reload that went well does not make the next delay shorter.
    """
    kind = """
        import time
        import bghost

        class Settings(bghost.Settings):
            word: str = "first"
            naptime: float = 1000.0

        class Kind:
            Settings = Settings
            failed = 0.0

            @bghost.hookimpl
            def bghost_tick(self, worker):
                if self.failed:
                    after = time.monotonic() - self.failed
                    row = worker.block.failures
                    worker.log.info("note: again after {:.3f} s, {}, {} failures", after, sorted(worker.woken), row)
                self.failed = time.monotonic()
                worker.wake()
                raise OSError("no luck")
    """
    args = ["run", "--set", "host.stop_timeout=600"]
    host = bghost_host(kinds={"unlucky": kind}, config="worker = [{kind = 'unlucky'}]", args=args)
    line = host.wait_line(r"note: again after ([\d.]+) s, (\[.*\])")
    assert float(line.match[1]) >= 1.0
    assert line.match[2] == "['wake']"
    for word in ("second", "third", "fourth", "fifth", "sixth"):  # the delays would be 2, 4, 8, 16 and 32 s
        change(host, "unlucky", word)
        line = host.wait_line(r"note: again after .*'reload'.*, ([0-9]+) failures", after=line, timeout=15.0)
    assert int(line.match[1]) >= 6
    assert host.client.stop("unlucky", timeout=30.0 * SLOW)["killed"] == []  # and this one 60 s
    assert host.row("unlucky")["exit"] == "exit code 0"


def test_the_death_of_the_host_ends_every_wait(bghost_host: StartHost) -> None:
    """The workers that wait are gone without the guard's help, between ticks and in one, after a cleanup."""
    args = ["run", "idle", "inside", "--set", "host.stop_timeout=600"]
    host = bghost_host(kinds={"idle": FOR_EVER, "inside": IN_A_TICK}, args=args)
    pids = [started(host, "idle"), started(host, "inside")]
    watch = select.poll()
    pidfds = [os.pidfd_open(pid) for pid in pids]
    for pidfd in pidfds:
        watch.register(pidfd, select.POLLIN)
    host.signal(signal.SIGKILL)
    deadline = time.monotonic() + 30.0 * SLOW
    gone: set[int] = set()
    while len(gone) < 2 and (left := deadline - time.monotonic()) > 0:
        for pidfd, _ in watch.poll(left * 1000):
            watch.unregister(pidfd)
            gone.add(pidfd)
    for pidfd in pidfds:
        os.close(pidfd)
    assert len(gone) == 2
    for name in ("idle", "inside"):
        host.wait_line(rf"\[{name}\] note: ends: host_died")


def test_a_worker_that_was_suspended_goes_on(bghost_host: StartHost) -> None:
    """What comes while a worker is suspended (SIGSTOP) is there when it is continued."""
    host = bghost_host(kinds={"sleeper": FOR_EVER}, args=["run", "sleeper"])
    pid = started(host, "sleeper")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text(), what="it is stopped")
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGCONT)
    host.wait_line(rf"note: woken by \['wake'\], {pid}")
    row = host.row("sleeper")
    assert (row["state"], row["pid"], row["restarts"]) == ("ready", pid, 0)


def test_waits_of_a_worker_that_is_to_end(bghost_host: StartHost) -> None:
    """With interrupts held, and in the clean-up, a wait lasts its time though the host is dead, and does not spin."""
    kind = """
        import os, select, time
        import bghost

        def lasts(worker, what):
            began, used = time.monotonic(), time.process_time()
            for _ in range(3):
                assert worker.wait(0.1) <= {"timeout", "wake"}
            took, used = time.monotonic() - began, time.process_time() - used
            worker.log.info("note: {}: {}, {}", what, took >= 0.2, used < 0.1)

        class Kind:
            @bghost.hookimpl
            def bghost_tick(self, worker):
                host = os.pidfd_open(os.getppid())
                with worker.hold_interrupts():
                    worker.log.info("note: holds, {}", os.getpid())
                    watch = select.poll()
                    watch.register(host, select.POLLIN)
                    watch.poll()
                    lasts(worker, "held")
                worker.log.info("note: not reached")

            @bghost.hookimpl
            def bghost_cleanup(self, worker, reason):
                lasts(worker, reason)
    """
    host = bghost_host(kinds={"holder": kind}, args=["run", "holder"])
    started(host, "holder")
    host.signal(signal.SIGKILL)
    host.wait_line("note: host_died")
    assert notes(host, "holder")[1:] == ["held: True, True", "host_died: True, True"]

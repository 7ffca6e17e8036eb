"""Signals by the thousand while every process logs: what was last said is in force, and nothing grows.

BGHOST_SOAK: 10,000 HUPs, 10,000 mixed signals. Without it a few hundred.
"""

import contextlib
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from signal import Signals as S
from typing import Final

import pytest
from support import SLOW, Host, StartHost, pid_in, until

from bghost import BghostError

SOAK: Final = os.environ.get("BGHOST_SOAK", "") not in ("", "0")
GROWTH: Final = 4 << 10
"""KiB that a process may have more: caches, and what the allocator keeps."""

HEAD: Final = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \w+ +\[[^]]+\] |\t"

SAYS: Final = """
    import bghost

    class Settings(bghost.Settings):
        word: str = ""

    class Kind:
        Settings = Settings

        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("word {}", worker.settings.word)
            try:
                worker.check_interrupts()
            except bghost.Canceled:
                worker.log.info("canceled")
            return 0.01
"""

pytestmark = pytest.mark.timeout(1800 if SOAK else 120)


class Often:
    """A host and two workers that log all the time, and what these three processes have."""

    def __init__(self, start: StartHost, log: Path) -> None:
        self.log = log
        self.host: Host = start(kinds={"says": SAYS}, args=["run"], config=self.config("w0"))
        self.host.client.wait("says")
        self.pids = [self.host.pid, *(pid_in(row) for row in self.host.client.ps())]

    def config(self, word: str) -> str:
        return f"[host.log]\nfile = '{self.log}'\n[kind.says]\nword = '{word}'\n[[worker]]\nkind = 'says'\ncount = 2\n"

    def write(self, text: str) -> None:
        """A new config, in the place of the old one at once."""
        new = self.host.sandbox.root / "new"
        new.write_text(text)
        new.rename(self.host.sandbox.config_file)

    def both_say(self, text: str) -> bool:
        """Whether both workers have logged it, in the file that is the log now."""
        now = self.log.read_text()
        return all(f"[says.{number}] {text}\n" in now for number in (1, 2))

    def counts(self) -> list[int]:
        """Descriptors and threads of each."""
        return [len(os.listdir(f"/proc/{pid}/{what}")) for pid in self.pids for what in ("fd", "task")]

    def memory(self) -> list[int]:
        """KiB of each."""
        texts = (Path(f"/proc/{pid}/status").read_text() for pid in self.pids)
        return [int(text.partition("VmRSS:")[2].split()[0]) for text in texts]

    def check_after(self, work: Callable[[], None]) -> None:
        """Have it do *work*; then the processes are the same, and have no more than before."""
        host = self.host
        host.client.reload(wait=True)
        counts, memory = self.counts(), self.memory()
        work()
        host.client.reload(wait=True, timeout=60 * SLOW)
        # No more: the connection of the first reload may have been open still when they were counted.
        until(lambda: all(map(int.__le__, self.counts(), counts)), what="descriptors and threads as before")
        grown = [after - before for before, after in zip(memory, self.memory(), strict=True)]
        print(f"descriptors and threads {counts} as before; memory {grown} KiB more")
        assert max(grown) < GROWTH
        assert self.pids == [host.pid, *(row["pid"] for row in host.client.ps())]
        text = self.log.read_text()
        assert all(re.match(HEAD, line) for line in text.splitlines())
        assert "Traceback" not in text and "bug of bghost" not in text
        assert host.client.status()["log_lost"] == 0


@pytest.fixture
def often(bghost_host: StartHost, tmp_path: Path) -> Often:
    directory = tmp_path / "log"
    directory.mkdir(0o700)
    return Often(bghost_host, directory / "bghost.log")


def test_many_hups(often: Often) -> None:
    """Each opens the log anew, wherever the old one has gone; the last one reads the last config."""

    def hup() -> None:
        often.log.rename(f"{often.log}.old")
        often.host.signal(signal.SIGHUP)
        until(often.log.exists)

    def work() -> None:
        for _ in range(10_000 if SOAK else 80):
            hup()

    for _ in range(5):
        hup()
    often.check_after(work)
    often.write(often.config("last"))
    hup()
    until(lambda: often.both_say("word last"))


HOSTS: Final = (S.SIGHUP, S.SIGUSR1, S.SIGUSR2, S.SIGCHLD, S.SIGPIPE, S.SIGWINCH, S.SIGCONT, S.SIGURG)
WORKERS: Final = (S.SIGHUP, S.SIGUSR1, S.SIGINT, S.SIGCHLD, S.SIGPIPE, S.SIGWINCH, S.SIGCONT, S.SIGSTOP)


def test_many_signals(often: Often) -> None:
    """Of all sorts but those that end, to host and workers, with good configs and bad ones: the last good one holds."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    def work() -> None:
        for number in range(10_000 if SOAK else 400):
            pid = chance.choice(often.pids)
            which = chance.choice(HOSTS if pid == often.host.pid else WORKERS)
            os.kill(pid, which)
            if which == S.SIGSTOP:
                os.kill(pid, S.SIGCONT)
            if number % 50 == 0:
                config = often.config(f"w{number}")
                often.write(config if number % 100 else config + "nonsense = ")
            if number % 5 == 0:
                often.host.client.ps()  # some of them are to be taken up one by one
        often.write(often.config("last"))
        often.host.client.reload(timeout=60 * SLOW)
        often.write("nonsense = ")
        with contextlib.suppress(BghostError):
            often.host.client.reload(timeout=60 * SLOW)
        assert "no TOML" in often.host.client.status()["config_error"]
        until(lambda: often.both_say("word last"))
        often.write(often.config("last"))

    often.check_after(work)

"""The log: whole lines from many processes, a file that is rotated, what workers print, and no reader waited for."""

import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from support import BGHOST, SLOW, Sandbox, StartHost, until

from bghost.commands.logs import last_records, worker_of
from bghost.shared.errors import ConfigError, HostError
from bghost.shared.sink import Sink, open_file, parts

HEAD: Final = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \w+ +\[[^]]+\] "

SAYS: Final = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            worker.log.info("ticked")
            return bghost.UNTIL_WOKEN
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a log file can be."""
    directory = tmp_path / "log"
    directory.mkdir(0o700)
    return directory / "bghost.log"


def config(log: Path, *more: str, worker: str = "[[worker]]\nkind = 'says'\n") -> str:
    return "\n".join(["[host.log]", f"file = '{log}'", *more, "", worker])


WRITER: Final = """
    import os, sys
    from bghost.shared import logs
    from loguru import logger
    logs.configure(file=sys.argv[1])
    for number in range(500):
        logger.info("{} {} {}", sys.argv[2], number, "x" * (20_000 if number % 10 == 0 else 200))
"""


def test_many_processes_write_whole_lines(log: Path) -> None:
    """Four of them, long records and short ones: each is there once, none is torn or mixed with another."""
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(WRITER), str(log), str(each)])
        for each in range(4)
    ]
    assert [writer.wait(60 * SLOW) for writer in writers] == [0] * 4
    found = [re.fullmatch(rf"{HEAD}(\d) (\d+) x+", line) for line in log.read_text().splitlines()]
    assert all(found)
    assert sorted((int(match[1]), int(match[2])) for match in found if match) == [
        (writer, number) for writer in range(4) for number in range(500)
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir(0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(path)], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


FILLS: Final = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            for number in range(600):
                worker.log.info("line {} {}", number, "x" * 300)
            return bghost.UNTIL_WOKEN
"""


def test_a_full_disk(bghost_host: StartHost, small_disk: Path) -> None:
    """Work goes on, what is lost is counted and told once there is room; no line is torn."""
    log = small_disk / "bghost.log"
    text = config(log, worker="[[worker]]\nkind = 'fills'\n")
    host = bghost_host(kinds={"fills": FILLS}, args=["run"], config=text)
    host.wait_row("fills", lambda row: row["ticks"] == 1)
    lost = host.client.status()["log_lost"]
    assert 300 < lost <= 602
    assert all(re.match(HEAD, line) for line in log.read_text().splitlines())
    os.truncate(log, 0)
    host.client.wake("fills")
    host.wait_row("fills", lambda row: row["ticks"] == 2)
    told = re.search(
        r"\[fills\] (\d+) log records could not be written and are lost: [Nn]o space left", log.read_text()
    )
    assert told is not None and 300 < int(told[1]) <= lost
    assert all(re.match(HEAD, line) for line in log.read_text().splitlines())


def test_a_reader_that_does_not_read(sandbox: Sandbox) -> None:
    """A terminal that was stopped: the host answers, starts and stops workers, and counts what is lost."""
    sandbox.kinds({"fills": FILLS.replace("600", "50"), "says": SAYS})
    near, far = pty.openpty()
    argv = [*BGHOST, "run", "fills", "says"]
    host = subprocess.Popen(
        argv,
        env=sandbox.env,
        cwd=sandbox.root,
        stdin=subprocess.DEVNULL,
        stdout=far,
        stderr=far,
        start_new_session=True,
    )
    os.close(far)
    try:
        sandbox.wait_answering()
        client = sandbox.client()
        until(lambda: client.ps("fills")[0]["ticks"] == 1, 30)
        for _ in range(2):
            client.restart("says")
        assert {row["state"] for row in client.ps()} == {"ready"}
        assert client.status()["log_lost"] > 0
        client.shutdown()
        assert host.wait(10 * SLOW) == 0
    finally:
        os.close(near)
        host.kill()
        host.wait()


def test_a_reader_that_is_gone(sandbox: Sandbox) -> None:
    """The host and its workers go on, and each lost line is counted."""
    sandbox.kinds({"says": SAYS})
    near, far = os.pipe()
    host = subprocess.Popen(
        [*BGHOST, "run", "says"], env=sandbox.env, cwd=sandbox.root, stdin=subprocess.DEVNULL, stdout=far, stderr=far
    )
    os.close(far)
    try:
        sandbox.wait_answering()
        client = sandbox.client()
        client.wait("says")
        os.close(near)
        for ticks in range(2, 5):
            client.wake("says")
            until(lambda ticks=ticks: client.ps("says")[0]["ticks"] == ticks)  # type: ignore[misc]
        assert client.status()["log_lost"] >= 3
        client.shutdown()
        assert host.wait(10 * SLOW) == 0
    finally:
        host.kill()
        host.wait()


def test_a_socket(sandbox: Sandbox) -> None:
    """As stderr is under some supervisors: lines come whole; its reader may be slow, or go, and work goes on."""
    sandbox.kinds({"says": SAYS})
    near, far = socket.socketpair()
    argv, fd = [*BGHOST, "run", "says"], far.fileno()
    host = subprocess.Popen(argv, env=sandbox.env, cwd=sandbox.root, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd)
    far.close()
    try:
        near.settimeout(10 * SLOW)
        text = b""
        while b"[says] ticked\n" not in text:
            text += near.recv(4096)
        assert all(re.match(HEAD, line) for line in text.decode().splitlines())
        client = sandbox.client()
        near.close()
        for ticks in range(2, 4):
            client.wake("says")
            until(lambda ticks=ticks: client.ps("says")[0]["ticks"] == ticks)  # type: ignore[misc]
        assert client.status()["log_lost"] >= 2
        client.shutdown()
        assert host.wait(10 * SLOW) == 0
    finally:
        near.close()
        host.kill()
        host.wait()


def test_a_hup_opens_the_file_anew(bghost_host: StartHost, log: Path) -> None:
    """Within a second host and workers are on the new one, whoever moved the old one away."""
    host = bghost_host(kinds={"says": SAYS}, args=["run"], config=config(log))
    host.client.wait("says")
    assert log.stat().st_mode & 0o777 == 0o600
    log.rename(log.with_suffix(".old"))
    host.signal(signal.SIGHUP)
    until(log.exists)
    host.client.wake("says")
    until(lambda: "[says] ticked" in log.read_text())
    assert "[says] started" in log.with_suffix(".old").read_text()
    os.unlink(log)
    host.signal(signal.SIGHUP)
    until(log.exists)
    host.client.wake("says")
    until(lambda: "[says] ticked" in log.read_text())
    ticks = log.read_text().count("[says] ticked")
    directory = log.parent.rename(log.parent.with_suffix(".gone"))  # with its directory: it goes on in the old file
    host.signal(signal.SIGHUP)
    until(lambda: "No such file or directory; it goes where it went" in (directory / log.name).read_text())
    host.client.wake("says")
    until(lambda: (directory / log.name).read_text().count("[says] ticked") > ticks)
    log.parent.mkdir(0o700)
    host.signal(signal.SIGHUP)
    until(log.exists)


def test_a_reload_moves_the_log(bghost_host: StartHost, log: Path) -> None:
    """Another file, format and level are in force for host and workers; a file that cannot be is refused."""
    host = bghost_host(kinds={"says": SAYS}, args=["run"], config=config(log))
    host.client.wait("says")
    other = log.with_name("other.log")
    host.sandbox.config(config(other, "format = 'json'", "level = 'DEBUG'"))
    assert host.bghost("reload", "--wait").code == 0
    host.client.wake("says")
    until(lambda: other.exists() and '"ticked"' in other.read_text())
    assert host.client.status()["log"] == str(other)
    ticks = log.read_text().count("ticked")
    host.sandbox.config(config(log.with_name("none") / "x.log"))
    result = host.bghost("reload")
    assert result.code == 2 and "cannot be looked at" in result.stderr
    assert host.client.status()["log"] == str(other)
    assert log.read_text().count("ticked") == ticks


def test_it_is_rotated_by_size(bghost_host: StartHost, log: Path) -> None:
    """By the host alone; as many old ones stay as are to be kept, and no line is lost on the way."""
    kind = """
        import bghost

        class Kind:
            number = 0

            @bghost.hookimpl
            def bghost_tick(self, worker):
                worker.log.info("line {} {}", self.number, "x" * 100)
                self.number += 1
                return 0.002
    """
    text = config(log, "rotate_size = '16KiB'", "keep = 100", worker="[[worker]]\nkind = 'many'\ncount = 2\n")
    host = bghost_host(kinds={"many": kind}, args=["run"], config=text)
    until(lambda: os.path.exists(f"{log}.3"), 20)
    for name in ("many.1", "many.2"):
        host.wait_row(name, lambda row: row["ticks"] > 100)
    assert host.client.shutdown()["killed"] == []
    names = [log, *(Path(f"{log}.{number}") for number in range(1, 100))]
    lines = [line for name in names if name.exists() for line in name.read_text().splitlines()]
    for worker in ("many.1", "many.2"):
        numbers = sorted(int(match[1]) for line in lines if (match := re.search(rf"\[{worker}\] line (\d+) x+$", line)))
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > 100


@pytest.mark.parametrize(
    "record",
    [
        "{:%Y-%m-%d %H:%M:%S}.000 INFO    [host] begins\n",
        '{{"time": "{:%Y-%m-%dT%H:%M:%S}.000", "message": "begins"}}\n',
    ],
)
def test_it_is_rotated_by_age(bghost_host: StartHost, log: Path, record: str) -> None:
    """By the age of its first record, which an earlier host may have written; the new one is left alone."""
    first = record.format(datetime.now() - timedelta(hours=2))
    log.write_text(first)
    log.chmod(0o600)
    host = bghost_host(kinds={"says": SAYS}, args=["run"], config=config(log, "rotate_age = '1h'"))
    until(lambda: log.with_name("bghost.log.1").exists())
    assert log.with_name("bghost.log.1").read_text().startswith(first)
    host.client.wake("says")
    until(lambda: "[says] ticked" in log.read_text())
    assert first not in log.read_text() and not log.with_name("bghost.log.2").exists()


def test_json_lines(bghost_host: StartHost, log: Path) -> None:
    """One object a line, with the same fields for all; an error has its type and its traceback."""
    kind = """
        import bghost

        class Kind:
            @bghost.hookimpl
            def bghost_tick(self, worker):
                print("printed \\x1b[2J")
                raise ValueError("a\\nb" + "x" * 100_000)
    """
    worker = "[[worker]]\nkind = 'fails'\n"
    host = bghost_host(kinds={"fails": kind}, args=["run"], config=config(log, "format = 'json'", worker=worker))
    until(lambda: '"traceback"' in log.read_text())
    host.client.shutdown()
    data = log.read_bytes()
    assert data.isascii()
    records = [json.loads(line) for line in data.splitlines()]
    for record in records:
        assert {"time", "level", "worker", "message"} <= record.keys() <= {
            "time", "level", "worker", "message", "error", "traceback", "lines",
        }  # fmt: skip
    assert {each["message"] for each in records if each["message"].startswith("printed")} == {"printed \x1b[2J"}
    (error,) = [each for each in records if "error" in each][:1]
    assert (error["error"], error["worker"]) == ("ValueError", "fails")
    assert max(map(len, data.splitlines())) < 1 << 16


PRINTS: Final = """
    import os, subprocess, sys
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            print("by print")
            print("to stderr", file=sys.stderr)
            os.write(2, b"from C\\n\\xff\\x1b[1m no text\\n")
            subprocess.run(["sh", "-c", "echo a child; (echo a grandchild >&2)"])
            os.write(1, b"y" * 200_000 + b"\\nafter\\n")
            os.write(1, b"not ended")
            sys.exit()
"""


def test_what_workers_print(bghost_host: StartHost, log: Path) -> None:
    """By print, from C, from what they start: a record each, by name; long lines are cut, and the last needs no end."""
    worker = "[[worker]]\nkind = 'prints'\n"
    host = bghost_host(kinds={"prints": PRINTS}, args=["run"], config=config(log, worker=worker))
    host.client.wait("prints", until="stopped")
    found = re.findall(r"INFO +\[prints\] (.*)", log.read_text())
    said = [text for text in found if not text.startswith(("started", "done"))]
    cut = said.pop(6)
    assert said == [
        "by print", "to stderr", "from C", r"\xff\x1b[1m no text", "a child", "a grandchild", "after", "not ended",
    ]  # fmt: skip
    assert set(cut.removesuffix(" ...")) == {"y"} and 60_000 < len(cut) < 1 << 16
    assert host.text("stdout") == ""


def test_a_worker_that_floods(bghost_host: StartHost, log: Path) -> None:
    """Does not keep the host from answering; it waits itself, till the host has taken what it wrote."""
    flood = 'args = { command = ["sh", "-c", "yes flooding"] }'
    host = bghost_host(args=["run"], config=config(log, worker=f"[[worker]]\nkind = 'exec'\nname = 'flood'\n{flood}\n"))
    until(lambda: log.stat().st_size > 1 << 20)
    for _ in range(5):
        host.client.ps()
    assert host.client.stop("flood")["stopped"] == ["flood"]


def test_a_program_is_ready_when_it_says_so(bghost_host: StartHost) -> None:
    """By a literal in what it prints."""
    script = "echo not yet; read line < $FIFO; echo it is READY now; exec sleep 600"
    host = bghost_host(args=["run"], config="[host]\nkinds = ['exec']\n")
    fifo = host.sandbox.root / "fifo"
    os.mkfifo(fifo)
    args = {"command": ["sh", "-c", script], "env": {"FIFO": str(fifo)}, "ready_output": "is READY"}
    host.client.request("launch", spec={"kind": "exec", "name": "web", "args": args})
    host.wait_line(r"\[web\] not yet")
    assert host.row("web")["state"] == "starting"
    fifo.write_text("go\n")
    assert host.client.wait("web")[0]["state"] == "ready"
    with pytest.raises(Exception, match="ready_output"):
        host.client.request("launch", spec={"kind": "exec", "args": {**args, "ready_output": "x" * 201}})


def test_a_log_that_cannot_be(sandbox: Sandbox, tmp_path: Path, log: Path) -> None:
    """A directory that others can write in, a symlink, a fifo, a relative path: refused at the start, with why."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (log.parent / "link").symlink_to("/etc/passwd")
    os.mkfifo(log.parent / "fifo")
    for path, why in (
        (tmp_path / "open/log", "is open to others"),
        (log.parent / "link", "it is a symlink"),
        (log.parent / "fifo", "No such device|is no file"),
        (log.parent / "none/log", "cannot be looked at"),
        ("bghost.log", "absolute path"),
    ):
        sandbox.config(config(Path(path), worker="[[worker]]\nkind = 'exec'\nargs = { command = ['true'] }\n"))
        result = sandbox.bghost("run")
        assert result.code == 2 and re.search(why, result.stderr), result


def test_bghost_logs(bghost_host: StartHost, log: Path) -> None:
    """Shows the last records, of all or of some workers, from rotated files too, and follows into a new file."""
    worker = "[[worker]]\nkind = 'says'\ncount = 3\n"
    host = bghost_host(kinds={"says": SAYS}, args=["run"], config=config(log, worker=worker))
    host.client.wait("says")
    until(lambda: log.read_text().count("ticked") == 3)
    log.rename(f"{log}.1")
    host.signal(signal.SIGHUP)
    until(log.exists)
    follower = host.sandbox.start("logs", "-f", "-n", "1000", "says.2")
    until(lambda: _waits_in_read(follower.pid))
    host.client.wake("says")
    follower.wait_line(r"\[says.2\] ticked")
    log.rename(f"{log}.2")
    os.replace(f"{log}.1", f"{log}.3")
    os.replace(f"{log}.2", f"{log}.1")
    os.replace(f"{log}.3", f"{log}.2")
    host.signal(signal.SIGHUP)
    until(log.exists)
    host.client.wake("says")
    until(lambda: "[says.2] ticked" in log.read_text())  # a reload wakes it, too: how often it has ticked is not known

    def all_shown() -> bool:
        logged = "".join(Path(name).read_text() for name in (log, f"{log}.1", f"{log}.2"))
        return follower.text("stdout").count("ticked") == logged.count("[says.2] ticked")

    until(all_shown)
    follower.signal(signal.SIGINT)
    assert follower.wait() == 130
    assert "says.1" not in follower.text("stdout")
    shown = host.bghost("logs", "says.[12]").stdout.splitlines()
    assert sum("ticked" in line for line in shown) >= 6
    assert host.bghost("logs", "-n", "1", "says").stdout.count("\n") == 0  # the last newline is not in a Result's text
    assert "runs, pid" in host.bghost("logs", "host").stdout
    assert host.bghost("shutdown").code == 0
    assert "ends" in host.bghost("logs", "-n", "1").stdout


def _waits_in_read(pid: int) -> bool:
    """Whether a process sleeps in a read: of its inotify descriptor, where it reads nothing else."""
    try:
        opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return "anon_inode:inotify" in opened and state == "S"


def test_bghost_logs_without_a_file(bghost_host: StartHost, sandbox: Sandbox) -> None:
    """Says where the log goes instead, and how to have it in a file."""
    host = bghost_host(kinds={"says": SAYS}, args=["run", "says"])
    result = host.bghost("logs")
    assert result.code == 1
    assert re.search(r"goes to the stderr of the host \(pid \d+\), which is pipe:.*\[host.log\]", result.stderr)
    assert "no log file" in sandbox.bghost("logs").stderr


def test_the_last_records_of_files(log: Path) -> None:
    """Lines that belong to a record come with it; a file without end, an empty one, and one that is not there."""
    with pytest.raises(HostError, match="there is no log"):
        last_records(str(log), 5, lambda line: True)
    log.write_text("")
    assert last_records(str(log), 5, lambda line: True) == []
    Path(f"{log}.1").write_bytes(
        b"".join(b"2026-01-01 00:00:00.000 INFO    [w%d] n\n\tmore\n" % each for each in range(9000))
    )
    found = last_records(str(log), 9001, lambda line: worker_of(line) == "w7")
    assert found == [b"2026-01-01 00:00:00.000 INFO    [w7] n\n\tmore\n"]
    assert len(last_records(str(log), 10**6, lambda line: True)) == 9000


def test_records_are_cut_at_lines() -> None:
    """What a pipe does not take whole goes in pieces of whole lines."""
    record = b"".join(b"%d" % each * 50 + b"\n" for each in range(9))
    pieces = list(parts(record, 120))
    assert b"".join(pieces) == record and all(len(piece) <= 120 and piece.endswith(b"\n") for piece in pieces)
    assert list(parts(b"x" * 200 + b"\n", 100)) == [b"x" * 95 + b" ...\n"]


def test_the_descriptor_of_a_file(log: Path) -> None:
    """Appends, is not inherited by programs, and its file is not others'."""
    fd = open_file(str(log))
    try:
        assert not os.get_inheritable(fd)
        assert log.stat().st_mode & 0o777 == 0o600
    finally:
        os.close(fd)
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_file(str(log.parent))


def test_a_limit_of_file_sizes(log: Path) -> None:
    """What does not fit is lost and told, in whole lines, as with a full disk."""
    sink = Sink(str(log), lambda count, reason: b"%d lost: %s\n" % (count, reason.encode()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        for _ in range(20):
            sink.write(b"x" * 98 + b"\n")  # ten, and a tenth of one more
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (sink.lost, sink.behind) == (10, True)
    sink.flush()
    assert log.read_bytes().splitlines() == [b"x" * 98] * 10 + [b"10 lost: no space left for all of it"]
    assert not sink.behind

"""What cannot be is said in one line that tells what, where and how to mend it, with the exit code of its sort."""

import os
import re
import shutil
from pathlib import Path

import pytest
from support import Result, Sandbox

QUICK = ("--set", "worker_spi.total_workers=1")


def complaint(result: Result) -> str:
    """The one line of the error (that bghost runs as root is a warning, and no part of it)."""
    [line] = [line for line in result.stderr.splitlines() if " WARNING " not in line]
    assert result.stdout == ""
    return line


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["run", "worker_sp"], 5, r"there is no kind 'worker_sp' \(did you mean worker_spi"),
        (["run", "worker_spi", "--set", "worker_spi.naptime=0"], 2, r"worker_spi\.naptime = 0 .*> 0"),
        (["run", "worker_spi", "--set", "worker_spi.naptime=soon"], 2, r'worker_spi\.naptime = "soon" .*float'),
        (["run", "worker_spi", "--set", "worker_spi.naptme=1"], 2, r"'naptme' .*did you mean naptime\?"),
        (
            ["run", "worker_spi", "--set", "worker_spi.total_workers=101"],
            2,
            r"worker_spi\.total_workers = 101 .*<= 100",
        ),
        (["run", "worker_spi", "--set", "naptime=1"], 2, r"naptime=1"),
        (
            ["run", "worker_spi", "--set", "postgres.dsn=host=localhost nonsense"],
            2,
            r"postgres.*dsn is not a connection string: ",
        ),
        (["ps"], 3, r"no host .*default"),
        (["stop", "worker_spi"], 3, r"no host .*default"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be(sandbox: Sandbox, args: list[str], code: int, expected: str) -> None:
    """Unknown kinds, settings that are not allowed, a dsn that does not parse, a host that is not there."""
    result = sandbox.bghost(*args)
    assert result.code == code, result
    assert re.search(expected, complaint(result)), result.stderr


def test_runtime_directory_that_is_a_symlink(sandbox: Sandbox) -> None:
    """A runtime directory that somebody else may have put there is refused, with its path and the reason."""
    link = Path(sandbox.env["BGHOST_RUNTIME_DIR"]) / "link"  # that is a short path, as a socket's has to be
    link.symlink_to(sandbox.root)
    result = sandbox.bghost("run", "worker_spi", *QUICK, env={"BGHOST_RUNTIME_DIR": str(link)})
    assert result.code == 1
    assert f"{link} is a symlink" in complaint(result)


def test_runtime_directory_of_somebody_else(sandbox: Sandbox) -> None:
    """A runtime directory of another user is refused, with its path and the reason."""
    if os.geteuid() == 0:
        directory = Path(sandbox.env["BGHOST_RUNTIME_DIR"]) / "theirs"
        directory.mkdir()
        os.chown(directory, 65534, 65534)
        expected = f"{directory} belongs to user 65534"
    else:
        directory, expected = Path("/"), "/default cannot be made: Permission denied"
    result = sandbox.bghost("run", "worker_spi", *QUICK, env={"BGHOST_RUNTIME_DIR": str(directory)})
    assert result.code == 1
    assert expected in complaint(result)


def test_second_host_of_an_instance(newcomer: Sandbox) -> None:
    """A second host of an instance is refused; the error names the first one's pid, and since when it runs."""
    host = newcomer.start_host("run", "worker_spi_feed")
    host.wait_answering()
    result = newcomer.bghost("run", "worker_spi_feed")
    assert result.code == 1
    assert re.search(rf"\b{host.pid}\b.*since \d", complaint(result)), result.stderr
    assert host.alive


def test_without_home_or_runtime_directory(newcomer: Sandbox) -> None:
    """Without HOME, XDG_RUNTIME_DIR and a terminal bghost works all the same, and no library complains."""
    name = f"test{os.getpid()}"
    data = newcomer.root / "data"
    newcomer.env = {key: newcomer.env[key] for key in ("PATH", "BGHOST_TEST_RUN")}
    newcomer.env |= {"BGHOST_INSTANCE": name, "BGHOST_DATA_DIR": str(data)}
    runtime = Path(newcomer.directories.runtime)  # of this test alone, but beside those of the user's own hosts
    try:
        host = newcomer.start_host("run", "worker_spi", "worker_spi_feed", "--set", "worker_spi.naptime=0.5")
        host.wait_line(r"worker_spi worker 1: count in schema1\.counted is now \d+$", timeout=20)
        assert newcomer.bghost("shutdown").code == 0
        assert host.wait() == 0
        assert not re.search("Warning:|Traceback", host.text())
    finally:
        shutil.rmtree(runtime)

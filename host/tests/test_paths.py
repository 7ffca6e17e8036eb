"""Where an instance keeps its things, and which directories are refused."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bghost.shared.errors import HostError, UsageError
from bghost.shared.paths import SOCKET_LIMIT, directories, prepare, private

US = os.geteuid()
STRANGER = 54321  # the uid of nobody on this machine

as_root = pytest.mark.skipif(US != 0, reason="only root can give a directory away")


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="bghost-") as path:
        yield Path(path)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def euid(uid: int) -> Iterator[None]:
    before = os.geteuid()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_each_directory_can_be_named(short: Path) -> None:
    """BGHOST_*_DIR name the directories; each instance has its own in them, and all share the one of the config."""
    names = ("RUNTIME", "STATE", "DATA", "CONFIG")
    found = directories("blue", {f"BGHOST_{name}_DIR": str(short / name) for name in names})
    assert found.runtime == str(short / "RUNTIME" / "blue")
    assert found.state == str(short / "STATE" / "blue")
    assert found.data == str(short / "DATA" / "blue")
    assert found.config == str(short / "CONFIG")
    assert os.path.dirname(found.socket) == os.path.dirname(found.lock) == found.runtime


@as_root
def test_a_user_without_a_home_needs_none_until_something_is_kept_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor the user database knows one: there is no config file, and the error names what to set."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    before = os.getresuid()
    os.setresuid(STRANGER, STRANGER, 0)
    try:
        found = directories(environ={})
        assert found.config is None
        for name in ("state", "data"):
            with pytest.raises(HostError) as refused:
                getattr(found, name)
            assert str(refused.value) == (
                f"user {STRANGER} has no home directory (set HOME or BGHOST_{name.upper()}_DIR)"
            )
    finally:
        os.setresuid(*before)


def test_a_relative_directory_is_meant_from_here() -> None:
    assert directories(environ={"BGHOST_RUNTIME_DIR": "here"}).base == os.path.abspath("here")


def test_the_instance_is_default_unless_the_environment_or_the_caller_names_one() -> None:
    assert directories(environ={}).instance == "default"
    assert directories(environ={"BGHOST_INSTANCE": ""}).instance == "default"
    assert directories(environ={"BGHOST_INSTANCE": "blue"}).instance == "blue"
    assert directories("a-b.c", {"BGHOST_INSTANCE": "blue"}).instance == "a-b.c"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".", "..", "1st", "a\n", "é", "x" * 64, "a..b"])
def test_an_instance_that_is_no_plain_word_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for"):
        directories(name, {})


def test_the_session_has_the_runtime_directory(short: Path) -> None:
    """Without BGHOST_RUNTIME_DIR it is in XDG_RUNTIME_DIR."""
    assert directories(environ={"XDG_RUNTIME_DIR": str(short)}).runtime == str(short / "bghost" / "default")


@pytest.mark.skipif(os.path.lexists(f"/run/user/{US}"), reason="this user has a session")
@pytest.mark.parametrize("environ", [{}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "/nowhere/at/all"}])
def test_without_a_session_it_is_in_tmp(environ: dict[str, str]) -> None:
    assert directories(environ=environ).runtime == f"/tmp/bghost-{US}/default"


def test_a_session_directory_that_is_not_safe_is_refused(short: Path) -> None:
    """XDG_RUNTIME_DIR that is a symlink or can be written to by others: the error has path, reason and cure."""
    (short / "real").mkdir(0o700)
    (short / "link").symlink_to(short / "real")
    (short / "open").mkdir()
    (short / "open").chmod(0o777)
    for name, why in (("link", "is a symlink"), ("link/", "is a symlink"), ("open", "is open to others, mode 0777")):
        with pytest.raises(HostError) as refused:
            _ = directories(environ={"XDG_RUNTIME_DIR": f"{short}/{name}"}).runtime
        assert refused.value.message == f"XDG_RUNTIME_DIR {short}/{name.rstrip('/')} {why}"
        assert refused.value.hint == "unset it, or set BGHOST_RUNTIME_DIR"


@as_root
def test_somebody_elses_session_directory_is_refused(short: Path) -> None:
    os.chown(short, STRANGER, -1)
    with pytest.raises(HostError, match=f"belongs to user {STRANGER}, and we are user {US}"):
        _ = directories(environ={"XDG_RUNTIME_DIR": str(short)}).runtime


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_what_is_made_is_ours_alone_under_any_umask(short: Path, mask: int) -> None:
    """All that is missing is made with mode 0700, also above the runtime directory, and the umask stays what it was."""
    with umask(mask):
        prepare(directories(environ={"BGHOST_RUNTIME_DIR": str(short / "a" / "b")}))
        assert os.umask(mask) == mask
    assert [mode(short / part) for part in ("a", "a/b", "a/b/default")] == [0o700] * 3


def test_preparing_twice_changes_nothing(short: Path) -> None:
    found = directories(environ={"BGHOST_RUNTIME_DIR": str(short / "run")})
    prepare(found)
    Path(found.lock).write_text("x")
    prepare(found)
    assert Path(found.lock).read_text() == "x"


def refuse(base: Path) -> HostError:
    with pytest.raises(HostError) as refused:
        prepare(directories(environ={"BGHOST_RUNTIME_DIR": str(base)}))
    assert "BGHOST_RUNTIME_DIR" in refused.value.hint
    return refused.value


@pytest.mark.parametrize("part", ["run", "run/default"])
def test_a_symlink_is_refused(short: Path, part: str) -> None:
    """Neither the runtime directory nor what it lies in may be a symlink, wherever it leads."""
    (short / "real").mkdir(0o700)
    (short / part).parent.mkdir(0o700, exist_ok=True)
    (short / part).symlink_to(short / "real")
    assert refuse(short / "run").message == f"the directory {short / part} is a symlink"
    (short / "real").rmdir()
    assert refuse(short / "run").message == f"the directory {short / part} is a symlink"


@as_root
@pytest.mark.parametrize("part", ["run", "run/default"])
def test_somebody_elses_directory_is_refused(short: Path, part: str) -> None:
    (short / "run" / "default").mkdir(0o700, parents=True)
    (short / "run").chmod(0o700)
    os.chown(short / part, STRANGER, -1)
    assert refuse(short / "run").message == (
        f"the directory {short / part} belongs to user {STRANGER}, and we are user {US}"
    )


def test_a_runtime_directory_that_others_may_enter_is_refused(short: Path) -> None:
    (short / "run" / "default").mkdir(parents=True)
    (short / "run").chmod(0o700)
    (short / "run" / "default").chmod(0o750)
    assert refuse(short / "run").message == f"the directory {short / 'run/default'} is open to others, mode 0750"


def test_what_it_lies_in_may_be_looked_at_but_not_changed(short: Path) -> None:
    """systemd makes a RuntimeDirectory= with 0755, which will do; one that others can write to will not."""
    base = short / "run"
    base.mkdir()
    base.chmod(0o755)
    prepare(directories(environ={"BGHOST_RUNTIME_DIR": str(base)}))
    assert mode(base / "default") == 0o700
    base.chmod(0o775)
    assert refuse(base).message == f"the directory {base} is open to others, mode 0775"


def test_a_file_in_its_place_is_refused(short: Path) -> None:
    (short / "run").write_text("")
    assert refuse(short / "run").message == f"the directory {short / 'run'} is no directory"
    (short / "file").write_text("")
    assert (
        refuse(short / "file" / "run").message == f"the directory {short / 'file/run'} cannot be made: Not a directory"
    )


@as_root
def test_the_fallback_in_tmp_must_be_ours() -> None:
    """/tmp/bghost-UID that somebody else made, or that is a symlink, is refused, and is not touched."""
    path = f"/tmp/bghost-{STRANGER}"
    os.mkdir(path, 0o755)  # root's, and we are somebody else below
    try:
        with euid(STRANGER), pytest.raises(HostError, match=f"{path} belongs to user 0, and we are user {STRANGER}"):
            prepare(directories(environ={}))
        os.chown(path, STRANGER, -1)
        with euid(STRANGER), pytest.raises(HostError, match=f"{path} is open to others, mode 0755"):
            prepare(directories(environ={}))
        assert os.listdir(path) == []
    finally:
        os.rmdir(path)
    os.symlink("/var/tmp", path)
    try:
        with euid(STRANGER), pytest.raises(HostError, match=f"{path} is a symlink"):
            prepare(directories(environ={}))
    finally:
        os.unlink(path)


def test_a_path_that_is_too_long_for_a_socket_is_refused(short: Path) -> None:
    """The longest that the kernel takes is taken; one byte more is refused before anything is made."""
    room = SOCKET_LIMIT - len(f"{short}//default/control.sock")
    prepare(directories(environ={"BGHOST_RUNTIME_DIR": str(short / ("x" * room))}))
    longer = short / ("y" * (room + 1))
    error = refuse(longer)
    assert error.message == f"the control socket's path {longer}/default/control.sock is too long"
    assert error.detail == "108 bytes, the most is 107"
    assert not longer.exists()


def test_a_directory_that_cannot_be_made_names_the_variable_to_set(short: Path) -> None:
    (short / "file").write_text("")
    with pytest.raises(HostError) as refused:
        private(f"{short}/file/state", variable="BGHOST_STATE_DIR")
    assert refused.value.hint == "set BGHOST_STATE_DIR"

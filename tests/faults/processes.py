"""What /proc tells of processes: those of a host, and whether they live."""

from pathlib import Path

from support import until


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def title(pid: int) -> str:
    """Its command line; empty if there is none any more."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def state(pid: int) -> str:
    """One letter; empty if there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def lives(pid: int) -> bool:
    """Whether it has not ended; what is a zombie has."""
    return state(pid) not in ("", "Z", "X")


def guard_of(pid: int) -> int:
    """The pid of the guard of the host *pid*, once there is one."""
    return until(lambda: next((child for child in children(pid) if title(child).startswith("bghost: guard")), 0))

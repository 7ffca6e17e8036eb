"""What is known of a process that has ended: how, in the middle of what, what speaks for which cause, what follows."""

import os
import resource
import signal
import time
from typing import TYPE_CHECKING, Final

from bghost.host import policy
from bghost.host.policy import Decision, Event, Exit
from bghost.shared import table as t
from bghost.shared.replies import Ended
from bghost.shared.spec import WorkerSpec

if TYPE_CHECKING:
    from bghost.host.workers import Registration

_CRASHES: Final = {
    signal.SIGSEGV: "memory that is not its own was touched: a mistake in C code, of a library or of ctypes",
    signal.SIGBUS: "a mapped file has become shorter, or C code made a mistake",
    signal.SIGILL: "an instruction that this processor does not know: a library built for another one",
    signal.SIGFPE: "C code divided by zero",
    signal.SIGABRT: "C code gave up: an assertion, a damaged heap, or Python's own fatal error",
    signal.SIGSYS: "a system call that a seccomp filter forbids",
    signal.SIGXFSZ: "RLIMIT_FSIZE: a file grew larger than it may",
}


def oom_kills() -> int | None:
    """How many processes the kernel has killed in this process's cgroup for want of memory; ``None``: not to be had."""
    try:
        with open("/proc/self/cgroup") as file:
            entries = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return None
    for _, controllers, path in entries:
        if not controllers:
            found = _count(f"/sys/fs/cgroup{path}/memory.events")
        elif "memory" in controllers.split(","):
            found = _count(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
        else:
            continue
        if found is not None:
            return found
    return None


def _count(path: str) -> int | None:
    try:
        with open(path) as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


def core_dumped(pid: int) -> bool:
    """Whether a child that has ended, and is not reaped, has left a core."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return result is not None and result.si_code == os.CLD_DUMPED


def evidence(worker: "Registration", exit: Exit, core: bool, oom: int | None) -> list[str]:
    """What speaks for which cause, one sentence each, the strongest first.

    :param oom: how many the kernel has killed for want of memory since this process was started.
    """
    found = []
    if worker.stop_asked:
        found.append("a stop was asked for through bghost")
    if worker.recycled:
        found.append("it was ended because another worker had crashed (on_crash = restart-all)")
    if worker.stuck:
        found.append(f"a tick took longer than tick_timeout, {worker.spec.tick_timeout:g} s; bghost stopped it")
    if worker.late:
        found.append(f"bghost_setup took longer than ready_timeout, {worker.spec.ready_timeout:g} s; bghost killed it")
    elif worker.killed:
        found.append("it did not stop in its time, and bghost killed it")
    if exit.overdue:
        found.append("its cleanup took longer than stop_timeout, and it ended itself")
    if exit.gave_up:
        found.append("a hook raised GiveUp: there is no use in trying again")
    if exit.terminated:
        found.append("a SIGTERM that bghost did not send has stopped it")
    if exit.status < 0:
        found += _of_signal(worker, -exit.status, exit, oom)
    elif not exit.orderly and not (worker.stop_asked or worker.stuck or worker.recycled):
        found.append("the process ended without bghost's way out: os._exit, or exit() in C code; no cleanup ran")
    if core:
        found.append("a core was dumped; see core(5) for where")
    if "MemoryError" in worker.last_error:
        found.append(f"memory ran out; RLIMIT_AS is {_limit(resource.RLIMIT_AS)}")
    return found


def _of_signal(worker: "Registration", number: int, exit: Exit, oom: int | None) -> list[str]:
    if number == signal.SIGKILL:
        if worker.killed or worker.late or worker.recycled or worker.stuck:
            return []
        if oom:
            return [f"the kernel has killed {oom} of this cgroup for want of memory while it ran: most likely this one"]
        if oom is None:
            return ["bghost has not sent that SIGKILL; the kernel's log tells whether memory ran out"]
        return ["bghost has not sent that SIGKILL, and no process of this cgroup was killed for want of memory"]
    if number == signal.SIGXCPU:
        return [f"RLIMIT_CPU, {_limit(resource.RLIMIT_CPU)} s, is used up"]
    if number in _CRASHES:
        return [_CRASHES[signal.Signals(number)]]
    if exit.overdue or worker.stop_asked or worker.stuck or worker.recycled:
        return []
    return ["bghost has not sent that signal"]


def _limit(which: int) -> str:
    soft = resource.getrlimit(which)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def decision_text(spec: WorkerSpec, decision: Decision, exit: Exit) -> str:
    """What was decided, and by which rule."""
    if decision.event is Event.DONE:
        return f"done: it ended with 0, and restart is {spec.restart}"
    if decision.event is Event.STOPPED:
        return "stopped, until it is started again"
    if decision.event is Event.RETRY:
        runs = f"unhealthy run {decision.unhealthy} of {policy.UNHEALTHY_LIMIT}, " if decision.unhealthy else ""
        return f"{runs}started again after {decision.delay:.1f} s"
    if exit.gave_up:
        return "failed: it gave up"
    if spec.restart == "never":
        return "failed: restart is never"
    return f"failed: {decision.unhealthy} unhealthy runs in a row"


def recent(logged: str, printed: list[str]) -> list[str]:
    """The last lines of both, by their time, which each of them begins with."""
    lines = [line for line in logged.split("\n") if line]
    return sorted([*lines, *printed], key=lambda line: line[:23])


def describe(
    worker: "Registration", exit: Exit, decision: Decision, before: dict[str, object], core: bool, oom: int | None
) -> Ended:
    """All of it, of a process that has just ended.

    :param before: the worker's row as it was.
    """
    began = worker.slot.control[t.STARTED]
    return {
        "at": time.time(),
        "ran_for": (time.monotonic_ns() - began) / 1e9 if began else 0.0,
        "state": str(before["state"]),
        "doing": str(before["doing"] or "") or None,
        "activity": str(before["activity"] or "") or None,
        "wait": str(before["wait"] or "") or None,
        "exit": str(exit),
        "code": exit.status if exit.status >= 0 else None,
        "signal": exit.signal,
        "core_dumped": core,
        "orderly": exit.orderly,
        "last_error": worker.last_error or None,
        "evidence": evidence(worker, exit, core, oom),
        "decision": decision_text(worker.spec, decision, exit),
        "lines": recent(worker.slot.recent.read(), list(worker.output.recent) if worker.output is not None else []),
        "dump": worker.dump or None,
    }

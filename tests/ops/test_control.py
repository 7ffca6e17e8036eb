"""The control socket with many clients at once, of which some die in the middle."""

import contextlib
import os
import random
import re
import resource
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Final

from support import SLOW, StartHost, until
from wire import answer, ask, connected

from bghost import HostError, WorkerSpec
from bghost.shared.frames import encode

IDLE: Final = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            return bghost.UNTIL_WOKEN
"""


def test_fifty_clients_and_one_worker(bghost_host: StartHost) -> None:
    """They stop it and start it again, all at once: one process at a time, and one state that all of them see."""
    host = bghost_host(kinds={"idle": IDLE}, args=["run"], config="[[worker]]\nkind = 'idle'\n")
    host.client.wait("idle")
    failed: list[BaseException] = []
    begin = threading.Barrier(50)

    def client(number: int) -> None:
        chance = random.Random(number)
        begin.wait()
        try:
            for _ in range(3):
                act = chance.choice([host.client.stop, host.client.restart])
                act("idle", timeout=30 * SLOW)
        except BaseException as error:
            failed.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(50)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert not failed
    (row,) = host.client.restart("idle")
    steps = re.findall(r"\[idle\] (started|stopped|done|exit code)", host.text())
    assert steps[::2] == ["started"] * row["starts"]
    assert steps[1::2] == ["stopped"] * (row["starts"] - 1)
    assert host.client.stop("idle") == {"stopped": ["idle"], "killed": []}
    assert host.row("idle")["state"] == "stopped"


def test_clients_that_die(bghost_host: StartHost) -> None:
    """Where the request had come whole, it is done whole; of half a request nothing is."""
    host = bghost_host(kinds={"idle": IDLE}, args=["run"], config="[host]\nkinds = ['idle']\n")
    names = [f"w{number}" for number in range(20)]
    for name in names:
        with connected(host) as connection:
            ask(connection, "launch", spec={"kind": "idle", "name": name}, wait=True)
    until(lambda: {row["name"] for row in host.client.ps()} == set(names))
    host.client.wait(*names, timeout=20 * SLOW)
    with connected(host) as connection:
        connection.sendall(encode({"verb": "stop", "args": {"names": names}})[:-1])
    for name in names[:10]:
        with connected(host) as connection:
            ask(connection, "stop", names=[name])
    host.client.wait(*names[:10], until="stopped", timeout=20 * SLOW)
    states = {row["name"]: row["state"] for row in host.client.ps()}
    assert [states[name] for name in names] == ["stopped"] * 10 + ["ready"] * 10


def test_clients_that_wait(bghost_host: StartHost) -> None:
    """While they do, the host has nothing to do for them, and others are served; all are answered in the end."""
    host = bghost_host(kinds={"idle": IDLE}, args=["run", "idle"])
    host.client.wait("idle")
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connected(host)) for _ in range(50)]
        for connection in waiting:
            ask(connection, "wait", names=["idle"], **{"for": "stopped"})
        host.client.ps()

        def turns() -> int:
            with open(f"/proc/{host.pid}/status") as file:
                return int(file.read().partition("\nvoluntary_ctxt_switches:")[2].split()[0])

        def quiet() -> bool:
            before = turns()
            time.sleep(0.2)  # what it does not do in that time
            return turns() == before

        until(quiet, what="a host that sleeps while others wait")
        assert host.client.launch(WorkerSpec(kind="idle", name="other"), wait=True)["state"] == "ready"
        host.client.stop("idle")
        assert {answer(connection)["result"][0]["state"] for connection in waiting} == {"stopped"}


ASKS: Final = """
    import os
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            while not os.path.exists({path!r}):
                worker.wait(0.05)
            try:
                worker.launch(bghost.WorkerSpec(kind="idle", name="other"))
            except bghost.HostError as error:
                worker.log.info("told: {{}}", error)
            return bghost.UNTIL_WOKEN
"""


def test_a_host_without_descriptors_says_so(bghost_host: StartHost, tmp_path: Path) -> None:
    """Who comes when there is none left is told at once, client or worker; those that it has are served."""
    go = tmp_path / "go"
    host = bghost_host(kinds={"idle": IDLE, "asks": ASKS.format(path=str(go))}, args=["run", "idle", "asks"])
    host.client.wait("idle", "asks")
    limits = resource.prlimit(host.pid, resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir(f"/proc/{host.pid}/fd"))) + 2
    resource.prlimit(host.pid, resource.RLIMIT_NOFILE, (limit, limits[1]))
    with contextlib.ExitStack() as stack:
        waiting: list[socket.socket] = []
        told = 0
        while told < 3:  # one may still be closed for a client that has gone
            try:
                host.client.ps()
            except HostError as error:
                assert str(error).startswith("the host can take no further connection")
                assert f"RLIMIT_NOFILE ({limit} here)" in error.detail
                told += 1
            else:
                told = 0
                assert len(waiting) < limit
                waiting.append(stack.enter_context(connected(host)))
                with contextlib.suppress(BrokenPipeError):  # it may be turned away itself, for the one before it
                    ask(waiting[-1], "wait", names=["idle"], **{"for": "stopped"})
        go.touch()
        host.wait_line(r"\[asks\] told: the host can take no further connection")
        resource.prlimit(host.pid, resource.RLIMIT_NOFILE, limits)
        host.client.stop("idle")
        answers = [answer(each) for each in waiting]
        assert {row["state"] for each in answers if each["ok"] for row in each["result"]} == {"stopped"}
        assert all("no further connection" in str(each["error"]) for each in answers if not each["ok"])


def test_what_a_worker_said_before_a_client_asked_is_known(bghost_host: StartHost, tmp_path: Path) -> None:
    """A worker that is ready when the request comes is told as ready, though the host looks at both at once."""
    kind = """
        import bghost

        class Kind:
            @bghost.hookimpl
            def bghost_setup(self, worker):
                open(worker.args["door"]).read()

            @bghost.hookimpl
            def bghost_tick(self, worker):
                worker.log.info("note: ticks")
                return bghost.UNTIL_WOKEN
    """
    door = tmp_path / "door"
    os.mkfifo(door)
    host = bghost_host(
        kinds={"shut": kind}, args=["run"], config=f"worker = [{{kind = 'shut', args = {{door = '{door}'}}}}]"
    )
    host.wait_line(r"\[shut\] started")
    host.client.ps()
    host.signal(signal.SIGSTOP)
    until(lambda: "\nState:\tT" in Path(f"/proc/{host.pid}/status").read_text(), what="the host is stopped")
    door.write_text("open")
    host.wait_line("note: ticks")
    with connected(host) as connection:
        ask(connection, "ps", names=[])
        host.signal(signal.SIGCONT)
        assert [row["state"] for row in answer(connection)["result"]] == ["ready"]

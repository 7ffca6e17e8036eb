"""``bghost restart``, ``signal`` and ``wake``, and what they answer."""

import pytest
from support import StartHost

WAITER = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        worker.log.info("woken by {}", sorted(worker.woken))
        if worker.args.get("die"):
            raise bghost.GiveUp("as told")
        return bghost.UNTIL_WOKEN
"""


def test_restart(bghost_host: StartHost) -> None:
    """A worker that runs is stopped and started again, one that is stopped or failed is started; when ready, 0."""
    config = """
    [[worker]]
    kind = "waiter"
    [[worker]]
    kind = "waiter"
    name = "loser"
    args = { die = true }
    """
    host = bghost_host(kinds={"waiter": WAITER}, args=["run"], config=config)
    host.client.wait("waiter")
    host.wait_row("loser", lambda row: row["state"] == "failed")
    first = host.row("waiter")["pid"]
    assert host.bghost("restart", "waiter").code == 0
    row = host.row("waiter")
    assert (row["state"], row["starts"], row["pid"] == first) == ("ready", 2, False)
    assert host.bghost("stop", "waiter").code == 0
    assert host.bghost("restart", "waiter", "--fast").code == 0
    assert host.row("waiter")["state"] == "ready"
    host.bghost("restart", "loser")
    assert host.wait_row("loser", lambda row: row["state"] == "failed" and row["starts"] == 2)


def test_wake_and_signal(bghost_host: StartHost) -> None:
    """A wake-up ends the sleep; a TERM is one from elsewhere: the worker comes back."""
    host = bghost_host(kinds={"waiter": WAITER}, args=["run", "waiter"])
    host.wait_line(r"woken by \[\]")
    assert host.bghost("wake", "waiter").code == 0
    line = host.wait_line(r"woken by \['wake'\]")
    assert host.bghost("signal", "waiter", "usr1").code == 0
    host.wait_line(r"woken by \['wake'\]", after=line)
    assert host.bghost("signal", "waiter", "15").code == 0
    host.wait_row("waiter", lambda row: row["starts"] == 2 and row["state"] == "ready")


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        (["signal", "waiter", "TREM"], 2, "bghost: there is no signal 'TREM' (did you mean TERM or VTALRM or TRAP?)"),
        (["signal", "nobody", "TERM"], 5, "bghost: no worker 'nobody' (there is waiter)"),
        (["wake", "nobody"], 5, "bghost: no worker 'nobody' (there is waiter)"),
        (["restart", "nobody"], 5, "bghost: no worker 'nobody' (there is waiter)"),
    ],
)
def test_what_cannot_be(bghost_host: StartHost, command: list[str], code: int, text: str) -> None:
    """One line says what is wrong."""
    host = bghost_host(kinds={"waiter": WAITER}, args=["run", "waiter"])
    result = host.bghost(*command)
    assert (result.code, result.stderr.strip()) == (code, text)


def test_without_a_process(bghost_host: StartHost) -> None:
    """A worker that has no process just now can be told nothing."""
    host = bghost_host(kinds={"waiter": WAITER}, args=["run", "waiter", "--count", "2"])
    assert host.bghost("stop", "waiter.1").code == 0
    result = host.bghost("wake", "waiter")
    assert (result.code, result.stderr.strip()) == (1, "bghost: without a process just now: waiter.1")

"""``bghost test-shm-mq``: messages round a ring of workers, in a host of its own."""

import os
import signal
import subprocess
import sys
import tempfile
from types import FrameType

import click

INSTANCE = "test_shm_mq"


@click.command()
@click.option("--queue-size", type=click.IntRange(min=64), default=65536, show_default=True, help="Bytes of a queue.")
@click.option("--message-size", type=click.IntRange(min=0), default=100, show_default=True, help="Bytes of a message.")
@click.option("--repeat", type=click.IntRange(min=0), default=1, show_default=True, help="How often it goes round.")
@click.option("--workers", type=click.IntRange(min=0), default=1, show_default=True, help="How many it passes.")
@click.option("--pipelined", is_flag=True, help="Have many messages under way at once.")
@click.option("--verify/--no-verify", default=True, help="With --pipelined: compare each message that comes back.")
def command(queue_size: int, message_size: int, repeat: int, workers: int, pipelined: bool, verify: bool) -> None:
    """Send a message round a ring of workers, and see that it comes back as it was sent."""
    if workers == 0 and not pipelined:
        raise click.BadParameter("0 is not one or more", param_hint="--workers")
    settings = {
        "queue_size": queue_size,
        "message_size": message_size,
        "repeat": repeat,
        "workers": workers,
        "pipelined": str(pipelined).lower(),
        "verify": str(verify).lower(),
    }
    sets = [f"--set=test_shm_mq.{key}={value}" for key, value in settings.items()]
    with tempfile.TemporaryDirectory(prefix="bghost-") as directory:
        env = {key: value for key, value in os.environ.items() if key != "BGHOST_CONFIG"}
        for name in ("RUNTIME", "STATE", "DATA", "CONFIG"):
            env[f"BGHOST_{name}_DIR"] = os.path.join(directory, name.lower())
        os.mkdir(env["BGHOST_RUNTIME_DIR"], mode=0o700)
        code = _wait_for(
            [sys.executable, "-P", "-m", "bghost", "run", "test_shm_mq", f"--instance={INSTANCE}", *sets], env
        )
    raise SystemExit(code if code >= 0 else 128 - code)


def _wait_for(argv: list[str], env: dict[str, str]) -> int:
    """Run a program in a process group of its own; what this process is told by signals is passed on, once."""
    noted: list[int] = []  # before there is somebody to pass it on to
    hosts: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if not hosts:
            noted.append(signum)
        for host in hosts:
            host.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(signum, pass_on)
    hosts.append(host := subprocess.Popen(argv, env=env, process_group=0))
    for number in noted:
        host.send_signal(number)
    return host.wait()

"""``bghost signal`` and ``bghost wake``: say something to workers."""

import signal as signals
from collections.abc import Sequence

import click

from bghost.commands.arguments import names_argument
from bghost.shared.client import Client
from bghost.shared.errors import HostError, UsageError
from bghost.shared.names import near


@click.command()
@names_argument()
@click.argument("signal", metavar="SIGNAL")
def signal(names: tuple[str, ...], signal: str) -> None:
    """Send a signal (TERM, SIGTERM or 15) to the processes of workers.

    It is a signal from elsewhere: a worker that TERM ends is started again. bghost stop is what keeps it stopped.
    """
    signum = _number(signal)
    client = Client()
    _told(names, client.signal(*names, signum=signum), client)


@click.command()
@names_argument()
def wake(names: tuple[str, ...]) -> None:
    """End the sleep of workers: their next tick comes at once."""
    client = Client()
    _told(names, client.wake(*names), client)


def _number(text: str) -> int:
    word = text.upper().removeprefix("SIG")
    try:
        return signals.Signals(int(word)) if word.isdigit() else signals.Signals["SIG" + word]
    except (KeyError, ValueError):
        known = [each.name.removeprefix("SIG") for each in signals.Signals]
        raise UsageError(f"there is no signal {text!r}", hint=near(word, known)) from None


def _told(names: Sequence[str], told: Sequence[str], client: Client) -> None:
    deaf = [row["name"] for row in client.ps(*names) if row["name"] not in told]
    if deaf:
        raise HostError(f"without a process just now: {', '.join(deaf)}")

"""``bghost stop``, ``restart`` and ``shutdown``: end workers, to start them again, or the host with all of them."""

from collections.abc import Sequence

import click

from bghost.commands.arguments import mode_options, names_argument, stop_mode, timeout_option
from bghost.shared.client import Client
from bghost.shared.errors import HostError


@click.command()
@names_argument()
@mode_options
@timeout_option
def stop(names: tuple[str, ...], fast: bool, now: bool, timeout: float | None) -> None:
    """Stop workers, and wait until they have.

    They stay so until they are told otherwise. A worker finishes its tick first. What does not end in its time is
    stopped in the next harder way, and is killed at last; then the exit code is 1.
    """
    result = Client().stop(*names, mode=stop_mode(fast, now), timeout=timeout)
    _blame(result["killed"])


@click.command()
@names_argument()
@mode_options
@timeout_option
def restart(names: tuple[str, ...], fast: bool, now: bool, timeout: float | None) -> None:
    """Stop workers and start them again, also those that are done, stopped or failed.

    Returns when each of them is ready, or over; the exit code is 1 if one of them has failed.
    """
    rows = Client().restart(*names, mode=stop_mode(fast, now), timeout=timeout)
    failed = [f"{row['name']} ({row['last_error'] or row['exit']})" for row in rows if row["state"] == "failed"]
    if failed:
        raise HostError(f"started, but failed: {', '.join(failed)}")


@click.command()
@mode_options
@timeout_option
def shutdown(fast: bool, now: bool, timeout: float | None) -> None:
    """Stop the host and all its workers, and wait until they are gone.

    A worker finishes its tick first. What does not end in its time is stopped in the next harder way, and is killed at
    last; then the exit code is 1.
    """
    result = Client().shutdown(mode=stop_mode(fast, now), timeout=timeout)
    _blame(result["killed"])


def _blame(killed: Sequence[str]) -> None:
    if killed:
        raise HostError(f"stopped, but had to be killed: {', '.join(killed)}")

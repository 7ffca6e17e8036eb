"""``bghost wait``: until workers are ready, or have stopped."""

from typing import Literal

import click

from bghost.commands.arguments import names_argument, timeout_option
from bghost.shared.client import Client


@click.command()
@names_argument()
@click.option("--for", "until", type=click.Choice(["ready", "stopped"]), default="ready", show_default=True)
@timeout_option
def wait(names: tuple[str, ...], until: Literal["ready", "stopped"], timeout: float | None) -> None:
    """Wait until workers are ready, or have stopped.

    All of those named, that is; one has stopped when it is not to be started again.
    """
    Client().wait(*names, until=until, timeout=timeout)

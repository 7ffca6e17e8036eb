"""``bghost ps``: the workers."""

import click

from bghost.commands.arguments import names_argument
from bghost.commands.listing import ps as show


@click.command()
@names_argument(required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def ps(names: tuple[str, ...], as_json: bool) -> None:
    """Show the workers, all or those named.

    NAME may be a worker's, or stand for all of its numbered ones. FOR is how long STATE has lasted.
    """
    show(names, as_json=as_json)

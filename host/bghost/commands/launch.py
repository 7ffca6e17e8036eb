"""``bghost launch``: one more worker in a host that runs."""

import json

import click

from bghost.commands.arguments import json_option, parse_arg, parse_sets, timeout_option
from bghost.shared.client import Client
from bghost.shared.errors import UsageError
from bghost.shared.names import check_name
from bghost.shared.spec import WorkerSpec


@click.command()
@click.argument("kind")
@click.option("--name", metavar="NAME", help="The worker's name, instead of its kind's.")
@click.option("--arg", "args", multiple=True, metavar="KEY=VALUE", help="Of worker.args; JSON or text.  Repeatable.")
@click.option(
    "--set", "sets", multiple=True, metavar="KIND.KEY=VALUE", help="A setting, for this worker alone.  Repeatable."
)
@click.option("--wait", is_flag=True, help="Wait until it is ready.")
@timeout_option
@json_option
def launch(
    kind: str,
    name: str | None,
    args: tuple[str, ...],
    sets: tuple[str, ...],
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Launch a worker of KIND, and print its name and pid."""
    if name is not None:
        check_name(name)
    settings = parse_sets(sets)
    for target in settings:
        if target != kind:
            raise UsageError(f"--set {target}... is not for this worker", hint=f"its settings are {kind}.KEY")
    spec = WorkerSpec(kind=kind, name=name, args=dict(map(parse_arg, args)), settings=settings.get(kind, {}))
    launched = Client().launch(spec, wait=wait, timeout=timeout)
    said = "{name} is {state}, pid {pid}".format_map(launched)
    print(json.dumps(launched, indent=2) if as_json else said)

"""``bghost status``: the host itself."""

import json
import time

import click

from bghost.commands.arguments import json_option
from bghost.commands.listing import age, plain
from bghost.shared.client import Client


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show the host itself: pid, since when, config, slots."""
    answer = Client().status()
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    width = max(map(len, answer))
    for key, value in answer.items():
        if key == "since" and isinstance(value, int | float):
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
            value = f"{began}, for {age(time.time() - value)}"
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or None
        print(f"{key.replace('_', ' '):{width}}  {'-' if value is None else plain(str(value))}")

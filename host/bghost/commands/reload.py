"""``bghost reload``: have the host read its config again."""

from __future__ import annotations

import json

import click

from bghost.commands.arguments import json_option, timeout_option
from bghost.commands.listing import plain
from bghost.shared.client import Client
from bghost.shared.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from bghost.shared.replies import Reloaded


@click.command()
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be changed.")
@click.option("--wait", is_flag=True, help="Wait until each worker runs by it, or has failed.")
@click.option(
    "--rollback", is_flag=True, help="Have the old config back if a worker fails, or is not ready in its time.  Waits."
)
@timeout_option
@json_option
def reload(dry_run: bool, wait: bool, rollback: bool, timeout: float | None, as_json: bool) -> None:
    """Have the host read its config again, and print what that changes.

    All of it is taken, or nothing changes and the exit code is 2. With --wait it is 1 if a worker does not run by it;
    with --rollback, if the old config was put back.
    """
    if dry_run and (wait or rollback):
        raise UsageError("--dry-run changes nothing that could be waited for")
    reloaded = Client().reload(dry_run=dry_run, wait=wait, rollback=rollback, timeout=timeout)
    waited = wait or rollback
    print(json.dumps(reloaded, indent=2) if as_json else plainly(reloaded, waited=waited))
    if waited and reloaded["failed"]:
        failed = ", ".join(f"{name} ({why})" for name, why in reloaded["failed"].items())
        raise HostError(f"config {reloaded['config']} is in force, but failed: {failed}")


def plainly(reloaded: Reloaded, *, waited: bool) -> str:
    """What a reload has come to, for people."""
    rows = [
        ("start", reloaded["start"]),
        ("stop", reloaded["stop"]),
        ("restart", reloaded["restart"]),
        ("revive", reloaded["revive"]),
        ("changed", reloaded["settings"]),
        ("at the host's next start", reloaded["pending_restart"]),
        ("note", reloaded["notes"]),
    ]
    if waited:
        rows.append(("acknowledged", [f"{name} {number}" for name, number in reloaded["acknowledged"].items()]))
    said = [f"{what}: {plain(', '.join(names))}" for what, names in rows if names]
    number = reloaded["config"]
    head = f"config {number} would be followed by one with" if reloaded["dry_run"] else f"config {number} is in force"
    return "\n".join([head, *(f"  {line}" for line in said or ["no change"])])

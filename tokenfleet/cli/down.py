"""``tokenfleet down``: end a local fleet."""

from __future__ import annotations

import click

from tokenfleet.cli.connection import FLEET
from tokenfleet.cli.output import note


@click.command("down")
@click.option("--fleet", envvar=FLEET, default="default", show_default=True, help="The local fleet's name.")
@click.option("--timeout", default=60.0, show_default=True, metavar="SECONDS", help="Then it is killed.")
def command(fleet: str, timeout: float) -> None:
    """Stop a local fleet, whoever uses it.

    Running jobs get some time to finish; what is left goes on when the fleet is next started.
    """
    from tokenfleet.producer import local_fleet

    if local_fleet.down(fleet, timeout_s=timeout):
        note(f"Local fleet {fleet!r} is stopped. Its data stays.")
    else:
        note(f"No local fleet {fleet!r} was running.")

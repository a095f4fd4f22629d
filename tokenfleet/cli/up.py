"""``tokenfleet up``: a local fleet that stays up until it is told to stop."""

from __future__ import annotations

from typing import Any

import click

from tokenfleet.cli.arguments import (
    CONTEXT,
    SectionedCommand,
    argument_options,
    from_environment,
    given_flags,
    merged,
)
from tokenfleet.cli.output import note
from tokenfleet.wire.errors import ConfigurationError


@click.command("up", cls=SectionedCommand, context_settings=CONTEXT)
@argument_options("Fleet", "Model", "vLLM", "SGLang", "Media", "Workers", without=("redis_url",))
@click.option("--wait/--detach", default=True, help="Wait until a worker is ready (the default), or only for Redis.")
@click.option("--idle-stop", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop so long after the last use.")
@click.argument("config", nargs=-1, metavar="[FILE] [KEY=VALUE]...")
@click.pass_context
def command(ctx: click.Context, /, config: tuple[str, ...], wait: bool, idle_stop: float | None, **_: Any) -> None:
    """Start a local fleet: Redis, a supervisor, and workers with a warm model.

    It is this user's, on this machine, and runs until `tokenfleet down`. FILE is a YAML or JSON file of the arguments
    below, as LLaMA-Factory takes it; KEY=VALUE words and flags win over it.
    """
    from tokenfleet.cli.local import join, say_how_long
    from tokenfleet.producer import local_fleet
    from tokenfleet.producer.arguments import split_arguments

    args, generation = split_arguments(merged(config, given_flags(ctx), from_environment(ctx)))
    if args.redis_url:
        raise ConfigurationError(
            "redis_url: a local fleet has its own Redis.", hint="`tokenfleet worker` joins another."
        )
    if generation:
        note(f"note: {', '.join(sorted(generation))}: said by each request, not by the fleet; not used here.")
    before = local_fleet.status(args.fleet)
    try:
        joined = join(args, is_ready=wait, idle_stop_s=idle_stop)
    except KeyboardInterrupt:
        if local_fleet.status(args.fleet) is not None:  # it does not end with whoever waited for it
            say_how_long(args.fleet)
        raise
    with joined as fleet:
        state = fleet.state()
        serves = f" and serves {', '.join(fleet.models)}" if fleet.models else ""
        was_running = before is not None and state is not None and before.pid == state.pid
        word = "was running" if was_running else f"is {state.state if state else 'gone'}"
        note(f"Local fleet {fleet.name!r} {word}{serves}.")
    say_how_long(args.fleet)

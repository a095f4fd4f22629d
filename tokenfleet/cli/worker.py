"""``tokenfleet worker``: this process becomes a Celery worker with the settings that the flags describe."""

from __future__ import annotations

import asyncio
import json
import os
import sys
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
from tokenfleet.cli.connection import FLEET, REDIS_URL, running_local
from tokenfleet.cli.media import FOLDER as MEDIA_FOLDER
from tokenfleet.cli.output import note
from tokenfleet.producer.arguments import WORKER_NAMES, FleetArguments
from tokenfleet.wire.errors import ConfigurationError

_APART = set(WORKER_NAMES)  # these can be said without saying which model


@click.command("worker", cls=SectionedCommand, context_settings=CONTEXT)
@argument_options("Fleet", "Model", "vLLM", "SGLang", "Media", "Workers", without=("workers",))
@click.option("--config", "config", metavar="FILE", help="A YAML or JSON file of these arguments.")
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- CELERY ARGUMENTS]...")
@click.pass_context
def command(ctx: click.Context, /, config: str | None, celery_arguments: tuple[str, ...], **_: Any) -> None:
    """Run one worker in the foreground, of any fleet.

    It is `celery -A tokenfleet.workers.app worker`, with its settings (TOKENFLEET_*) made from these flags; what stands
    after `--` goes to Celery as it is. SIGTERM or Ctrl-C: it finishes or hands over what it runs, then leaves.
    """
    from tokenfleet.producer.arguments import split_arguments

    words = [config] if config else []
    args, generation = split_arguments(merged(words, given_flags(ctx), from_environment(ctx)))
    if generation:
        note(f"note: {', '.join(sorted(generation))}: said by each request, not by the worker; not used here.")
    environment = {**os.environ, **_settings(args)}
    if args.gpus is not None:
        environment |= {"CUDA_VISIBLE_DEVICES": args.gpus, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    celery = [sys.executable, "-m", "celery", "-A", "tokenfleet.workers.app", "worker"]
    sys.stdout.flush()
    # Replaced, not wrapped: signals, process id and exit status are the worker's own, under Docker and systemd too.
    os.execve(sys.executable, [*celery, *celery_arguments], environment)  # noqa: S606


def _settings(args: FleetArguments) -> dict[str, str]:
    """``TOKENFLEET_*`` for what was said; what was not stays as the environment has it."""
    settings: dict[str, str] = {}
    if args.redis_url:
        settings |= {REDIS_URL: args.redis_url, FLEET: args.fleet}
    elif not os.environ.get("TOKENFLEET_CONFIG"):
        local = asyncio.run(running_local(args.fleet))
        settings |= {REDIS_URL: local.url, FLEET: args.fleet, MEDIA_FOLDER: local.media_folder}
    said = args.model_fields_set - {"redis_url", "fleet", "gpus"}
    worker = args.local_fleet().worker
    if said <= _APART | {"model"}:  # which model it is, if at all, is the environment's to say
        worker = {name: value for name, value in worker.items() if name in said}
    for name, value in worker.items():
        if value == "":  # in the environment that is the same as not said
            hint = f'Write {{"{name}": ""}} to a file, and name it in TOKENFLEET_CONFIG.'
            raise ConfigurationError(f"{name} can't be empty on this command line.", hint=hint)
        settings[f"TOKENFLEET_{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
    return settings

"""Finding, starting and joining local fleets for commands that may start one."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from tokenfleet.cli.output import note
from tokenfleet.cli.progress import progress
from tokenfleet.producer import local_fleet
from tokenfleet.producer.arguments import FleetArguments
from tokenfleet.producer.local_fleet import LocalFleet
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.local_files import LocalFleetConfig, fleet_folder
from tokenfleet.wire.private_files import read

# These say which fleet and which of its models, not how a fleet is to be run.
WHICH = frozenset({"redis_url", "fleet", "model"})


def join(args: FleetArguments, *, is_ready: bool = True, **overrides: Any) -> LocalFleet:
    """Attach to local fleet ``args.fleet``, starting it if need be, and wait for a worker if ``is_ready``.

    A fleet that runs will do if ``args`` don't say how it is to be run; else it must run just so.
    Raises `ConfigurationError`, `FleetUnavailable`."""
    name = args.fleet
    state = local_fleet.status(name)
    # Its own settings, where nothing else is asked for: should it end just now, it comes up again as it was.
    running = running_config(name) if state is not None and state.state not in ("failed", "stopping") else None
    is_described = bool(args.model_fields_set - WHICH)
    if running is None and args.model and not is_described:
        raise ConfigurationError(
            f"No local fleet {name!r} runs that could serve {args.model!r}.",
            hint="To start one, say what to load: --model_name_or_path.",
        )
    if running is None:
        config = args.local_fleet(**overrides)
    elif is_described:
        config = _like(running, args.local_fleet(**overrides), args)
    else:
        config = running
    with progress() as tell:
        fleet = local_fleet.ensure(name, config, on_progress=tell)
        try:
            if is_ready:
                fleet.wait_ready(timeout_s=None, on_progress=tell)
        except BaseException:
            fleet.close()
            raise
    return fleet


def only_model(fleet: LocalFleet, args: FleetArguments) -> str | None:
    """Which model of a fleet just joined is meant; None if it is not clear."""
    if args.model:
        return args.model
    models = fleet.models
    return models[0] if len(models) == 1 else None


def running_config(name: str) -> LocalFleetConfig | None:
    """How local fleet ``name`` was started."""
    return read(fleet_folder(name, os.environ).config, LocalFleetConfig)


def say_how_long(name: str) -> None:
    """Tell when the fleet stops by itself."""
    config = running_config(name)
    end = f"tokenfleet down{'' if name == 'default' else f' --fleet {name}'}"
    if config is None or config.idle_stop_s is None:
        note(f"The fleet runs until `{end}`.")
    else:
        note(f"The fleet stops {config.idle_stop_s / 60:g} minutes after its last use, or at `{end}`.")


def _like(running: LocalFleetConfig, config: LocalFleetConfig, args: FleetArguments) -> LocalFleetConfig:
    """Leave open what was not asked for: how many workers there are, and on which GPUs."""
    same = {field: getattr(running, field) for field in ("workers", "gpus") if field not in args.model_fields_set}
    return msgspec.structs.replace(config, **same)

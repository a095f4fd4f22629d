"""A worker's settings: environment variables ``TOKENFLEET_*``, or a JSON file that ``TOKENFLEET_CONFIG`` names.

Built once, by the entry point (`celeryconfig.py`), then passed on.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, JsonConfigSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from tokenfleet.engines.options import json_mapping
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.keys import Keys

EngineName = Literal["transformers", "vllm", "sglang", "scripted"]
_SLOTS: dict[EngineName, int] = {"transformers": 16, "vllm": 256, "sglang": 256, "scripted": 256}

_THEIR_SLOTS = {"vllm": "max_num_seqs", "sglang": "max_running_requests"}
"""What ``vllm_config`` and ``sglang_config`` call it."""


class LeaseSettings(BaseModel):
    """How soon a dead worker is noticed. Seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heartbeat_s: float = Field(1.0, gt=0)
    lease_s: float = Field(3.0, gt=0)

    @model_validator(mode="after")
    def _lease_outlasts_beats(self) -> Self:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError("lease_s must be at least twice heartbeat_s, or one late beat loses live work")
        return self

    @property
    def lease_ms(self) -> int:
        return int(self.lease_s * 1000)

    @property
    def normal_gap_ms(self) -> int:
        """The longest time between two reaps while Redis is up; a longer one gives all leases a fresh term.

        A lease that was renewed just before an outage this long is still valid after it."""
        return int((self.lease_s - self.heartbeat_s) * 750)


class WorkerSettings(BaseSettings):
    """``model`` is the public name that clients ask for; ``engine_args`` go to the engine as they are."""

    model_config = SettingsConfigDict(env_prefix="TOKENFLEET_", frozen=True, extra="forbid", env_ignore_empty=True)

    redis_url: str = "redis://127.0.0.1:6379/0"
    fleet: str = "default"
    model: str = Field("", max_length=128)
    engine: EngineName = "transformers"
    engine_args: dict[str, Any] = Field(default_factory=dict)
    template: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool = False
    neutral_special_tokens: bool = False
    """Special tokens written out in users' and tools' messages are ordinary text."""
    slots: int | None = Field(None, ge=1, le=4096)
    media_folder: Path | None = None
    """Where media too large for Redis lie; shared with the producers."""
    lease: LeaseSettings = LeaseSettings()
    grace_s: float = Field(30.0, ge=0)
    """How long running jobs may go on after SIGTERM before they are handed over."""

    hang_s: float = Field(30.0, gt=0)
    """An engine that makes no step for this long, while jobs run, is dead; 20 ms more per running prompt token."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        found = [init_settings, env_settings]
        if path := os.environ.get("TOKENFLEET_CONFIG"):
            found.append(JsonConfigSettingsSource(settings_cls, json_file=Path(path)))
        return tuple(found)

    @property
    def keys(self) -> Keys:
        return Keys(self.fleet)

    @property
    def concurrency(self) -> int:
        """Jobs that this worker runs at once: no more than its engine takes, or others could not take them."""
        config = self.engine_args.get(f"{self.engine}_config")
        with contextlib.suppress(ValueError):  # told when the engine is loaded
            config = json_mapping(config)
        theirs = config.get(_THEIR_SLOTS.get(self.engine, "")) if isinstance(config, dict) else None
        said = (self.slots, self.engine_args.get("max_batch_size"), theirs)
        return min((slots for slots in said if isinstance(slots, int) and slots > 0), default=_SLOTS[self.engine])


def load_settings() -> WorkerSettings:
    """Raises `ConfigurationError` in one line."""
    try:
        return WorkerSettings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "_".join(str(p) for p in first["loc"]).upper()
        raise ConfigurationError(f"TOKENFLEET_{place}: {first['msg']}", hint="See docs/settings.md.") from error
    except (SettingsError, OSError) as error:
        raise ConfigurationError(f"Settings can't be read: {error}", hint="See docs/settings.md.") from error

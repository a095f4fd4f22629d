"""The gateway's settings: environment variables ``TOKENFLEET_GATEWAY_*``, or flags of ``tokenfleet serve``."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from tokenfleet.wire.errors import ConfigurationError


class GatewaySettings(BaseSettings):
    """Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="TOKENFLEET_GATEWAY_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    redis_url: str = "redis://127.0.0.1:6379/0"
    fleet: str = "default"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    processes: int = Field(1, ge=1, le=64)
    allow_no_keys: bool = False
    """Serve without keys on an address that others can reach. For networks that are closed by other means."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024)
    """Media come as base64: four bytes for three."""
    max_media_bytes: int = Field(128 * 1024 * 1024, ge=1)
    """One image, video or audio; without ``media_folder`` at most 8 MiB."""
    media_folder: Path | None = None
    """Shared with the workers, for media above 8 MiB."""
    fetch_urls: bool = False
    """Fetch media that requests name by http(s) URLs, from the public internet only."""
    fetch_timeout_s: float = Field(10.0, gt=0)
    fetch_max_urls: int = Field(16, ge=1)
    fetch_allowed_networks: tuple[str, ...] = ()
    """Networks that are not public and may be fetched from all the same, e.g. ``["10.1.2.0/24"]``."""
    max_messages: int = Field(2048, ge=1)
    max_parts: int = Field(256, ge=1)
    max_prompts: int = Field(128, ge=1)
    """Of one ``POST /v1/completions``: each is a job."""
    retention_s: float = Field(600.0, gt=0)
    """How long an ended job stays readable, unless its request says (``retention_s``)."""
    idempotency_s: float = Field(86400.0, gt=0)
    """How long an ended job with an ``Idempotency-Key`` stays readable, and the key means that job."""
    max_retention_s: float = Field(30 * 86400.0, gt=0, le=90 * 86400)
    storage: str = ""
    """Where files lie: a folder that all gateways share, or ``s3://bucket/prefix``. By default in this user's data."""
    max_file_bytes: int = Field(200 * 1024 * 1024, ge=1024)
    max_stored_bytes: int = Field(10 * 1024**3, ge=1024)
    """Of one tenant's files together."""
    file_expiry_s: float = Field(30 * 86400.0, gt=0)
    batch_window: int = Field(128, ge=1, le=10_000)
    """Rows of one batch that wait or run at once."""
    batch_max_rows: int = Field(100_000, ge=1)
    batch_retention_s: float = Field(30 * 86400.0, gt=0)
    """How long an ended batch can be retrieved."""
    batch_lease_s: float = Field(10.0, ge=1)
    """After so long without a word of the gateway that drives a batch, another one goes on with it."""
    webhook_http: bool = False
    """Call webhooks without TLS, too."""
    webhook_allowed_networks: tuple[str, ...] = ()
    """Networks that are not public and whose webhooks are called all the same, e.g. ``["10.1.2.0/24"]``."""
    webhook_retry_s: float = Field(5.0, gt=0)
    """Until a failed webhook is tried again; twice as long each time, up to an hour, for three days."""
    deadline_s: float = Field(3600.0, gt=0)
    queue_ttl_s: float = Field(600.0, gt=0)
    head_held_s: float = Field(5.0, ge=0)
    """How long a stream's head waits for a worker, so that what the worker refuses is a 4xx."""
    keepalive_s: float = Field(15.0, gt=0)
    """A stream that has nothing to send sends a comment so often, for proxies between."""
    max_queued: int = Field(10_000, ge=1)

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def settings_from_environment() -> GatewaySettings:
    """Raises `ConfigurationError` that names the variable."""
    try:
        return GatewaySettings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = "_".join(str(part) for part in first["loc"][:1]).upper()
        raise ConfigurationError(f"TOKENFLEET_GATEWAY_{name}: {first['msg']}.", hint="See docs/settings.md.") from error
    except SettingsError as error:  # a list that is no JSON
        raise ConfigurationError(f"Settings can't be read: {error}.", hint="See docs/settings.md.") from error

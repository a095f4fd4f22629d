"""tokenfleet: a message-queue driven fleet of LLM inference workers.

Importing this is cheap: each name is loaded when it is first used, and none of them loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenfleet.producer.aio import AsyncClient
    from tokenfleet.producer.aio_job import AsyncJob, AsyncStream
    from tokenfleet.producer.chat_model import ChatModel, Response
    from tokenfleet.producer.sync import Client, Job, JobStream
    from tokenfleet.wire.errors import TokenfleetError
    from tokenfleet.wire.media import MediaSettings
    from tokenfleet.wire.results import ChatResult

__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": "producer.aio",
    "AsyncJob": "producer.aio_job",
    "AsyncStream": "producer.aio_job",
    "ChatModel": "producer.chat_model",
    "ChatResult": "wire.results",
    "Client": "producer.sync",
    "Job": "producer.sync",
    "JobStream": "producer.sync",
    "MediaSettings": "wire.media",
    "Response": "producer.chat_model",
    "TokenfleetError": "wire.errors",
}

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncStream",
    "ChatModel",
    "ChatResult",
    "Client",
    "Job",
    "JobStream",
    "MediaSettings",
    "Response",
    "TokenfleetError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

"""`ChatModel` under the name LLaMA-Factory's users know, and the Celery signature of a chat.

    from tokenfleet.chat import ChatModel
    from tokenfleet import chat                   # chat.s("Hi!", model="smollm2-135m-instruct"), for a Celery canvas

Importing this is cheap; the names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenfleet.producer.chat_model import ChatModel, Response
    from tokenfleet.producer.signatures import chat_signature as s
    from tokenfleet.producer.signatures import score_signature as score

_HOMES = {
    "ChatModel": ("chat_model", "ChatModel"),
    "Response": ("chat_model", "Response"),
    "s": ("signatures", "chat_signature"),
    "score": ("signatures", "score_signature"),
}

__all__ = ["ChatModel", "Response", "s", "score"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, what = _HOMES[name]
    return getattr(import_module(f"tokenfleet.producer.{module}"), what)


def __dir__() -> list[str]:
    return list(__all__)

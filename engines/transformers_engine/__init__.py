"""A transformers model with continuous batching: sequences join and leave at every step.

Import `TransformersEngine` and `TransformersOptions` from here; torch is imported only when the engine is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenfleet.engines.transformers_engine.options import TransformersOptions

if TYPE_CHECKING:
    from tokenfleet.engines.transformers_engine.engine import TransformersEngine

__all__ = ["TransformersEngine", "TransformersOptions"]


def __getattr__(name: str) -> Any:
    if name == "TransformersEngine":
        from tokenfleet.engines.transformers_engine.engine import TransformersEngine

        return TransformersEngine
    raise AttributeError(name)

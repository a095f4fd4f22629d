"""A model in vLLM: its engine core runs in a child process of the worker, its sampling is told in our words.

Import `VllmEngine` and `VllmOptions` from here; vLLM is imported only when the engine is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenfleet.engines.vllm_engine.options import VllmOptions

if TYPE_CHECKING:
    from tokenfleet.engines.vllm_engine.engine import VllmEngine

__all__ = ["VllmEngine", "VllmOptions"]


def __getattr__(name: str) -> Any:
    if name == "VllmEngine":
        from tokenfleet.engines.vllm_engine import compat

        compat.prepare_environment()  # vLLM reads some of it as it is imported
        from tokenfleet.engines.vllm_engine.engine import VllmEngine

        return VllmEngine
    raise AttributeError(name)

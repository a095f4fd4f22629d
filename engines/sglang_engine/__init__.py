"""A model in SGLang: its scheduler runs in a child process of the worker, with a sampler of our own in it.

Import `SglangEngine` and `SglangOptions` from here; SGLang is imported only when the engine is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenfleet.engines.sglang_engine.options import SglangOptions

if TYPE_CHECKING:
    from tokenfleet.engines.sglang_engine.engine import SglangEngine

__all__ = ["SglangEngine", "SglangOptions"]


def __getattr__(name: str) -> Any:
    if name == "SglangEngine":
        from tokenfleet.engines.sglang_engine import compat

        compat.import_sglang()  # with what it does to the process undone
        from tokenfleet.engines.sglang_engine.engine import SglangEngine

        return SglangEngine
    raise AttributeError(name)

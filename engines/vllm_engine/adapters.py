"""LoRA adapters in vLLM: of which rank it is loaded for them, and that it can apply them, before any request asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenfleet.engines.folders import first_line
from tokenfleet.engines.lora import LoraFolder
from tokenfleet.wire.errors import ConfigurationError

HEADS = frozenset({"classifier", "score"})
"""Modules that vLLM takes whole from a classifier's adapter (`vllm.lora.peft_helper`)."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's (`vllm.config.lora.MaxLoRARanks`)."""


def greatest_rank(adapters: Sequence[LoraFolder], limit: int | None) -> int:
    """The rank to load vLLM for. ``limit``: vllm_max_lora_rank. Raises `ConfigurationError`."""
    needed = max(adapter.rank for adapter in adapters)
    fitting = [rank for rank in _RANKS if rank >= (limit or needed)]
    if not fitting or (limit is not None and needed > limit):
        raise ConfigurationError(
            f"An adapter has rank {needed}, and vllm_max_lora_rank is {limit}."
            if limit is not None and needed > limit
            else f"vLLM has no rank as great as {limit or needed}.",
            hint=f"vLLM's ranks are {', '.join(map(str, _RANKS))}.",
        )
    return fitting[0]


async def load_all(engine: Any, requests: Mapping[str | None, Any]) -> None:
    """Let ``engine``, an `AsyncLLM`, load each of ``requests`` (`LoRARequest`): by itself it does so in the step of the
    first request that has it, and an adapter that it can't apply then ends the core and all that runs in it.

    Raises `ConfigurationError`, and what vLLM raises when its core is dead."""
    from vllm.v1.engine.exceptions import EngineDeadError

    for name, request in requests.items():
        try:
            await engine.add_lora(request)
        except EngineDeadError:  # of no memory, perhaps: nothing that the adapter's maker could mend
            raise
        except Exception as error:  # what the core's own error was is lost on the way, all but its text
            label = "of all requests" if name is None else repr(name)
            raise ConfigurationError(f"vLLM can't apply the adapter {label}: {first_line(error)}") from error

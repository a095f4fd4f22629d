"""A first request of each kind, so that no caller's waits for what is compiled or loaded at its first use."""

from __future__ import annotations

from contextlib import aclosing

from tokenfleet.engines.base import Engine, Sequence
from tokenfleet.wire.chat import GenerationParams


async def warm_up(engine: Engine) -> None:
    """A score, or a token for each way to sample."""
    if engine.info.can_score:
        await engine.score([(1, 1)])
        return
    for params in (GenerationParams(do_sample=False), GenerationParams(logprobs=True)):
        async with aclosing(engine.generate(Sequence("warm-up", (1, 1), params, 2))) as chunks:
            async for _ in chunks:
                pass

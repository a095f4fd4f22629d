"""What the tests of vLLM and of SGLang alone share: answers of an engine with adapters, held to the plain models."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams

PROMPT = (40, 41, 42, 43)


async def ids_of(engine, adapter=None, delivered=(), **params):
    """A whole answer to ``PROMPT``; greedy, of 16 tokens, unless ``params`` say otherwise. ``delivered``: its first
    ids, by another worker."""
    params = GenerationParams(**{"max_new_tokens": 16, "do_sample": False, **params})
    sequence = Sequence(
        f"s-{adapter}",
        PROMPT,
        params,
        params.max_new_tokens,
        seed=params.seed,
        adapter=adapter,
        eos_ids=frozenset({1}),
        delivered_ids=tuple(delivered),
    )
    async with aclosing(engine.generate(sequence)) as chunks:
        return [*delivered, *(token for chunk in [chunk async for chunk in chunks] for token in chunk.ids)]


async def check_each_has_its_adapter(engine, plain):
    """All in one batch, and again with half of each answer there. ``plain``: adapter (None: no choice) → the model that
    it makes."""
    import torch

    answers = await asyncio.gather(*(ids_of(engine, name, ignore_eos=True) for name in plain))
    assert len({tuple(ids) for ids in answers}) == len(plain)
    tolerance = 0.3 if torch.cuda.is_available() else 1e-2  # in float16, of logits beyond 30
    continued = await asyncio.gather(
        *(ids_of(engine, name, ids[:7], ignore_eos=True) for name, ids in zip(plain, answers, strict=True))
    )
    for model, ids in zip([*plain.values()] * 2, [*answers, *continued], strict=True):
        assert len(ids) == 16
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
        chosen = logits[torch.arange(len(ids)), torch.tensor(ids)]
        assert bool((chosen >= logits.amax(-1) - tolerance).all())

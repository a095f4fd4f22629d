"""Ways to load a model that need a GPU: quantised at load, and split over two cards. Greedy answers, teacher-forced.

In float16: with bitsandbytes' 8 bits and bfloat16 around them plain transformers, too, answers the question wrongly."""

from __future__ import annotations

import importlib.util
from contextlib import aclosing, asynccontextmanager

import pytest

from tests.contract import packed_models
from tests.contract.reference import log_softmax
from tests.plain_models import plain_model
from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ENGINES = [name for name in ("transformers", "vllm", "sglang") if importlib.util.find_spec(name)]


def arguments(engine, gpu_share=0.4):
    own = {
        "transformers": {},
        "vllm": {"vllm_maxlen": 1024, "vllm_enforce_eager": True, "vllm_gpu_util": gpu_share},
        "sglang": {
            "sglang_maxlen": 1024, "sglang_mem_fraction": gpu_share,
            "sglang_config": {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": [1, 4]},
        },
    }  # fmt: skip
    return {"model_name_or_path": MODEL, "infer_dtype": "float16", **own[engine]}


@asynccontextmanager
async def loaded(engine, **options):
    from tokenfleet.engines import registry

    found = await registry.load(engine, {**arguments(engine), **options}, registry.ModelSettings("small", slots=4))
    try:
        yield found.engine
    finally:
        await found.engine.close()


async def answer(engine):
    """(its text, its mean log-probability by the plain model in float32)"""
    import torch

    tokenizer = engine.tokenizer
    prompt = tuple(tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False))
    params = GenerationParams(do_sample=False, max_new_tokens=16)
    sequence = Sequence("s", prompt, params, 16, eos_ids=frozenset({tokenizer.eos_token_id}))
    async with aclosing(engine.generate(sequence)) as chunks:
        ids = [token async for chunk in chunks for token in chunk.ids]
    plain = plain_model(MODEL)
    with torch.no_grad():
        logits = plain(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double().numpy()
    chosen = [float(log_softmax(row)[token]) for row, token in zip(logits, ids, strict=True)]
    return tokenizer.decode(ids, skip_special_tokens=True), sum(chosen) / len(chosen)


WAYS = {
    "transformers": [{"quantization_bit": 8}, {"quantization_bit": 4}],
    "vllm": [{"quantization_bit": 8}, {"quantization_bit": 4}],
    "sglang": [{"quantization_bit": 8}],
}


@pytest.mark.parametrize(
    ("engine", "way"), [(engine, way) for engine in ENGINES for way in WAYS[engine]], ids=lambda value: str(value)
)
async def test_a_model_quantised_at_load_still_knows(gpu, engine, way):
    if engine == "transformers" or way == {"quantization_bit": 4}:
        pytest.importorskip("bitsandbytes")
    async with loaded(engine, **way) as quantised:
        text, likelihood = await answer(quantised)
    print(f"{engine} {way}: {text!r}, mean log-probability {likelihood:.3f}")
    assert likelihood > -1.0


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "transformers"])
async def test_a_checkpoint_in_four_bits_is_the_model_of_its_rounded_weights(gpu, engine, method, tmp_path):
    plain = packed_models.save(method, tmp_path)
    async with loaded(engine, model_name_or_path=str(tmp_path), infer_dtype="float16") as packed:
        assert max(await packed_models.gaps(packed, plain)) < packed_models.TOLERANCE


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "transformers"])
async def test_a_model_is_split_over_all_cards_of_its_worker(gpu, engine):
    """SmolLM2's 9 heads can't be split in two: a shape that can, with random weights."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    from tests.gpu.split import greedy_answer_is_the_models_own

    await greedy_answer_is_the_models_own(engine, loaded)

"""A request that does not fit the card's memory fails or is tried again; its neighbours don't notice."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import EngineError

_LEFT_BYTES = 200 << 20


async def test_only_the_request_that_does_not_fit_fails(gpu, tmp_path):
    """Loaded with all of the card to itself; then the card is filled up but for 200 MiB."""
    import torch
    import transformers as hf

    from tests.contract.subjects import _save_llama
    from tests.small_tokenizers import byte_level
    from tokenfleet.engines.transformers_engine import TransformersEngine, TransformersOptions

    _save_llama(tmp_path, byte_level(), torch, hf)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    config.max_position_embeddings = 1 << 18
    config.save_pretrained(tmp_path)
    options = TransformersOptions(
        model_name_or_path=str(tmp_path), infer_dtype="float32", max_batch_size=8, kv_budget_tokens=1 << 20,
        prefill_chunk_tokens=1 << 17, flash_attn="disabled",
    )  # fmt: skip
    engine = TransformersEngine(options)
    await engine.start()

    async def ids_of(name, prompt_tokens, new):
        params = GenerationParams(do_sample=False, max_new_tokens=new, ignore_eos=True)
        async with aclosing(engine.generate(Sequence(name, (40,) * prompt_tokens, params, new))) as chunks:
            return [token async for chunk in chunks for token in chunk.ids]

    try:
        alone = await ids_of("alone", 8, 200)
        free, _ = torch.cuda.mem_get_info()
        filling = torch.empty(free - _LEFT_BYTES, dtype=torch.uint8, device="cuda")
        neighbours = [asyncio.create_task(ids_of(f"n{k}", 8, 200)) for k in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(EngineError) as raised:
            await ids_of("large", 1 << 17, 8)  # its attention's scores alone are 4 * 2^34 bytes and more
        assert raised.value.code == "out_of_memory"
        assert await asyncio.gather(*neighbours) == [alone] * 4
        del filling
        assert await ids_of("after", 8, 200) == alone
    finally:
        await engine.close()

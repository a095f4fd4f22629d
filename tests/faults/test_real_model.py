"""Kills under a real model on transformers: greedy in float32, each token checked against the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.trial import Trial, ledger_of
from tests.fleets import Fleet
from tests.small_tokenizers import byte_level
from tokenfleet.wire.events import Delta

TOLERANCE = 1e-3
"""Of the top logit, in float32: batches of other sizes add up in another order."""


def save_llama(folder: Path, torch: Any, hf: Any) -> Any:
    """A small Llama with random weights and a byte-level tokenizer: its tokens are full of open characters."""
    backend = byte_level()
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        initializer_range=0.4, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return model


@pytest.mark.slow
def test_a_real_models_stream_goes_on_where_it_was_cut(fleet: Fleet) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    folder = fleet.folder / "llama"
    model = save_llama(folder, torch, hf)
    real = {
        "TOKENFLEET_ENGINE": "transformers",
        "TOKENFLEET_ENGINE_ARGS": json.dumps(
            {"model_name_or_path": str(folder), "infer_dtype": "float32", "max_batch_size": 8, "threads": 1}
        ),
    }
    first = fleet.start_worker(env=real)
    with Trial(fleet) as trial:
        greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 500, "ignore_eos": True}
        jobs = [trial.submit((), prompt=f"question {k}", **greedy) for k in range(6)]
        readings = trial.watch(jobs)
        trial.until_streaming(10)
        fleet.start_worker(env=real, wait=False)
        trial.kill(first)
        verdict = trial.judge(timeout_s=150, may_run_plain=True, may_have=["text_differs", "invalid_utf8"])
        assert verdict.cut_streams == 6
        for job, reading in zip(jobs, readings, strict=True):
            prompt = json.loads(ledger_of(fleet, job)["prompt"])
            ids = [token for event in reading.events if isinstance(event, Delta) for token in event.ids]
            assert len(ids) == 500
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            below = logits.max(dim=-1).values - logits[torch.arange(len(ids)), torch.tensor(ids)]
            assert float(below.max()) < TOLERANCE

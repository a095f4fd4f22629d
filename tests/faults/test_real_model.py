"""A kill under a real model on transformers: in float32, each token checked against the model itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.trial import Trial, ledger_of
from tests.fleets import ROOT, Fleet
from tests.small_tokenizers import byte_level
from tokenfleet import Job
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


COLOURS = ["red", "green", "blue"]
MANY_COLOURS = {"type": "array", "items": {"enum": COLOURS}, "minItems": 60, "maxItems": 60}
TOKENS, PACE_S = 300, 0.2
"""Of each answer, and of a token of the worker that is killed: none ends within the minute that all have to begin."""


def paced(pace_s: float) -> dict[str, str]:
    """A worker's environment under which a pass of its model takes ``pace_s`` at least (tests/faults/paced_model)."""
    return {"PYTHONPATH": str(ROOT / "tests" / "faults" / "paced_model"), "PACED_MODEL_S": str(pace_s)}


@pytest.mark.slow
@pytest.mark.timeout(400)  # torch and the model are loaded three times
def test_a_real_models_streams_go_on_where_they_were_cut(fleet: Fleet) -> None:
    """Plain, with an adapter, with logprobs, several choices, penalties, and in a grammar: one kill cuts them all."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    from tests.contract import small_models

    folder, adapter = fleet.folder / "llama", fleet.folder / "lora"
    model = save_llama(folder, torch, hf)
    adapted = small_models.save_lora(folder, adapter)
    arguments = {"model_name_or_path": str(folder), "infer_dtype": "float32", "max_batch_size": 16, "threads": 1,
                 "adapters": {"tuned": str(adapter)}}  # fmt: skip
    real = {"TOKENFLEET_ENGINE": "transformers", "TOKENFLEET_ENGINE_ARGS": json.dumps(arguments)}
    first = fleet.start_worker(env={**real, **paced(PACE_S)}, wait=False)
    fleet.wait_ready(first, 0, 150)
    with Trial(fleet) as trial:
        greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "ignore_eos": True}

        def ask(number: int, **more: Any) -> Job:
            return trial.submit((), prompt=f"question {number}", **{**greedy, **more})

        plain = [ask(k) for k in range(3)]
        tuned = [ask(k, adapter="tuned") for k in range(2)]
        told = ask(5, logprobs=True, top_logprobs=2)
        choices = ask(6, n=2, do_sample=True, temperature=1.0, seed=5)
        held = ask(7, frequency_penalty=0.5, repetition_penalty=1.2)
        shape = {"type": "json_schema", "json_schema": MANY_COLOURS}
        formed = ask(8, response_format=shape, max_new_tokens=1000, ignore_eos=False)
        jobs = [*plain, *tuned, told, choices, held, formed]
        readings = trial.watch(jobs)
        began = time.monotonic()
        trial.until_streaming(10)
        assert time.monotonic() - began > 5 * PACE_S, "the first worker is not paced"
        fleet.start_worker(env=real, wait=False)
        trial.kill(first)
        verdict = trial.judge(timeout_s=150, may_run_plain=True, may_have=["text_differs", "invalid_utf8"])
        assert verdict.cut_streams == len(jobs)
        ids = {reading.job.id: ids_of(reading.events) for reading in readings}
        for job in [*plain, *tuned, told]:
            assert len(ids[job.id]) == TOKENS
            logits = teacher_forced(torch, adapted if job in tuned else model, prompt_of(fleet, job), ids[job.id])
            chosen = logits[torch.arange(TOKENS), torch.tensor(ids[job.id])]
            assert float((logits.max(dim=-1).values - chosen).max()) < TOLERANCE
        entries = told.result(30).choices[0].logprobs
        assert [entry.id for entry in entries] == ids[told.id]
        logprobs = teacher_forced(torch, model, prompt_of(fleet, told), ids[told.id]).log_softmax(dim=-1)
        for place, entry in enumerate(entries):
            assert abs(entry.logprob - float(logprobs[place, entry.id])) < TOLERANCE
            assert len(entry.top) == 2
        penalised(torch, model, prompt_of(fleet, held), ids[held.id])
        colours = json.loads(formed.result(30).choices[0].text)
        assert len(colours) == 60
        assert set(colours) <= set(COLOURS)
        both = choices.result(30).choices
        assert [len(choice.ids) for choice in both] == [TOKENS, TOKENS]
        assert both[0].ids != both[1].ids


def ids_of(events: Any) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.ids]


def prompt_of(fleet: Fleet, job: Job) -> list[int]:
    ids: list[int] = json.loads(ledger_of(fleet, job)["prompt"])
    return ids


def teacher_forced(torch: Any, model: Any, prompt: list[int], ids: list[int]) -> Any:
    """The model's logits for each delivered token, given its own prefix."""
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]


def penalised(torch: Any, model: Any, prompt: list[int], ids: list[int]) -> None:
    """Each token is the best after both penalties, counted over all attempts."""
    logits = teacher_forced(torch, model, prompt, ids)
    for place, chosen in enumerate(ids):
        row = logits[place].clone()
        seen = torch.tensor(sorted({*prompt, *ids[:place]}))
        row[seen] = torch.where(row[seen] > 0, row[seen] / 1.2, row[seen] * 1.2)
        for token in ids[:place]:
            row[token] -= 0.5
        assert float(row.max() - row[chosen]) < TOLERANCE, f"token {place} forgets what was delivered before"

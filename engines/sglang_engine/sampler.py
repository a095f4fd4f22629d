"""Sampling in SGLang's scheduler process, with one meaning of all parameters.

SGLang's own sampling cuts and biases in another order, counts no delivered ids, draws by seed only in a mode that seeds
everything, and gives logprobs of what is left after all that. Nothing in here waits for the GPU, with one exception
that `grammars` explains: SGLang prepares the next step while the GPU computes this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend

from tokenfleet.engines.sglang_engine import compat
from tokenfleet.engines.sglang_engine.grammars import Grammars
from tokenfleet.engines.sglang_engine.history import History
from tokenfleet.engines.sglang_engine.params import KEY
from tokenfleet.engines.sglang_engine.tensors import columns, placed
from tokenfleet.engines.sglang_engine.torch_draw import TorchDraw

_BACKEND = "pytorch"
"""The sampling backend in whose place ours comes (`loading`): with a name of its own it would be dropped on a CPU."""


def register() -> None:
    """In a scheduler's process, before it makes its sampler."""
    compat.carry_rows()
    compat.end_at_stop_ids_alone()
    register_sampler_backend(_BACKEND, FleetSampler)


class FleetSampler(Sampler):
    """One token for each row of a batch. Keeps what follows from the batch's parameters while the batch is the same."""

    def __init__(self) -> None:
        super().__init__()
        self._batch: Batch | None = None

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int] | None],
        positions: torch.Tensor,
        **others: Any,
    ) -> torch.Tensor:
        """``next_token_logits`` ``[rows, vocab]`` to token ids ``[rows]``; ``positions`` ``[rows]`` are those of the
        tokens that the logits follow. Writes logprobs of the model's own distribution to ``logits_output``."""
        raw = logits_output.next_token_logits
        batch = self._batch_of(sampling_info.fleet_rows, raw)
        ids = batch.sample(raw, positions)
        if return_logprob:
            logprobs = torch.log_softmax(raw.float(), dim=-1)
            found = self.output_logprob_processor.compute_logprobs(logprobs, top_logprobs_nums, token_ids_logprobs, ids)
            found.write_output_to(logits_output)
        self._sync_token_ids_across_tp(ids, sampling_info)
        batch.record(ids, positions)
        return ids

    def _batch_of(self, rows: list[Any], raw: torch.Tensor) -> Batch:
        if self._batch is None or self._batch.source is not rows:  # a list is never changed: `compat.carry_rows`
            self._batch = Batch(rows, raw.shape[-1], raw.device)
        return self._batch


class Batch:
    """A fixed list of rows, as `compat.carry_rows` makes them."""

    def __init__(self, source: list[Any], vocab_size: int, device: torch.device) -> None:
        self.source = source
        # SGLang has requests of its own, too.
        self.rows: list[Mapping[str, Any]] = [row if KEY in row else {} for row in source]
        self._vocab_size, self._device = vocab_size, device
        rows, numbered = self.rows, list(enumerate(self.rows))
        whole = columns(rows, {"prompt": 0, "delivered": 0}, torch.int64, device)
        self._prompts, self._least = whole.split(1, dim=1)
        self._draw = _drawing(device)(rows, vocab_size, device)
        self._bias = self._scatter([(p, i, v) for p, row in numbered for i, v in _pairs(row)])
        barred = [(p, i, row["min_tokens"]) for p, row in numbered if "barred" in row for i in row["barred"]]
        self._barred = self._scatter(barred)
        self._history = History(rows, vocab_size, device)
        self._grammars = Grammars(rows, vocab_size, device)

    def sample(self, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids ``[rows]`` for ``raw`` logits ``[rows, vocab]``, which are left as they are."""
        return self._draw(self._scores(raw, positions), positions)

    def record(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """``ids`` ``[rows]`` are what came of it, but for rows whose prompt isn't read to its end yet."""
        if self._history.is_needed or self._grammars.is_needed:
            is_new = positions.long() + 1 - self._prompts[:, 0] >= self._least[:, 0]
            self._history.record(ids, is_new)
            self._grammars.record(ids, is_new)

    def _scores(self, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``raw`` after bias, penalties, bars and grammars: what greedy maximises."""
        if self._bias is None and self._barred is None and not (self._history.is_needed or self._grammars.is_needed):
            return raw
        scores = raw.to(torch.float32, copy=True)
        if self._bias is not None:
            rows, ids, values = self._bias
            scores.index_put_((rows, ids), values, accumulate=True)
        self._history.apply(scores)
        unbarred = scores
        if self._barred is not None:
            rows, ids, least = self._barred
            index = positions.long() + 1 - self._prompts[:, 0]  # of the token to come, in its choice
            if self._grammars.is_needed:
                unbarred = scores.clone()
            scores[rows, ids] = torch.where(index[rows] < least, -torch.inf, scores[rows, ids])
        self._grammars.apply(scores, unbarred)
        return scores

    def _scatter(self, entries: list[tuple[int, int, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        entries = [entry for entry in entries if entry[1] < self._vocab_size]
        if not entries:
            return None
        rows, ids, values = zip(*entries, strict=True)
        place = torch.int64, self._device
        return placed(rows, *place), placed(ids, *place), placed(values, torch.float32, self._device)


def _drawing(device: torch.device) -> Any:
    if device.type != "cuda":
        return TorchDraw
    from tokenfleet.engines.sglang_engine.triton_draw import TritonDraw

    return TritonDraw


def _pairs(row: Mapping[str, Any]) -> Any:
    return zip(row.get("bias_ids", ()), row.get("bias", ()), strict=True)

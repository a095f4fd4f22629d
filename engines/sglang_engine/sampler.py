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
from tokenfleet.engines.sglang_engine.changes import CHANGES, Changes
from tokenfleet.engines.sglang_engine.params import KEY
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
    """A fixed list of rows, as `compat.carry_rows` makes them. It is made anew whenever a request comes or goes."""

    def __init__(self, source: list[Any], vocab_size: int, device: torch.device) -> None:
        self.source = source
        # SGLang has requests of its own, too.
        rows: list[Mapping[str, Any]] = [row if KEY in row else {} for row in source]
        self._draw = _drawing(device)(rows, vocab_size, device)
        is_changed = any(not CHANGES.isdisjoint(row) for row in rows)
        self._changes = Changes(rows, vocab_size, device) if is_changed else None

    def sample(self, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids ``[rows]`` for ``raw`` logits ``[rows, vocab]``, which are left as they are."""
        scores = raw if self._changes is None else self._changes.scores(raw, positions)
        return self._draw(scores, positions)

    def record(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """``ids`` ``[rows]`` are what came of it, but for rows whose prompt isn't read to its end yet."""
        if self._changes is not None:
            self._changes.record(ids, positions)


def _drawing(device: torch.device) -> Any:
    if device.type != "cuda":
        return TorchDraw
    from tokenfleet.engines.sglang_engine.triton_draw import TritonDraw

    return TritonDraw

"""One launch that chooses the next token of every row: what `TorchDraw` does on a CPU.

Some forty launches a step were a sixth of a small model's step, all of it the scheduler's time; and sorting a whole
vocabulary for top_p took longer than the model. Here each row is one program. It finds the lowest score that is kept by
quartering the range between scores that are there, then the place where the row's number falls among the weights of
those kept, in the order of ids. Of candidates with the same score the first are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenfleet.engines.sglang_engine import draw_kernel, uniform
from tokenfleet.engines.sglang_engine.tensors import columns

_TILE = 4096
_WARPS = 16


class TritonDraw:
    """See `TorchDraw`. Scores of 16 or 32 bits, on a GPU."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], vocab_size: int, device: torch.device) -> None:
        # Greedy rows have a temperature of 0.
        greedy = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0}
        sampled = [row if "seed" in row else {} for row in rows]
        self._floats = columns(sampled, greedy, torch.float32, device)
        self._whole = columns(rows, {"top_k": 0, "seed": 0, "prompt": 0}, torch.int64, device)
        self._whole[:, 1] = uniform.streams(self._whole[:, 1])

    def __call__(self, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        count, vocab = scores.shape
        ids = torch.empty(count, dtype=torch.int64, device=scores.device)
        inputs = scores, positions.long(), self._floats, self._whole
        draw_kernel.draw[(count,)](*inputs, ids, scores.stride(0), vocab, tile=_TILE, num_warps=_WARPS)
        return ids

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

from tokenfleet.engines.sglang_engine import draw_kernel
from tokenfleet.engines.sglang_engine.tensors import placed

_TILE = 4096
_WARPS = 16
_CELLS = "cells"


class TritonDraw:
    """See `TorchDraw`. Scores of 16 or 32 bits, on a GPU."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], vocab_size: int, device: torch.device) -> None:
        cells = [row.get(_CELLS) or _cells(row) for row in rows]
        self._floats = placed([floats for floats, _ in cells], torch.float32, device)
        self._whole = placed([whole for _, whole in cells], torch.int64, device)

    def __call__(self, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        count, vocab = scores.shape
        ids = torch.empty(count, dtype=torch.int64, device=scores.device)
        inputs = scores, positions.long(), self._floats, self._whole
        draw_kernel.draw[(count,)](*inputs, ids, scores.stride(0), vocab, tile=_TILE, num_warps=_WARPS)
        return ids


def _cells(row: Mapping[str, Any]) -> Any:
    """What the kernel wants of a row, kept with it: a batch is made anew whenever any request comes or goes."""
    # The greedy choice is that of temperature 0.
    floats = (row["temperature"], row["top_p"], row["min_p"]) if "seed" in row else (0.0, 1.0, 0.0)
    cells = floats, (row.get("top_k", 0), row.get("seed", 0), row.get("prompt", 0))
    if isinstance(row, dict):
        row[_CELLS] = cells
    return cells

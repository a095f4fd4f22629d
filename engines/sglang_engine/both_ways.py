"""In a scheduler process: what of a prompt is read in both directions, beside SGLang's own attention, which looks back
only: blocks of tokens that attend to one another whatever their order, and to what stands before the block.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

OF_IMAGES: Final = "images"
"""Each run of an image's tokens is a block: Gemma 3's."""
OF_PROMPT: Final = "prompt"
"""All that is there before the answer is one: PaliGemma's."""


class Block:
    """Tokens of one request, from ``begin`` on and before ``end``, of which ``rows`` are read in this step."""

    def __init__(self, request: Any, begin: int, end: int, read: range, first_row: int) -> None:
        start, self.end = max(begin, read.start), min(end, read.stop)
        self.request, self.begin, self.start = request, begin, start
        self.rows = slice(first_row + start - read.start, first_row + self.end - read.start)


def blocks(batch: Any, both_ways: str) -> list[Block]:
    if not batch.forward_mode.is_extend() or batch.extend_prefix_lens_cpu is None:
        return []
    rows = getattr(batch.sampling_info, "fleet_rows", None)
    found, first_row = [], 0
    for place, (before, count) in enumerate(zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)):
        read = range(before, before + count)
        if both_ways == OF_PROMPT:
            spans = [(0, rows[place]["prompt"])] if rows and "prompt" in rows[place] else []
        else:
            given = batch.mm_inputs[place] if batch.mm_inputs else None
            spans = [(first, last + 1) for item in (given.mm_items if given else []) for first, last in item.offsets]
        for begin, end in spans:
            if max(begin, before) < min(end, before + count):
                found.append(Block(batch.req_pool_indices[place], begin, end, read, first_row))
        first_row += count
    return found


def attention(layer: Any, block: Block, queries: Any, keys: Any, values: Any) -> torch.Tensor:
    """``[rows, heads, width]``. ``keys`` and ``values``: of all tokens up to the block's end."""
    mask = None
    if 0 <= layer.sliding_window_size < block.end - 1:
        own = torch.arange(block.end, device=queries.device)
        mask = own[None, :] >= own[block.start :, None] - layer.sliding_window_size
        mask |= own[None, :] >= block.begin
    q, k, v = (each.to(queries.dtype).movedim(0, 1)[None] for each in (queries, keys, values))
    seen: torch.Tensor
    if layer.logit_cap:
        seen = _capped(q, k, v, mask=mask, scale=layer.scaling, cap=layer.logit_cap)
    else:
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scaling, enable_gqa=True)
    return seen[0].movedim(0, 1)


def _capped(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, mask: Any, scale: float, cap: float
) -> torch.Tensor:
    """Gemma 2's attention: no score is further from 0 than ``cap``."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(groups, dim=1) for each in (keys, values))
    scores = cap * torch.tanh((queries @ keys.transpose(-1, -2)).float() * scale / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(values.dtype) @ values

"""In vLLM's core on a CPU: what an image's tokens attend to, where a model reads images in both directions (Gemma 3).

vLLM's attention for CPUs leaves out that they attend to what comes later, and says nothing
(vllm/v1/attention/backends/cpu_attn.py, 0.32); its backends for GPUs have it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_BOTH_WAYS = frozenset({"Gemma3ForConditionalGeneration"})


def arguments(architectures: Collection[str]) -> dict[str, Any]:
    """Of vLLM's arguments on a CPU, what these models need: a step has all keys that an image's tokens attend to."""
    if not _BOTH_WAYS & set(architectures):
        return {}
    return {"enable_chunked_prefill": False, "enable_prefix_caching": False}


def install() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

    build, forward = CPUAttentionMetadataBuilder.build, CPUAttentionBackendImpl.forward

    def built(builder: Any, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        made = build(builder, common_prefix_len, common, fast_build)
        made.fleet_blocks = _blocks(common)
        return made

    def forwarded(
        impl: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any, **rest: Any
    ) -> Any:
        result = forward(impl, layer, query, key, value, cache, metadata, output, **rest)
        for first, begin, end in getattr(metadata, "fleet_blocks", ()):
            seen = _attention(impl, query[begin:end], key[first:end], value[first:end])
            output[begin:end] = seen.reshape(output[begin:end].shape)
        return result

    CPUAttentionMetadataBuilder.build = built
    CPUAttentionBackendImpl.forward = forwarded


def _blocks(common: Any) -> list[tuple[int, int, int]]:
    """Rows of this step: where an image's prompt begins, where the image does, and what comes after it."""
    ranges = getattr(common, "mm_req_doc_ranges", None)
    if not ranges:
        return []
    starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
    return [
        (starts[row], starts[row] + first, starts[row] + last + 1)
        for row, images in ranges.items()
        if starts[row + 1] - starts[row] == lengths[row]  # a prompt is read, all of it
        for first, last in images
    ]


def _attention(impl: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[rows, heads, width]``, of an image's tokens, which are the last of ``keys``."""
    own = torch.arange(len(keys))
    mask = None
    if impl.sliding_window > 0:
        begin = len(keys) - len(queries)
        mask = (own[None, :] > own[begin:, None] - impl.sliding_window) | (own[None, :] >= begin)
    q, k, v = (each.movedim(0, 1)[None] for each in (queries, keys, values))
    seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=impl.scale, enable_gqa=True)
    return seen[0].movedim(0, 1)

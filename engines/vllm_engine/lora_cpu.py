"""LoRA on vLLM's CPU backend by adapter, not by token.

vLLM's own kernels for CPUs (vllm/lora/ops/torch_ops/lora_ops.py, 0.32) copy an adapter's matrices once for each token
of a step: 10 MB a token with a model of 135M. Of a step that reads prompts that is most of the time, and the first step
after a takeover reads all that a dead worker's chats have said. Here the tokens of a step that have one adapter are
multiplied with its matrices together, and those without an adapter cost nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

_KNOWN = ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs")
"""The parameters of `PunicaWrapperCPU.add_lora_linear` that this was written for."""

_LONG = 16
"""Runs of fewer tokens (answers give one each) are gathered: that costs less than a multiplication for each."""

Part = tuple[int, slice | torch.Tensor]
"""An adapter's place in the stacked matrices, and rows of a step that have it."""


def install() -> None:
    """In the process that computes. On a GPU, or with a vLLM whose wrapper is another one, nothing is changed."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if fits(PunicaWrapperCPU):
        replace(PunicaWrapperCPU)


def fits(wrapper: Any) -> bool:
    return tuple(inspect.signature(wrapper.add_lora_linear).parameters) == _KNOWN


def replace(wrapper: Any) -> None:
    """``wrapper``: a class, `PunicaWrapperCPU` or one that is made of it."""
    update = wrapper.update_metadata

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        self.parts = parts(self.token_lora_indices)

    def add_lora_linear(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any,
        *, buffer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        add(y, x, lora_a_stacked, lora_b_stacked, output_slices, self.parts, scale)

    wrapper.parts = ()
    wrapper.update_metadata, wrapper.add_lora_linear = update_metadata, add_lora_linear


def parts(indices: torch.Tensor) -> list[Part]:
    """``indices`` ``[tokens]``: each token's adapter, -1 for none."""
    places, counts = torch.unique_consecutive(indices, return_counts=True)
    runs: dict[int, list[slice]] = {}
    end = 0
    for place, count in zip(places.tolist(), counts.tolist(), strict=True):
        end += count
        if place >= 0:
            runs.setdefault(place, []).append(slice(end - count, end))
    found: list[Part] = []
    for place, of_it in runs.items():
        rows = (indices == place).nonzero().flatten()
        if len(of_it) > 1 and len(rows) < _LONG * len(of_it):
            found.append((place, rows))
        else:
            found += [(place, run) for run in of_it]
    return found


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    stacked_a: Sequence[torch.Tensor],
    stacked_b: Sequence[torch.Tensor],
    widths: Sequence[int],
    where: Sequence[Part],
    scale: float,
) -> None:
    """Add to ``y`` ``[tokens, sum of widths]`` what adapters make of ``x`` ``[tokens, in]``, each slice of ``y`` by
    matrices A ``[adapters, 1, rank, in]`` and B ``[adapters, 1, width, rank]`` of its own."""
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    for place, rows in where:
        chosen, begin = x[rows], 0
        for a, b, width in zip(stacked_a, stacked_b, widths, strict=True):
            inner, out = torch.mm(chosen, a[place, 0].T.to(x.dtype)), b[place, 0].T.to(x.dtype)
            target = y[:, begin : begin + width]
            if isinstance(rows, slice):
                target[rows].addmm_(inner, out, alpha=scale)
            else:
                target.index_add_(0, rows, torch.mm(inner, out), alpha=scale)
            begin += width

"""Random numbers that are functions of (key, index of the token), and what they pick, computed where the logits are.

Each operation here is one launch of a kernel by the scheduler, whose time is what limits a small model."""

from __future__ import annotations

import torch

# splitmix64 (Steele, Lea and Flood, 2014), in the two's complement that torch's int64 wraps in.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)

_BLOCK = 128
"""Divides nearly all vocabularies."""


def streams(keys: torch.Tensor) -> torch.Tensor:
    """Where the numbers of each of ``keys`` (int64) begin."""
    return _mixed(keys) + _STEP


def uniform(streams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Number ``index`` (int64) of each of ``streams``: float64 in [0, 1) with 53 random bits, in their common shape."""
    return _shifted(_mixed(torch.add(streams, index, alpha=_STEP)), 11).double().mul_(2.0**-53)


def inverse(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """``[rows]``: the place in each row of ``weights`` ``[rows, width]`` where its number ``[rows, 1]`` falls,
    if each place has a share of [0, 1) as large as its weight. Never a place of no weight, unless all are."""
    rows, width = weights.shape
    if width <= 2 * _BLOCK:
        sums = weights.double().cumsum(dim=-1)
        return _place(sums, numbers * sums[:, -1:])[:, 0]
    # First the block of places, then the place in it: sums over a whole vocabulary are the costliest step of a draw.
    if width % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -width % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    sums = torch.nn.functional.pad(blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1), (1, 0))
    target = numbers * sums[:, -1:]
    block = _place(sums[:, 1:], target)
    within = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(dim=-1)
    return (block * _BLOCK + _place(within, target - sums.gather(1, block)))[:, 0]


def _place(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``[rows, 1]``: the first place whose sum is above ``target``, or the first that has all of it."""
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(sums.contiguous(), torch.minimum(target, below), right=True).clamp_(
        max=sums.shape[-1] - 1
    )


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right: torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

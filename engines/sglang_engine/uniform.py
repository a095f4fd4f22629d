"""Random numbers that are functions of (key, index of the token), computed where the logits are."""

from __future__ import annotations

import torch

# splitmix64 (Steele, Lea and Flood, 2014), in the two's complement that torch's int64 wraps in.
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


def streams(keys: torch.Tensor) -> torch.Tensor:
    """Where the numbers of each of ``keys`` (int64) begin."""
    return _mixed(keys) + STEP


def uniform(streams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Number ``index`` (int64) of each of ``streams``: float64 in [0, 1) with 53 random bits, in their common shape."""
    return _shifted(_mixed(torch.add(streams, index, alpha=STEP)), 11).double().mul_(2.0**-53)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right: torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

"""From lists to tensors on the GPU without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def placed(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.tensor(values, device=…)`` would wait until the GPU has done all that it was told before."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def columns(
    rows: Sequence[Mapping[str, Any]], defaults: Mapping[str, float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``[rows, len(defaults)]``: what each row has under these names."""
    return placed([[row.get(name, value) for name, value in defaults.items()] for row in rows], dtype, device)

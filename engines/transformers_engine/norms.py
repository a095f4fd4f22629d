"""RMS norms on a CPU in four operations instead of nine.

transformers' own spell each out in pow, mean, rsqrt, two products and casts to float32 that change nothing there; for a
few rows each costs its call, not its numbers. SmolLM2-135M has 61 norms: 3.5 to 4.8 ms of a decode step of 44 to 77 ms.
"""

from __future__ import annotations

import torch
from torch import nn


class PlainRMSNorm(nn.Module):
    """Computes what the norm it was made from computes on float32, within rounding: ``weight * x / rms(x)``."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = epsilon
        self._epsilon = torch.tensor(epsilon)
        self._share = 1.0 / weight.numel()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
        scale = torch.addcmul(self._epsilon, norm, norm, value=self._share).rsqrt_()
        return (hidden_states * scale).mul_(self.weight)


def simplify_norms(model: nn.Module) -> int:
    """Replace the float32 RMS norms of ``model`` that compute the same numbers, in place; gives how many."""
    found = [
        (parent, name, simple)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (simple := _simplified(child)) is not None
    ]
    for parent, name, simple in found:
        setattr(parent, name, simple)
    return len(found)


def _simplified(norm: nn.Module) -> PlainRMSNorm | None:
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not type(norm).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter):
        return None
    if not isinstance(epsilon, float) or weight.dim() != 1 or len(list(norm.parameters())) != 1:
        return None
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    simple = PlainRMSNorm(weight, epsilon)
    # By name alone one wouldn't know: Gemma's weights are offsets from one, others' norms have groups or gates.
    x = torch.linspace(-3, 5, 2 * weight.numel()).view(1, 2, -1) * torch.tensor([[1e-3], [1.0]])
    with torch.no_grad():
        try:
            is_same = torch.allclose(simple(x), norm(x), rtol=1e-5, atol=1e-6)
        except (RuntimeError, TypeError, ValueError):
            return None
    return simple if is_same else None

"""Linear layers for small batches on a CPU: weights reordered once for oneDNN's blocked kernels.

torch's own float32 linear calls a GEMM that is slow for 2 to 16 rows. With SmolLM2-135M on 2 AVX2 cores the output
head takes 28 ms for 16 rows, reordered 11 ms; at 4 rows a whole step's linear layers take 95 ms, reordered 41 ms
(bench/transformers_batching.py prints both). torch.compile's "freezing" does the same with the same two operators.
"""

from __future__ import annotations

import torch
from torch import nn

_ROWS_HINT = 128
"""The batch that the layout is chosen for; layouts chosen for one row are very slow for others, this one
is as quick for 1 to 16 rows as one chosen for 16, or a little quicker."""
_LEAST_WEIGHTS = 1 << 16
"""Below this the call costs more than the layout saves."""


class PackedLinear(nn.Module):
    """Computes what the ``nn.Linear`` it was made from computes, within float32 rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS_HINT)
        self.bias = linear.bias
        # Code that asks a layer for its dtype or device reads its weight; this one holds no memory.
        self.weight = torch.empty(0, dtype=linear.weight.dtype).expand(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> int:
    """Replace the large float32 linear layers of ``model``, in place; gives how many. 0 where torch can't do it."""
    if not _works():
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and child.weight.numel() >= _LEAST_WEIGHTS
        and child.weight.dtype == torch.float32
        and child.weight.device.type == "cpu"
    ]
    for parent, name, linear in found:
        setattr(parent, name, PackedLinear(linear))
    return len(found)


def _works() -> bool:
    """Whether this build of torch has the operators and they compute a linear layer."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear = nn.Linear(96, 64)
    with torch.no_grad():
        try:
            packed = PackedLinear(linear)
            x = torch.linspace(-1, 1, 3 * 96).view(1, 3, 96)
            return bool(torch.allclose(packed(x), linear(x), atol=1e-4))
        except (AttributeError, RuntimeError, NotImplementedError):
            return False

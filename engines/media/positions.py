"""Positions in prompts of Qwen-VL, three numbers a token, where transformers' are not those of the model's training."""

from __future__ import annotations

import torch


def go_on_after_videos(positions: torch.Tensor, types: torch.Tensor) -> None:
    """Change ``positions`` ``[3, tokens]`` in place. ``types`` ``[tokens]``: 0 for text, others for media.

    After a medium, Qwen's own code goes on after the greatest number in it, as vLLM and SGLang do, and transformers
    before 5. transformers 5 (5.19) goes on by height and width alone, also after a video with more frames than that, so
    that its text stands at numbers its last frames have. Nothing changes where both say the same, as after images."""
    ends = ((types[:-1] != 0) & (types[1:] == 0)).nonzero()[:, 0] + 1
    for end in ends.tolist():
        missing = positions[:, :end].max() + 1 - positions[:, end].min()
        positions[:, end:] += missing.clamp(min=0)

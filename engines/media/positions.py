"""Positions in prompts of Qwen-VL, three numbers a token, where transformers' are not those of the model's training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

VIDEO = 2
"""In ``types``, as transformers numbers them: 0 for text, 1 for an image, 2 for a video, 3 for an audio."""


def space_frames(
    positions: torch.Tensor, types: torch.Tensor, grids: Sequence[Sequence[int]], seconds: Sequence[float], rate: float
) -> None:
    """Change ``positions`` ``[3, tokens]`` in place: each video's steps stand as far apart as they are in time.

    ``grids``: steps, height and width of each video; ``seconds``: how long a step lasts; ``rate``: positions a second.
    transformers before 5.18 leaves out fractions of a second; with later ones nothing changes."""
    is_video = torch.cat([types.new_zeros(1), (types == VIDEO).to(types.dtype), types.new_zeros(1)])
    edges = is_video.diff().nonzero()[:, 0].view(-1, 2).tolist()
    for (begin, end), (steps, *_), second in zip(edges, grids, seconds, strict=True):
        times = (torch.arange(int(steps)) * (rate * second)).long()
        positions[0, begin:end] = positions[1, begin] + times.repeat_interleave((end - begin) // int(steps))


def go_on_after_videos(positions: torch.Tensor, types: torch.Tensor) -> None:
    """Change ``positions`` ``[3, tokens]`` in place, by ``types`` ``[tokens]``.

    After a medium, Qwen's own code goes on after the greatest number in it, as vLLM and SGLang do, and transformers
    before 5. transformers 5 (5.19) goes on by height and width alone, also after a video with more frames than that, so
    that its text stands at numbers its last frames have. Nothing changes where both say the same, as after images."""
    ends = ((types[:-1] != 0) & (types[1:] == 0)).nonzero()[:, 0] + 1
    for end in ends.tolist():
        missing = positions[:, :end].max() + 1 - positions[:, end].min()
        positions[:, end:] += missing.clamp(min=0)

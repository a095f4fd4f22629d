"""Videos for Qwen-VL's processors where torchvision is not installed: frames go through the image processor.

It lays an image out as patches that hold the same picture ``temporal_patch_size`` times; a video's patches hold that
many frames instead, so frames are processed one by one and their patches are interleaved.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_SIZES = {14: (128 * 28 * 28, 28 * 28 * 768), 16: (128 * 32 * 32, 32 * 32 * 768)}
"""By patch size: the least and most pixels of a frame in transformers' video processors for Qwen2-VL and Qwen3-VL."""


class FramesAsImages:
    """Stands in for a `BaseVideoProcessor`."""

    def __init__(self, image_processor: Any, size: dict[str, int]) -> None:
        self._image_processor = image_processor
        self.size = size
        self.patch_size: int = image_processor.patch_size
        self.temporal_patch_size: int = image_processor.temporal_patch_size
        self.merge_size: int = image_processor.merge_size
        self.model_input_names = ["pixel_values_videos", "video_grid_thw"]

    @classmethod
    def of(cls, folder: Path, image_processor: Any) -> FramesAsImages | None:
        """None for a model that is not made like this."""
        if not hasattr(image_processor, "temporal_patch_size") or not hasattr(image_processor, "merge_size"):
            return None
        least, most = _SIZES.get(image_processor.patch_size, _SIZES[14])
        settings = _settings(folder)
        found = settings.get("size") or {}
        size = {
            "shortest_edge": found.get("shortest_edge") or settings.get("min_pixels") or least,
            "longest_edge": found.get("longest_edge") or settings.get("max_pixels") or most,
        }
        return cls(image_processor, size)

    def __call__(self, videos: list[list[Any]], *, video_metadata: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        pixels, grids = [], []
        for frames in videos:
            made = self._image_processor(frames, size=self.size, return_tensors="pt")
            per_frame = made["image_grid_thw"][0].prod().item()
            channels_first = made["pixel_values"].view(
                len(frames), per_frame, -1, self.temporal_patch_size, self.patch_size**2
            )[:, :, :, 0]
            missing = -len(frames) % self.temporal_patch_size
            channels_first = torch.cat([channels_first, channels_first[-1:].repeat(missing, 1, 1, 1)])
            # [groups, frames of a group, patches, channels, pixels] -> [groups * patches, channels, frames, pixels]
            grouped = channels_first.unflatten(0, (-1, self.temporal_patch_size)).permute(0, 2, 3, 1, 4)
            pixels.append(grouped.flatten(0, 1).flatten(1))
            grids.append([len(grouped), *made["image_grid_thw"][0, 1:].tolist()])
        return {
            "pixel_values_videos": torch.cat(pixels),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": [SimpleNamespace(**each, sampled_fps=each["fps"]) for each in video_metadata],
        }


def _settings(folder: Path) -> dict[str, Any]:
    """What the checkpoint says about its videos; older ones say it with the images."""
    for name, part in (
        ("video_preprocessor_config.json", None),
        ("processor_config.json", "video_processor"),
        ("preprocessor_config.json", None),
    ):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found.get(part) if part else found
            if isinstance(found, dict):
                return found
    return {}

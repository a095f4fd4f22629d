"""LoRA adapters as vLLM wants them: one a request. What is to be applied together is made one adapter here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenfleet.wire.errors import ConfigurationError

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's (`vllm.config.lora.MaxLoRARanks`)."""
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class LoraFolder:
    """An adapter's folder, its ``adapter_config.json`` and its greatest rank."""

    path: Path
    config: dict[str, Any]
    rank: int


def read(folder: Path, *, allow_pickle: bool) -> LoraFolder:
    """Raises `ConfigurationError` for what is no LoRA, or one that only a pickle holds."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{folder.name!r} is no LoRA adapter: its adapter_config.json is missing or has no rank."
        ) from error
    if not allow_pickle and not (folder / _WEIGHTS).is_file():
        raise ConfigurationError(
            f"The adapter {folder.name!r} has no {_WEIGHTS}.",
            hint="Pickled weights can run code when loaded; set allow_pickle only for an adapter you trust.",
        )
    return LoraFolder(folder, config, rank)


def greatest_rank(adapters: Sequence[LoraFolder], limit: int | None) -> int:
    """The rank to load vLLM for. ``limit``: vllm_max_lora_rank. Raises `ConfigurationError`."""
    needed = max(adapter.rank for adapter in adapters)
    fitting = [rank for rank in _RANKS if rank >= (limit or needed)]
    if not fitting or (limit is not None and needed > limit):
        raise ConfigurationError(
            f"An adapter has rank {needed}, and vllm_max_lora_rank is {limit}."
            if limit is not None and needed > limit
            else f"vLLM has no rank as great as {limit or needed}.",
            hint=f"vLLM's ranks are {', '.join(map(str, _RANKS))}.",
        )
    return fitting[0]


def joined(adapters: Sequence[LoraFolder], folder: Path) -> LoraFolder:
    """One adapter, written to ``folder``, that adds what all of ``adapters`` add.

    The sum of LoRAs is a LoRA of the sum of their ranks: A's rows and B's columns side by side, each B times its own
    scaling. Exact, and cheaper than a merged copy of the model's weights; the order makes no difference."""
    if len(adapters) == 1:
        return adapters[0]
    from safetensors.torch import save_file

    parts = [_scaled(adapter) for adapter in adapters]
    rank = sum(adapter.rank for adapter in adapters)
    weights: dict[str, Any] = {}
    for module in sorted({module for part in parts for module in part}):
        pairs = [part[module] for part in parts if module in part]
        weights |= _side_by_side(module, pairs, rank)
    modules = sorted({module.rsplit(".", 1)[-1] for part in parts for module in part})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    folder.mkdir(parents=True)
    save_file(weights, folder / _WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return LoraFolder(folder, config, rank)


def _side_by_side(module: str, pairs: Sequence[tuple[Any, Any]], rank: int) -> dict[str, Any]:
    """``pairs``: A ``[r, in]`` and B ``[out, r]`` of each part; zeros fill them up to ``rank``."""
    import torch

    a = torch.cat([a for a, _ in pairs])
    b = torch.cat([b for _, b in pairs], dim=1)
    missing = rank - a.shape[0]
    return {
        f"{module}.lora_A.weight": torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous(),
        f"{module}.lora_B.weight": torch.nn.functional.pad(b, (0, missing)).contiguous(),
    }


def _scaled(adapter: LoraFolder) -> dict[str, tuple[Any, Any]]:
    """Module → A and B with the adapter's scaling in B."""
    from safetensors.torch import load_file

    config, name = adapter.config, adapter.path.name
    odd = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    if odd or not (adapter.path / _WEIGHTS).is_file():
        reason = f"it has {odd[0]}" if odd else f"it has no {_WEIGHTS}"
        raise ConfigurationError(
            f"The adapter {name!r} can't be joined with another for vLLM: {reason}.",
            hint="Merge it into the model beforehand, or serve the model with transformers.",
        )
    scaling = config.get("lora_alpha", config["r"]) / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    weights = load_file(adapter.path / _WEIGHTS)
    found = {}
    for key, a in weights.items():
        module, _, part = key.partition(".lora_A.weight")
        if part == "" and module != key:
            found[module] = (a, weights[f"{module}.lora_B.weight"] * scaling)
        elif module == key and not key.endswith(".lora_B.weight"):
            raise ConfigurationError(f"The adapter {name!r} can't be joined with another for vLLM: it has {key}.")
    return found

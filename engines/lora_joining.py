"""Several LoRA adapters as one, and one with scalings of its own for some modules as one with a single scaling."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenfleet.engines.folders import Folders
from tokenfleet.engines.lora import PREFIX, WEIGHTS, LoraFolder, check_fits, read
from tokenfleet.wire.errors import ConfigurationError

Choices = Mapping[str | None, LoraFolder]
"""By the adapter that a request asks for; None: for none."""


def choices(folders: Folders, files: ExitStack, *, allow_pickle: bool, saved: Collection[str] = ()) -> Choices:
    """One adapter for each choice that a request has, on top of those that all requests get. What has to be written for
    that is removed when ``files`` is closed. Raises `ConfigurationError`."""

    def checked(folder: Path) -> LoraFolder:
        adapter = read(folder, allow_pickle=allow_pickle, saved=saved)
        check_fits(adapter, folders.model)
        return adapter

    always = [checked(folder) for folder in folders.fixed]
    named: dict[str | None, list[LoraFolder]] = {None: always} if always else {}
    for name, folder in folders.chosen.items():
        named[name] = [*always, checked(folder)]
    place = Path()
    if any(len(each) > 1 or not each[0].is_uniform for each in named.values()):
        place = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="tokenfleet-lora-")))
    return {name: joined(each, place / str(i)) for i, (name, each) in enumerate(named.items())}


def joined(adapters: Sequence[LoraFolder], folder: Path) -> LoraFolder:
    """One adapter that adds what all of ``adapters`` add; written to ``folder`` unless it is the only one and uniform.

    The sum of LoRAs is a LoRA of the sum of their ranks: A's rows and B's columns side by side, each B times its own
    scaling. Exact, and cheaper than a merged copy of the model's weights; the order makes no difference."""
    if len(adapters) == 1 and adapters[0].is_uniform:
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
    save_file(weights, folder / WEIGHTS)
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
    """Module → A and B with the adapter's scaling in B, float32: a scaling is seldom exact in 16 bits."""
    from safetensors.torch import load_file

    config, name = adapter.config, adapter.path.name
    odd = "modules_to_save" if config.get("modules_to_save") else None
    if odd or not (adapter.path / WEIGHTS).is_file():
        raise _not_joined(name, odd) if odd else _not_joined(name, f"no {WEIGHTS}")
    weights = load_file(adapter.path / WEIGHTS)
    found = {}
    for key, a in weights.items():
        module, _, part = key.partition(".lora_A.weight")
        if part == "" and module != key:
            scaling = _scaling(config, module.removeprefix(PREFIX), a.shape[0])
            found[module] = (a.float(), weights[f"{module}.lora_B.weight"].float() * scaling)
        elif module == key and not key.endswith(".lora_B.weight"):
            raise _not_joined(name, key)
    return found


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """As peft has it: the first pattern that is the whole name or an end of it after a dot counts."""
    alphas = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(matching, config.get("lora_alpha", config["r"]))
    return float(alpha) / float(rank) ** (0.5 if config.get("use_rslora") else 1)


def _not_joined(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"The adapter {name!r} can't be joined with another: it has {what}.",
        hint="Merge it into the model beforehand, or serve the model with transformers.",
    )

"""LoRA adapters in SGLang, which computes some modules of a layer together and takes them together, or loses some."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenfleet.engines.lora import PREFIX, WEIGHTS, LoraFolder
from tokenfleet.engines.tensors import names_in, shapes_in
from tokenfleet.wire.errors import ConfigurationError

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""`sglang.srt.lora.lora` makes one of each: k_proj and v_proj without q_proj, or up_proj without gate_proj, end the
scheduler with the first request, q_proj without v_proj its start."""
_ALIKE = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}
"""Of one height."""


def completed(adapter: LoraFolder, model: Path, folder: Path) -> LoraFolder:
    """``adapter`` with zeros for what it leaves alone of modules that are computed together; written to ``folder``
    if it leaves any. Raises `ConfigurationError`."""
    import torch

    if not (adapter.path / WEIGHTS).is_file():
        return adapter
    names = names_in(adapter.path / WEIGHTS)
    # SGLang's backend for CPUs (sglang/srt/lora/backend/torch_backend.py) takes lm_head's rows, one a request where
    # prompts are read, for the tokens': others' adapters are applied. Those for GPUs know better (lmhead_mixing.py).
    if not torch.cuda.is_available() and any(".lm_head.lora_" in name for name in names):
        raise ConfigurationError(
            f"SGLang can't apply the adapter {adapter.path.name!r} on a CPU: it has lm_head.",
            hint="Serve the model with vllm or transformers.",
        )
    missing = dict(_missing({name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}))
    if not missing:
        return adapter
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter.path / WEIGHTS)
    shapes = {name: shape for file in model.glob("*.safetensors") for name, shape in shapes_in(file)}
    for module, beside in missing.items():
        a = weights[f"{beside}.lora_A.weight"]
        weights[f"{module}.lora_A.weight"] = torch.zeros_like(a)
        height = _height(module, weights, shapes, adapter.path.name)
        weights[f"{module}.lora_B.weight"] = torch.zeros(height, a.shape[0], dtype=a.dtype)
    modules = sorted({*adapter.config["target_modules"], *(module.rsplit(".", 1)[-1] for module in missing)})
    config = {**adapter.config, "target_modules": modules}
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return LoraFolder(folder, config, adapter.rank)


def _missing(modules: set[str]) -> list[tuple[str, str]]:
    """Modules that are not there, each with one beside it that is."""
    found = []
    for module in sorted(modules):
        stem, _, last = module.rpartition(".")
        for group in _TOGETHER:
            if last in group:
                found += [(f"{stem}.{other}", module) for other in group if f"{stem}.{other}" not in modules]
    return found


def _height(module: str, weights: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], name: str) -> int:
    stem, _, last = module.rpartition(".")
    own = shapes.get(f"{module.removeprefix(PREFIX)}.weight")
    if own is not None:
        return own[0]
    alike = weights.get(f"{stem}.{_ALIKE.get(last)}.lora_B.weight")
    if alike is None:
        raise ConfigurationError(
            f"SGLang can't apply the adapter {name!r}: it has no {last}, and the model's is not to be found.",
            hint="Serve the model with vllm or transformers.",
        )
    return int(alike.shape[0])

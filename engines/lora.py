"""LoRA adapters as vLLM and SGLang want them: one a request, of one scaling. What is more than that is made one here,
and what neither can apply is refused before they start: they would leave it out, or fail with the first request.

    read(folder)  ->  check_fits(adapter, model)  ->  lora_joining.joined(adapters, where to write)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenfleet.engines.tensors import shapes_in
from tokenfleet.wire.errors import ConfigurationError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of the names of modules in peft's files."""
_LAYER = re.compile(r"^(.*?\.)(\d+)\.")

_ALONE = frozenset(
    {
        "peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
        "peft_version", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "bias", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
        "parent_library",
    }
)  # fmt: skip
"""Of an ``adapter_config.json``: what changes nothing beside the weights that are there, or is computed here. Of
anything else that is set, engines know nothing (`vllm.lora.peft_helper`, `sglang.srt.lora.lora_config`)."""
_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Values of ``init_lora_weights`` that leave the model's own weights alone (as `vllm.lora.peft_helper` has it)."""


@dataclass(frozen=True, slots=True)
class LoraFolder:
    """An adapter's folder, its ``adapter_config.json`` and its greatest rank."""

    path: Path
    config: Mapping[str, Any]
    rank: int

    @property
    def is_uniform(self) -> bool:
        """Whether any engine takes its scaling, and what it applies to, for what they are."""
        given = self.config
        odd = any(given.get(key) for key in ("use_rslora", "rank_pattern", "alpha_pattern"))
        return not odd and isinstance(given.get("target_modules", []), list)


def read(folder: Path, *, allow_pickle: bool, saved: Collection[str] = ()) -> LoraFolder:
    """``saved``: modules that an adapter may bring whole. Raises `ConfigurationError` for what is no plain LoRA, or one
    that only a pickle holds."""
    config = config_of(folder)
    try:
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_adapter(folder) from error
    check_weights(folder, allow_pickle=allow_pickle)
    if (odd := _odd(config, saved)) is not None:
        raise ConfigurationError(
            f"The adapter {folder.name!r} is no plain LoRA: it has {odd}.",
            hint="Merge it into the model beforehand, or serve the model with transformers.",
        )
    return LoraFolder(folder, config, rank)


def config_of(folder: Path) -> dict[str, Any]:
    """Raises `ConfigurationError`."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise _no_adapter(folder) from error
    if not isinstance(config, dict):
        raise _no_adapter(folder)
    return config


def check_weights(folder: Path, *, allow_pickle: bool) -> None:
    if not allow_pickle and not (folder / WEIGHTS).is_file():
        raise ConfigurationError(
            f"The adapter {folder.name!r} has no {WEIGHTS}.",
            hint="Pickled weights can run code when loaded; set allow_pickle only for an adapter you trust.",
        )


def changes_model(config: Mapping[str, Any]) -> str | None:
    """What of an adapter changes the model it is beside, for requests without it, too; None if nothing does."""
    if config.get("bias") not in {None, "none"}:
        return f"bias={config['bias']}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        return f"init_lora_weights={start}"
    return None


def _odd(config: Mapping[str, Any], saved: Collection[str]) -> str | None:
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        return f"peft_type={config['peft_type']}"
    if (odd := changes_model(config)) is not None:
        return odd
    for name, value in config.items():
        if name == "modules_to_save" and set(value or ()) <= set(saved):
            continue
        if value and name not in _ALONE:
            return name
    return None


def check_fits(adapter: LoraFolder, model: Path) -> None:
    """Raises `ConfigurationError` for an adapter of another model, as far as the names and shapes of weights tell."""
    shapes = dict(_shapes(model))
    layers = [match for name in shapes if (match := _LAYER.match(name))]
    stems, places = {layer[0] for layer in layers}, {layer[1] for layer in layers}
    for module, (a, b) in _pair_shapes(adapter).items():
        layer = _LAYER.match(module)
        if layer and layer[1] in places and layer[0] not in stems:
            raise _other_model(adapter, f"the model has no {layer[0].rstrip('.')}")
        own = shapes.get(f"{module}.weight", [])
        # A transposed one is GPT-2's.
        if len(own) == 2 and [b[0], a[1]] != own and [a[1], b[0]] != own:
            raise _other_model(adapter, f"the model's {module} is {own[0]} x {own[1]}, its own {b[0]} x {a[1]}")


def _pair_shapes(adapter: LoraFolder) -> dict[str, tuple[list[int], list[int]]]:
    """Module → shapes of A ``[r, in]`` and B ``[out, r]``; empty for pickles. Raises `ConfigurationError`."""
    if not (adapter.path / WEIGHTS).is_file():
        return {}
    shapes = dict(shapes_in(adapter.path / WEIGHTS))
    found = {}
    for name, a in shapes.items():
        module, _, part = name.partition(".lora_A.weight")
        if part or module == name or len(a) != 2:
            continue
        b = shapes.get(f"{module}.lora_B.weight", [])
        if len(b) != 2 or b[1] != a[0]:
            raise ConfigurationError(f"The adapter {adapter.path.name!r} is broken: {module} has no two matrices.")
        found[module.removeprefix(PREFIX)] = (a, b)
    return found


def _shapes(model: Path) -> Iterator[tuple[str, list[int]]]:
    for file in model.glob("*.safetensors"):
        if not file.name.startswith(("value_head.", "adapter_")):
            yield from shapes_in(file)


def _no_adapter(folder: Path) -> ConfigurationError:
    return ConfigurationError(f"{folder.name!r} is no LoRA adapter: its adapter_config.json is missing or has no rank.")


def _other_model(adapter: LoraFolder, how: str) -> ConfigurationError:
    return ConfigurationError(f"The adapter {adapter.path.name!r} doesn't fit the model: {how}.")

"""Adapters (peft): merged into the weights at start, or kept apart and chosen by each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenfleet.engines.lora import WEIGHTS, changes_model, check_weights, config_of
from tokenfleet.engines.tensors import names_in
from tokenfleet.wire.errors import ConfigurationError


class AdapterChoice:
    """The model with its adapters beside it; ``can_mix``: rows with different ones can share a forward pass."""

    def __init__(self, model: Any, folders: Mapping[str, Path], *, allow_pickle: bool) -> None:
        from peft import PeftModel

        # peft makes module names of them, in which a dot has a meaning.
        self._inner = {name: f"adapter{place}" for place, name in enumerate(folders)}
        self._active: str | None = None
        self._peft: Any = None
        # Beside one that has tokens of its own peft takes none that has not, but the other way round.
        for name, folder in sorted(folders.items(), key=lambda each: _has_tokens(each[1])):
            _check(folder, allow_pickle)
            if (changed := changes_model(config_of(folder))) is not None:
                raise ConfigurationError(
                    f"The adapter {name!r} can't be chosen per request: its {changed} changes the model for all.",
                    hint="Merge it (adapter_name_or_path), or convert it to a plain LoRA.",
                )
            try:
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(model, folder, adapter_name=self._inner[name])
                else:
                    self._peft.load_adapter(folder, adapter_name=self._inner[name])
            except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
                raise ConfigurationError(f"The adapter {name!r} doesn't fit the model: {error}") from error
            _check_used(self._peft, self._inner[name], folder)
        self._peft.eval().requires_grad_(False)
        configs = self._peft.peft_config.values()
        if any(config.is_prompt_learning for config in configs):
            raise ConfigurationError("Prompt-learning adapters can't be chosen per request.", hint="Use LoRA adapters.")
        self.can_mix = all(_is_plain_lora(config) for config in configs)
        self._peft.base_model.disable_adapter_layers()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._inner)

    def run(self, adapters: Sequence[str | None], inputs: dict[str, Any]) -> Any:
        """The model's forward, row i with ``adapters[i]``."""
        distinct = set(adapters)
        if len(distinct) == 1:
            self.activate(distinct.pop())
            return self._peft(**inputs)
        self._peft.base_model.enable_adapter_layers()
        self._active = ""  # neither none nor one
        names = [self._inner[adapter] if adapter is not None else "__base__" for adapter in adapters]
        return self._peft(adapter_names=names, **inputs)

    def activate(self, adapter: str | None) -> None:
        """Let the model compute with ``adapter`` until told otherwise."""
        if adapter == self._active:
            return
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.base_model.set_adapter(self._inner[adapter], inference_mode=True)
        self._active = adapter


def merge(model: Any, folders: Sequence[Path], *, allow_pickle: bool) -> Any:
    """``model`` with the adapters added to its weights, in their order."""
    from peft import PeftModel

    for folder in folders:
        _check(folder, allow_pickle)
        try:
            adapted = PeftModel.from_pretrained(model, folder)
            _check_used(adapted, "default", folder)
            model = adapted.merge_and_unload()
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"The adapter in {folder.name!r} can't be merged: {error}") from error
    return model


def _check(folder: Path, allow_pickle: bool) -> None:
    if not (folder / "adapter_config.json").is_file():
        raise ConfigurationError(f"{folder.name!r} is no adapter: it has no adapter_config.json.")
    check_weights(folder, allow_pickle=allow_pickle)
    if (folder / WEIGHTS).is_file():
        names_in(folder / WEIGHTS)


def _has_tokens(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and bool(config_of(folder).get("trainable_token_indices"))


def _check_used(model: Any, name: str, folder: Path) -> None:
    """peft leaves out the weights that it finds no place for, and makes up those that are not there. ``model``: with
    the adapter ``name``. Raises `ConfigurationError`."""
    import peft

    if not (folder / WEIGHTS).is_file():
        return
    wanted = set(peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    given = set(names_in(folder / WEIGHTS))
    copies = {key for key in given - wanted if key.endswith(".base_layer.weight") or "lora" not in key.lower()}
    for keys, what in ((given - wanted - copies, "the model has no place for its"), (wanted - given, "it lacks")):
        if keys:
            raise ConfigurationError(
                f"The adapter {folder.name!r} doesn't fit the model: {what} {min(keys)}.",
                hint="Was it made for another model?",
            )


def _is_plain_lora(config: Any) -> bool:
    return (
        str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
        and not getattr(config, "use_dora", False)
        and not getattr(config, "target_parameters", None)
        and not getattr(config, "alora_invocation_tokens", None)
        and not getattr(config, "modules_to_save", None)
        and not getattr(config, "trainable_token_indices", None)
        and not getattr(config, "arrow_config", None)
    )

"""Reward heads: one number for a text, read off the hidden state of its last token."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenfleet.engines.tensors import names_in
from tokenfleet.wire.errors import ConfigurationError

_SAFE, _PICKLED = "value_head.safetensors", "value_head.bin"  # as trl and LLaMA-Factory save them
_WEIGHT, _BIAS = "v_head.summary.weight", "v_head.summary.bias"


@dataclass(frozen=True, slots=True)
class RewardHead:
    weight: torch.Tensor
    """``[1, hidden]``, float32"""
    bias: torch.Tensor | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` → ``[rows]``"""
        weight = self.weight.to(hidden.device)
        bias = None if self.bias is None else self.bias.to(hidden.device)
        return torch.nn.functional.linear(hidden.float(), weight, bias)[:, 0]

    def check_width(self, hidden_size: int) -> None:
        """Raises `ConfigurationError` for the head of another model."""
        if self.weight.shape[1] != hidden_size:
            raise ConfigurationError(
                f"The value head takes {self.weight.shape[1]} numbers, and the model gives {hidden_size}.",
                hint="Was it made for another model?",
            )


def no_rewards(label: str) -> ConfigurationError:
    """For ``rewards`` with a model that gives none."""
    return ConfigurationError(
        f"rewards: {label!r} is no sequence classifier, and there is no value head beside it or its adapters.",
        hint="A value head is a file value_head.safetensors or value_head.bin.",
    )


def find_value_head(folders: Sequence[Path]) -> RewardHead | None:
    """The first value head that lies in one of ``folders``, next to a model or an adapter."""
    for folder in folders:
        if (folder / _SAFE).is_file():
            from safetensors.torch import load_file

            names_in(folder / _SAFE)
            return _value_head(load_file(folder / _SAFE))
        if (folder / _PICKLED).is_file():
            return _value_head(_unpickled(folder / _PICKLED))
    return None


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """weights_only: tensors, nothing that could run. So it is read without ``allow_pickle``, too."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigurationError(
            f"{path.name} holds something else than tensors, or is broken.",
            hint="Convert it to value_head.safetensors.",
        ) from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path.name} holds no named tensors.")
    return found


def classifier_head(model: Any) -> RewardHead | None:
    """The head of a decoder with one label (``...ForSequenceClassification``)."""
    score = getattr(model, "score", None)
    if model.config.num_labels != 1 or not isinstance(score, torch.nn.Linear):
        return None
    return RewardHead(score.weight.detach().float(), None if score.bias is None else score.bias.detach().float())


def _value_head(state: dict[str, torch.Tensor]) -> RewardHead:
    if _WEIGHT not in state:
        raise ConfigurationError(f"The value head has no {_WEIGHT}; it has {', '.join(sorted(state)[:4])}.")
    bias = state.get(_BIAS)
    return RewardHead(state[_WEIGHT].float().reshape(1, -1), None if bias is None else bias.float().reshape(1))

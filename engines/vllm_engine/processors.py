"""`extras` as logits processors of vLLM's model runner V1, the one for CPUs and for some models on GPUs.

Requests that need nothing cost a dictionary look-up when they join the batch. A processor that reads output ids makes
vLLM wait for the step before; `compat.want_output_ids_only_if_needed` lets it do so only while a request of the batch
needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from tokenfleet.engines.lifeline import leave_with_parent
from tokenfleet.engines.vllm_engine import compat, cpu_blocks, lora_cpu
from tokenfleet.engines.vllm_engine.extras import Cut, Guide, Guides, History

if not compat.is_front_end:
    # vLLM's configuration names the classes below, so each of its processes imports this before anything else of ours.
    leave_with_parent()
    compat.want_output_ids_only_if_needed()
    lora_cpu.install()
    if current_platform.is_cpu():
        cpu_blocks.install()


class HistoryProcessor(LogitsProcessor):
    """`History` and `Guide`, which both look at the ids so far."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._guides = Guides()
        self._rows: dict[int, tuple[list[History | Guide], list[int]]] = {}
        """With the runner's own growing list of the request's new ids."""

    def is_argmax_invariant(self) -> bool:
        return False

    @property
    def reads_output_ids(self) -> bool:
        return bool(self._rows)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._row)

    def _row(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> tuple[list[History | Guide], list[int]] | None:
        # A grammar comes first: `History` bars nothing that is the only way on.
        found = (self._guides.of(params, prompt_ids or []), History.of(params, prompt_ids or []))
        needed: list[History | Guide] = [each for each in found if each is not None]
        return (needed, output_ids) if needed else None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (needed, output_ids) in self._rows.items():
            for each in needed:
                each.apply(logits[row], output_ids)
        return logits


class CutProcessor(LogitsProcessor):
    """`Cut`, after everything else."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, Cut] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    @property
    def reads_output_ids(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _cut)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, cut in self._rows.items():
            cut.apply(logits[row])
        return logits


def _cut(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Cut | None:
    return Cut.of(params)

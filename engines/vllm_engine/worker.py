"""What vLLM's worker imports where no logits processor of ours is loaded: models that score, and model runner V2."""

from __future__ import annotations

from tokenfleet.engines.lifeline import leave_with_parent
from tokenfleet.engines.vllm_engine import compat, lora_cpu, sampler_v2

if not compat.is_front_end:
    leave_with_parent()
    if compat.may_use_v2():
        sampler_v2.install()
    lora_cpu.install()


class WorkerExtension:
    """Adds nothing: vLLM imports a worker's extension by its name."""

"""What vLLM's worker imports where no logits processor of ours brings the lifeline: in a model that gives scores."""

from __future__ import annotations

from tokenfleet.engines.vllm_engine import compat
from tokenfleet.engines.vllm_engine.lifeline import leave_with_parent

if not compat.is_front_end:
    leave_with_parent()


class WorkerExtension:
    """Adds nothing: vLLM imports a worker's extension by its name."""

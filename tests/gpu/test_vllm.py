"""What only the vLLM engine does, on a GPU: adapters in one batch, grammars, scores, a killed core."""

from __future__ import annotations

from tests.contract.test_vllm import *  # noqa: F403

"""What only the SGLang engine does, on a GPU: adapters in one batch, grammars, retractions, a failed scheduler."""

from __future__ import annotations

from tests.contract.test_sglang import *  # noqa: F403

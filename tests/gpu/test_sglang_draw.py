"""The kernel with which the SGLang engine chooses tokens on a GPU."""

from __future__ import annotations

from tests.contract.test_sglang_draw import *  # noqa: F403

"""Is the engine making progress? A hung one must lose its lease by decision, not by accident."""

from __future__ import annotations

import time
from collections.abc import Callable

PREFILL_S_PER_TOKEN = 0.02


class Progress:
    """Watches the engine's step counter, from the lease's thread. ``busy_tokens`` are the prompt tokens of the running
    jobs: the allowance grows with them, since a long prefill is one step on some engines."""

    def __init__(self, steps: Callable[[], int], hang_s: float) -> None:
        self._steps = steps
        self._hang_s = hang_s
        self._last = (-1, time.monotonic())

    def is_made(self, running: int, busy_tokens: int) -> bool:
        steps, now = self._steps(), time.monotonic()
        if steps != self._last[0] or not running:
            self._last = (steps, now)
            return True
        return now - self._last[1] < self._hang_s + PREFILL_S_PER_TOKEN * busy_tokens

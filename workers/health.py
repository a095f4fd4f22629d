"""Is the engine making progress? A hung one must lose its lease by decision, not by accident."""

from __future__ import annotations

import time
from collections.abc import Callable

PREFILL_S_PER_TOKEN = 0.02


class Progress:
    """Watches the engine's step counter, from the lease's thread. ``busy_tokens`` are the prompt tokens of the running
    jobs: the allowance grows with them, since a long prefill is one step on some engines."""

    def __init__(self, steps: Callable[[], int], hang_s: float, beat_s: float = 1.0) -> None:
        self._steps = steps
        self._hang_s = hang_s
        self._most_s = 3 * beat_s
        self._asked = time.monotonic()
        self._last = -1
        self._stood_s = 0.0

    def is_made(self, running: int, busy_tokens: int) -> bool:
        steps, now = self._steps(), time.monotonic()
        # Where nobody asked for longer than that, the whole process stood still (frozen, or the machine was): that is
        # no fault of the engine's, which wakes up no sooner than this thread.
        self._stood_s += min(now - self._asked, self._most_s)
        self._asked = now
        if steps != self._last or not running:
            self._last, self._stood_s = steps, 0.0
            return True
        return self._stood_s < self._hang_s + PREFILL_S_PER_TOKEN * busy_tokens

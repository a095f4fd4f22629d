"""The main function of SGLang's scheduler processes: SGLang's own, with our sampler and without its bad habits.

Nothing here is imported before the process is known to be a scheduler: the worker imports this module by name only.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenfleet.engines.lifeline import leave_with_parent

_MESSAGES_PER_S = 8000
"""Chunks a second, of all requests together, that the worker's event loop has the time for beside its other work."""
_IDLE_S = 0.5
"""A longer pause than any step: it says nothing about how long a step takes."""


def run(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """What `sglang.srt.managers.scheduler.run_scheduler_process` does. Leaves with its parent, however that went."""
    leave_with_parent()
    _end_instead_of_signalling()
    from sglang.srt.managers.scheduler import run_scheduler_process

    from tokenfleet.engines.folders import architectures
    from tokenfleet.engines.sglang_engine import compat, grammars, sampler, seeing, towers

    sampler.register()
    names = architectures(Path(server_args.model_path))
    seeing.register(names)
    towers.install(names)
    _coalesce(compat.streamer())
    grammars.compiler.prepare(server_args.model_path, bool(server_args.trust_remote_code))
    run_scheduler_process(server_args, *args, **kwargs)


def _end_instead_of_signalling() -> None:
    """A scheduler that fails sends SIGQUIT to its parent, which means a cold shutdown to Celery. The parent watches its
    children and will see that this one is gone."""
    import psutil  # type: ignore[import-untyped]

    send_signal = psutil.Process.send_signal

    def send(process: psutil.Process, number: int) -> None:
        if number == signal.SIGQUIT and process.pid == os.getppid():
            os._exit(1)
        send_signal(process, number)

    psutil.Process.send_signal = send


class Pace:
    """How many tokens of a request to send at once: one while there is time for it, more under load."""

    def __init__(self) -> None:
        self._before_s = 0.0
        self._step_s = 0.0

    def interval(self, requests: int) -> int:
        """To be asked once a step, with the number of requests in it."""
        now_s = time.monotonic()
        took_s, self._before_s = now_s - self._before_s, now_s
        if took_s < _IDLE_S:
            self._step_s = self._step_s + (took_s - self._step_s) / 16 if self._step_s else took_s
        if not self._step_s:
            return 1
        return max(1, math.ceil(requests / (_MESSAGES_PER_S * self._step_s)))


def _coalesce(streamer: Any) -> None:
    """Set each request's stream_interval before SGLang decides whose tokens to send."""
    original = streamer._stream_output_generation
    pace = Pace()

    def stream(self: Any, reqs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        interval = pace.interval(len(reqs))
        for request in reqs:
            request.sampling_params.stream_interval = interval
        return original(self, reqs, *args, **kwargs)

    streamer._stream_output_generation = stream

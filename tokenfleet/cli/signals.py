"""What a command does when it is told to end, by something other than Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def jobs_end_with_us() -> AsyncIterator[None]:
    """SIGTERM, or SIGHUP as the terminal is closed, cancels the task in the block, and so its jobs; then the process
    ends by that signal, as ever."""
    if sys.platform == "win32":
        yield
        return
    loop, task, told = asyncio.get_running_loop(), asyncio.current_task(), list[int]()
    assert task is not None

    def end(number: int) -> None:
        told.append(number)
        task.cancel()

    # Not what is ignored, as by `nohup`.
    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    finally:
        for number in ours:
            loop.remove_signal_handler(number)
        if told:
            signal.raise_signal(told[0])

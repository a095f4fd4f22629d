"""Tells an engine's SIGQUIT from an operator's.

SGLang's children send SIGQUIT to their parent when they fail, and its watchdog thread sends it to its own process; to
Celery SIGQUIT means cold shutdown. Python's handlers aren't told the sender, `sigwaitinfo` is: so SIGQUIT is blocked
in every thread, one thread waits for it, and passes it on to Celery only if it came from outside.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)


def is_available() -> bool:
    return hasattr(signal, "sigwaitinfo") and threading.current_thread() is threading.main_thread()


def watch_quit(on_own_quit: Callable[[int], None], on_passed: Callable[[], None]) -> None:
    """From now on call ``on_own_quit(sender's pid)``, on a thread of its own, for a SIGQUIT sent by this process or a
    descendant of it; any other SIGQUIT still reaches the Python handler installed for SIGQUIT, in the main thread,
    which calls ``on_passed`` first.

    Call it in the main thread, before other threads start: a thread that doesn't block SIGQUIT may be picked by the
    kernel, and the handler then runs whoever sent it. Processes started afterwards inherit the blocked signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})
    if unguarded := _threads_open_to(signal.SIGQUIT):
        logger.warning(
            "%d threads were started before the pool: SIGQUIT of an engine may end the worker",
            unguarded,
        )

    def run_quit_handler(_signum: int, frame: FrameType | None) -> None:
        on_passed()
        handler = signal.getsignal(signal.SIGQUIT)  # looked up now: Celery replaces it while it shuts down
        if callable(handler):
            handler(signal.SIGQUIT, frame)

    signal.signal(_PASSED_ON, run_quit_handler)
    threading.Thread(target=_watch, args=(on_own_quit,), name="tokenfleet-signals", daemon=True).start()


if is_available():
    _PASSED_ON = signal.SIGRTMIN + 3  # a real signal, so that it also interrupts a sleeping main thread


def _watch(on_own_quit: Callable[[int], None]) -> None:
    while True:
        info = signal.sigwaitinfo({signal.SIGQUIT})
        if is_own(info.si_pid):
            on_own_quit(info.si_pid)
        else:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, _PASSED_ON)


def is_own(pid: int) -> bool:
    """Whether ``pid`` is this process or descends from it; False if it is gone, in another namespace or the kernel."""
    this = os.getpid()
    while pid > 1:
        if pid == this:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])  # the name, in parentheses, may hold anything
    return False


def _threads_open_to(signum: signal.Signals) -> int:
    bit = 1 << (signum - 1)
    unguarded = 0
    for status in Path("/proc/self/task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # the thread just ended
            continue
        unguarded += any(line.startswith("SigBlk:") and not int(line.split()[1], 16) & bit for line in lines)
    return unguarded

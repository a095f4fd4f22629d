"""What lives on the worker's event loop as long as the worker does: a warm engine, a publisher."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TypeVar

Lifespan = Callable[[], AbstractAsyncContextManager[object]]
L = TypeVar("L", bound=Lifespan)

_registered: list[Lifespan] = []


def register_lifespan(factory: L) -> L:
    """Have ``factory()`` entered on the loop before the first message is taken, and left after the last task.

    Entered in the order of registration, left in reverse, all in one asyncio task and on the loop's thread;
    `AsyncioPool.current` is there already. Entering may take minutes; SIGTERM meanwhile cancels it. If it raises, the
    worker logs the error in one line and exits with status 1. Also a decorator, above `asynccontextmanager`.
    """
    _registered.append(factory)
    return factory


class Lifespans:
    """The entering, staying and leaving of all lifespans of one pool, as one asyncio task."""

    def __init__(self) -> None:
        self._leave = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.is_entered = False
        self.settled = threading.Event()
        """Set when all are entered, or when entering failed: then ``error`` says how."""
        self.ended = threading.Event()
        self.error: BaseException | None = None

    async def live(self) -> None:
        """Never raises; what went wrong stands in ``error``."""
        self._task = asyncio.current_task()
        try:
            async with AsyncExitStack() as stack:
                for factory in _registered:
                    await stack.enter_async_context(factory())
                self.is_entered = True
                self.settled.set()
                await self._leave.wait()
        except BaseException as error:  # noqa: BLE001  the main thread decides what a failed start means
            self.error = error
        finally:
            self.settled.set()
            self.ended.set()

    def leave(self) -> None:
        """On the loop's thread. Lifespans that are still being entered are cancelled."""
        self._leave.set()
        if not self.is_entered and self._task is not None:
            self._task.cancel()

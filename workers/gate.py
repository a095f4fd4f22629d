"""Many jobs share the engine; one that may be killing workers gets it for itself, until it has proven harmless."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

Share = Callable[[], None]


class Gate:
    """`shared` for any number at once, `alone` for one and nobody else. First come, first served."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._sharing = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[Share]:
        async with self._turn:
            self._enter()
        try:
            yield lambda: None
        finally:
            self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[Share]:
        """Yields what ends being alone: from then on others share."""
        await self._turn.acquire()  # whoever comes later waits for us
        is_alone = True

        def share() -> None:
            nonlocal is_alone
            if is_alone:
                is_alone = False
                self._enter()
                self._turn.release()

        try:
            await self._empty.wait()
            yield share
        finally:
            if is_alone:
                self._turn.release()
            else:
                self._leave()

    def _enter(self) -> None:
        self._sharing += 1
        self._empty.clear()

    def _leave(self) -> None:
        self._sharing -= 1
        if not self._sharing:
            self._empty.set()

"""What all workers of a model would refuse is refused before it is queued, to the one who asks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

from tokenfleet.wire.chat import ChatRequest, ScoreRequest
from tokenfleet.wire.errors import InvalidRequest, UnknownModel
from tokenfleet.wire.jobs import ServedModel
from tokenfleet.wire.ledger import Ledger
from tokenfleet.wire.requests import check_taken
from tokenfleet.wire.support import check_supported

_TRUSTED_S = 5.0


@dataclass(frozen=True, slots=True)
class _Known:
    """``engines``: of the model's live workers; without one, of the last that registered it."""

    model: ServedModel
    engines: frozenset[str]
    until_s: float

    def check(self, request: ChatRequest | ScoreRequest) -> None:
        check_taken(self.model, request)
        if isinstance(request, ChatRequest):
            for engine in sorted(self.engines):
                check_supported(engine, request.params)


class Acceptance:
    """What it has looked up it trusts for some seconds, but only to accept: workers check again. Before it refuses, it
    looks anew."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[str, _Known] = {}
        self._looking_up = asyncio.Lock()

    async def check(self, request: ChatRequest | ScoreRequest, model: str) -> None:
        """A model on two engines takes what both take, since any of its workers may come to the job.

        Raises `InvalidRequest`, `UnknownModel`, `FleetUnavailable`."""
        known = self._known.get(model)
        if known is not None and time.monotonic() < known.until_s:
            with contextlib.suppress(InvalidRequest):  # it was so then
                known.check(request)
                return
        async with self._looking_up:
            if (now := self._known.get(model)) is known or now is None:  # else another has looked meanwhile
                now = self._known[model] = await self._look_up(model)
        now.check(request)

    async def _look_up(self, name: str) -> _Known:
        models = await self._ledger.models()
        if name not in models:
            raise unknown(name, models)
        workers = await self._ledger.workers()
        engines = {worker["engine"] for worker in workers if worker.get("model") == name and "engine" in worker}
        return _Known(models[name], frozenset(engines or {models[name].engine}), time.monotonic() + _TRUSTED_S)


def unknown(model: str, models: Iterable[str]) -> UnknownModel:
    known = ", ".join(sorted(models)) or "none yet"
    message = f"This fleet serves no model named {model!r}."
    return UnknownModel(message, hint=f"Served models: {known}.", param="model", model=model)

"""Questions to a worker's tokenizer: a small request and its reply through Redis, for producers without one.

The question lies in a key of its own, so that exactly one worker takes it; its control channel says that it is there.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from tokenfleet.wire.errors import ErrorBody, FleetUnavailable, UnknownModel, from_body
from tokenfleet.wire.keys import new_id
from tokenfleet.wire.ledger import Ledger, translated

KEPT_MS = 30_000
_EACH_S = 2.0


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """``request`` (a chat request, JSON) to be rendered; or ``text`` to be encoded as it is; or ``ids`` to decode."""

    request: msgspec.Raw = msgspec.Raw(b"null")
    text: str | None = None
    ids: tuple[int, ...] | None = None
    wants_strings: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    text: str = ""
    context_tokens: int = 0
    error: ErrorBody | None = None


async def ask(ledger: Ledger, model: str, question: Question, *, timeout_s: float = 10.0) -> Reply:
    """Ask one live worker of ``model`` after the other. Raises what it answers, `UnknownModel`, `FleetUnavailable`
    (``no_worker``, ``no_answer``)."""
    if model not in await ledger.models():
        raise UnknownModel(f"This fleet serves no model named {model[:128]!r}.", param="model")
    until, asked = time.monotonic() + timeout_s, False
    client: Any = ledger.client
    for worker in await ledger.workers():
        left = until - time.monotonic()
        if worker.get("model") != model or left <= 0:
            continue
        asked, nonce = True, new_id()
        async with translated():
            await client.set(ledger.keys.ask(nonce), msgspec.json.encode(question), px=KEPT_MS)
            if not await client.publish(ledger.keys.control(worker["id"]), f"ask {nonce}"):
                continue  # it has gone, or listens to its channel no more
            popped = await client.blpop([ledger.keys.reply(nonce)], timeout=min(left, _EACH_S))
        if popped is None:
            continue
        reply = msgspec.json.decode(popped[1], type=Reply)
        if reply.error is not None:
            raise from_body(reply.error)
        return reply
    if not asked:
        raise FleetUnavailable(f"No worker serves {model!r} now.", code="no_worker", hint="Try again later.")
    raise FleetUnavailable("No worker answered in time.", code="no_answer", hint="Try again later.")

"""Webhooks: an address that is told when a chat, a completion, a response or a batch has ended, signed as
OpenAI signs its own.

The end itself writes what is to be delivered, in the same script; any gateway delivers it, at least once, and tries
again for three days. ``webhook-id`` is the same each time. The schedule lies in Redis, since it outlives processes: a
retrying library keeps its own in memory.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import random
import time
from typing import Any, Literal

import msgspec
from fastapi import Request
from redis.exceptions import RedisError

from tokenfleet.producer.gateway.safe_fetch import SafeHttp, UrlRefused, UrlUnreachable, parsed
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.producer.tenants import Tenants
from tokenfleet.wire import scripts
from tokenfleet.wire.errors import InvalidRequest, LostState
from tokenfleet.wire.events import ChoiceFinished
from tokenfleet.wire.ledger import Ledger, translated

log = logging.getLogger(__name__)

KINDS = {
    "/v1/chat/completions": "chat.completion",
    "/v1/completions": "completion",
    "/v1/responses": "response",
    "/v1/batches": "batch",
}
"""Of the event's type, by where ``webhook`` is taken."""
_POLL_S = 0.5
_AT_ONCE = 16
_TIMEOUT_S = 10.0
_HOLD_MS = 20_000
"""Longer than an attempt may take: after that its gateway is dead, and another one tries."""
_MOST_S = 3600.0
_GONE = 410


class Hook(msgspec.Struct, frozen=True):
    """Where, for whom, and what has ended."""

    url: str
    tenant: str
    kind: str


async def webhook_of(request: Request, wanted: Any) -> str:
    """The checked address of a body's ``webhook``; "" for none. Where it leads is checked when it is called.

    Raises `InvalidRequest`, `UrlRefused`."""
    if wanted is None:
        return ""
    url = wanted.get("url") if isinstance(wanted, dict) and set(wanted) == {"url"} else None
    if not isinstance(url, str):
        raise InvalidRequest('webhook: {"url": "https://..."} is needed.', param="webhook")
    is_https = parsed(url).scheme == b"https"
    if not is_https and not request.app.state.settings.webhook_http:
        raise UrlRefused("webhook: only https is called.", param="webhook")
    async with translated():
        if await request.app.state.tenants.webhook_secret(request.state.tenant) is None:
            raise InvalidRequest(
                "webhook: there is no secret to sign with.", code="webhook_secret_missing", param="webhook",
                hint="`tokenfleet keys webhook-secret` makes one.",
            )  # fmt: skip
    return url


def signature(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """Standard Webhooks' ``webhook-signature``."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{event_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


class WebhookRunner:
    """Delivers what is due. Every gateway has one."""

    def __init__(self, ledger: Ledger, tenants: Tenants, settings: GatewaySettings) -> None:
        self._ledger = ledger
        self._tenants = tenants
        self._http = SafeHttp(settings.webhook_allowed_networks)
        self._retry_s = settings.webhook_retry_s
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled. What is under way then is tried again by another gateway."""
        try:
            while True:
                room = _AT_ONCE - len(self._tasks)
                try:
                    taken = await self._run("take", room, _HOLD_MS) if room else []
                except (RedisError, OSError) as error:
                    log.warning("webhooks: %s; trying again", type(error).__name__)
                    taken = []
                for k in range(0, len(taken), 5):
                    task = asyncio.create_task(self._deliver(*taken[k : k + 5]))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                if not taken:
                    await asyncio.sleep(_POLL_S)
                elif not room - len(taken) // 5:
                    await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _deliver(self, ended_id: bytes, stored: bytes, state: bytes, ended_ms: bytes, attempts: bytes) -> None:
        name = ended_id.decode()
        with contextlib.suppress(RedisError, OSError):  # tried again once nobody holds it
            how = await self._attempt(name, msgspec.json.decode(stored, type=Hook), state.decode(), int(ended_ms))
            if how == "later":
                delay_s = min(_MOST_S, self._retry_s * 2 ** min(int(attempts), 30)) * random.uniform(0.8, 1.2)
                await self._run("later", name, int(delay_s * 1000))
            else:
                await self._run("done", name)

    async def _attempt(self, ended_id: str, hook: Hook, state: str, ended_ms: int) -> Literal["done", "later"]:
        secret = await self._tenants.webhook_secret(hook.tenant)
        if secret is None:
            return "later"
        event_id = "evt_" + hashlib.sha256(f"{self._ledger.keys.fleet}\0{ended_id}".encode()).hexdigest()[:32]
        event = {
            "id": event_id,
            "object": "event",
            "created_at": ended_ms // 1000,
            "type": f"{hook.kind}.{await self._how(hook.kind, ended_id, state)}",
            "data": {"id": object_id(hook.kind, ended_id)},
        }
        body, now = msgspec.json.encode(event), int(time.time())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(secret, event_id, now, body),
        }
        try:
            status = await self._http.post(hook.url, body, headers, timeout_s=_TIMEOUT_S)
        except UrlRefused:
            log.warning("webhook of %s: its address is not called", ended_id)
            return "done"
        except UrlUnreachable:
            return "later"
        return "done" if 200 <= status < 300 or status == _GONE else "later"

    async def _how(self, kind: str, ended_id: str, state: str) -> str:
        """The end in the API's words."""
        if kind == "batch" or state == "cancelled":
            return state
        if state != "finished":
            return "failed"
        if kind == "response" and await self._is_cut(ended_id):
            return "incomplete"
        return "completed"

    async def _is_cut(self, job_id: str) -> bool:
        seq = 0
        try:
            while events := await self._ledger.read(job_id, seq):
                if any(isinstance(event, ChoiceFinished) and event.reason == "length" for _, event in events):
                    return True
                seq = events[-1][0]
        except LostState:
            pass
        return False

    async def _run(self, *args: scripts.Arg) -> Any:
        return await scripts.run(self._ledger.client, "hooks", self._ledger.keys.prefix, *args)


def object_id(kind: str, ended_id: str) -> str:
    """The API's name of what has ended."""
    match kind:
        case "chat.completion":
            return f"chatcmpl-{ended_id}"
        case "completion":
            return f"cmpl-{ended_id}"
        case "response":
            return "resp_" + ended_id.replace("-", "")
        case _:
            return ended_id

"""Media in request bodies: data URLs and base64, and http(s) URLs where the gateway is told to fetch them.

`take_media` comes before a body becomes a request: from then on messages hold references, and what they refer to waits
in the HTTP request's state until `chat.submit` stores it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request

from tokenfleet.producer.gateway.safe_fetch import SafeHttp
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.producer.media import PARTS, has_media, take
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.media import MediaSettings

Messages = list[Any]


async def take_media(request: Request, messages: Messages) -> Messages:
    """``messages`` in the chat API's form with references in place of media. Raises `InvalidRequest`."""
    state = request.app.state
    messages, media = await media_of(messages, state.settings, state.client.media.settings)
    if media:
        request.state.media = {**taken_media(request), **media}
    return messages


def taken_media(request: Request) -> Mapping[str, bytes]:
    """By sha256, what `take_media` found in this HTTP request."""
    found: Mapping[str, bytes] = getattr(request.state, "media", {})
    return found


async def media_of(
    messages: Messages, settings: GatewaySettings, limits: MediaSettings
) -> tuple[Messages, Mapping[str, bytes]]:
    """The messages with references, and the bytes by sha256. Raises `InvalidRequest`."""
    if not has_media(messages, {}):
        return messages, {}
    if settings.fetch_urls:
        messages = await _fetched(messages, settings, limits)
    taken = await asyncio.to_thread(take, messages, {}, limits)
    return list(taken.messages), taken.media


async def _fetched(messages: Messages, settings: GatewaySettings, limits: MediaSettings) -> Messages:
    """The messages with the content of URLs in place of these; each URL is fetched once, a few at a time."""
    urls = list(dict.fromkeys(url for message in messages for part in _parts(message) if (url := _url(part))))
    if len(urls) > settings.fetch_max_urls:
        raise InvalidRequest(
            f"A request may name at most {settings.fetch_max_urls} URLs.", code="media_too_large", param="messages"
        )
    http, room = SafeHttp(settings.fetch_allowed_networks), asyncio.Semaphore(4)

    async def fetch(url: str) -> bytes:
        async with room:
            return await http.get(url, max_bytes=limits.limit_bytes, timeout_s=settings.fetch_timeout_s)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(fetch(url)) for url in urls}
    except* InvalidRequest as errors:
        raise errors.exceptions[0] from None
    found = {url: task.result() for url, task in tasks.items()}
    return [_replaced(message, found) if any(map(_url, _parts(message))) else message for message in messages]


def _replaced(message: Mapping[str, Any], found: Mapping[str, bytes]) -> dict[str, Any]:
    parts = []
    for part in message["content"]:
        url = _url(part)
        kind = PARTS[part["type"]][0] if url else ""
        parts.append({"type": kind, kind: found[url]} if url else part)
    return {**message, "content": parts}


def _parts(message: Any) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else ()


def _url(part: Any) -> str | None:
    """The http(s) URL of a part, if its medium is given by one."""
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str) or part["type"] not in PARTS:
        return None
    content = part.get(PARTS[part["type"]][1])
    url = content.get("url") if isinstance(content, Mapping) else content
    return url if isinstance(url, str) and url[:8].lower().startswith(("http://", "https://")) else None

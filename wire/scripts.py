"""The ledger's Lua scripts: content-addressed, loaded on demand, run over an asyncio or a blocking client.

All are idempotent under a retry with the same arguments, so a reply lost with its connection is simply asked for again.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import redis
import redis.asyncio

Name = Literal[
    "submit", "claim", "append", "cancel", "release", "beat", "serve", "bury", "reap", "poll", "lost", "links", "rate",
    "forget", "media_touch", "media_put", "file", "batch", "hooks",
]  # fmt: skip
Arg = str | bytes | int | float

# What heals a full Redis must not be refused by it; only what takes in new work is.
_REFUSED_WHEN_FULL = {"submit", "media_put"}


@cache
def _source(name: Name) -> tuple[str, str]:
    folder = files("tokenfleet.wire") / "lua"
    head = "#!lua" if name in _REFUSED_WHEN_FULL else "#!lua flags=allow-oom"
    text = "\n".join([head, (folder / "common.lua").read_text(), (folder / f"{name}.lua").read_text()])
    return text, hashlib.sha1(text.encode()).hexdigest()  # noqa: S324  (EVALSHA's own address, no secret)


async def run(client: redis.asyncio.Redis, name: Name, *args: Arg) -> Any:
    """Run one script. Raises redis-py's exceptions."""
    text, sha = _source(name)
    try:
        return await client.execute_command("EVALSHA", sha, 0, *args)  # type: ignore[no-untyped-call]
    except redis.exceptions.NoScriptError:
        return await client.execute_command("EVAL", text, 0, *args)  # type: ignore[no-untyped-call]


async def run_then_wait(
    client: redis.asyncio.Redis, name: Name, replicas: int, timeout_ms: int, *args: Arg
) -> tuple[Any, int]:
    """Run one script, then WAIT on the same connection. Returns its reply, and how many replicas have what it wrote."""
    text, sha = _source(name)
    for command in (("EVALSHA", sha), ("EVAL", text)):
        pipe: Any = client.pipeline(transaction=False)
        pipe.execute_command(*command, 0, *args).execute_command("WAIT", replicas, timeout_ms)
        reply, has_it = await pipe.execute(raise_on_error=False)
        if not isinstance(reply, redis.exceptions.NoScriptError):
            break
    for each in (reply, has_it):
        if isinstance(each, Exception):
            raise each
    return reply, int(has_it)


def run_blocking(client: redis.Redis, name: Name, *args: Arg) -> Any:
    """`run` for a thread of its own."""
    text, sha = _source(name)
    try:
        return client.execute_command("EVALSHA", sha, 0, *args)  # type: ignore[no-untyped-call]
    except redis.exceptions.NoScriptError:
        return client.execute_command("EVAL", text, 0, *args)  # type: ignore[no-untyped-call]

"""Answers to producers' questions about text and tokens (`wire.asks`), beside the jobs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from redis.exceptions import RedisError

from tokenfleet.engines.registry import Loaded
from tokenfleet.wire.asks import KEPT_MS, Question, Reply
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest, TokenfleetError
from tokenfleet.wire.jobs import parse_request
from tokenfleet.wire.keys import Keys, is_id

log = logging.getLogger(__name__)
# More at once are left to other workers (or to the asker's patience): jobs come first.
_MAX_OPEN = 32


class Answers:
    """``client`` is an asyncio Redis client that decodes nothing."""

    def __init__(self, client: Any, keys: Keys, loaded: Loaded) -> None:
        self._client = client
        self._keys = keys
        self._loaded = loaded
        self._open: set[asyncio.Task[None]] = set()
        self._one = asyncio.Semaphore(1)

    def take(self, nonce: str) -> None:
        """Answer in the background. Called on the loop."""
        if not is_id(nonce) or len(self._open) >= _MAX_OPEN:
            return
        task = asyncio.create_task(self._answer(nonce))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def close(self) -> None:
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _answer(self, nonce: str) -> None:
        try:
            data = await self._client.getdel(self._keys.ask(nonce))
            if data is None:  # another has it, or it was asked too long ago
                return
            async with self._one:  # one thread's worth of work, however many ask
                reply = await asyncio.to_thread(self.reply, data)
            pipe = self._client.pipeline(transaction=False)
            pipe.rpush(self._keys.reply(nonce), msgspec.json.encode(reply))
            pipe.pexpire(self._keys.reply(nonce), KEPT_MS)
            await pipe.execute()
        except (RedisError, OSError) as error:
            log.info("a question was not answered: %s", type(error).__name__)

    def reply(self, data: bytes) -> Reply:
        """For any bytes; what is wrong with them is in the reply."""
        try:
            return self._reply(msgspec.json.decode(data, type=Question))
        except msgspec.DecodeError as error:
            return Reply(error=InvalidRequest(f"not a question: {error}").to_body())
        except TokenfleetError as error:
            return Reply(error=error.to_body())

    def _reply(self, question: Question) -> Reply:
        tokenizer = self._loaded.tokenizer
        if question.ids is not None:
            if any(not 0 <= token < tokenizer.vocab_size for token in question.ids):
                raise InvalidRequest(f"tokens: ids are 0 to {tokenizer.vocab_size - 1}.", param="tokens")
            return Reply(text=tokenizer.decode(question.ids, skip_special_tokens=False))
        if question.text is not None:
            ids = tuple(tokenizer.encode(question.text))
        else:
            request = parse_request(bytes(question.request))
            if not isinstance(request, ChatRequest):
                raise InvalidRequest("Only chats have a prompt.")
            ids = tuple(self._loaded.render(request, ()).ids)
        strings = tuple(map(tokenizer.token_text, ids)) if question.wants_strings else ()
        return Reply(ids, strings, context_tokens=self._loaded.engine.info.context_tokens)

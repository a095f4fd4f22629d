"""`SglangEngine`: checks a sequence, hands it to SGLang, passes its tokens on, sees whether SGLang lives."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from sglang.srt.managers.io_struct import EmbeddingReqInput

from tokenfleet.engines.base import Sequence, TokenChunk
from tokenfleet.engines.checks import already_over, check_sequence, check_texts
from tokenfleet.engines.mailbox import Mailbox
from tokenfleet.engines.model_engine import ModelEngine
from tokenfleet.engines.sglang_engine.front import Reader
from tokenfleet.engines.sglang_engine.loading import LoadedSglang, load
from tokenfleet.engines.sglang_engine.options import SglangOptions
from tokenfleet.engines.sglang_engine.params import sampling_params
from tokenfleet.engines.warming import warm_up
from tokenfleet.wire.errors import EngineDead, EngineError, InvalidRequest


class SglangEngine(ModelEngine[LoadedSglang]):
    """A causal language model in `sglang.Engine`. See `engines.base.Engine`.

    The scheduler is a child process (one a GPU); what reads its tokens is a task on the loop that `start` ran on."""

    def __init__(self, options: SglangOptions) -> None:
        super().__init__()
        self._options = options
        self._active = 0
        self._is_dead = False
        self._watched: list[int] = []
        self._numbers = itertools.count()
        self._scores: set[asyncio.Task[float]] = set()

    @property
    def steps(self) -> int:
        return int(self._started.front.tokenizer_manager.steps)

    @property
    def running(self) -> int:
        # SGLang's own scheduler keeps the others waiting, first come, first served.
        return min(self._active, self._options.max_batch_size)

    async def start(self) -> None:
        if self._loaded is not None:
            return
        # In a thread: in the main one SGLang would take SIGQUIT over.
        loaded = self._loaded = await asyncio.to_thread(load, self._options)
        try:
            self._watch(loaded)
            await warm_up(self)
        except BaseException:
            await self.close()
            raise

    def _watch(self, loaded: LoadedSglang) -> None:
        """Know at once when a process of the engine is gone."""
        loop = asyncio.get_running_loop()
        loaded.front.tokenizer_manager.on_failure = self._die
        for child in loaded.front.children:
            descriptor = os.pidfd_open(child.pid)
            self._watched.append(descriptor)
            loop.add_reader(descriptor, self._die)

    def _die(self) -> None:
        self._is_dead = True
        self._stop_watching()
        if self._loaded is not None:
            for reader in self._loaded.front.tokenizer_manager.readers.values():
                reader.mailbox.fail(_dead())
        for score in self._scores:
            score.cancel()

    def _stop_watching(self) -> None:
        watched, self._watched = self._watched, []
        for descriptor in watched:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    async def generate(self, sequence: Sequence) -> AsyncGenerator[TokenChunk, None]:
        await self.check()
        if (over := already_over(sequence)) is not None:
            yield over
            return
        check_sequence(self.info, sequence)
        await self._grammar(sequence)  # the scheduler has no way to refuse one
        inputs = await asyncio.to_thread(self._media_inputs, sequence) if sequence.media else None
        manager = self._started.front.tokenizer_manager
        # SGLang aborts by prefix: all ids have one length. An aborted sequence's may come again at once.
        rid = f"{next(self._numbers):016x}"
        params = sequence.params
        mailbox = Mailbox()
        manager.readers[rid] = Reader(mailbox, params.top_logprobs if params.logprobs else None)
        request = asyncio.create_task(self._request(rid, sequence, inputs, mailbox))
        self._active += 1
        request.add_done_callback(self._forgotten)
        is_over = False
        try:
            while not is_over:
                chunk = await mailbox.take()
                is_over = chunk.finish_reason is not None
                yield chunk
        finally:
            del manager.readers[rid]
            request.cancel()  # SGLang aborts what it has sent off and not seen the end of

    def _forgotten(self, request: asyncio.Task[None]) -> None:
        """Its slot is free, whether or not its reader has read all."""
        self._active -= 1

    async def _request(self, rid: str, sequence: Sequence, inputs: Any, mailbox: Mailbox) -> None:
        """Send a sequence to SGLang, and wait until SGLang has forgotten it."""
        loaded, params = self._started, sequence.params
        try:
            outputs = await loaded.front.async_generate(
                input_ids=[*sequence.prompt_ids, *sequence.delivered_ids],
                sampling_params=sampling_params(sequence),
                rid=rid,
                stream=True,
                return_logprob=params.logprobs,
                top_logprobs_num=params.top_logprobs,
                lora_path=loaded.lora.get(sequence.adapter),
                image_data=None if inputs is None else [inputs],
            )
            async with aclosing(outputs):
                async for _ in outputs:
                    pass
        except asyncio.CancelledError:
            raise
        except ValueError as error:
            mailbox.fail(InvalidRequest(f"SGLang refuses this request: {error}"))
        except Exception as error:  # noqa: BLE001  # the reader's to raise
            mailbox.fail(EngineError(f"SGLang failed this request: {error}"))
        else:
            mailbox.put((), (), "cancelled")  # no more than a word to nobody, unless SGLang gave it up by itself

    def _media_inputs(self, sequence: Sequence) -> Any:
        media = self._started.media
        assert media is not None
        return media.inputs(sequence.prompt_ids, sequence.delivered_ids, sequence.media)

    async def score(self, texts_ids: list[tuple[int, ...]], *, adapter: str | None = None) -> list[float]:
        await self.check()
        hint = "Serve a sequence classifier; a value head is for transformers or vLLM."
        check_texts(self.info, texts_ids, adapter, hint=hint)
        scores = [asyncio.create_task(self._score(ids, adapter)) for ids in texts_ids]
        self._scores.update(scores)
        try:
            return list(await asyncio.gather(*scores))
        except asyncio.CancelledError:
            if self._is_dead:
                raise _dead() from None
            raise
        finally:
            for score in scores:
                score.cancel()
            self._scores.difference_update(scores)

    async def _score(self, ids: tuple[int, ...], adapter: str | None) -> float:
        loaded = self._started
        request = EmbeddingReqInput(
            input_ids=list(ids), rid=f"{next(self._numbers):016x}", lora_path=loaded.lora.get(adapter)
        )
        self._active += 1
        try:
            async with aclosing(loaded.front.tokenizer_manager.generate_request(request)) as outputs:
                output = await anext(outputs)
        except ValueError as error:
            raise InvalidRequest(f"SGLang refuses this text: {error}") from error
        finally:
            self._active -= 1
        return float(output["embedding"][0])

    async def check(self) -> None:
        self._started  # noqa: B018  # raises
        if self._is_dead:
            raise _dead()

    async def close(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._stop_watching()
        for reader in loaded.front.tokenizer_manager.readers.values():
            reader.mailbox.fail(EngineDead("The engine was closed."))
        await asyncio.to_thread(loaded.front.stop)
        await loaded.front.tokenizer_manager.close_channels()


def _dead() -> EngineDead:
    return EngineDead("SGLang's scheduler has died.", hint="Its reason is in the worker's log.")

"""`TransformersEngine`, the asyncio side: checks a sequence, hands it to the engine's thread, streams its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import secrets
import threading
from collections.abc import AsyncGenerator
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from tokenfleet.engines.base import EngineInfo, Sequence, TokenChunk
from tokenfleet.engines.checks import already_over, check_sequence, check_texts
from tokenfleet.engines.mailbox import Mailbox
from tokenfleet.engines.model_engine import ModelEngine
from tokenfleet.engines.stopping import ending_ids
from tokenfleet.engines.transformers_engine.batch import MediaInputs, PromptPass, Row
from tokenfleet.engines.transformers_engine.beams import SearchRow, check_search
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.loading import LoadedModel, load
from tokenfleet.engines.transformers_engine.loop import Deliveries, EngineLoop
from tokenfleet.engines.transformers_engine.options import TransformersOptions
from tokenfleet.engines.transformers_engine.sampling import SamplingState
from tokenfleet.engines.transformers_engine.scoring import ScoreWork
from tokenfleet.wire.errors import ConfigurationError, EngineDead, EngineError

_SHARE_OF_FREE_MEMORY = 0.3
_CPU_CHUNK_TOKENS, _GPU_CHUNK_TOKENS = 128, 2048


class TransformersEngine(ModelEngine[LoadedModel]):
    """A language model of transformers, multimodal or not, or a reward model; batches continuously. See
    `engines.base.Engine`."""

    def __init__(self, options: TransformersOptions) -> None:
        super().__init__()
        self._options = options
        self._loop: EngineLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_abandoned = False
        self._budget_tokens = 0

    @property
    def steps(self) -> int:
        return self._loop.steps if self._loop else 0

    @property
    def running(self) -> int:
        return self._loop.running if self._loop else 0

    @property
    def held_tokens(self) -> int:
        """Tokens that the KV caches have memory for now, padding included."""
        return self._loop.held_tokens if self._loop else 0

    async def start(self) -> None:
        if self._thread is not None:
            return
        self._is_abandoned = False
        events = asyncio.get_running_loop()
        ready: asyncio.Future[None] = events.create_future()

        def deliver(deliveries: Deliveries) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is gone, and with it whoever was listening
                events.call_soon_threadsafe(_put_all, deliveries)

        def settle(error: BaseException | None) -> None:
            if not ready.done():
                ready.set_exception(error) if error else ready.set_result(None)

        def work() -> None:
            failure: BaseException | None = None
            try:
                loop = self._load(deliver)
            except BaseException as error:  # noqa: BLE001  # goes to whoever awaits start()
                failure = error
            with contextlib.suppress(RuntimeError):
                events.call_soon_threadsafe(settle, failure)
            if failure is None and not self._is_abandoned:
                loop.run()

        # A daemon: a process that wants to exit must not wait for a forward pass.
        self._thread = threading.Thread(target=work, name="transformers-engine", daemon=True)
        self._thread.start()
        try:
            await ready
        except BaseException:
            # Loading can't be interrupted; when it is done, nobody will want it.
            self._is_abandoned = True
            if self._loop is not None:
                self._loop.close()
            self._thread = None
            raise

    def _load(self, deliver: Any) -> EngineLoop:
        """Runs in the engine's thread."""
        options = self._options
        model = load(options)
        on_cpu = model.device.type == "cpu"
        info = model.info
        budget = self._budget_tokens = options.kv_budget_tokens or _budget_tokens(model, _warm_up(model), info)
        model.info = dataclasses.replace(info, context_tokens=min(info.context_tokens, budget))
        self._loop = EngineLoop(
            model,
            slots=info.slots,
            budget_tokens=budget,
            chunk_tokens=options.prefill_chunk_tokens or (_CPU_CHUNK_TOKENS if on_cpu else _GPU_CHUNK_TOKENS),
            deliver=deliver,
        )
        self._loaded = model
        return self._loop

    async def generate(self, sequence: Sequence) -> AsyncGenerator[TokenChunk, None]:
        await self.check()
        loop = self._loop
        assert loop is not None
        if (over := already_over(sequence)) is not None:
            yield over
            return
        info = self.info
        check_sequence(info, sequence)
        longest = len(sequence.prompt_ids) + sequence.max_new_tokens
        check_search(sequence.params, longest, info.slots, self._budget_tokens)
        stop_ids = ending_ids(sequence.params, sequence.eos_ids)
        grammar = await self._grammar(sequence)
        media = None
        if sequence.media:
            media = await asyncio.to_thread(self._media_inputs, sequence)
        elif self._started.reads_both_ways:
            media = self._started.text_inputs(sequence.prompt_ids)
        mailbox = Mailbox()
        state = SamplingState(
            params=sequence.params,
            seed=_seed(sequence),
            prompt_ids=sequence.prompt_ids,
            ids=list(sequence.delivered_ids),
            stop_ids=stop_ids,
            grammar=grammar,
        )
        if sequence.params.num_beams == 1:
            loop.submit(Row(sequence, state, mailbox, media))
        else:
            loop.submit(SearchRow(sequence, state, mailbox, media, ranks={mailbox: sequence.choice}))
        is_over = False
        try:
            while not is_over:
                chunk = await mailbox.take()
                is_over = chunk.finish_reason is not None
                yield chunk
        finally:
            if not is_over:
                loop.abort(mailbox)

    def _media_inputs(self, sequence: Sequence) -> MediaInputs:
        model = self._started
        assert model.media is not None
        return model.media_inputs(sequence.prompt_ids, model.media.prepared(sequence.media))

    async def score(self, texts_ids: list[tuple[int, ...]], *, adapter: str | None = None) -> list[float]:
        await self.check()
        hint = "Serve a sequence classifier, or a model with a value head beside it or an adapter."
        check_texts(self.info, texts_ids, adapter, hint=hint)
        if not texts_ids:
            return []
        assert self._loop is not None
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._loop.submit(ScoreWork(texts_ids, adapter, future))
        try:
            return await future
        finally:
            if not future.done() or future.cancelled():
                self._loop.abort(future)

    async def check(self) -> None:
        if self._loop is not None and self._loop.dead:
            raise self._loop.dead
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            raise EngineDead("The engine's thread is not running.")

    async def close(self) -> None:
        thread, loop = self._thread, self._loop
        if thread is None:
            return
        if loop is not None:
            loop.close()
        await asyncio.to_thread(thread.join)
        self._loaded = None
        self._loop = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _put_all(deliveries: Deliveries) -> None:
    for receiver, outcome in deliveries:
        match receiver, outcome:
            case Mailbox(), TokenChunk(ids, logprobs, reason):
                receiver.put(ids, logprobs, reason)
            case Mailbox(), error:
                receiver.fail(error)
            case _ if receiver.done():  # its reader has gone
                pass
            case _, EngineError():
                receiver.set_exception(outcome)
            case _:
                receiver.set_result(outcome)


def _seed(sequence: Sequence) -> int:
    """A job's choices share a beam search, and with it the job's own seed."""
    seeds = [sequence.seed] if sequence.params.num_beams == 1 else [sequence.params.seed, sequence.seed]
    return next((seed for seed in seeds if seed is not None), secrets.randbits(63))


def _warm_up(model: LoadedModel) -> int:
    """Compute something once, so that the first request doesn't pay for it. Gives the cache's bytes per token."""
    warm = PromptPass([((1,) * 8, None)], model.layers, 8)
    try:
        with torch.inference_mode():
            warm.run(model.first_pass)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConfigurationError(
            f"The model can't be batched: {type(error).__name__}: {error}", hint="Serve it with vllm or sglang."
        ) from error
    return warm.cache.bytes_per_token


def _budget_tokens(model: LoadedModel, bytes_per_token: int, info: EngineInfo) -> int:
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
    else:
        free_bytes = psutil.virtual_memory().available
    most = BatchCache.tokens_for(info.slots, info.context_tokens)
    return max(min(int(free_bytes * _SHARE_OF_FREE_MEMORY) // bytes_per_token, most), 1)

"""`VllmEngine`: checks a sequence, hands it to vLLM, passes its tokens on."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import cached_property
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from tokenfleet.engines.base import Sequence, TokenChunk
from tokenfleet.engines.checks import already_over, check_sequence, check_texts
from tokenfleet.engines.model_engine import ModelEngine
from tokenfleet.engines.templates.tokens import Plain
from tokenfleet.engines.vllm_engine import compat
from tokenfleet.engines.vllm_engine.adapters import load_all
from tokenfleet.engines.vllm_engine.loading import LoadedVllm, load
from tokenfleet.engines.vllm_engine.options import VllmOptions
from tokenfleet.engines.vllm_engine.params import pooling_params, sampling_params
from tokenfleet.engines.vllm_engine.steps import StepReader
from tokenfleet.engines.warming import warm_up
from tokenfleet.wire.errors import ContextLengthExceeded, EngineDead, InvalidRequest


class VllmEngine(ModelEngine[LoadedVllm]):
    """A causal language model in vLLM's engine core, a child process. See `engines.base.Engine`.

    `AsyncLLM` starts the core, checks requests and ends it; what the core makes is read by our own `StepReader`."""

    def __init__(self, options: VllmOptions) -> None:
        super().__init__()
        self._options = options
        self._reader: StepReader | None = None
        self._tasks: tuple[Any, ...] = ()
        self._numbers = itertools.count()

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Finds special tokens that are written out."""
        return Plain(self.tokenizer, ()).pattern

    @property
    def steps(self) -> int:
        return 0 if self._reader is None else self._reader.steps

    @property
    def running(self) -> int:
        # vLLM's own scheduler keeps the others waiting, first come, first served.
        return 0 if self._reader is None else min(self._reader.unfinished, self._options.max_batch_size)

    async def start(self) -> None:
        if self._loaded is not None:
            return
        self._loaded = loaded = await asyncio.to_thread(load, self._options)
        self._reader = StepReader(loaded.engine.engine_core)
        if loaded.media is not None:
            loaded.media.serve()
        try:
            self._tasks = await loaded.engine.get_supported_tasks()
            await load_all(loaded.engine, loaded.lora)
            await warm_up(self)
        except EngineDeadError as error:
            await self.close()
            raise _dead() from error
        except BaseException:
            await self.close()
            raise

    async def generate(self, sequence: Sequence) -> AsyncGenerator[TokenChunk, None]:
        await self.check()
        if (over := already_over(sequence)) is not None:
            yield over
            return
        check_sequence(self.info, sequence)
        # vLLM refuses a request with ends that its model has no scores for; a tokenizer may have more tokens.
        known = frozenset(token for token in sequence.eos_ids if token < self.info.vocab_size)
        sequence = replace(sequence, eos_ids=known)
        params = sequence.params
        await self._grammar(sequence)  # `extras.Guides` does the same in the core, where an error would end it
        request_id = f"{sequence.sequence_id}-{next(self._numbers)}"  # an aborted sequence's may come again at once
        core, reader = self._started.engine.engine_core, self._steps_reader
        request = self._request(
            request_id,
            await self._prompt(sequence),
            sampling_params(sequence, self._started.tokenizer_facts, self._special),
            sequence.adapter,
            param=None if params.response_format.type == "text" else "response_format",
        )
        box = reader.open(request_id, params.top_logprobs if params.logprobs else None)
        try:
            await core.add_request_async(request)
            while True:
                chunk = await box.take()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        except EngineDeadError as error:
            raise _dead() from error
        finally:
            await reader.close(request_id)

    async def _prompt(self, sequence: Sequence) -> Any:
        """vLLM's engine input. Raises `InvalidRequest`, and `ContextLengthExceeded` for what its media come to."""
        ids = (*sequence.prompt_ids, *sequence.delivered_ids)
        if not sequence.media:
            return compat.token_prompt(list(ids))
        assert self._started.media is not None
        prompt = await self._started.media.prompt(ids, sequence.media)
        tokens, room = len(prompt["prompt_token_ids"]) - len(sequence.delivered_ids), self.info.context_tokens
        if tokens + sequence.max_new_tokens > room:
            raise ContextLengthExceeded(
                f"The prompt has {tokens} tokens with its media; with {sequence.max_new_tokens} new ones that is more "
                f"than the {room} there is room for.",
                hint="Send fewer or smaller media.",
                prompt_tokens=tokens,
                max_new_tokens=sequence.max_new_tokens,
                context_tokens=room,
            )
        return prompt

    def _request(self, request_id: str, prompt: Any, params: Any, adapter: str | None, param: str | None = None) -> Any:
        """An `EngineCoreRequest`; ``params``: `SamplingParams` or `PoolingParams`. Raises `InvalidRequest` that names
        ``param``: all that vLLM refuses beside a grammar was refused before."""
        loaded = self._started
        try:
            request = loaded.engine.input_processor.process_inputs(
                request_id, prompt, params, self._tasks, lora_request=loaded.lora.get(adapter)
            )
        except compat.request_errors() as error:
            if param is None:
                raise InvalidRequest(f"vLLM refuses this request: {error}") from error
            reason = str(error).removeprefix("Grammar error: ")
            raise InvalidRequest(f"{param} can't be used: {reason}", param=param) from error
        request.external_req_id = request_id
        return request

    @property
    def _steps_reader(self) -> StepReader:
        if self._reader is None:
            raise EngineDead("The engine has not been started.")
        return self._reader

    async def score(self, texts_ids: list[tuple[int, ...]], *, adapter: str | None = None) -> list[float]:
        await self.check()
        hint = "Serve a sequence classifier, or set rewards for a model with a value head."
        check_texts(self.info, texts_ids, adapter, hint=hint)
        scores = [asyncio.ensure_future(self._score(ids, adapter)) for ids in texts_ids]
        try:
            return list(await asyncio.gather(*scores))
        finally:
            for score in scores:
                score.cancel()

    async def _score(self, ids: tuple[int, ...], adapter: str | None) -> float:
        loaded, reader = self._started, self._steps_reader
        request_id = f"score-{next(self._numbers)}"
        prompt = compat.token_prompt(list(ids))
        request = self._request(request_id, prompt, pooling_params(is_hidden=loaded.head is not None), adapter)
        pooled = reader.open_reward(request_id)
        try:
            await loaded.engine.engine_core.add_request_async(request)
            values = await pooled
        except EngineDeadError as error:
            raise _dead() from error
        finally:
            await reader.close(request_id)
        return float(values[0] if loaded.head is None else loaded.head(values[None])[0])

    async def check(self) -> None:
        if self._started.engine.errored:
            raise _dead()
        if (failure := self._steps_reader.failure) is not None:
            raise failure

    async def close(self) -> None:
        reader, self._reader = self._reader, None
        loaded, self._loaded = self._loaded, None
        if reader is not None:
            reader.stop()
        if loaded is not None:
            await asyncio.to_thread(loaded.engine.shutdown)
            loaded.folders.close()


def _dead() -> EngineDead:
    return EngineDead("vLLM's engine core has died.", hint="Its reason is in the worker's log.")

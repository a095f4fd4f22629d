"""`VllmEngine`: checks a sequence, hands it to vLLM, passes its tokens on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from tokenfleet.engines.base import EngineInfo, RawLogprob, Sequence, TokenChunk
from tokenfleet.engines.stopping import ending_ids
from tokenfleet.engines.vllm_engine import compat
from tokenfleet.engines.vllm_engine.loading import LoadedVllm, load
from tokenfleet.engines.vllm_engine.options import VllmOptions
from tokenfleet.engines.vllm_engine.params import sampling_params
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ContextLengthExceeded, EngineDead, EngineError, InvalidRequest


class VllmEngine:
    """A causal language model in vLLM's `AsyncLLM`. See `engines.base.Engine`.

    The engine core is a child process; what reads its tokens is a task on the loop that first generates."""

    def __init__(self, options: VllmOptions) -> None:
        self._options = options
        self._loaded: LoadedVllm | None = None
        self._steps = 0
        self._active = 0
        self._numbers = itertools.count()

    @property
    def info(self) -> EngineInfo:
        return self._started.info

    @property
    def tokenizer(self) -> Any:
        """The model's `PreTrainedTokenizerBase`."""
        return self._started.tokenizer

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def running(self) -> int:
        # vLLM's own scheduler keeps the others waiting, first come, first served.
        return min(self._active, self._options.max_batch_size)

    @property
    def _started(self) -> LoadedVllm:
        if self._loaded is None:
            raise EngineDead("The engine has not been started.")
        return self._loaded

    async def start(self) -> None:
        if self._loaded is not None:
            return
        loaded = await asyncio.to_thread(load, self._options)
        compat.count_steps(loaded.engine, self._count_step)
        self._loaded = loaded
        try:
            await self._warm_up()
        except BaseException:
            await self.close()
            raise

    def _count_step(self) -> None:
        self._steps += 1

    async def _warm_up(self) -> None:
        """A token for each way to sample that is compiled or loaded at its first use."""
        for params in (GenerationParams(do_sample=False), GenerationParams(logprobs=True)):
            async with aclosing(self.generate(Sequence("warm-up", (1, 1), params, 2))) as chunks:
                async for _ in chunks:
                    pass

    async def generate(self, sequence: Sequence) -> AsyncGenerator[TokenChunk, None]:
        await self.check()
        if (over := _already_over(sequence)) is not None:
            yield over
            return
        self._refuse_what_cannot_work(sequence)
        loaded, params = self._started, sequence.params
        try:
            # vLLM adds nothing to an id in older releases, and an aborted sequence's may come again at once.
            outputs = loaded.engine.generate(
                compat.token_prompt([*sequence.prompt_ids, *sequence.delivered_ids]),
                sampling_params(sequence),
                f"{sequence.sequence_id}-{next(self._numbers)}",
                lora_request=loaded.lora.get(sequence.adapter),
            )
        except compat.request_errors() as error:
            raise _refused(error) from error
        self._active += 1
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    chunk = _chunk(output.outputs[0], params.top_logprobs if params.logprobs else None)
                    if chunk is not None:
                        yield chunk
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine core has died.", hint="Its reason is in the worker's log.") from error
        except EngineGenerateError as error:
            raise EngineError(f"vLLM failed this request: {error.__cause__ or error}") from error
        except compat.request_errors() as error:
            raise _refused(error) from error
        finally:
            self._active -= 1

    def _refuse_what_cannot_work(self, sequence: Sequence) -> None:
        info, params = self.info, sequence.params
        prompt_tokens = len(sequence.prompt_ids)
        if not prompt_tokens:
            raise InvalidRequest("The prompt has no tokens.", param="prompt")
        if prompt_tokens + sequence.max_new_tokens > info.context_tokens:
            raise ContextLengthExceeded(
                f"The prompt has {prompt_tokens} tokens; with {sequence.max_new_tokens} new ones that is more than "
                f"the {info.context_tokens} there is room for.",
                prompt_tokens=prompt_tokens,
                max_new_tokens=sequence.max_new_tokens,
                context_tokens=info.context_tokens,
            )
        for name, ids in (
            ("prompt", (*sequence.prompt_ids, *sequence.delivered_ids)),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if any(not 0 <= token < info.vocab_size for token in ids):
                raise InvalidRequest(
                    f"{name} has a token id outside of the model's vocabulary (0 to {info.vocab_size - 1}).", param=name
                )
        if sequence.adapter is not None and sequence.adapter not in info.adapters:
            raise InvalidRequest(
                f"There is no adapter {sequence.adapter!r}.",
                hint=f"Loaded: {', '.join(info.adapters) or 'none'}.",
                param="adapter",
            )
        if sequence.media:
            raise InvalidRequest("This engine takes text only.", code="unsupported_parameter", param="media")
        if params.num_beams > 1:
            raise InvalidRequest(
                "Beam search is not offered by this engine.", code="unsupported_parameter", param="num_beams"
            )

    async def score(self, texts_ids: list[tuple[int, ...]], *, adapter: str | None = None) -> list[float]:
        raise EngineError("Rewards are not built for vLLM yet.", code="unsupported", hint="Use transformers.")

    async def check(self) -> None:
        if self._started.engine.errored:
            raise EngineDead("vLLM's engine core has died.", hint="Its reason is in the worker's log.")

    async def close(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await asyncio.to_thread(loaded.engine.shutdown)


def _already_over(sequence: Sequence) -> TokenChunk | None:
    """What is left of a continuation whose last token had been delivered when its worker died."""
    delivered = sequence.delivered_ids
    if delivered and delivered[-1] in ending_ids(sequence.params, sequence.eos_ids):
        return TokenChunk((), (), "stop")
    if len(delivered) >= sequence.max_new_tokens:
        return TokenChunk((), (), "length")
    return None


def _chunk(output: Any, top_logprobs: int | None) -> TokenChunk | None:
    """``output``: a `CompletionOutput` in deltas. None if there is nothing in it."""
    ids = tuple(output.token_ids)
    logprobs: tuple[RawLogprob, ...] = ()
    if top_logprobs is not None and ids:
        logprobs = tuple(map(_raw_logprob, ids, output.logprobs, itertools.repeat(top_logprobs)))
    match output.finish_reason:
        case None:
            return TokenChunk(ids, logprobs) if ids else None
        case "stop" | "length" as reason:
            return TokenChunk(ids, logprobs, reason)
        case "abort":
            return TokenChunk(ids, logprobs, "cancelled")
        case reason:
            raise EngineError(f"vLLM ended this request with {reason!r}.")


def _raw_logprob(token: int, found: Any, count: int) -> RawLogprob:
    """``found``: id → `vllm.logprobs.Logprob`, of the ``count`` best and of the token itself."""
    best = sorted(((other, each.logprob) for other, each in found.items()), key=lambda pair: -pair[1])
    return RawLogprob(token, found[token].logprob, tuple(best[:count]))


def _refused(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"vLLM refuses this request: {error}")

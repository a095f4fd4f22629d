"""From a job to its deltas, on any engine: fan-out over choices, limits, continuation.

    renderer (engines/prompts.py) -> GenerationJob -> generate_deltas(engine, tokenizer, job) -> Delta, ChoiceFinished

What becomes of one choice's tokens is `engines/choice.py`'s business.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tokenfleet.engines.base import Engine, Media, Sequence
from tokenfleet.engines.choice import ChoiceText, DeliveredChoice
from tokenfleet.engines.tokenizer import Tokenizer
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ContextLengthExceeded, InvalidRequest
from tokenfleet.wire.events import ChoiceFinished, Delta

__all__ = ["DeliveredChoice", "GenerationJob", "choice_seed", "generate_deltas", "resolve_max_new_tokens"]


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A rendered chat job, for one attempt.

    ``delivered`` holds what earlier attempts delivered, per choice; choices that are absent start from nothing, those
    with ``is_finished`` are left alone. ``stop`` are the template's own stop strings, beside ``params.stop``.
    """

    job_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    max_new_tokens: int
    """Per choice, delivered ones included: `resolve_max_new_tokens`."""
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    visible_ids: frozenset[int] = frozenset()
    """Special tokens whose text stays: those that the answer's parser looks for."""
    adapter: str | None = None
    media: tuple[Media, ...] = ()
    prompt_text: str | None = None
    delivered: Mapping[int, DeliveredChoice] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def sequence(self, choice: int) -> Sequence:
        """Choice ``choice`` as the engine gets it. Ids are of one length per job: SGLang aborts by prefix."""
        return Sequence(
            sequence_id=f"{self.job_id}-{self.attempt:04d}-{choice:03d}",
            prompt_ids=self.prompt_ids,
            params=self.params,
            max_new_tokens=self.max_new_tokens,
            seed=None if self.params.seed is None else choice_seed(self.params.seed, choice),
            delivered_ids=self.delivered[choice].ids if choice in self.delivered else (),
            eos_ids=self.eos_ids,
            adapter=self.adapter,
            choice=choice,
            media=self.media,
            prompt_text=self.prompt_text,
            extra={**self.extra, "attempt": self.attempt},
        )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice: the job's own for choice 0, so that n=1 and n>1 agree there; for choice i the upper 63
    bits of sha256("<seed>:<i>")."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8], "big") >> 1


def resolve_max_new_tokens(params: GenerationParams, prompt_tokens: int, context_tokens: int) -> int:
    """How many tokens a choice may have, from max_new_tokens, max_length and what the context leaves.

    A limit the caller asked for must fit; the default one (LLaMA-Factory's 1024) yields to the context, and to an
    explicit ``max_length``. Raises `ContextLengthExceeded`.
    """
    asked = params.max_new_tokens if "max_new_tokens" in params.model_fields_set else None
    room = context_tokens - prompt_tokens
    needed = max(asked or 1, params.min_tokens)
    if room < needed:
        hint = "Shorten the prompt." if room < 1 else f"Shorten the prompt or ask for at most {room} new tokens."
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens and {needed} new ones were asked for, "
            f"but the model's context holds {context_tokens}.",
            hint=hint,
            prompt_tokens=prompt_tokens,
            max_new_tokens=needed,
            context_tokens=context_tokens,
        )
    if params.max_length is None:
        return min(room, params.max_new_tokens or room)
    if params.max_length - prompt_tokens < max(1, params.min_tokens):
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens, so max_length={params.max_length} leaves no room for an answer.",
            hint="max_length counts prompt and answer together; raise it, or give max_new_tokens instead.",
            prompt_tokens=prompt_tokens,
            max_new_tokens=max(1, params.min_tokens),
            context_tokens=min(params.max_length, context_tokens),
        )
    return min(room, asked or room, params.max_length - prompt_tokens)


async def generate_deltas(
    engine: Engine, tokenizer: Tokenizer, job: GenerationJob
) -> AsyncGenerator[Delta | ChoiceFinished, None]:
    """Yield each choice's deltas in token order, choices interleaved, and one `ChoiceFinished` for each.

    Whatever tokens of a choice wait when the reader comes back are one delta: a step's worth for a fast reader.
    Closing or cancelling this generator aborts all choices and frees their slots before it returns.
    Raises what the engine raises; one choice's error ends the job. Raises `InvalidRequest` for ids the model has not.
    """
    _check_ids(job, engine.info.vocab_size)
    texts: dict[int, ChoiceText] = {}
    for choice in range(job.params.n):
        delivered = job.delivered.get(choice)
        if delivered is not None and delivered.is_finished:
            continue
        text = ChoiceText(
            choice, tokenizer, job.params, job.max_new_tokens,
            eos_ids=job.eos_ids, stop=job.stop, visible_ids=job.visible_ids,
        )  # fmt: skip
        ended = text.resume(delivered) if delivered is not None else None
        if ended is not None:
            yield ended
        else:
            texts[choice] = text
    if len(texts) > 1:
        async with aclosing(_several(engine, job, texts)) as events:
            async for event in events:
                yield event
        return
    for choice, text in texts.items():
        async with aclosing(engine.generate(job.sequence(choice))) as chunks:
            async for chunk in chunks:
                for event in text.feed(chunk):
                    yield event
                if text.is_finished:  # the engine goes on past a stop string until it is closed
                    return


def _check_ids(job: GenerationJob, vocab_size: int) -> None:
    """An id beyond the vocabulary would be read beyond a tensor's end; on a GPU that takes the whole engine down."""
    params = job.params
    for param, ids in (
        ("prompt", job.prompt_ids),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if ids and (min(ids) < 0 or max(ids) >= vocab_size):
            raise InvalidRequest(
                f"{param} has a token id outside the model's vocabulary.",
                hint=f"Token ids are 0 to {vocab_size - 1}.",
                param=param,
            )
    if not job.prompt_ids:
        raise InvalidRequest("The prompt has no tokens.", hint="Send at least one.", param="prompt")


async def _several(
    engine: Engine, job: GenerationJob, texts: Mapping[int, ChoiceText]
) -> AsyncGenerator[Delta | ChoiceFinished, None]:
    """A task per choice fills one list; the reader takes all that is in it."""
    waiting: list[Delta | ChoiceFinished] = []
    filled = asyncio.Event()

    async def run(choice: int, text: ChoiceText) -> None:
        try:
            async with aclosing(engine.generate(job.sequence(choice))) as chunks:
                async for chunk in chunks:
                    waiting.extend(text.feed(chunk))
                    filled.set()
                    if text.is_finished:
                        return
        finally:
            filled.set()

    tasks = [asyncio.create_task(run(choice, text)) for choice, text in texts.items()]
    try:
        while waiting or not all(task.done() for task in tasks):
            await filled.wait()
            filled.clear()
            events, waiting[:] = _merged(waiting), []
            for event in events:
                yield event
            for task in tasks:
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _merged(events: list[Delta | ChoiceFinished]) -> list[Delta | ChoiceFinished]:
    """The same events with each choice's consecutive deltas joined, ends after them."""
    deltas: dict[int, Delta] = {}
    ends: list[Delta | ChoiceFinished] = []
    for event in events:
        if isinstance(event, ChoiceFinished):
            ends.append(event)
        elif (before := deltas.get(event.choice)) is None:
            deltas[event.choice] = event
        else:
            deltas[event.choice] = Delta(
                event.choice, before.index, before.ids + event.ids, before.text + event.text,
                before.logprobs + event.logprobs,
            )  # fmt: skip
    return [*deltas.values(), *ends]

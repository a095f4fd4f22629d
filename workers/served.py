"""The served model of a worker: engine, tokenizer and template together; makes a job ready to be generated."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tokenfleet.engines.base import Engine, Media
from tokenfleet.engines.generation import DeliveredChoice, GenerationJob, resolve_max_new_tokens
from tokenfleet.engines.prompts import RenderedPrompt
from tokenfleet.engines.registry import Loaded, ModelSettings, load
from tokenfleet.engines.support import continuation
from tokenfleet.engines.tokenizer import Tokenizer
from tokenfleet.wire.chat import ChatRequest, GenerationParams, ResponseFormat, ScoreRequest
from tokenfleet.wire.errors import InvalidRequest, StreamInterrupted
from tokenfleet.wire.ledger import Claim
from tokenfleet.wire.requests import check_taken
from tokenfleet.wire.support import REFUSED, check_supported
from tokenfleet.workers.settings import WorkerSettings
from tokenfleet.workers.takeover import Delivered

# Rendering below this many characters is quicker than a change of threads.
_INLINE_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class Prepared:
    """``is_fresh``: the prompt was rendered now, so the ledger is to store it. Scores have ``texts_ids``, no job."""

    prompt_ids: tuple[int, ...]
    prompt_tokens: int
    parser: dict[str, Any]
    is_fresh: bool
    job: GenerationJob | None = None
    texts_ids: tuple[tuple[int, ...], ...] = ()


class Served:
    """One per worker process; `start` loads the model."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._loaded: Loaded | None = None

    async def start(self) -> None:
        """Raises `ConfigurationError` (a missing extra, bad options, no such model) or `EngineDead`."""
        s = self._settings
        model = ModelSettings(
            s.model,
            s.slots,
            s.template,
            s.default_system,
            s.enable_thinking,
            preserve_thinking=s.preserve_thinking,
            neutral_special_tokens=s.neutral_special_tokens,
        )
        self._loaded = await load(s.engine, s.engine_args, model)

    @property
    def loaded(self) -> Loaded:
        assert self._loaded is not None, "not started"
        return self._loaded

    @property
    def engine(self) -> Engine:
        return self.loaded.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    async def score(self, prepared: Prepared, adapter: str | None) -> list[float]:
        return await self.engine.score(list(prepared.texts_ids), adapter=adapter)

    async def close(self) -> None:
        if self._loaded is not None:
            await self.engine.close()

    def check(self, request: ChatRequest | ScoreRequest) -> None:
        """Before any medium is fetched. Raises `InvalidRequest` (``unsupported``, ``unsupported_modality``,
        ``unsupported_parameter``, ``unknown_adapter``)."""
        info = self.engine.info
        check_taken(info, request)
        if isinstance(request, ChatRequest):
            check_supported(info.name, request.params)

    async def prepare(
        self, request: ChatRequest | ScoreRequest, claim: Claim, delivered: Delivered, media: tuple[Media, ...] = ()
    ) -> Prepared:
        """Render, check and limit; a continuation takes the stored prompt ids. Raises `CallerError`s before prefill,
        `StreamInterrupted` if what was delivered can't be continued here.

        ``media``: the bytes of ``request.media``, in the same order."""
        if isinstance(request, ScoreRequest):
            return await asyncio.to_thread(self._prepare_scores, request)
        if media or len(claim.request) > _INLINE_CHARS:
            return await asyncio.to_thread(self._prepare_chat, request, claim, delivered, media)
        return self._prepare_chat(request, claim, delivered, media)

    def _prepare_chat(
        self, request: ChatRequest, claim: Claim, delivered: Delivered, media: tuple[Media, ...]
    ) -> Prepared:
        info = self.engine.info
        if claim.options.durable and continuation(info.name, request.params, info.uncontinued) == "no":
            raise InvalidRequest(
                "This engine could not continue a request with these parameters after a worker's death.",
                code="not_durable",
                hint="Leave out durable, or the parameters that docs/reliability.md marks 'no'.",
            )
        prompt = self.loaded.render(request, media)
        ids, is_fresh = prompt.ids, True
        if claim.prompt and delivered.choices:
            self._check_continuable(request, claim)
            ids, is_fresh = tuple(json.loads(claim.prompt)), False
        params, parser = _forced(request.params, prompt, info.name)
        job = GenerationJob(
            job_id=claim.job_id,
            attempt=claim.epoch,
            prompt_ids=ids,
            params=params,
            max_new_tokens=resolve_max_new_tokens(request.params, prompt.tokens, info.context_tokens),
            eos_ids=self.loaded.tokenizer.eos_ids | info.eos_ids | frozenset(prompt.stop_token_ids),
            stop=() if params.ignore_eos else prompt.stop_strings,  # they stand for EOS
            visible_ids=frozenset(prompt.visible_ids),
            adapter=request.adapter,
            media=media,
            prompt_text=prompt.text,
            delivered={
                index: DeliveredChoice(tuple(choice.ids), choice.text, is_finished=bool(choice.finish_reason))
                for index, choice in delivered.choices.items()
            },
        )
        return Prepared(ids, prompt.tokens, parser, is_fresh, job)

    def _check_continuable(self, request: ChatRequest, claim: Claim) -> None:
        info = self.engine.info
        if claim.fingerprint != info.fingerprint:
            raise StreamInterrupted(
                "The job's worker died, and those left are of another engine or version of its model."
            )
        if continuation(info.name, request.params, info.uncontinued) == "no":
            raise StreamInterrupted("The job's worker died, and this engine can't continue its parameters.")

    def _prepare_scores(self, request: ScoreRequest) -> Prepared:
        limit = min(request.max_length or self.engine.info.context_tokens, self.engine.info.context_tokens)
        texts = tuple(tuple(self.loaded.tokenizer.encode(text)[:limit]) for text in request.texts)
        return Prepared((), sum(map(len, texts)), {}, False, None, texts)


def _forced(params: GenerationParams, prompt: RenderedPrompt, engine: str) -> tuple[GenerationParams, dict[str, Any]]:
    """A forced call's arguments follow their schema on every engine that can be held to a grammar. Also the parser of
    the answer, which knows whether they do.

    ``response_format`` is about content, and such an answer has none."""
    if "prefix" not in prompt.parser:
        return params, dict(prompt.parser)
    wanted = ResponseFormat()
    parser = {key: value for key, value in prompt.parser.items() if key != "forced"}
    if prompt.grammar and "response_format" not in REFUSED[engine]:
        wanted, parser = ResponseFormat(type="grammar", grammar=prompt.grammar), dict(prompt.parser)
    return params.model_copy(update={"response_format": wanted}), parser

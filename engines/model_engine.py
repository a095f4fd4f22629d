"""What the engines that load a model's files have alike, whatever they compute with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Items
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tokenfleet.engines.base import EngineInfo, Media, Sequence
from tokenfleet.engines.grammar import GrammarCompiler, TokenGrammar
from tokenfleet.engines.stopping import ending_ids
from tokenfleet.wire.errors import EngineDead

if TYPE_CHECKING:
    from tokenfleet.engines.templates.expansion import Expansion


class PromptMedia(Protocol):
    """How media come into a model's prompts."""

    def expansion(self, media: Items[Media]) -> Expansion:
        """Raises `InvalidRequest` for media that can't be decoded or that the model can't take. Blocks."""
        ...


class Loaded(Protocol):
    """What an engine's loading gives, at the least."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def tokenizer(self) -> Any:
        """`transformers.PreTrainedTokenizerBase`"""
        ...

    @property
    def media(self) -> PromptMedia | None:
        """None for a model of texts."""
        ...


AnyLoaded = TypeVar("AnyLoaded", bound=Loaded)


class ModelEngine(Generic[AnyLoaded]):
    """The part of `Engine` that follows from what was loaded. ``start`` sets ``_loaded``, ``close`` takes it away."""

    def __init__(self) -> None:
        self._loaded: AnyLoaded | None = None

    @property
    def _started(self) -> AnyLoaded:
        if self._loaded is None:
            raise EngineDead("The engine has not been started.")
        return self._loaded

    @property
    def info(self) -> EngineInfo:
        return self._started.info

    @property
    def tokenizer(self) -> Any:
        """The model's `PreTrainedTokenizerBase`: prompts are made and tokens are read with it above the engine."""
        return self._started.tokenizer

    @property
    def media(self) -> PromptMedia | None:
        """What makes prompts of media for this model; None for a model of texts."""
        return self._started.media

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.info.vocab_size)

    async def _grammar(self, sequence: Sequence) -> TokenGrammar | None:
        """What the text has to follow, having read the delivered ids; None if that is nothing. Raises
        `InvalidRequest`, `EngineError`: here, before a loop or a child process of the engine would have to."""
        wanted = sequence.params.response_format
        if wanted.type == "text":
            return None
        ends = ending_ids(sequence.params, sequence.eos_ids)
        # In another thread: a large schema takes long, and others are waiting for their tokens.
        return await asyncio.to_thread(self._compiler.compile, wanted, sequence.delivered_ids, ends)

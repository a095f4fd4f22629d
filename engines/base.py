"""The interface every engine implements: token ids in, token ids out, one sequence a call.

What is the same for all engines is done once, above it: templates (`engines/prompts.py`), detokenising, stop strings
and fan-out over choices (`engines/generation.py`). So an engine never sees text, and a stop string, a finish reason
or a usage count cannot differ between engines.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tokenfleet.wire.chat import GenerationParams


@dataclass(frozen=True, slots=True)
class Media:
    """One decoded-on-demand medium: raw file bytes as uploaded, checked for size but not yet decoded."""

    kind: Literal["image", "video", "audio"]
    data: bytes


@dataclass(frozen=True, slots=True)
class Sequence:
    """One choice of one job, ready to be prefilled.

    ``prompt_ids`` and ``delivered_ids`` are prefilled together; generation goes on at index ``len(delivered_ids)``.
    ``params`` are the caller's own: an engine itself subtracts what was delivered from max_new_tokens and min_tokens
    and counts delivered ids in penalties. ``seed`` is the choice's seed (already derived), None for a fresh draw.
    ``sequence_id`` is unique per attempt and choice.
    """

    sequence_id: str
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    max_new_tokens: int
    """Total for the choice, delivered ones included; resolved from max_new_tokens, max_length and the context."""
    seed: int | None = None
    delivered_ids: tuple[int, ...] = ()
    eos_ids: frozenset[int] = frozenset()
    """Ids that end the choice (EOS and the template's stop tokens), unless ``params.ignore_eos``."""
    adapter: str | None = None
    choice: int = 0
    """Its number among the choices of its job; these have ``sequence_id``s that differ in the last part only."""
    media: tuple[Media, ...] = ()
    prompt_text: str | None = None
    """Set for multimodal prompts: the rendered text with the model's own placeholders, for engines that want it."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RawLogprob:
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(id, natural-log probability), best first, of the model's own distribution (before temperature and cuts)."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New token ids of a sequence, one or more steps' worth. The last chunk has a ``finish_reason`` (and may have no
    ids): ``stop`` (an EOS or stop token, which is the last of ``ids``), ``length``, or ``cancelled`` after an abort."""

    ids: tuple[int, ...]
    logprobs: tuple[RawLogprob, ...] = ()
    finish_reason: Literal["stop", "length", "cancelled"] | None = None


Continuation = Literal["exact", "valid", "no"]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is and can do; constant once it has started."""

    name: str
    version: str
    model: str
    """Label of the model for people and fingerprints, never a secret path."""
    fingerprint: str
    """Changes whenever a continuation by another worker would not be the same model: weights revision, dtype,
    tokenizer, template, adapters, engine and its version."""
    context_tokens: int
    slots: int
    """Sequences the engine batches at once."""
    vocab_size: int
    adapters: tuple[str, ...] = ()
    can_score: bool = False
    can_generate: bool = True
    modalities: tuple[str, ...] = ("text",)
    eos_ids: frozenset[int] = frozenset()
    """What ends a text by the model's own generation config, beside the tokenizer's EOS."""
    uncontinued: frozenset[str] = frozenset()
    """Parameters that this engine, as it is loaded, can't continue after a takeover whatever the table says."""


class Engine(Protocol):
    """A warm model. All methods are called on one event loop; none may block it for longer than a step."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def steps(self) -> int:
        """Grows whenever the engine makes progress (a decode step or a prefill chunk): health watches it."""
        ...

    @property
    def running(self) -> int:
        """Sequences that hold a slot now."""
        ...

    async def start(self) -> None:
        """Load everything and warm up. Raises `ConfigurationError` or `EngineDead`."""
        ...

    def generate(self, sequence: Sequence) -> AsyncGenerator[TokenChunk, None]:
        """Generate one sequence. Closing or cancelling the generator aborts it and frees its slot within one step.

        Raises `EngineError` if this request failed, `EngineDead` if no request can succeed any more."""
        ...

    async def score(self, texts_ids: list[tuple[int, ...]], *, adapter: str | None = None) -> list[float]:
        """One reward per token sequence. Raises `EngineError` (code ``unsupported``) if the model has no head."""
        ...

    async def check(self) -> None:
        """Raises `EngineDead` if the engine (or a child process of it) has died."""
        ...

    async def close(self) -> None:
        """Abort what runs and free all memory. May be called twice."""
        ...

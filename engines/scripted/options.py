"""How a scripted engine behaves; fixed when it starts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ScriptedOptions(BaseModel):
    """Time, size, and what may be asked of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots: int = Field(256, ge=1)
    """Sequences that run at once; later ones wait in order."""
    context_tokens: int = Field(32_768, ge=16)
    ttft_ms: float = Field(0.0, ge=0, le=3_600_000)
    """Start of a sequence to its first token, once it has a slot."""
    prefill_us_per_token: float = Field(0.0, ge=0, le=1_000_000)
    """Added to ``ttft_ms`` for each prompt and delivered token."""
    token_ms: float = Field(0.0, ge=0, le=3_600_000)
    """Between tokens of a sequence. Token i is due at start + ttft + i * token_ms whatever came before, so delays don't
    add up. 0: as fast as the loop turns."""
    most_behind_ms: float | None = Field(None, ge=0)
    """A sequence that is later than this (the machine stood still) makes up for no more; its other tokens are put off.
    None: it makes up for all, several tokens in one step."""
    eos_after: int | None = Field(None, ge=0)
    """EOS is token number ``eos_after`` (counted from 0) of every choice, later if min_tokens bars it. None: never."""
    salted: bool = False
    """Tokens follow from all ids before them and a salt drawn per attempt; sampling parameters play no part."""
    allow_faults: bool = False
    """Obey ``[[fault: ...]]`` in prompts (`engines/scripted/directives.py`). ``[[say: ...]]`` is always obeyed."""
    record_path: str | None = None
    """Append what is prefilled, generated and ended to this file, a JSON object a line, before it is delivered."""
    adapters: tuple[str, ...] = ()
    modalities: tuple[Literal["text", "image", "video", "audio"], ...] = ("text",)
    label: str = "scripted"
    uncontinued: frozenset[str] = frozenset()
    """Parameters that it says it can't continue after a takeover (it could)."""

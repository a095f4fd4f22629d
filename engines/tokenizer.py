"""What tokenfleet needs of a tokenizer: HF's (`engines/hf_tokenizer.py`) and the scripted engine's have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextStream(Protocol):
    """Decodes the ids of one choice as they come.

    The joined results of `push`, then of `flush`, are the text of all ids: always valid Unicode."""

    @property
    def is_open(self) -> bool:
        """Whether the text of the last token pushed is not yet final: a character's first bytes wait for the rest."""
        ...

    def push(self, token_id: int) -> str:
        """The text that became final with this token; "" for a skipped special token or an open character."""
        ...

    def flush(self) -> str:
        """The end: U+FFFD for a character that never completed, else ""."""
        ...


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, with no BOS or EOS added; special tokens written out in ``text`` become plain text or not
        as the model's own tokenizer does it."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str:
        """One token for logprobs. Bytes that are no whole character read ``bytes:\\xf0\\x9f``, as OpenAI's do."""
        ...

    def special_id(self, word: str) -> int | None:
        """The id of the special token that is written ``word``; None if there is none."""
        ...

    def decode_stream(
        self, *, skip_special_tokens: bool = True, visible_ids: frozenset[int] = frozenset()
    ) -> TextStream:
        """``visible_ids`` are special tokens whose text stays all the same: the marks of a tool call."""
        ...

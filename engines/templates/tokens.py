"""What prompts need of a transformers tokenizer, which this never changes: many requests share it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerBase` that is used here."""

    chat_template: Any
    bos_token: Any
    eos_token: Any
    bos_token_id: Any
    eos_token_id: Any

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Any, /) -> Any: ...
    def convert_tokens_to_ids(self, token: str, /) -> Any: ...
    def convert_ids_to_tokens(self, token_id: int, /) -> Any: ...
    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of ``text`` alone: no BOS or EOS; special tokens written out in it become what they name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return list(tokenizer.encode(text, add_special_tokens=False))
    # The same ids; the library's own wrapper sets truncation on the shared backend, which threads can't do at once.
    return encode_whole(backend, text)


def encode_whole(backend: Any, text: str) -> list[int]:
    """Ids of all of ``text``, by a `tokenizers.Tokenizer`.

    ``tokenizer.json`` keeps how texts were cut and filled up when it was saved (in a trainer's batches, mostly), which
    would shorten prompts, and texts to be scored, without a word."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return list(backend.encode(text, add_special_tokens=False).ids)


def token_id(tokenizer: Tokenizer, token: str) -> int | None:
    """The id of the one token ``token``; None where the vocabulary hasn't got it."""
    found = tokenizer.convert_tokens_to_ids(token)
    return found if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token else None


@lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that are dropped from answers' texts as special."""
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


class Plain:
    """Tokenises texts in which control words are to be ordinary text, however they are spelled out."""

    def __init__(self, tokenizer: Tokenizer, further: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        words = {str(token.content) for token in added.values() if token.special}
        words |= {word for word in further if token_id(tokenizer, word) is not None}
        ordered = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Cuts each control word after its first character, so that no piece is one."""
        found = self.pattern.search(text)
        if found is None:
            return encode(self._tokenizer, text) if text else []
        cut = found.start() + 1
        return encode(self._tokenizer, text[:cut]) + self.encode(text[cut:])

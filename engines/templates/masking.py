"""Control words in users' and tools' texts, taken out before a template is rendered and put back as plain text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from functools import lru_cache

from tokenfleet.engines.templates.schema import Template
from tokenfleet.engines.templates.tokens import Plain, Tokenizer
from tokenfleet.wire.chat import Message, TextPart
from tokenfleet.wire.toolformats import READERS

_MASKED_ROLES = frozenset({"user", "tool", "observation"})


@lru_cache(maxsize=8)
def _plain(tokenizer: Tokenizer, words: frozenset[str]) -> Plain:
    return Plain(tokenizer, words)


def _words(template: Template | None) -> frozenset[str]:
    """Words that may be control tokens of this model without being marked as special."""
    words = {word for readers in READERS.values() for reader in readers for word in (*reader.marks, *reader.words)}
    words |= {"<think>", "</think>"}
    if template:
        words |= {*template.stop_words, *(mark.strip() for mark in template.thoughts), *template.call_words}
    return frozenset(words)


class Mask:
    """``messages`` with control words replaced by marks that nobody can guess, and the way back."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None, messages: Sequence[Message]) -> None:
        self._plain = _plain(tokenizer, _words(template))
        self._words: list[str] = []
        key = secrets.token_hex(8)
        self._mark = f"\ue000{key}-{{}}\ue001"
        self._marks = re.compile(f"\ue000{key}-([0-9]+)\ue001")
        self.messages = tuple(self._masked(message) for message in messages)

    def _masked(self, message: Message) -> Message:
        if message.role not in _MASKED_ROLES or message.content is None:
            return message
        if isinstance(message.content, str):
            return message.model_copy(update={"content": self._hide(message.content)})
        parts = tuple(
            TextPart(text=self._hide(part.text)) if isinstance(part, TextPart) else part for part in message.content
        )
        return message.model_copy(update={"content": parts})

    def _hide(self, text: str) -> str:
        def mark(found: re.Match[str]) -> str:
            self._words.append(found[0])
            return self._mark.format(len(self._words) - 1)

        return self._plain.pattern.sub(mark, text)

    def show(self, text: str) -> str:
        return self._marks.sub(lambda found: self._words[int(found[1])], text)

    def segments(self, text: str) -> Iterator[tuple[str, bool]]:
        """(text, whether it is a control word that is to be plain text)."""
        for i, segment in enumerate(self._marks.split(text)):
            if i % 2:
                yield self._words[int(segment)], True
            elif segment:
                yield segment, False

    def plain_ids(self, word: str) -> list[int]:
        return self._plain.encode(word)

"""Salted text: each token follows from all ids before it and a salt drawn per attempt, and shows that salt.

So a checker that knows the log alone can tell which attempt made which token, and with the salts from the engines'
records whether each attempt continued from exactly the ids delivered before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenfleet.engines.scripted.hashing import digest, mix
from tokenfleet.engines.scripted.tokenizer import SALT_BITS, SALTED_BASE, SALTED_WORDS, VOCAB_SIZE

_VISIBLE = (1 << SALT_BITS) - 1


def salt_of(token_id: int) -> int | None:
    """The last 16 bits of the salt that made this token; None for a token that is not salted."""
    return (token_id - SALTED_BASE) // len(SALTED_WORDS) if SALTED_BASE <= token_id < VOCAB_SIZE else None


class SaltedText:
    """The ids that follow ``prompt_ids`` and whatever is fed to it. ``salt`` has 63 bits."""

    __slots__ = ("_base", "_salt", "_state")

    def __init__(self, prompt_ids: Sequence[int], delivered_ids: Iterable[int], salt: int) -> None:
        self._salt = salt
        self._base = SALTED_BASE + (salt & _VISIBLE) * len(SALTED_WORDS)
        self._state = digest(prompt_ids)
        for token_id in delivered_ids:
            self.feed(token_id)

    def feed(self, token_id: int) -> None:
        self._state = mix(self._state ^ token_id)

    def peek(self) -> int:
        """The id at this place."""
        return self._base + (mix(self._state ^ self._salt) & (len(SALTED_WORDS) - 1))


def salts_by_token(prompt_ids: Sequence[int], ids: Sequence[int], salts: Iterable[int]) -> list[int | None]:
    """Which of ``salts`` made each token out of exactly the ids before it; None where none of them did."""
    texts = {salt: SaltedText(prompt_ids, (), salt) for salt in salts}
    makers: list[int | None] = []
    for token_id in ids:
        makers.append(next((salt for salt, text in texts.items() if text.peek() == token_id), None))
        for text in texts.values():
            text.feed(token_id)
    return makers

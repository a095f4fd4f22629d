"""The scripted engine's vocabulary as its documentation gives it, written again: what ids mean, and their salts."""

from __future__ import annotations

from collections.abc import Iterable

EOS = 256
SPECIAL = range(256, 262)
WORDS = {
    512 + k: word
    for k, word in enumerate(
        (
            " the", " river", " bends", " slowly", " past", " seven", " old", " mills", " and", " a", " quiet",
            " wheel", " turns", " naïve", " café", " über", " 世界", " こんにちは", " мир", " ☃", " 🚀", ",", ".", "\n",
            " light", " on", " water", " never", " stays", " where", " it", " was",
        )
    )
}  # fmt: skip
SALTED = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haze", "inlet", "jade", "kelp", "lotus", "maple",
    "north", "ocean", "pine",
)  # fmt: skip
FIRST_SALTED = 1024


def salt_of(token: int) -> int | None:
    """The last 16 bits of its attempt's salt; None for a token without one."""
    return (token - FIRST_SALTED) // 16 if FIRST_SALTED <= token < FIRST_SALTED + (16 << 16) else None


def text_of(tokens: Iterable[int]) -> str | None:
    """The text of a whole choice; None if it ends in the middle of a character, or has an unknown token."""
    data = bytearray()
    for token in tokens:
        if token < 256:
            data.append(token)
        elif (salt := salt_of(token)) is not None:
            data += f" {SALTED[(token - FIRST_SALTED) % 16]}-{salt:04x}".encode()
        elif token in WORDS:
            data += WORDS[token].encode()
        elif token not in SPECIAL:
            return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None

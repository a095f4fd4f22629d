"""The scripted engine's tokenizer: bytes, a few special tokens, some words, and salted words. Exact both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tokenfleet.engines.detokenizer import ByteStream, token_text
from tokenfleet.wire.chat import Message

SPECIAL = ("<eos>", "<system>", "<user>", "<assistant>", "<tool>", "<end>")
EOS, _SYSTEM, _USER, _ASSISTANT, _TOOL, END = range(256, 256 + len(SPECIAL))
_ROLES = {"system": _SYSTEM, "developer": _SYSTEM, "user": _USER, "assistant": _ASSISTANT, "function": _ASSISTANT}

WORDS = (
    " the", " river", " bends", " slowly", " past", " seven", " old", " mills", " and", " a", " quiet", " wheel",
    " turns", " naïve", " café", " über", " 世界", " こんにちは", " мир", " ☃", " 🚀", ",", ".", "\n", " light", " on",
    " water", " never", " stays", " where", " it", " was",
)  # fmt: skip
WORD_BASE = 512
WORD_IDS = tuple(range(WORD_BASE, WORD_BASE + len(WORDS)))

SALT_BITS = 16
SALTED_WORDS = (
    " amber", " birch", " cedar", " delta", " ember", " fjord", " grove", " haze",
    " inlet", " jade", " kelp", " lotus", " maple", " north", " ocean", " pine",
)  # fmt: skip
SALTED_BASE = 1024
VOCAB_SIZE = SALTED_BASE + (len(SALTED_WORDS) << SALT_BITS)

_SPECIAL_IDS = frozenset(range(EOS, EOS + len(SPECIAL)))
_IDS_BY_WORD = {word: WORD_BASE + i for i, word in enumerate(WORDS)}
_WORD = re.compile("|".join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True)))


class _Table(dict[int, bytes]):
    """Bytes by id. Ids that stand for nothing have none."""

    def __missing__(self, token_id: int) -> bytes:
        if SALTED_BASE <= token_id < VOCAB_SIZE:
            salt, word = divmod(token_id - SALTED_BASE, len(SALTED_WORDS))
            return f"{SALTED_WORDS[word]}-{salt:04x}".encode()
        return b""


_TABLE = _Table(
    {i: bytes([i]) for i in range(256)}
    | {EOS + i: text.encode() for i, text in enumerate(SPECIAL)}
    | {WORD_BASE + i: word.encode() for i, word in enumerate(WORDS)}
)


class ScriptedTokenizer:
    """Implements `Tokenizer`. A salted token reads like `` cedar-3fa2``: its attempt's salt shows in the text."""

    vocab_size = VOCAB_SIZE
    eos_ids = frozenset((EOS,))

    def encode(self, text: str) -> list[int]:
        """Words where they stand, bytes between them; special tokens written out are plain text."""
        ids: list[int] = []
        position = 0
        for match in _WORD.finditer(text):
            ids += text[position : match.start()].encode("utf-8", "replace")
            ids.append(_IDS_BY_WORD[match.group()])
            position = match.end()
        ids += text[position:].encode("utf-8", "replace")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        skipped = _SPECIAL_IDS if skip_special_tokens else frozenset()
        return b"".join(_TABLE[i] for i in ids if i not in skipped).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return token_text(_TABLE[token_id])

    def special_id(self, word: str) -> int | None:
        return EOS + SPECIAL.index(word) if word in SPECIAL else None

    def decode_stream(
        self, *, skip_special_tokens: bool = True, visible_ids: frozenset[int] = frozenset()
    ) -> ByteStream:
        return ByteStream(_TABLE, skipped=_SPECIAL_IDS - visible_ids if skip_special_tokens else frozenset())

    def render_chat(self, messages: Iterable[Message], *, system: str | None = None) -> list[int]:
        """Each message as role token, text, end token; then the assistant's turn is open."""
        ids: list[int] = [_SYSTEM, *self.encode(system), END] if system else []
        for message in messages:
            ids += (_ROLES.get(message.role, _TOOL), *self.encode(message.text), END)
        return [*ids, _ASSISTANT]

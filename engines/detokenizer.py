"""Incremental detokenising: `ByteStream` where every token stands for fixed bytes, `WindowStream` for all other kinds.

Why not tokenizers' own ``DecodeStream`` (0.23): it decodes a window of tokens twice for each token (2 to 10 times the
cost of a table look-up), keeps back every token whose text honestly ends with U+FFFD until other text follows, never
gives out what is left at the end, and raises when a run of byte-fallback tokens turns out to be no valid UTF-8.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence


def _one_mark_a_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


PER_BYTE = "tokenfleet.replace_per_byte"
"""Error handler of byte-fallback tokenizers: one U+FFFD for each invalid byte, where byte-level ones give one for
each broken character (``replace``)."""
codecs.register_error(PER_BYTE, _one_mark_a_byte)


class ByteStream:
    """Joins the tokens' bytes and gives out whole characters.

    ``first`` maps an id to its bytes at the very start of the text (Metaspace drops a leading space there);
    ``strip`` is how many spaces are dropped from the start of the text as a whole. Implements `TextStream`.
    """

    __slots__ = ("_errors", "_first", "_is_at_start", "_pending", "_skipped", "_strip", "_table")

    def __init__(
        self,
        table: Mapping[int, bytes],
        *,
        skipped: frozenset[int] = frozenset(),
        errors: str = "replace",
        first: Callable[[int], bytes] | None = None,
        strip: int = 0,
    ) -> None:
        self._table = table
        self._skipped = skipped
        self._errors = errors
        self._first = first
        self._strip = strip
        self._is_at_start = first is not None or strip > 0
        self._pending = b""

    @property
    def is_open(self) -> bool:
        return bool(self._pending)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._table[token_id] if not self._is_at_start else self._at_start(token_id)
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, self._errors, False)
        self._pending = data[used:]
        return text

    def _at_start(self, token_id: int) -> bytes:
        data = self._table[token_id] if self._first is None else self._first(token_id)
        self._first = None
        while self._strip and data.startswith(b" "):
            data, self._strip = data[1:], self._strip - 1
        if data:
            self._strip = 0
        self._is_at_start = self._strip > 0
        return data

    def flush(self) -> str:
        text, _ = codecs.utf_8_decode(self._pending, self._errors, True)
        self._pending = b""
        return text


class WindowStream:
    """For any tokenizer: decodes a short window of tokens with and without the new one and gives the difference.

    Text that ends with U+FFFD is taken as an open character for at most `_MOST_OPEN` tokens. Implements `TextStream`.
    """

    _MOST_OPEN = 6  # a character has at most 4 bytes, one token each; the rest is slack for stray bytes before it

    __slots__ = ("_decode", "_ids", "_is_open", "_prefix", "_seen")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._seen = 0  # how many of _ids have been given out
        self._prefix = ""  # their text
        self._is_open = False

    @property
    def is_open(self) -> bool:
        return self._is_open

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        self._is_open = text.endswith("\ufffd") and len(self._ids) - self._seen < self._MOST_OPEN
        if self._is_open:
            return ""
        return self._give(text)

    def _give(self, text: str) -> str:
        new = text[len(self._prefix) :] if text.startswith(self._prefix) else text[min(len(text), len(self._prefix)) :]
        # The window keeps the tokens just given, so that the next one is decoded in their context. Tokens without text
        # (skipped special ones) are no context: with only these before it, a token would lose its leading space.
        recent = self._ids[self._seen :]
        prefix = self._decode(recent)
        if prefix:
            self._ids, self._prefix = recent, prefix
        else:
            self._prefix = text
        self._seen = len(self._ids)
        return new

    def flush(self) -> str:
        if not self._is_open:
            return ""
        self._is_open = False
        return self._give(self._decode(self._ids))


def token_text(data: bytes) -> str:
    """A token's bytes as text, or as OpenAI writes those that are no whole character: ``bytes:\\xf0\\x9f``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

"""Hugging Face tokenizers behind `Tokenizer`: one library call to encode, one table look-up a token to decode."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from tokenfleet.engines.detokenizer import PER_BYTE, ByteStream, WindowStream, token_text
from tokenfleet.engines.templates.tokens import encode_whole
from tokenfleet.engines.tokenizer import TextStream


class HFTokenizer:
    """Implements `Tokenizer`. ``inner`` is a `tokenizers.Tokenizer` or any of transformers' tokenizers.

    ``decode`` is the library's, without ``clean_up_tokenization_spaces``: that one changes text already given out.
    """

    def __init__(self, inner: Any, *, eos_ids: Iterable[int] = ()) -> None:
        self.inner = inner
        backend = inner if isinstance(inner, Backend) else getattr(inner, "backend_tokenizer", None)
        self._backend: Backend | None = backend if isinstance(backend, Backend) else None
        own_eos = getattr(inner, "eos_token_id", None)
        self.eos_ids = frozenset(eos_ids) or frozenset(() if own_eos is None else (own_eos,))
        self.vocab_size = self._backend.get_vocab_size() if self._backend is not None else len(inner)
        self._bytes: _TokenBytes | None = None
        if self._backend is None:
            self._special_ids = dict(zip(inner.all_special_tokens, inner.all_special_ids, strict=True))
        else:
            added = self._backend.get_added_tokens_decoder()
            self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._special = frozenset(self._special_ids.values())
        if self._backend is not None:
            tokens = _TokenBytes.of(self._backend)
            if tokens is not None and self._is_exact(tokens):
                self._bytes = tokens

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> HFTokenizer:
        """From a model's folder, with the ids that its generation config and tokenizer end an answer with."""
        if (folder / "tokenizer.json").is_file():
            inner = Backend.from_file(str(folder / "tokenizer.json"))
            return cls(inner, eos_ids=_eos_ids(folder, inner.token_to_id))
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return cls(slow, eos_ids=_eos_ids(folder, slow.convert_tokens_to_ids))

    def encode(self, text: str) -> list[int]:
        if self._backend is not None:
            return encode_whole(self._backend, text)
        return list(self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))
        return str(self.inner.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        if self._bytes is not None:
            return token_text(self._bytes.table[token_id])
        if self._backend is not None:
            return self._backend.id_to_token(token_id) or ""
        return str(self.inner.convert_ids_to_tokens(token_id) or "")

    def special_id(self, word: str) -> int | None:
        return self._special_ids.get(word)

    def decode_stream(
        self, *, skip_special_tokens: bool = True, visible_ids: frozenset[int] = frozenset()
    ) -> TextStream:
        skipped = self._special - visible_ids if skip_special_tokens else frozenset[int]()
        if self._bytes is not None:
            return self._bytes.stream(skipped)
        if not visible_ids:
            return WindowStream(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens))
        return WindowStream(lambda ids: self.decode([i for i in ids if i not in skipped], skip_special_tokens=False))

    def _is_exact(self, tokens: _TokenBytes) -> bool:
        """Whether our reading of the decoder holds: the stream must say what the library says, on random ids."""
        draw = random.Random(0)
        ids = [token_id for token_id in range(self.vocab_size) if not tokens.is_raw_byte(token_id)]
        for turn in range(64):
            sample = draw.choices(ids, k=12)
            stream = tokens.stream(self._special if turn % 2 else frozenset())
            text = "".join(map(stream.push, sample)) + stream.flush()
            if text != self.decode(sample, skip_special_tokens=bool(turn % 2)):
                return False
        return True


class _TokenBytes:
    """What each token stands for, in a tokenizer whose decoder works token by token."""

    def __init__(self, backend: Backend, steps: _Steps) -> None:
        self._backend = backend
        self._steps = steps
        self.table: Mapping[int, bytes] = _Table(self._read)

    @classmethod
    def of(cls, backend: Backend) -> _TokenBytes | None:
        """None for decoders of another kind (WordPiece's, CTC's, BPE's with word ends)."""
        if backend.decoder is None:
            return None
        steps = _read_decoder(json.loads(backend.decoder.__getstate__()))  # to_str() would write the vocabulary too
        return None if steps is None else cls(backend, steps)

    def is_raw_byte(self, token_id: int) -> bool:
        """Whether the library decodes it together with its neighbours: where a run of them is no valid UTF-8 it marks
        all of the run as broken, even characters given out long before; we mark the broken bytes only."""
        return self._steps.byte_fallback and _BYTE.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def stream(self, skipped: frozenset[int]) -> ByteStream:
        steps = self._steps
        return ByteStream(
            self.table,
            skipped=skipped,
            errors=PER_BYTE if steps.byte_fallback else "replace",
            first=self._read_first if steps.metaspace is not None and steps.drops_first_space else None,
            strip=steps.strip,
        )

    def _read(self, token_id: int) -> bytes:
        return self._steps.to_bytes(self._backend.id_to_token(token_id) or "", is_first=False)

    def _read_first(self, token_id: int) -> bytes:
        return self._steps.to_bytes(self._backend.id_to_token(token_id) or "", is_first=True)


class _Table(dict[int, bytes]):
    """Filled as tokens come up: reading a vocabulary of 250,000 takes half a second."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._read(token_id)
        return data


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(slots=True)
class _Steps:
    """A decoder of `tokenizers`, as far as it works on one token at a time."""

    byte_level: bool = False
    byte_fallback: bool = False
    metaspace: str | None = None
    drops_first_space: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    strip: int = 0
    """Spaces dropped from the start of the whole text."""

    def to_bytes(self, token: str, *, is_first: bool) -> bytes:
        for old, new in self.replaced:
            token = token.replace(old, new)
        if self.byte_fallback and _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self.metaspace is not None:
            token = token.replace(self.metaspace, "" if is_first and self.drops_first_space else " ")
        if self.byte_level and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return token.encode("utf-8", "replace")


def _read_decoder(decoder: dict[str, Any]) -> _Steps | None:
    """None if there is anything in it that this can't tell token by token. `HFTokenizer` checks the outcome."""
    steps = _Steps()
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                steps.byte_level = True
            case {"type": "ByteFallback"}:
                steps.byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Metaspace", "replacement": str(mark)}:
                steps.metaspace = mark
                steps.drops_first_space = step.get("prepend_scheme", "always") != "never"
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                steps.replaced += ((old, new),)
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                steps.strip = start
            case _:
                return None
    return steps


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _eos_ids(folder: Path, id_of: Callable[[str], int | None]) -> frozenset[int]:
    ids: set[int] = set()
    eos = _read_json(folder / "generation_config.json").get("eos_token_id")
    ids.update([eos] if isinstance(eos, int) else eos or ())
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    own = id_of(name) if isinstance(name, str) else None
    return frozenset(ids if own is None else ids | {own})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}

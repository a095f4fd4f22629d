"""Pieces of a prompt as token ids and as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenfleet.engines.templates.masking import Mask
from tokenfleet.engines.templates.named import Piece
from tokenfleet.engines.templates.schema import Template
from tokenfleet.engines.templates.tokens import Tokenizer, encode, token_id


@dataclass(frozen=True, slots=True)
class Encoding:
    """``template`` None: the model's own, whose EOS is the tokenizer's."""

    tokenizer: Tokenizer
    template: Template | None
    mask: Mask | None = None

    @property
    def _eos(self) -> str:
        if self.template and self.template.replaces_eos:
            return self.template.stop_words[0]
        return str(self.tokenizer.eos_token or "")

    def ids(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        return tuple(token for piece in pieces for token in self._piece_ids(piece))

    def _piece_ids(self, piece: Piece) -> list[int]:
        if isinstance(piece, str):
            return self._text_ids(piece)
        match piece.kind:
            case "bos":
                return [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
            case "eos":
                found = token_id(self.tokenizer, self._eos) if self._eos else None
                return encode(self.tokenizer, self._eos) if found is None else [found]
            case "token":
                found = self.tokenizer.convert_tokens_to_ids(piece.token)  # the unknown token's, if it is unknown
                return encode(self.tokenizer, piece.token) if found is None else [found]

    def _text_ids(self, text: str) -> list[int]:
        if self.mask is None:
            return encode(self.tokenizer, text)
        result: list[int] = []
        for segment, is_plain in self.mask.segments(text):
            result += self.mask.plain_ids(segment) if is_plain else encode(self.tokenizer, segment)
        return result

    def text(self, pieces: Iterable[Piece]) -> str:
        return "".join(map(self._piece_text, pieces))

    def _piece_text(self, piece: Piece) -> str:
        if isinstance(piece, str):
            return self.mask.show(piece) if self.mask else piece
        match piece.kind:
            case "bos":
                return str(self.tokenizer.bos_token or "")
            case "eos":
                return self._eos
            case "token":
                return piece.token

    def stops(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """(ids, strings) that end an answer. A stop word that the vocabulary lacks is a string: no id is made up."""
        words = {word: token_id(self.tokenizer, word) for word in (self.template.stop_words if self.template else ())}
        ids = {found for found in words.values() if found is not None}
        if (self._eos not in words or words[self._eos] is None) and self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        return tuple(sorted(ids)), tuple(word for word, found in words.items() if found is None)

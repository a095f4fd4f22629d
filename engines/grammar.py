"""Output that follows a JSON schema, a regular expression or a grammar: which tokens may come next (llguidance)."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenfleet.engines.templates.tokens import Plain, special_ids
from tokenfleet.wire.chat import ResponseFormat
from tokenfleet.wire.errors import ConfigurationError, EngineError, InvalidRequest

_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as grammars need it. ``plain`` tokenises texts in which special tokens, written out, are ordinary."""

    size: int
    inner: Any
    special: frozenset[int]
    plain: Plain


class TokenGrammar:
    """The state of one sequence in its grammar. Ends by allowing nothing but what ends a text.

    ``failure`` is set where the grammar became too much for llguidance: what ends the text then is no end of it."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, stop_ids: frozenset[int]) -> None:
        self.failure = ""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size = vocabulary.size
        self._eos_id = eos_id = vocabulary.inner.eos_token
        # The matcher knows the tokenizer's EOS only; a template's stop token ends the text just as well.
        self._other_ends = [token for token in stop_ids if token < vocab_size and token != eos_id]

    def mask(self) -> torch.Tensor:
        """``[vocab]``, True where a token may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if len(allowed) < self._vocab_size:
            allowed = np.pad(allowed, (0, self._vocab_size - len(allowed)))
        if self._matcher.is_error():
            self.failure = _reason(self._matcher.get_error())
        forced = np.flatnonzero(allowed)
        if len(forced) == 1 and int(forced[0]) in self._vocabulary.special and (text := self._forced_text()):
            allowed[forced] = False
            allowed[self._vocabulary.plain.encode(text)[0]] = True
        elif allowed[self._eos_id]:
            allowed[self._other_ends] = True
        return torch.from_numpy(allowed)

    def _forced_text(self) -> str:
        """What must come next, if that is text. llguidance tokenises it and allows the first token only; where that is
        a special token's name it takes the special token, which its own grammar refuses then."""
        data: bytes = self._matcher.compute_ff_bytes()
        return "" if data.startswith(b"\xff") else data.decode(errors="ignore")  # 0xff: the special token itself

    def fork(self) -> TokenGrammar:
        """Another one in the same state, that goes its own way."""
        copy = TokenGrammar(self._matcher.deep_copy(), self._vocabulary, frozenset())
        copy._other_ends = self._other_ends
        return copy

    def accept(self, token_id: int) -> None:
        """Raises `EngineError` if the token can't follow."""
        is_end = token_id == self._eos_id or token_id in self._other_ends
        if not is_end and not self._matcher.consume_token(token_id):
            self.failure = _reason(self._matcher.get_error())
        if self.failure:
            raise EngineError(f"The grammar can't go on: {self.failure}")


class GrammarCompiler:
    """Compiles response formats for one tokenizer. May be called from any thread; the first call takes about 1 s."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()

    def compile(self, wanted: ResponseFormat, delivered_ids: tuple[int, ...], stop_ids: frozenset[int]) -> TokenGrammar:
        """A grammar that has read ``delivered_ids``. Raises `InvalidRequest` for a format that can't be compiled."""
        llguidance = _llguidance()
        with self._lock:
            vocabulary = self._vocabulary = self._vocabulary or self._made(llguidance)
        try:
            matcher = llguidance.LLMatcher(vocabulary.inner, _definition(wanted, llguidance), log_level=0)
        except (ValueError, TypeError) as error:
            reason = str(error)[:_REASON_CHARS]
            raise InvalidRequest(f"response_format can't be used: {reason}", param="response_format") from error
        if not matcher.is_error():
            matcher.compute_bitmask()  # tells of a grammar that no text fits
        if matcher.is_error():
            reason = _reason(matcher.get_error()) or "no text fits it"
            raise InvalidRequest(f"response_format can't be used: {reason}", param="response_format")
        grammar = TokenGrammar(matcher, vocabulary, stop_ids)
        for token in delivered_ids:
            grammar.accept(token)
        return grammar

    def _made(self, llguidance: Any) -> Vocabulary:
        return Vocabulary(
            self._vocab_size,
            llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocab_size),
            special_ids(self._tokenizer),
            Plain(self._tokenizer, ()),
        )


def _reason(error: str) -> str:
    """The first line: more would show the grammar and the text so far; and it may quote a pattern of any size."""
    return next(iter(error.strip().splitlines()), "")[:_REASON_CHARS]


def _definition(wanted: ResponseFormat, llguidance: Any) -> str:
    match wanted.type:
        case "json_object":
            return str(llguidance.grammar_from("json_schema", '{"type": "object"}'))
        case "json_schema":
            if wanted.json_schema is None:
                raise ValueError("json_schema is missing.")
            return str(llguidance.grammar_from("json_schema", json.dumps(wanted.json_schema)))
        case "regex":
            if wanted.pattern is None:
                raise ValueError("pattern is missing.")
            return str(llguidance.grammar_from("regex", wanted.pattern))
        case "grammar":
            if wanted.grammar is None:
                raise ValueError("grammar is missing.")
            return str(llguidance.grammar_from("grammar", wanted.grammar))
        case "text":
            raise ValueError("text needs no grammar.")


def _llguidance() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise ConfigurationError(
            "response_format needs the package llguidance.", hint='pip install "tokenfleet[hf]"'
        ) from error
    return llguidance

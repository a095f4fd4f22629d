"""Output that follows a JSON schema, a regular expression or a grammar: which tokens may come next (llguidance)."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import torch

from tokenfleet.wire.chat import ResponseFormat
from tokenfleet.wire.errors import ConfigurationError, EngineError, InvalidRequest

_REASON_CHARS = 300


class TokenGrammar:
    """The state of one sequence in its grammar. Ends by allowing nothing but what ends a text."""

    def __init__(self, matcher: Any, vocab_size: int, eos_id: int, stop_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        # The matcher knows the tokenizer's EOS only; a template's stop token ends the text just as well.
        self._other_ends = [token for token in stop_ids if token < vocab_size and token != eos_id]

    def mask(self) -> torch.Tensor:
        """``[vocab]``, True where a token may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if len(allowed) < self._vocab_size:
            allowed = np.pad(allowed, (0, self._vocab_size - len(allowed)))
        if allowed[self._eos_id]:
            allowed[self._other_ends] = True
        return torch.from_numpy(allowed)

    def fork(self) -> TokenGrammar:
        """Another one in the same state, that goes its own way."""
        copy = TokenGrammar(self._matcher.deep_copy(), self._vocab_size, self._eos_id, frozenset())
        copy._other_ends = self._other_ends
        return copy

    def accept(self, token_id: int) -> None:
        """Raises `EngineError` if the token can't follow."""
        if token_id == self._eos_id or token_id in self._other_ends or self._matcher.consume_token(token_id):
            return
        raise EngineError(f"The grammar can't go on: {self._matcher.get_error()}")


class GrammarCompiler:
    """Compiles response formats for one tokenizer. May be called from any thread; the first call takes about 1 s."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def compile(self, wanted: ResponseFormat, delivered_ids: tuple[int, ...], stop_ids: frozenset[int]) -> TokenGrammar:
        """A grammar that has read ``delivered_ids``. Raises `InvalidRequest` for a format that can't be compiled."""
        llguidance = _llguidance()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocab_size)
        try:
            matcher = llguidance.LLMatcher(self._vocabulary, _definition(wanted, llguidance), log_level=0)
        except (ValueError, TypeError) as error:
            reason = str(error)[:_REASON_CHARS]
            raise InvalidRequest(f"response_format can't be used: {reason}", param="response_format") from error
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:_REASON_CHARS]  # it may quote a pattern of any size
            raise InvalidRequest(f"response_format can't be used: {reason}", param="response_format")
        grammar = TokenGrammar(matcher, self._vocab_size, self._vocabulary.eos_token, stop_ids)
        for token in delivered_ids:
            grammar.accept(token)
        return grammar


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

"""response_format in the scheduler process: the grammars that the transformers engine uses, one of each row that wants
one. SGLang's own start anew after a takeover, and need its tokenizer in all its processes.

A grammar must know the last token before it says what may come next. Its copy is under way since it was drawn and is
waited for here, while the GPU computes the logits that it is to mask.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenfleet.engines.grammar import GrammarCompiler, TokenGrammar
from tokenfleet.engines.sglang_engine import compat
from tokenfleet.engines.sglang_engine.tensors import placed
from tokenfleet.wire.chat import ResponseFormat
from tokenfleet.wire.errors import EngineError, TokenfleetError

_STATE = "tokenfleet_grammar"


class _Compiler:
    """Of this process; made in a thread while the model loads, since reading a tokenizer takes seconds."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._compiler: GrammarCompiler | None = None
        self._failure: Exception | None = None

    def prepare(self, folder: str, trust_remote_code: bool) -> None:
        def make() -> None:
            import transformers

            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
                config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
                compiler = GrammarCompiler(tokenizer, config.get_text_config().vocab_size)
                compiler.compile(ResponseFormat(type="json_object"), (), frozenset())
                self._compiler = compiler
            except Exception as error:  # noqa: BLE001  # told to the request that wants a grammar
                self._failure = error

        self._thread = threading.Thread(target=make, name="grammars", daemon=True)
        self._thread.start()

    def get(self) -> GrammarCompiler:
        if self._thread is not None:
            self._thread.join()
        if self._compiler is None:
            raise EngineError(f"No grammar can be compiled here: {self._failure}")
        return self._compiler


compiler = _Compiler()


@dataclass(slots=True, eq=False)
class _Row:
    """A request's grammar, and the ids (on their way from the GPU) that it has not read yet. -1 is no id."""

    request: Any
    grammar: TokenGrammar | None
    ends: list[int]
    retractions: int
    failure: str = ""
    """Why the grammar can't go on: the request is given up, since whatever ends it now makes it no whole text."""
    unread: list[tuple[torch.Tensor, int, Any]] = field(default_factory=list)

    def mask(self, vocab_size: int) -> torch.Tensor:
        """``[vocab]``, True where a token may come next."""
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        try:
            self._read()
            if self.grammar is not None and not self.failure:
                mask = self.grammar.mask()[:vocab_size]
                allowed[: len(mask)] = mask
                self.failure = self.grammar.failure
        except EngineError as error:
            self.failure = str(error)
        if self.failure:
            allowed[self.ends or [0]] = True
            compat.give_up(self.request, self.failure)
        return allowed

    def _read(self) -> None:
        unread, self.unread = self.unread, []
        for copied, place, event in unread:
            if event is not None:
                event.synchronize()
            token = int(copied[place])
            if token >= 0 and self.grammar is not None and not self.failure:
                self.grammar.accept(token)


class Grammars:
    def __init__(self, rows: Sequence[Mapping[str, Any]], vocab_size: int, device: torch.device) -> None:
        places = [place for place, row in enumerate(rows) if "grammar" in row]
        self.is_needed = bool(places)
        self._vocab_size, self._device = vocab_size, device
        self._states = [_state(rows[place], vocab_size) for place in places]
        self._places = placed(places, torch.int64, device)

    def apply(self, scores: torch.Tensor, unbarred: torch.Tensor) -> None:
        """Forbid in ``scores`` ``[rows, vocab]``, in place, what the grammars do. Where min_tokens bars the only way
        on (a grammar's end), the row of ``unbarred`` counts."""
        if not self.is_needed:
            return
        allowed = torch.stack([state.mask(self._vocab_size) for state in self._states])
        if self._device.type == "cuda":
            allowed = allowed.pin_memory().to(self._device, non_blocking=True)
        masked = scores[self._places].masked_fill(~allowed, -torch.inf)
        freed = unbarred[self._places].masked_fill(~allowed, -torch.inf)
        has_way = (masked > -torch.inf).any(dim=-1, keepdim=True)
        scores[self._places] = torch.where(has_way, masked, freed)

    def record(self, ids: torch.Tensor, is_new: torch.Tensor) -> None:
        if not self.is_needed:
            return
        drawn = torch.where(is_new, ids, -1)[self._places]
        copied, event = drawn, None
        if drawn.is_cuda:
            copied = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            copied.copy_(drawn, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        for place, state in enumerate(self._states):
            state.unread.append((copied, place, event))


def _state(row: Mapping[str, Any], vocab_size: int) -> _Row:
    request = row["request"]
    state: _Row | None = getattr(request, _STATE, None)
    if state is None or state.retractions != request.retraction_count:
        ids = [*request.origin_input_ids, *request.output_ids][row["prompt"] :]
        ends = [token for token in row["stop_ids"] if token < vocab_size]
        wanted = ResponseFormat.model_validate_json(row["grammar"])
        state = _Row(request, None, ends, request.retraction_count)
        try:
            state.grammar = compiler.get().compile(wanted, tuple(ids), frozenset(ends))
        except TokenfleetError as error:  # the front end has compiled it, so this is not the caller's
            state.failure = str(error)
        setattr(request, _STATE, state)
    return state

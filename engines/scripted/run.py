"""One sequence while the scripted engine runs it."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from tokenfleet.engines.base import RawLogprob, Sequence
from tokenfleet.engines.mailbox import FinishReason, Mailbox
from tokenfleet.engines.scripted.directives import Fault, read_directives
from tokenfleet.engines.scripted.hashing import digest
from tokenfleet.engines.scripted.model import Sampler, best_at
from tokenfleet.engines.scripted.options import ScriptedOptions
from tokenfleet.engines.scripted.salted import SaltedText
from tokenfleet.engines.scripted.tokenizer import EOS, WORD_IDS, ScriptedTokenizer
from tokenfleet.engines.stopping import ending_ids

_NOTHING: frozenset[int] = frozenset()


class Run:
    """Makes the sequence's tokens one by one; the engine says when."""

    __slots__ = (
        "_barred", "_ending", "_eos_at", "_first_due", "_first_index", "_is_simple", "_logprobs", "_made",
        "_max_tokens", "_min_tokens", "_options", "_prompt", "_salted", "_sampler", "_say", "_sequence", "_token_s",
        "due", "fault", "index", "is_over", "mailbox", "reason", "salt", "sequence_id",
    )  # fmt: skip

    def __init__(
        self, sequence: Sequence, options: ScriptedOptions, tokenizer: ScriptedTokenizer, mailbox: Mailbox
    ) -> None:
        params, delivered = sequence.params, sequence.delivered_ids
        self._sequence = sequence
        self._options = options
        self.mailbox = mailbox
        self.sequence_id = sequence.sequence_id
        self.index = self._first_index = len(delivered)  # of the next token
        self._max_tokens = sequence.max_new_tokens
        self._min_tokens = params.min_tokens
        self.reason: FinishReason | None = None
        self.is_over = False  # left the engine
        self.due = 0.0
        self._first_due = 0.0
        self._token_s = options.token_ms / 1000
        self._made: list[int] = []
        self._logprobs: list[RawLogprob] = []
        directives = read_directives(sequence.prompt_ids, tokenizer)
        self._say = directives.say
        self.fault = _applicable(directives.fault, options, sequence)
        eos_at = directives.eos_at if directives.eos_at is not None else options.eos_after
        if self._say is not None:
            eos_at = len(self._say)
        self._eos_at = None if eos_at is None else max(eos_at, params.min_tokens)
        self._ending = ending_ids(params, sequence.eos_ids)
        self._barred = self._ending & (set(WORD_IDS) | params.logit_bias.keys()) if params.min_tokens else _NOTHING
        extra = [hashlib.sha256(media.data).digest() for media in sequence.media]
        if sequence.adapter is not None:
            extra.append(sequence.adapter.encode())
        self._prompt = digest(sequence.prompt_ids, extra)
        seed = secrets.randbits(63) if sequence.seed is None else sequence.seed
        self._sampler = Sampler(self._prompt, sequence.prompt_ids, delivered, params, seed)
        self.salt: int | None = secrets.randbits(63) if options.salted else None
        self._salted = None if self.salt is None else SaltedText(sequence.prompt_ids, delivered, self.salt)
        # Greedy and nothing else asked for: what benchmarks run, so it costs one hash.
        self._is_simple = (
            self._sampler.is_greedy and self._salted is None and self._eos_at is None and not params.logprobs
            and not self._barred
        )  # fmt: skip

    def begin(self, now: float) -> None:
        """It has a slot: prefill starts. ``now`` is the loop's clock, in seconds."""
        tokens = len(self._sequence.prompt_ids) + len(self._sequence.delivered_ids)
        wait_s = self._options.ttft_ms / 1000 + tokens * self._options.prefill_us_per_token / 1e6
        self.due = self._first_due = now + wait_s

    def put_off(self, late_s: float) -> None:
        """Have all further tokens come later."""
        self.due += late_s
        self._first_due += late_s

    def step(self) -> int:
        """Make the next token; sets ``reason`` if it is the last one."""
        index = self.index
        token_id = best_at(self._prompt, index) if self._is_simple else self._choose(index)
        self._made.append(token_id)
        self.index = index = index + 1
        if token_id in self._ending and index > self._min_tokens:
            self.reason = "stop"
        elif index >= self._max_tokens:
            self.reason = "length"
        else:
            self.due = self._first_due + (index - self._first_index) * self._token_s
        return token_id

    def _choose(self, index: int) -> int:
        params = self._sequence.params
        forced = self._forced(index)
        if forced is not None:
            token_id = forced
        elif self._salted is not None:
            token_id = self._salted.peek()
        else:
            token_id = self._sampler.choose(index, self._barred if index < self._min_tokens else _NOTHING)
        if self._salted is not None:
            self._salted.feed(token_id)
        self._sampler.count(token_id)
        if params.logprobs:
            self._logprobs.append(self._sampler.logprob(index, token_id, forced, params.top_logprobs))
        return token_id

    def _forced(self, index: int) -> int | None:
        """What the script has at this place. A negative bias against the token lifts it."""
        if self._say is not None and index < len(self._say):
            forced = self._say[index]
        elif index == self._eos_at:
            forced = EOS
        else:
            return None
        return None if self._sequence.params.logit_bias.get(forced, 0.0) < 0 else forced

    def deliver(self) -> None:
        """Hand what `step` made to the reader."""
        self.mailbox.put(self._made, self._logprobs, self.reason)
        self._made.clear()
        self._logprobs.clear()

    def describe(self) -> dict[str, Any]:
        sequence = self._sequence
        return {
            "sequence_id": self.sequence_id,
            "salt": self.salt,
            "seed": sequence.seed,
            "prompt_tokens": len(sequence.prompt_ids),
            "delivered_tokens": len(sequence.delivered_ids),
        }


def _applicable(fault: Fault | None, options: ScriptedOptions, sequence: Sequence) -> Fault | None:
    if fault is None or not options.allow_faults or fault.at < len(sequence.delivered_ids):
        return None
    return fault if fault.attempt in (None, sequence.extra.get("attempt")) else None

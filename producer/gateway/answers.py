"""What OpenAI's objects need of a job beside its text: reasoning tokens, usage, log probabilities, messages."""

from __future__ import annotations

from typing import Any

from tokenfleet.wire.events import AnyEvent, Delta, Queued, Started, TokenLogprob, Usage
from tokenfleet.wire.toolcalls import ToolParser, parse


class ReasoningCount:
    """Counts the tokens of thoughts, their marks included, as the log is read. Free where a model has none."""

    def __init__(self) -> None:
        self.has_thoughts = False
        self._parser: dict[str, Any] = {}
        self._parsers: dict[int, ToolParser] = {}
        self._read: dict[int, tuple[int, int]] = {}  # of each choice: characters, tokens
        self._thoughts: dict[int, int] = {}

    @property
    def tokens(self) -> int:
        return sum(self._thoughts.values())

    def add(self, event: AnyEvent) -> None:
        if isinstance(event, Started):
            self._parser = {key: value for key, value in event.parser.items() if key in ("think", "open")}
            self.has_thoughts = "think" in self._parser
        elif isinstance(event, Delta) and self.has_thoughts:
            parser = self._parsers.get(event.choice)
            if parser is None:
                parser = self._parsers[event.choice] = ToolParser(self._parser)
            parser.feed(event.text)
            self.count(event, parser.thought_chars, is_thinking=parser.is_thinking)

    def count(self, event: Delta, thought_chars: int, *, is_thinking: bool) -> None:
        """With this delta so many characters of its choice are thoughts, which go on if ``is_thinking``. Of tokens that
        came together, and in which they end, as many count as there is of the text."""
        if not self.has_thoughts:
            return
        chars, tokens = self._read.get(event.choice, (0, 0))
        more = len(event.text)
        self._read[event.choice] = chars + more, tokens + len(event.ids)
        if is_thinking:
            self._thoughts[event.choice] = tokens + len(event.ids)
        elif thought_chars > chars:
            share = min(thought_chars - chars, more)
            self._thoughts[event.choice] = tokens + -(-len(event.ids) * share // max(1, more))


def usage_object(usage: Usage, reasoning: int | None = None) -> dict[str, Any]:
    """``reasoning`` is None for a model without thoughts."""
    told: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    if reasoning is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return told


def logprobs_object(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    return {"content": [logprob_object(token) for token in logprobs], "refusal": None}


def logprob_object(token: TokenLogprob) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return one(token.token, token.logprob) | {"top_logprobs": [one(other.token, other.logprob) for other in token.top]}


def text_logprobs(logprobs: tuple[TokenLogprob, ...], offset: int = 0) -> dict[str, Any] | None:
    """The older API's parallel lists; ``offset``: characters that came before."""
    if not logprobs:
        return None
    offsets = []
    for token in logprobs:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [t.token for t in logprobs],
        "token_logprobs": [t.logprob for t in logprobs],
        "top_logprobs": [{a.token: a.logprob for a in t.top} for t in logprobs],
        "text_offset": offsets,
    }


def chat_message(text: str, parser: dict[str, Any], key: str, reason: str) -> tuple[dict[str, Any], str]:
    """A whole choice's message, and its finish reason."""
    parsed = parse(text, parser, key=key, reason=reason)
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
    if parsed.reasoning is not None:
        message["reasoning_content"] = parsed.reasoning
    if parsed.tool_calls:
        message["tool_calls"] = [call.model_dump(mode="json") for call in parsed.tool_calls]
    return message, parsed.finish_reason


def created_s(event: AnyEvent) -> int | None:
    """When the job was submitted (s since 1970), if this is the event that tells."""
    return event.t_ms // 1000 if isinstance(event, Queued) else None

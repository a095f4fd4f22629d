"""From a chat request to the prompt's token ids: the one place where conversations become text, for all engines.

    render = renderer(tokenizer, template="qwen3")      # once, at start
    prompt = render(request, media)                     # per request; requests share no state

Named templates are tokenised piece by piece, as LLaMA-Factory does (ids depend on the borders); the model's own chat
template as one text, as transformers does. docs/templates.md says more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from tokenfleet.engines.base import Media
from tokenfleet.engines.templates import own
from tokenfleet.engines.templates.answer import begin_call, parser_of, parser_of_own, visible_ids
from tokenfleet.engines.templates.choice import Offer, offer
from tokenfleet.engines.templates.conversation import check_last, check_order, split_system, turns, without_thoughts
from tokenfleet.engines.templates.encoding import Encoding
from tokenfleet.engines.templates.expansion import Expansion
from tokenfleet.engines.templates.masking import Mask
from tokenfleet.engines.templates.media import Placement, as_parts, place, text_of
from tokenfleet.engines.templates.named import Piece, pieces
from tokenfleet.engines.templates.options import PromptOptions, Wishes
from tokenfleet.engines.templates.parsed import parsed
from tokenfleet.engines.templates.schema import Template, named
from tokenfleet.engines.templates.tokens import Tokenizer
from tokenfleet.wire.chat import ChatRequest, MediaPart, Message
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest

__all__ = ["PromptOptions", "RenderedPrompt", "load_template", "render", "renderer"]


_DEFAULTS = PromptOptions()


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt, and how to read what comes after it."""

    ids: tuple[int, ...]
    text: str | None = None
    stop_strings: tuple[str, ...] = ()
    """Stop words of the template that are no token of this model."""
    stop_token_ids: tuple[int, ...] = ()
    """EOS and the template's stop words."""
    parser: Mapping[str, Any] = field(default_factory=dict)
    """For `wire.toolcalls.ToolParser`."""
    grammar: str = ""
    """What the rest of a forced call must follow (Lark, for llguidance); "" if it is left to the model."""
    visible_ids: tuple[int, ...] = ()
    """Special tokens that the parser looks for: their text must stay, whatever ``skip_special_tokens`` says."""
    pieces: tuple[Piece, ...] = ()
    """What was tokenised by itself, in order: texts and special tokens."""
    media: tuple[MediaPart, ...] = ()
    """In the order of their placeholders in ``text``."""
    expanded_tokens: int | None = None
    """What the prompt comes to where the engine, and not ``ids``, writes out its media."""

    @property
    def tokens(self) -> int:
        """What the prompt counts for in the context and in usage."""
        return len(self.ids) if self.expanded_tokens is None else self.expanded_tokens


def load_template(name: str | None, tokenizer: Tokenizer) -> Template | None:
    """None is the model's own; ``parsed`` is LLaMA-Factory's reading of that. Raises `ConfigurationError`."""
    return None if name is None else parsed(tokenizer) if name == "parsed" else named(name)


def renderer(
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    default_system: str | None = None,
    enable_thinking: bool | None = None,
    options: PromptOptions = _DEFAULTS,
    expansion_of: Callable[[tuple[Media, ...]], Expansion] | None = None,
    tokens_of: Callable[[tuple[int, ...], tuple[Media, ...]], int] | None = None,
) -> Callable[[ChatRequest, tuple[Media, ...]], RenderedPrompt]:
    """`render` for one served model. None means "not set" here. Raises `ConfigurationError` (an unknown name).

    ``expansion_of`` says what the model reads in the place of a request's media; it may take long (it decodes them)
    and raises `InvalidRequest`. Without it their places are words such as ``<image>``. ``tokens_of`` counts a prompt's
    tokens where the engine writes out media by itself."""
    if default_system is not None:
        options = replace(options, default_system=default_system)
    if enable_thinking is not None:
        options = replace(options, enable_thinking=enable_thinking)
    loaded = load_template(template, tokenizer)

    def render_one(request: ChatRequest, media: tuple[Media, ...] = ()) -> RenderedPrompt:
        expansion = expansion_of(media) if media and expansion_of else None
        prompt = render(request, tokenizer, loaded, options=options, expansion=expansion)
        if media and tokens_of is not None:
            prompt = replace(prompt, expanded_tokens=tokens_of(prompt.ids, media))
        return prompt

    return render_one


def render(
    request: ChatRequest,
    tokenizer: Tokenizer,
    template: Template | None,
    *,
    options: PromptOptions = _DEFAULTS,
    now: datetime | None = None,
    expansion: Expansion | None = None,
) -> RenderedPrompt:
    """Raises `InvalidRequest`; ``details["param"]`` names what is wrong."""
    if request.prompt is not None:
        return _raw(request.prompt, tokenizer)
    wishes, offered = Wishes.of(request, options), offer(request)
    placement = place(request.messages, template.media if template else None)
    messages: Sequence[Message] = request.messages
    if expansion is not None:
        messages, placement = as_parts(messages, placement, expansion.words(template))
    mask = Mask(tokenizer, template, messages) if options.is_neutral else None
    messages = mask.messages if mask else messages
    result: list[Piece]
    if template is None:
        text, source = _own_text(tokenizer, messages, wishes, offered, placement, now)
        result = [text]
        parser = parser_of_own(source, text, offered, is_parallel=request.parallel_tool_calls)
    else:
        result = _named_pieces(template, messages, wishes, offered, placement, now)
        parser = parser_of(template, offered, is_parallel=request.parallel_tool_calls)
    grammar = ""
    if offered.forced is not None:
        no_thoughts = template.no_thoughts if template else "".join(own.THOUGHTS)
        last = result[-1] if isinstance(result[-1], str) else ""
        parser, added, grammar = begin_call(parser, offered, last, no_thoughts)
        result += added
    if expansion is not None:
        result = expansion.expanded(result, template)
    encoding = Encoding(tokenizer, template, mask)
    stop_ids, stop_strings = encoding.stops()
    return RenderedPrompt(
        ids=encoding.ids(result),
        text=encoding.text(result),
        stop_strings=stop_strings,
        stop_token_ids=stop_ids,
        parser=parser,
        grammar=grammar,
        visible_ids=visible_ids(tokenizer, parser),
        pieces=tuple(result),
        media=placement.media,
    )


def _raw(prompt: str | Sequence[int], tokenizer: Tokenizer) -> RenderedPrompt:
    """Text as the tokenizer takes it by itself, BOS included where it adds one; or ids, checked."""
    if isinstance(prompt, str):
        ids, text = list(tokenizer.encode(prompt)), prompt
    else:
        ids, text = list(prompt), None
        if any(not 0 <= token < len(tokenizer) for token in ids):
            hint = f"Ids are 0 to {len(tokenizer) - 1}."
            raise InvalidRequest("The prompt has token ids that this model hasn't.", hint=hint, param="prompt")
    if not ids:
        raise InvalidRequest("The prompt is empty.", hint="Give some text or ids.", param="prompt")
    stop_ids, _ = Encoding(tokenizer, None).stops()
    return RenderedPrompt(tuple(ids), text, stop_token_ids=stop_ids)


def _named_pieces(
    template: Template,
    messages: Sequence[Message],
    wishes: Wishes,
    offered: Offer,
    placement: Placement,
    now: datetime | None,
) -> list[Piece]:
    wishes.check_for_named(template.name)
    if wishes.default_system is not None:
        template = replace(template, default_system=wishes.default_system)
    system, others = split_system(messages, wishes.system)
    check_order(others)
    drops_thoughts = template.is_reasoning and not wishes.thinking.preserve
    return pieces(
        template,
        turns(
            others,
            lambda message: text_of(message, placement),
            template.thoughts,
            template.call_words,
            (lambda text: without_thoughts(text, template.thoughts)) if drops_thoughts else str,
        ),
        system=system,
        tools=offered.tools,
        thinking=wishes.thinking,
        now=now,
        date_string=wishes.date_string,
    )


def _own_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    wishes: Wishes,
    offered: Offer,
    placement: Placement,
    now: datetime | None,
) -> tuple[str, str]:
    """(the prompt's text, the source of the template that made it)."""
    system, others = split_system(messages, wishes.system)
    check_last(others)
    source = own.source_of(tokenizer, has_tools=bool(offered.tools)) or ""
    if own.loses_tools(others, source, has_tools=bool(offered.tools)):
        system = system or wishes.default_system or _default_system(tokenizer, source)
        told = own.tools_as_text(others, system, offered.tools, now)
        try:
            text = own.render(tokenizer, own.as_dicts(told, source, placement), None, wishes.for_own, now=now)
        except InvalidRequest:
            if told[0].role != "system":
                raise
            told = own.system_in_user(told)
            text = own.render(tokenizer, own.as_dicts(told, source, placement), None, wishes.for_own, now=now)
        return text, source
    if system or wishes.default_system is not None:
        first = messages[0] if messages[0].role == "developer" and system else Message(role="system")
        others.insert(0, first.model_copy(update={"content": system or wishes.default_system}))
    dicts = own.as_dicts(others, source, placement)
    return own.render(tokenizer, dicts, offered.tools, wishes.for_own, now=now), source


@lru_cache(maxsize=8)
def _default_system(tokenizer: Tokenizer, source: str) -> str:
    """What the model's own template ``source`` says where there is no system text; "" if that can't be found out."""
    try:
        return parsed(tokenizer).default_system
    except ConfigurationError:
        return ""

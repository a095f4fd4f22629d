"""How an answer is to be read (`wire.toolcalls.ToolParser`) after a prompt, and how a call is begun for the model."""

from __future__ import annotations

from typing import Any

from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.choice import Offer
from tokenfleet.engines.templates.forced import call_forms, call_grammar
from tokenfleet.engines.templates.own import knows_tools
from tokenfleet.engines.templates.schema import Template, tool_format
from tokenfleet.engines.templates.tokens import Tokenizer, encode, special_ids
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.toolformats import READERS

# What a model's own chat template writes tells which reader fits; the first that is found in it counts.
_TOOL_SIGNS = {
    "<minimax:tool_call>": "minimax2",
    "<seed:tool_call>": "seed_oss",
    "<|tool_call_start|>": "lfm2",
    "<|tool_list_start|>": "lfm2",
    "<|tool_call>": "gemma4",
    "<arg_key>": "glm4_moe",
    "<function=": "qwen3_5",
    "<｜tool▁calls▁begin｜>": "deepseek",
    "<|channel|>": "gpt_oss",
    "<tool_calls>": "minimax1",
    "<tool_call>": "qwen",
    "[TOOL_CALLS]": "mistral",
    "<|tool_call|>": "phi4_mini",
    "<|python_tag|>": "llama3",
    "ipython": "llama3",
    "<|observation|>": "glm4",
}
_HARMONY = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")
_THOUGHTS = (
    ("<|channel>thought", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
    ("<think>", "</think>"),
)


def parser_of_own(source: str, text: str, offer: Offer, *, is_parallel: bool) -> dict[str, Any]:
    """From the source of the model's own chat template and the prompt ``text`` that it made."""
    tools = None
    if offer.tools:  # "default" is how `own.tools_as_text` tells them
        signs = _TOOL_SIGNS.items() if knows_tools(source) else ()
        tools = next((name for sign, name in signs if sign in source), None if signs else "default")
    pair = next((pair for pair in _THOUGHTS if pair[1] in source), None)
    if "<|channel|>" in source:  # beside calls, thoughts may be followed by something else than the final channel
        pair = (_HARMONY[0], "<|end|>") if tools else _HARMONY
    return _parser(tools, pair, text, is_parallel=is_parallel)


def parser_of(template: Template, offer: Offer, *, is_parallel: bool) -> dict[str, Any]:
    pair = (template.thoughts[0].strip(), template.thoughts[1].strip()) if template.is_reasoning else None
    return _parser(template.tool_format if offer.tools else None, pair, "", is_parallel=is_parallel)


def _parser(tools: str | None, pair: tuple[str, str] | None, text: str, *, is_parallel: bool) -> dict[str, Any]:
    parser: dict[str, Any] = {"tools": tools} if tools else {}
    if tools and not is_parallel:
        parser["parallel"] = False
    if pair:
        parser["think"] = list(pair)
        if text.rstrip().endswith(pair[0]):
            parser["open"] = True
    return parser


def begin_call(
    parser: dict[str, Any], offer: Offer, text: str, no_thoughts: str
) -> tuple[dict[str, Any], list[str], str]:
    """(parser, pieces to add to the prompt, grammar of the rest) that leave the model nothing but a call. Thoughts are
    closed first. The grammar is "" where the arguments' notation is not JSON.

    Raises `InvalidRequest` where the format of this model's calls is unknown or has no fixed beginning."""
    style = tool_format(parser["tools"]) if parser.get("tools") in _WRITTEN else None
    source = (style.opening_named if offer.forced else style.opening) if style else ""
    if not source:
        raise InvalidRequest(
            "This model can't be made to call a tool.", hint='Use tool_choice="auto".', param="tool_choice",
            code="unsupported_parameter",
        )  # fmt: skip
    opening = sandbox.render(sandbox.snippet(source), {"name": offer.forced})
    closing = ""
    if "think" in parser and not text.rstrip().endswith(parser["think"][1]):
        closing = f"\n{parser['think'][1]}\n\n" if parser.get("open") else no_thoughts
    kept = {key: value for key, value in parser.items() if key not in ("think", "open")}
    assert style is not None
    is_parallel = parser.get("parallel") is not False
    grammar = call_grammar(style, offer, opening, is_parallel=is_parallel)
    if grammar and (forms := call_forms(style, offer, is_parallel=is_parallel)):
        kept["forced"] = forms
    return {**kept, "prefix": opening}, [piece for piece in (closing, opening) if piece], grammar


_WRITTEN = READERS.keys() - {"deepseek", "gpt_oss"}


def visible_ids(tokenizer: Tokenizer, parser: dict[str, Any]) -> tuple[int, ...]:
    """Special tokens in the marks that the parser looks for."""
    marks = [*parser.get("think", ())]
    for reader in READERS.get(parser.get("tools", ""), ()):
        marks += [*reader.marks, *reader.words]
    special = special_ids(tokenizer)
    return tuple(sorted({number for mark in marks for number in encode(tokenizer, mark) if number in special}))

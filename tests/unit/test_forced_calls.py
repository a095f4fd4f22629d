"""A call that a prompt has begun can only go on as a call: the grammar of each format, read by llguidance."""

from __future__ import annotations

from typing import Any

import pytest

from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.choice import Offer
from tokenfleet.engines.templates.forced import call_grammar
from tokenfleet.engines.templates.schema import tool_format
from tokenfleet.engines.templates.tools import Call, write_calls

llguidance = pytest.importorskip("llguidance")
pytestmark = pytest.mark.unit

TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False, "a-word-that-no-grammar-knows": 3,
    }}},
    {"type": "function", "function": {"name": "time"}},
)  # fmt: skip
GOOD, OTHER, WRONG = Call("weather", {"city": "Łódź"}), Call("time", {}), Call("weather", {"town": "x"})
JSON_FORMATS = ("default", "ling", "llama3", "minimax1", "phi4_mini", "qwen")
SEVERAL = {"default", "ling", "minimax1", "phi4_mini", "qwen"}
"""Where a second call follows the first; llama3 writes several as a list, which begins otherwise."""


def opening_of(name: str, forced: str) -> str:
    style = tool_format(name)
    return sandbox.render(sandbox.snippet(style.opening_named if forced else style.opening), {"name": forced})


def follows(name: str, forced: str, *calls: Call, is_parallel: bool = True) -> bool:
    """Whether these calls, as the format writes them, can follow the opening, and the text may end there."""
    opening = opening_of(name, forced)
    grammar = call_grammar(tool_format(name), Offer(TOOLS, forced), opening, is_parallel=is_parallel)
    text = write_calls(tool_format(name), calls, "calls")
    if not text.startswith(opening):
        return False
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), llguidance.grammar_from("grammar", grammar))
    rest = list(text[len(opening) :].encode())
    return matcher.try_consume_tokens(rest) == len(rest) and matcher.is_accepting()


@pytest.mark.parametrize("name", JSON_FORMATS)
def test_any_tool_with_its_own_arguments(name: str) -> None:
    assert follows(name, "", GOOD)
    assert follows(name, "", OTHER)
    assert not follows(name, "", WRONG)
    assert not follows(name, "", Call("weather", {"city": "x", "more": 1}))
    assert not follows(name, "", Call("unknown", {}))
    assert follows(name, "", GOOD, OTHER, GOOD) == (name in SEVERAL)
    assert not follows(name, "", GOOD, OTHER, is_parallel=False)


@pytest.mark.parametrize("name", [*JSON_FORMATS, "glm4"])
def test_one_call_of_a_named_tool(name: str) -> None:
    assert follows(name, "weather", GOOD)
    assert not follows(name, "weather", WRONG)
    assert not follows(name, "weather", GOOD, GOOD)


@pytest.mark.parametrize("name", ["gemma4", "lfm2", "qwen3_5", "seed_oss"])
def test_where_arguments_are_not_json_the_model_is_left_alone(name: str) -> None:
    for forced in ("", "weather"):
        opening = opening_of(name, forced)
        assert call_grammar(tool_format(name), Offer(TOOLS, forced), opening, is_parallel=True) == ""

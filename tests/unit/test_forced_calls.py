"""A call that a prompt has begun can only go on as a call: the grammar of each format, read by llguidance; and what
such calls say is shown while it is written, whatever the cuts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.test_responses import EVENTS, check_order
from tests.vectors import Characters
from tokenfleet.engines.prompts import load_template, render
from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.choice import Offer
from tokenfleet.engines.templates.forced import call_forms, call_grammar
from tokenfleet.engines.templates.schema import tool_format
from tokenfleet.engines.templates.tools import Call, write_calls
from tokenfleet.producer.gateway.answers import chat_message
from tokenfleet.producer.gateway.response_events import ResponseFold
from tokenfleet.producer.gateway.response_items import Asked
from tokenfleet.wire.chat import ChatRequest, GenerationParams, ResponseFormat
from tokenfleet.wire.events import AnyEvent, ChoiceFinished, Delta, Finished, Queued, Started, Usage
from tokenfleet.wire.toolcalls import ParsedDelta, ToolCallDelta, ToolParser, assemble, parse
from tokenfleet.workers.served import _forced

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


# -- shown while they are written -------------------------------------------------------------------------------------


def parser_of(name: str, forced: str, *, is_parallel: bool = True) -> dict[str, Any]:
    forms = call_forms(tool_format(name), Offer(TOOLS, forced), is_parallel=is_parallel)
    assert forms is not None
    more = {} if is_parallel else {"parallel": False}
    return {"tools": name, "prefix": opening_of(name, forced), "forced": forms, **more}


def said(name: str, forced: str, *calls: Call) -> str:
    """What the model writes of these calls."""
    return write_calls(tool_format(name), calls, "calls").removeprefix(opening_of(name, forced))


def fed(parser: dict[str, Any], pieces: list[str]) -> list[ParsedDelta]:
    machine = ToolParser(parser)
    return [delta for piece in pieces for delta in machine.feed(piece)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\{}[]:, é🚀\n'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)


@pytest.mark.parametrize("name", JSON_FORMATS)
@settings(deadline=None, max_examples=25)
@given(several=st.lists(ARGUMENTS, min_size=1, max_size=3), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_however_it_is_cut_what_has_come_depends_on_the_text_alone(
    name: str, several: list[dict[str, Any]], cuts: list[int]
) -> None:
    called = [Call(("weather", "time")[k % 2], each) for k, each in enumerate(several)]
    called = called if name in SEVERAL else called[:1]
    parser, text = parser_of(name, ""), said(name, "", *called)
    for end in {0, len(text), *(cut % (len(text) + 1) for cut in cuts)}:
        at_once = assemble(fed(parser, [text[:end]]))
        assert assemble(fed(parser, list(text[:end]))) == at_once
    whole = parse(text, parser).tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in whole] == [
        (c.name, c.arguments) for c in called
    ]
    assert parse(text, parser).content is None


@pytest.mark.parametrize("name", [*JSON_FORMATS, "glm4"])
def test_arguments_come_out_with_each_piece_of_text(name: str) -> None:
    parser, text = parser_of(name, "weather"), said(name, "weather", GOOD)
    arguments = [d.arguments for d in fed(parser, list(text)) if isinstance(d, ToolCallDelta) and d.arguments]
    assert "".join(arguments) == '{"city": "Łódź"}'
    assert len(arguments) == len('{"city": "Łódź"}')  # one for each character: nothing waits for the end


def test_a_call_that_is_cut_is_a_call_that_is_cut() -> None:
    parser, text = parser_of("qwen", ""), said("qwen", "", GOOD)
    machine = ToolParser(parser)
    deltas = [*machine.feed(text[: text.index("dź")]), *machine.close()]
    [call] = assemble(deltas).tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Łó')
    assert machine.finish_reason("length") == "length"
    assert machine.finish_reason("stop") == "stop"  # a caller's stop string stood in it
    assert chat_message(text[: text.index("dź")], parser, "job:0", "stop")[1] == "stop"  # whole, as in a stream
    assert chat_message(text, parser, "job:0", "stop")[1] == "tool_calls"


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("wanted", [{}, {"type": "json_object"}])
def test_a_format_of_content_does_not_bind_an_answer_that_has_none(template: str, wanted: dict[str, Any]) -> None:
    params = GenerationParams(response_format=ResponseFormat(**wanted))
    tokenizer = Characters()
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    for choice in ("auto", "required"):
        request = ChatRequest(**asked, tool_choice=choice)
        prompt = render(request, tokenizer, load_template(template, tokenizer))
        held, parser = _forced(params, prompt, "transformers")
        has_grammar = choice == "required" and template == "qwen3"  # qwen3_5 writes arguments as no JSON
        assert ("forced" in parser) == has_grammar
        if choice == "auto":
            assert held == params
        elif has_grammar:
            assert held.response_format.grammar == prompt.grammar != ""
        else:
            assert held.response_format.type == "text"


def test_one_call_is_one_if_there_may_be_no_more() -> None:
    text = said("qwen", "", GOOD, OTHER)
    assert len(parse(text, parser_of("qwen", "")).tool_calls) == 2
    assert len(parse(text, parser_of("qwen", "", is_parallel=False)).tool_calls) == 1


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_responses_stream_shows_them_as_openai_does(reason: str) -> None:
    text = said("qwen", "", GOOD, OTHER)
    text = text if reason == "stop" else text[: text.index("dź")]
    log: list[AnyEvent] = [Queued(t_ms=1_700_000_000_000, model="m"), Started(1, "w", 7, parser_of("qwen", ""))]
    log += [Delta(0, k, (5,), char) for k, char in enumerate(text)]
    log += [ChoiceFinished(0, reason, len(text)), Finished(Usage(7, len(text)))]
    fold = ResponseFold("resp_1", "job", Asked({"model": "m", "input": "Hi!"}))
    events = [shown for event in log for shown in fold.feed(event)]
    for event in events:
        EVENTS.validate_python(event, strict=True)
    check_order(events)
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert len(pieces) > 10
    calls = fold.response["output"]
    assert "".join(pieces) == "".join(call["arguments"] for call in calls)
    assert [call["status"] for call in calls] == (["completed"] * 2 if reason == "stop" else ["incomplete"])


@pytest.mark.parametrize("text", ["", "no call", ' "unknown", "arguments": {}}\n</tool_call>', ' "weather", "argu'])
def test_what_no_grammar_has_held_is_read_as_ever(text: str) -> None:
    parser = parser_of("qwen", "")
    as_ever = {key: value for key, value in parser.items() if key != "forced"}
    assert parse(text, parser) == parse(text, as_ever)
    assert assemble([*fed(parser, list(text))]) == assemble([*fed(as_ever, list(text))])


def test_tools_whose_names_change_the_notation_are_left_to_the_end() -> None:
    tools = ({"type": "function", "function": {"name": 'a "name"'}},)
    assert call_forms(tool_format("qwen"), Offer(tools, ""), is_parallel=True) is None

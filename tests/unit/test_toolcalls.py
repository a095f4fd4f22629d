"""Tool calls and thoughts read out of answers: against what LLaMA-Factory 0.9.5 extracted, and however they are cut.

`DEPARTURES` lists every extraction where we knowingly do otherwise; docs/templates.md has the same list for people.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import vectors
from tokenfleet.engines.templates import schema
from tokenfleet.engines.templates.tools import Call, write_calls
from tokenfleet.wire.toolcalls import (
    ContentDelta,
    Parsed,
    ParsedDelta,
    ReasoningDelta,
    ToolCallDelta,
    ToolParser,
    assemble,
    parse,
)
from tokenfleet.wire.toolformats import READERS

EXTRACTED = vectors.load()["tool_extract"]
THINK = ["<think>", "</think>"]
_CALLS, _CALL = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"
WEATHER = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "c"}'}
ROUTE = {"stops": [{"lat": 1.5, "tags": ["a", "b"]}, {"lat": -2, "tags": []}], "opts": {"toll": False, "note": None}}
BOTH = [
    {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
    {"name": "add", "arguments": '{"a": 1.5, "b": -2}'},
]

# (format, kind): (why, the calls that we read; None where the text is content)
_CLOSED = "a call that is complete stays one, whatever text follows it"
_OWN_XML = "it can't read its own XML calls there"
DEPARTURES: dict[tuple[str, str], tuple[str, list[dict[str, str]] | None]] = {
    ("qwen", "call_then_text"): (_CLOSED, [WEATHER]),
    ("ling", "call_then_text"): (_CLOSED, [WEATHER]),
    ("glm4", "parallel"): ("it refuses parallel calls there", BOTH),
    ("glm4_moe", "single"): (_OWN_XML, [WEATHER]),
    ("glm4_moe", "padded"): (_OWN_XML, [WEATHER]),
    ("glm4_moe", "text_then_call"): (_OWN_XML, [WEATHER]),
    ("glm4_moe", "call_then_text"): (_OWN_XML, [WEATHER]),
    ("glm4_moe", "malformed"): (_OWN_XML + "; its writer never closes them, so a cut closing mark is none", [WEATHER]),
    ("glm4_moe", "parallel"): (_OWN_XML, BOTH),
    ("glm4_moe", "truncated"): (_OWN_XML, BOTH[:1]),
    ("glm4_moe", "empty_args"): (_OWN_XML, [{"name": "ping", "arguments": "{}"}]),
    ("glm4_moe", "nested_args"): (_OWN_XML, [{"name": "plan", "arguments": json.dumps(ROUTE)}]),
    ("glm4_moe", "unicode_args"): (
        _OWN_XML,
        [{"name": "say", "arguments": json.dumps({"text": 'héllo "wörld" 你好 🎉\nline2'}, ensure_ascii=False)}],
    ),
    ("lfm2", "nested_args"): (
        "it can't read true, false and null inside lists and objects, which its own writer makes",
        [{"name": "plan", "arguments": json.dumps(ROUTE)}],
    ),
    ("llama3", "bare_json_scalar"): ("it raises there", None),
    ("mistral", "bare_json_scalar"): ("it raises there", None),
    ("minimax1", "malformed"): ("it makes an empty list of calls there, and the text is lost", None),
}


def called(parsed: Parsed) -> list[dict[str, str]]:
    return [{"name": call.function.name, "arguments": call.function.arguments} for call in parsed.tool_calls]


@vectors.is_absent
@pytest.mark.parametrize("case", EXTRACTED, ids=[f"{case['tool_format']}/{case['kind']}" for case in EXTRACTED])
def test_calls_are_extracted_as_recorded(case: dict[str, Any]) -> None:
    parsed = parse(case["input"], {"tools": case["tool_format"]})
    departure = DEPARTURES.get((case["tool_format"], case["kind"]))
    expected = case["input"] if departure else case["result"]
    if departure:
        expected = departure[1] or case["input"]
        assert expected != case.get("result")
    if isinstance(expected, str):
        assert (parsed.content, parsed.tool_calls) == (expected, ())
    else:
        assert called(parsed) == expected
        assert not parsed.content or parsed.content in ("I will look that up.", "Done!")
    for call in parsed.tool_calls:
        assert isinstance(json.loads(call.function.arguments), dict)


@vectors.is_absent
def test_every_departure_is_met_by_a_case() -> None:
    assert DEPARTURES.keys() <= {(case["tool_format"], case["kind"]) for case in EXTRACTED}
    assert len(EXTRACTED) == 202
    assert {case["tool_format"] for case in EXTRACTED} <= READERS.keys()


# --- what is written is read -----------------------------------------------------------------------------------------
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.text(
        st.characters(categories=["L", "N"], include_characters=" .,:{}[]é🎉", exclude_characters="\n"), max_size=12
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdef_", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
arguments = st.dictionaries(st.text("abcdef_", min_size=1, max_size=6), json_values, max_size=4)
names = st.text("abcdefgh_", min_size=1, max_size=8).filter(lambda name: name.strip("_"))
WRITTEN = sorted({schema.named(name).tool_format for name in schema.template_names()})
# Values are written without quotes there, so a text that reads as JSON comes back as what it reads as.
_BARE_VALUES = {"glm4_moe", "minimax2", "qwen3_5", "seed_oss"}


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(names, arguments), min_size=1, max_size=3), before=st.sampled_from(["", "Let me see.\n"])
)
def test_every_reader_reads_what_its_format_writes(name: str, calls: list[tuple[str, Any]], before: str) -> None:
    if name in _BARE_VALUES:
        calls = [(called, {key: _unlike_json(value) for key, value in given.items()}) for called, given in calls]
    text = write_calls(schema.tool_format(name), [Call(*call) for call in calls], "messages[1]")
    if name == "minimax2":  # written without the marks around it
        text = f"<minimax:tool_call>\n{text}\n</minimax:tool_call>"
    if READERS[name][0].marks:
        text = before + text
    parsed = parse(text, {"tools": name})
    assert [(call.function.name, json.loads(call.function.arguments)) for call in parsed.tool_calls] == calls
    assert (parsed.content or "") == (before.strip() if READERS[name][0].marks else "")


def _unlike_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return "x" + value.strip() + "x"


# --- cut anywhere, the same comes out --------------------------------------------------------------------------------
def pieces_of(name: str) -> list[str]:
    words = [word for reader in READERS[name] for word in (*reader.marks, *reader.words)]
    call = [Call("get", {"a": 'x "y"', "b": [1, None]}), Call("add", {"t": "</tool_call> }"})]
    written = (
        [write_calls(schema.tool_format(name), calls, "") for calls in ([call[0]], call)] if name in WRITTEN else []
    )
    return [
        *words, *(word[:-1] for word in words), *written, *(text[:-2] for text in written), *THINK, "<thi", "</th",
        " ", "\n", "Hi", "{", "}", "[", "]", '"', ":", '{"name": "f", "arguments": {"a": 1}}', "f\n{}", "<", "\\",
        '{"name": "f", "parameters": {}}', "<function=f>", "</function>", "<parameter=a>\n1\n</parameter>", "42", "é🎉",
        '<invoke name="f">', "</invoke>", '<parameter name="a">b</parameter>', "<arg_value>1</arg_value>", "call:f{",
        '<|"|>', "f(a=1)", "Action Input:", "f", "```", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
    ]  # fmt: skip


def shown(deltas: list[ParsedDelta]) -> tuple[str, str, list[tuple[Any, ...]]]:
    """All that a reader has seen: content, thoughts, calls with the order of their parts."""
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    thoughts = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    calls = [(d.index, d.id, d.name, d.arguments) for d in deltas if isinstance(d, ToolCallDelta)]
    return content, thoughts, calls


def configuration(name: str, data: st.DataObject) -> dict[str, Any]:
    parser: dict[str, Any] = {"tools": name}
    if data.draw(st.booleans()):
        parser["think"] = THINK
        parser["open"] = data.draw(st.booleans())
    if data.draw(st.integers(0, 4)) == 0:
        parser["parallel"] = False
    return parser


@pytest.mark.parametrize("name", sorted(READERS))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_cut_of_any_text_gives_the_same(name: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(pieces_of(name)), max_size=14)))
    parser = configuration(name, data)
    slow, after = ToolParser(parser, key="k"), []
    seen: list[ParsedDelta] = []
    for char in text:
        seen += slow.feed(char)
        after.append(shown(seen))
    seen += slow.close()
    whole = parse(text, parser, key="k")
    assert assemble(seen) == whole
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=5)) | {0, len(text)})
    quick = ToolParser(parser, key="k")
    deltas: list[ParsedDelta] = []
    for start, end in itertools.pairwise(cuts):
        deltas += quick.feed(text[start:end])
        assert shown(deltas) == after[end - 1]
    deltas += quick.close()
    assert shown(deltas) == shown(seen)
    if not whole.tool_calls and not whole.reasoning and name != "gpt_oss" and "think" not in parser:
        assert whole.content == text  # nothing is ever lost but marks of calls and thoughts
    for call in whole.tool_calls:
        json.loads(call.function.arguments)


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"minimax2"}))
def test_no_part_of_a_call_is_shown_as_content_while_it_streams(name: str) -> None:
    calls = [Call("get_weather", {"city": "Paris"}), Call("add", {"a": 1})]
    written = write_calls(schema.tool_format(name), calls, "")
    has_marks = bool(READERS[name][0].marks)
    text = ("Let me look.\n" if has_marks else "") + written
    parser = ToolParser({"tools": name, "think": THINK})
    content = ""
    for char in "<think>\nhm\n</think>\n\n" + text:
        content += "".join(delta.text for delta in parser.feed(char) if isinstance(delta, ContentDelta))
        assert "Let me look.".startswith(content)
    deltas = parser.close()
    assert not any(isinstance(delta, ContentDelta) for delta in deltas)
    assert parser.has_calls


def test_calls_come_out_as_they_are_completed() -> None:
    parser = ToolParser({"tools": "qwen"}, key="job:0")
    one = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    first = parser.feed("Hi " + one + "\n<tool")
    assert [type(delta) for delta in first] == [ContentDelta, ToolCallDelta, ToolCallDelta]
    opened, filled = first[1:]
    assert opened == ToolCallDelta(0, "call_" + hashlib.blake2b(b"job:0:0", digest_size=12).hexdigest(), "f")
    assert filled == ToolCallDelta(0, arguments='{"a": 1}')
    second = parser.feed('_call>\n{"name": "g", "arguments": {}}\n</tool_call>')
    assert [(d.index, d.name) for d in second if isinstance(d, ToolCallDelta)] == [(1, "g"), (1, None)]
    assert parser.finish_reason("stop") == "tool_calls"
    assert parser.finish_reason("length") == "length"


def test_ids_of_calls_are_the_same_for_every_reader_and_differ_between_jobs() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' * 2
    ids = [tuple(call.id for call in parse(text, {"tools": "qwen"}, key=key).tool_calls) for key in ("a", "a", "b")]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0] + ids[2])) == 4


# --- thoughts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, "hm", "Yes"),
        ("\n <think>hm", False, "hm", ""),
        ("hm\n</think>\n\nYes <think> no", True, "hm", "Yes <think> no"),
        ("<think></think>Yes", False, None, "Yes"),
        ("Yes", False, None, "Yes"),
        ("  Yes ", False, None, "  Yes "),
        ("I say <think> here", False, None, "I say <think> here"),
        ("<thi", False, None, "<thi"),
        ("hm </thi", True, "hm </thi", ""),
        ("", True, None, ""),
    ],
)
def test_thoughts_are_told_from_content(text: str, is_open: bool, reasoning: str | None, content: str) -> None:
    parsed = parse(text, {"think": THINK, "open": is_open})
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_a_call_in_thoughts_is_a_thought() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parsed = parse(f"<think>{call}</think>\n\nNo.", {"tools": "qwen", "think": THINK})
    assert (parsed.reasoning, parsed.content, parsed.tool_calls) == (call, "No.", ())
    assert len(parse(f"<think>hm</think>\n\n{call}", {"tools": "qwen", "think": THINK}).tool_calls) == 1


# --- odd input -------------------------------------------------------------------------------------------------------
def test_text_without_tools_is_left_alone() -> None:
    text = ' <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> '
    for parser in ({}, {"tools": None}, {"tools": "of a newer release"}):
        assert parse(text, parser) == Parsed(text, None, ())


def test_a_mark_that_is_only_spoken_of_is_shown_at_once() -> None:
    for name, text in {
        "qwen": "A <tool_call> is",
        "glm4_moe": "A `<tool_call>` is",
        "default": "Action: none yet",
    }.items():
        parser = ToolParser({"tools": name})
        assert "".join(delta.text for delta in parser.feed(text) if isinstance(delta, ContentDelta)) == text


def test_only_the_first_call_counts_where_parallel_calls_are_off() -> None:
    one = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert len(parse(one + one, {"tools": "qwen", "parallel": False}).tool_calls) == 1


def test_arguments_that_are_json_text_already_stay_one_object() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert called(parse(text, {"tools": "qwen"})) == [{"name": "f", "arguments": '{"a": 1}'}]


@pytest.mark.parametrize("name", ["qwen", "default", "gemma4", "qwen3_5", "glm4_moe"])
def test_a_broken_call_takes_no_good_one_with_it(name: str) -> None:
    good = write_calls(schema.tool_format(name), [Call("f", {"a": 1})], "")
    broken = {
        "qwen": '<tool_call>{"name"}</tool_call>',
        "default": "\nAction: g h\n",
        "gemma4": "<|tool_call>call:g{a:}<tool_call|>",
        "qwen3_5": "<tool_call>oops</tool_call>",
        "glm4_moe": "<tool_call>g<arg_key>a</tool_call>",
    }[name]
    parsed = parse(good + broken, {"tools": name})
    assert [call["name"] for call in called(parsed)] == ["f"]
    assert (parsed.content or "").strip() == broken.strip()


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": 1, "arguments": {}}',
        "42",
        "[]",
        '["f"]',
        '{"name": "f", "arguments": NaN}',
        "{" * 5000,
        "null",
        '{"a": 1e999}',
    ],
)
def test_json_that_is_no_call_is_content(inner: str) -> None:
    text = f"<tool_call>{inner}</tool_call>"
    assert parse(text, {"tools": "qwen"}) == Parsed(text, None, ())


def test_what_comes_out_can_always_be_encoded() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'
    [call] = parse(text, {"tools": "qwen"}).tool_calls
    assert json.loads(call.function.arguments.encode())["a"] == "\ud800"


def test_arguments_may_be_called_like_pythons_keywords() -> None:
    text = '<|tool_call_start|>[fly(from="Rome", to="from=", class=2, keyword_x=None), def()]<|tool_call_end|>'
    first, second = called(parse(text, {"tools": "lfm2"}))
    assert json.loads(first["arguments"]) == {"from": "Rome", "to": "from=", "class": 2, "keyword_x": None}
    assert second == {"name": "def", "arguments": "{}"}


def test_readers_of_models_own_formats() -> None:
    deepseek = (
        "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        '```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    assert called(parse(deepseek, {"tools": "deepseek"})) == [
        {"name": "f", "arguments": '{"a": 1}'}, {"name": "g", "arguments": "{}"},
    ]  # fmt: skip
    harmony = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}'
    )
    parsed = parse(harmony, {"tools": "gpt_oss", "think": ["<|channel|>analysis<|message|>", "<|end|>"]})
    assert (parsed.reasoning, called(parsed)) == ("hm", [{"name": "f", "arguments": '{"a": 1}'}])
    final = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi there"
    parsed = parse(final, {"tools": "gpt_oss", "think": ["<|channel|>analysis<|message|>", "<|end|>"]})
    assert (parsed.reasoning, parsed.content) == ("hm", "Hi there")
    granite = '<|tool_call|>[{"name": "f", "arguments": {}}]'
    assert called(parse(granite, {"tools": "phi4_mini"})) == [{"name": "f", "arguments": "{}"}]


def test_no_mark_begins_with_another() -> None:
    for readers in READERS.values():
        marks = [mark for reader in readers for mark in reader.marks]
        assert not [(one, other) for one in marks for other in marks if one != other and one.startswith(other)]


def test_long_calls_cost_time_in_proportion() -> None:
    """A reader that went over all that is held with each piece of text in Python would take minutes."""
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "' + "x" * 100_000 + '"}}\n</tool_call>'
    parser = ToolParser({"tools": "qwen"})
    deltas: list[ParsedDelta] = []
    for at in range(0, len(text), 4):
        deltas += parser.feed(text[at : at + 4])
    assert len(assemble(deltas).tool_calls) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen", '<tool_call>{"name": "a", "arguments": {"x": "' + "</tool_call>" * 1000),
        ("glm4_moe", '<tool_call>{"name": "a", "arguments": {"x": "' + "</tool_call>" * 1000),
        ("minimax2", "<minimax:tool_call>" + '<invoke name="a">' * 1000 + "</minimax:tool_call>"),
        ("gpt_oss", "<|channel|>commentary to=functions.a <|constrain|>json" * 300),
        ("deepseek", f"{_CALLS}{_CALL}f<｜tool▁sep｜>" + " " * 60_000 + "x<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    ],
    ids=lambda value: value if len(value) < 20 else "",
)
def test_no_text_makes_reading_slow(name: str, text: str) -> None:
    """What a model can be talked into writing is read in a gateway's event loop; each of these took minutes."""
    parser, start = ToolParser({"tools": name}), time.process_time()
    deltas: list[ParsedDelta] = []
    for at in range(0, len(text), 4):
        deltas += parser.feed(text[at : at + 4])
        assert time.process_time() - start < 15
    assert assemble(deltas + parser.close()).tool_calls == ()


def test_a_closing_mark_may_stand_in_a_calls_strings_some_times() -> None:
    arguments = {"a": "</tool_call>" * 20}
    text = f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"
    [call] = called(parse(text, {"tools": "qwen"}))
    assert json.loads(call["arguments"]) == arguments


def test_reading_calls_needs_nothing_heavy() -> None:
    code = "import sys, tokenfleet.wire.toolcalls; "
    code += "assert not {'torch', 'transformers', 'tokenizers', 'jinja2', 'tokenfleet.engines'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Named templates, and models' own, against what LLaMA-Factory 0.9.5 and transformers made of the same conversations.

`DEPARTURES` lists every kind of case where we knowingly do otherwise; docs/templates.md has the same list for people.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from tests import vectors
from tokenfleet.engines.prompts import PromptOptions, RenderedPrompt, load_template, render
from tokenfleet.engines.templates import schema
from tokenfleet.engines.templates.conversation import turns
from tokenfleet.engines.templates.named import pieces
from tokenfleet.engines.templates.schema import Slot
from tokenfleet.engines.templates.tools import definitions
from tokenfleet.wire.chat import ChatRequest, Message
from tokenfleet.wire.errors import InvalidRequest

TODAY = datetime(2025, 3, 5, tzinfo=UTC)
Case = dict[str, Any]
NAMED = [case for case in vectors.load()["cases"] if case["template"] is not None]
OWN = [case for case in vectors.load()["cases"] if case["template"] is None]


def request_of(conversation: Case) -> ChatRequest:
    return ChatRequest(
        messages=conversation["messages"],
        system=conversation["system"],
        tools=definitions(conversation["tools"]) or (),
        enable_thinking=conversation["enable_thinking"],
        preserve_thinking=conversation.get("preserve_thinking"),
    )


def ours(conversation: Case, template: schema.Template | None, tokenizer: Any) -> RenderedPrompt:
    """None as ``enable_thinking`` is a setting of LLaMA-Factory, not a request's way of saying nothing."""
    options = PromptOptions(enable_thinking=conversation["enable_thinking"])
    return render(request_of(conversation), tokenizer, template, options=options, now=TODAY)


def recorded(piece: str | Slot) -> Any:
    if isinstance(piece, str):
        return piece
    return {"token": piece.token} if piece.kind == "token" else {"slot": f"{piece.kind}_token"}


def with_messages(conversation: Case, change: Callable[[int, Case], None]) -> Case:
    changed = copy.deepcopy(conversation)
    for i, message in enumerate(changed["messages"]):
        change(i, message)
    return changed


# --- where we do otherwise, and how it is shown that nothing else differs --------------------------------------------
def _as_it_replaces_idx(conversation: Case) -> Case:
    def replace_first(i: int, message: Case) -> None:
        if message["role"] == "user":
            message["content"] = message["content"].replace("{{idx}}", str(i // 2), 1)

    return with_messages(conversation, replace_first)


def _as_it_encodes_twice(conversation: Case) -> Case:
    def encode(_: int, message: Case) -> None:
        if message["role"] == "function":
            calls = json.loads(message["content"])
            for call in calls:
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
            message["content"] = json.dumps(calls, ensure_ascii=False)

    return with_messages(conversation, encode)


def _arguments_are_objects(conversation: Case, template: object = None) -> Case:
    def decode(_: int, message: Case) -> None:
        if message["role"] == "function":
            calls = json.loads(message["content"])
            for call in calls:
                call["arguments"] = json.loads(call["arguments"])
            message["content"] = json.dumps(calls, ensure_ascii=False)

    return with_messages(conversation, decode)


def _thoughts_in_own_words(conversation: Case, template: schema.Template) -> Case:
    def translate(_: int, message: Case) -> None:
        opened, closed = template.thoughts
        message["content"] = message["content"].replace("<think>\n", opened).replace("\n</think>\n\n", closed)

    return with_messages(conversation, translate)


@dataclass(frozen=True)
class Departure:
    """``applies`` picks cases. ``undo`` turns a case's conversation into one of which we make what it made of the
    case; ``same`` into one of which we make what we make of the case."""

    reason: str
    applies: Callable[[Case], bool]
    undo: Callable[[Case], Case] | None = None
    same: Callable[[Case, schema.Template], Case] | None = None


def _is_fused(case: Case) -> bool:
    return schema.named(case["template"]).is_system_in_user


DEPARTURES = {
    "call_string_args": Departure(
        "arguments given as JSON text (as OpenAI's clients do) are encoded twice there, or raise",
        lambda case: case["kind"] == "call_string_args",
        undo=_as_it_encodes_twice,
        same=_arguments_are_objects,
    ),
    "idx": Departure(
        "{{idx}} in a user's text is replaced by the turn's number there",
        lambda case: case["kind"] == "placeholders_in_content" and not (case["template"] and _is_fused(case)),
        undo=_as_it_replaces_idx,
    ),
    "glm4 parallel calls": Departure(
        "parallel calls raise there",
        lambda case: case["kind"] == "parallel_calls" and case["template"] in ("glm4", "glmz1"),
    ),
    "fused thoughts": Departure(
        "templates with the system text in the user's turn read a call only where nothing stands beside it",
        lambda case: case["error"] and re.match("call_with_(think|text)", case["kind"]) and _is_fused(case),
    ),
    "foreign thoughts": Departure(
        "thoughts before a call are only found there in the template's own words",
        lambda case: case["error"] and re.match("call_with_think", case["kind"]) and not _is_fused(case),
        same=_thoughts_in_own_words,
    ),
    "no media": Departure(
        "a placeholder without its image is an error in a request to a template that takes images",
        lambda case: case["kind"] == "image",
    ),
    "no tools": Departure(
        "an empty list of tools makes an empty system turn there; in a request it is no tools",
        lambda case: case["kind"] == "tools_empty_list",
        same=lambda conversation, template: {**conversation, "tools": None},
    ),
}


def departures(case: Case) -> list[Departure]:
    case = {"error": None, **case}
    return [departure for departure in DEPARTURES.values() if departure.applies(case)]


def ids_of(cases: list[Case]) -> list[str]:
    return [case["id"] for case in cases]


@vectors.is_absent
@pytest.mark.parametrize("case", NAMED, ids=ids_of(NAMED))
def test_a_named_template_renders_what_was_recorded(case: Case) -> None:
    template, tokenizer = schema.named(case["template"]), vectors.Characters()
    conversation = case["conversation"]
    if case["kind"] == "call_bad_json":
        with pytest.raises(InvalidRequest) as caught:
            ours(conversation, template, tokenizer)
        assert caught.value.details["param"] == "messages[1].content"
        return
    if not (found := departures(case)):
        assert case["text"] is not None, case["error"]
        prompt = ours(conversation, template, tokenizer)
        assert prompt.text == case["text"]
        assert list(map(recorded, prompt.pieces)) == case["pieces"]
        assert prompt.ids == tuple(i for piece in prompt.pieces for i in tokenizer.encode(text_of(piece, template)))
        return
    if case["kind"] == "image":
        with pytest.raises(InvalidRequest) as caught:
            ours(conversation, template, tokenizer)
        assert caught.value.code == "invalid_media"
        return
    prompt = ours(conversation, template, tokenizer)
    for departure in found:
        if departure.undo and case["text"] is not None:
            assert prompt.text != case["text"]
            undone = ours(departure.undo(conversation), template, tokenizer)
            assert (undone.text, list(map(recorded, undone.pieces))) == (case["text"], case["pieces"])
        if departure.same:
            assert prompt.text == ours(departure.same(conversation, template), template, tokenizer).text


def text_of(piece: str | Slot, template: schema.Template) -> str:
    if isinstance(piece, str):
        return piece
    eos = template.stop_words[0] if template.replaces_eos else "</s>"
    return {"bos": "<s>", "eos": eos, "token": piece.token}[piece.kind]


@vectors.is_absent
def test_every_departure_is_met_by_a_case_and_most_cases_meet_none() -> None:
    cases = vectors.load()["cases"]
    for name, departure in DEPARTURES.items():
        assert any(departure.applies({"error": None, **case}) for case in cases), name
    assert len(cases) == 758
    assert sum(bool(departures(case)) for case in cases) == 95


BELOW = [case for case in NAMED if case["kind"] in ("tools_empty_list", "image")]


@vectors.is_absent
@pytest.mark.parametrize("case", BELOW, ids=ids_of(BELOW))
def test_what_requests_refuse_or_drop_renders_as_recorded_below_them(case: Case) -> None:
    if (case["template"], case["kind"]) == ("phi4_mini", "tools_empty_list"):
        pytest.skip("it writes [] between its tool marks there; we describe no tools")
    template, conversation = schema.named(case["template"]), case["conversation"]
    messages = [Message(**message) for message in conversation["messages"]]
    said = turns(messages, lambda message: message.text, template.thoughts, template.call_words)
    made = pieces(template, said, system=conversation["system"], tools=definitions(conversation["tools"]), now=TODAY)
    assert list(map(recorded, made)) == case["pieces"]


@pytest.mark.parametrize("name", ["glm4", "glmz1"])
def test_glm4_writes_parallel_calls_one_after_the_other(name: str) -> None:
    calls = json.dumps([{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}])
    messages = [
        {"role": "user", "content": "u"},
        {"role": "function", "content": calls},
        {"role": "tool", "content": "r"},
    ]
    prompt = render(ChatRequest(messages=messages), vectors.Characters(), schema.named(name))
    assert prompt.text == '[gMASK]<sop><|user|>\nu<|assistant|>a\n{"x": 1}\nb\n{}<|observation|>\nr<|assistant|>'


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma3"])
@pytest.mark.parametrize("text", ["<think>\nhm\n</think>\n\n", "Let me see.\n"])
def test_templates_with_the_system_text_in_the_user_turn_read_calls_beside_text(name: str, text: str) -> None:
    call = '{"name": "a", "arguments": {"x": 1}}'
    content = text + (call if "think" in text else f"<tool_call>{call}</tool_call>")
    messages = [
        {"role": "user", "content": "u"},
        {"role": "function", "content": content},
        {"role": "tool", "content": "r"},
    ]
    prompt = render(ChatRequest(messages=messages), vectors.Characters(), schema.named(name))
    written = {"mistral": '[{"name": "a", "arguments": {"x": 1}}]'}.get(name, 'Action: a\nAction Input: {"x": 1}')
    assert text + written in (prompt.text or "")


# --- ids -------------------------------------------------------------------------------------------------------------
@vectors.is_absent
@pytest.mark.parametrize("name", sorted({case["template"] for case in NAMED}))
def test_ids_are_the_recorded_ones_where_the_stop_words_are_tokens(name: str) -> None:
    facts = vectors.load()["templates"][name]
    tokenizer = vectors.smollm2(tuple(facts["smollm2_added_tokens"]))
    assert {word: tokenizer.convert_tokens_to_ids(word) for word in facts["smollm2_added_tokens"]} == facts[
        "smollm2_added_tokens"
    ]
    template, checked = schema.named(name), 0
    for case in NAMED:
        if case["template"] == name and case["text"] is not None and not departures(case):
            prompt = ours(case["conversation"], template, tokenizer)
            assert prompt.ids == tuple(case["ids_smollm2"]), case["id"]
            assert prompt.stop_token_ids == tuple(facts["stop_ids_smollm2"])
            assert prompt.stop_strings == ()
            checked += 1
    assert checked >= 5


def test_no_id_is_made_up_for_a_stop_word_that_the_model_lacks() -> None:
    tokenizer = vectors.smollm2()
    size = len(tokenizer)
    prompt = render(ChatRequest(messages=[{"role": "user", "content": "Hi"}]), tokenizer, schema.named("llama3"))
    assert max(prompt.ids) < size
    assert len(tokenizer) == size
    assert prompt.stop_strings == ("<|eot_id|>", "<|eom_id|>")
    assert prompt.stop_token_ids == (tokenizer.eos_token_id,)


# --- facts about templates --------------------------------------------------------------------------------------------
@vectors.is_absent
@pytest.mark.parametrize("name", sorted(vectors.load()["templates"]))
def test_a_templates_facts_are_the_recorded_ones(name: str) -> None:
    facts, template = vectors.load()["templates"][name], schema.named(name)
    assert template.default_system == facts["default_system"]
    assert list(template.stop_words) == facts["template_stop_words"]
    assert list(template.thoughts) == facts["thought_words"]
    assert list(template.call_words) == facts["tool_call_words"]
    assert template.replaces_eos == facts["replace_eos"]
    assert template.tool_format == (facts["tool_format"] or "phi4_mini")
    assert template.media.get("image") == facts["image_token"]
    kinds = {"Llama2Template": (True, False, "both"), "Template": (False, False, "both")}
    kinds |= {"ReasoningTemplate": (False, True, "both"), "Glm47ReasoningTemplate": (False, True, "close")}
    assert (template.is_system_in_user, template.is_reasoning, template.empty_thought) == kinds[facts["class"]]


def test_all_families_that_users_ask_for_are_there() -> None:
    wanted = "default empty alpaca vicuna llama2 llama3 llama4 mistral qwen qwen3 chatml gemma gemma3 phi3 phi4 "
    wanted += (
        "deepseek deepseekr1 glm4 yi baichuan2 internlm2 zephyr falcon cohere granite gpt_oss smollm qwen2_vl llava"
    )
    assert set(wanted.split()) <= set(schema.template_names())
    for name in schema.template_names():
        template = schema.named(name)
        assert schema.tool_format(template.tool_format)
        prompt = render(ChatRequest(messages=[{"role": "user", "content": "4711"}]), vectors.Characters(), template)
        assert "4711" in (prompt.text or "")


# --- the model's own template -----------------------------------------------------------------------------------------
def own_tokenizer(case: Case) -> Any:
    name = case.get("chat_template_name")
    source = vectors.load()["synthetic_chat_templates"][name] if name else None
    return vectors.smollm2(chat_template=source, adds_bos=name == "llama3_addbos")


@vectors.is_absent
@pytest.mark.parametrize("case", OWN, ids=ids_of(OWN))
def test_the_name_parsed_is_llama_factorys_reading_of_a_models_own_template(case: Case) -> None:
    tokenizer, conversation = own_tokenizer(case), case["conversation"]
    template = load_template("parsed", tokenizer)
    if case["kind"] == "call_bad_json":
        with pytest.raises(InvalidRequest):
            ours(conversation, template, tokenizer)
        return
    prompt = ours(conversation, template, tokenizer)
    found = [departure for departure in departures(case) if departure is not DEPARTURES["no tools"]]
    if not found:
        assert prompt.text == case["text"]
        assert list(map(recorded, prompt.pieces)) == case["pieces"]
        assert prompt.ids == tuple(case["ids_smollm2"])
    for departure in found:
        assert departure.undo
        assert ours(departure.undo(conversation), template, tokenizer).text == case["text"]


# What a model's own template makes of a conversation is transformers' rendering of it, but for these kinds.
OWN_DEPARTURES = {
    "empty_system": "an empty system text is none: the template's default one holds, as in LLaMA-Factory",
    "tools": "a template that knows no tools would lose them, and calls: they are told in words, as in LLaMA-Factory",
    "trim": "tools told in words go through the template, which may trim them or write BOS once; its reading doesn't",
}


@vectors.is_absent
@pytest.mark.parametrize("case", OWN, ids=ids_of(OWN))
def test_a_models_own_template_renders_as_transformers_does(case: Case) -> None:
    tokenizer, conversation = own_tokenizer(case), case["conversation"]
    if case["kind"] == "call_bad_json":
        with pytest.raises(InvalidRequest):
            ours(conversation, None, tokenizer)
        return
    prompt = ours(conversation, None, tokenizer)
    has_calls = any(message["role"] == "function" for message in conversation["messages"])
    if conversation["tools"] not in (None, "[]") or has_calls:
        expected = _arguments_are_objects(conversation) if case["kind"] == "call_string_args" else conversation
        parsed = ours(expected, load_template("parsed", tokenizer), tokenizer)
        assert _squeezed(prompt.text) == _squeezed(parsed.text)
        if not str(case.get("chat_template_name")).startswith("llama3"):
            assert prompt.text == parsed.text
        return
    assert prompt.text == (case["text"] if case["kind"] == "empty_system" else case["hf_chat_template_text"])
    messages = [] if not conversation["system"] else [{"role": "system", "content": conversation["system"]}]
    messages += conversation["messages"]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(prompt.ids) == list(theirs)


def _squeezed(text: str | None) -> str:
    """Without the later BOS of a doubled one, and without blanks that the synthetic templates trim."""
    return re.sub(r"\s+(?=<\|eot_id\|>)", "", (text or "").replace("<|eot_id|><|im_start|>", "<|eot_id|>"))


@vectors.is_absent
@pytest.mark.parametrize("name", sorted(vectors.load()["parsed_templates"]))
def test_a_parsed_template_has_the_recorded_turns(name: str) -> None:
    facts = vectors.load()["parsed_templates"][name]
    tokenizer = own_tokenizer({"chat_template_name": None if name == "smollm2" else name})
    template = load_template("parsed", tokenizer)
    assert template is not None
    assert template.default_system == facts["default_system"]
    assert template.is_reasoning == (facts["class"] == "ReasoningTemplate")
    mark = "{{content}}"
    for field in ("user", "assistant", "system"):
        made = pieces(
            schema.Template(name="x", user=getattr(template, field), tool=(), call=()),
            turns([Message(role="user", content=mark)], lambda message: message.text, ("a", "b"), ("c", "d")),
        )
        assert made == facts[field], field

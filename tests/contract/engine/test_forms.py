"""Answers that follow a schema, an expression or a grammar."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import pytest

from tests.contract.engine.asking import GREEDY, ask, assert_greedy, make_job, run, until
from tokenfleet.engines.choice import DeliveredChoice
from tokenfleet.engines.support import continuation
from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.choice import Offer
from tokenfleet.engines.templates.forced import call_grammar
from tokenfleet.engines.templates.schema import tool_format
from tokenfleet.wire.errors import EngineError, InvalidRequest
from tokenfleet.wire.events import Delta
from tokenfleet.wire.support import REFUSED
from tokenfleet.wire.toolcalls import parse

pytestmark = pytest.mark.asyncio(loop_scope="session")

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 20, 300]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
WILD = {"temperature": 2.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 200}


@pytest.fixture
def grammars(subject):
    if "response_format" in REFUSED[subject.name]:
        pytest.skip("refused by this engine, as the table says")


def has_form(text, wanted):
    if wanted["type"] == "regex":
        return re.fullmatch(wanted["pattern"], text) is not None
    found = json.loads(text)
    return found.keys() == {"ok", "size"} and type(found["ok"]) is bool and found["size"] in (1, 20, 300)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema", "json_schema": SCHEMA},
        {"type": "regex", "pattern": "[0-9]{3}-(ab|é){2}"},
    ],
    ids=lambda wanted: wanted["type"],
)
async def test_an_answer_has_the_form_asked_for_and_continues_in_it(subject, grammars, wanted):
    for seed in range(5):
        job = make_job(subject, response_format=wanted, seed=seed, **WILD)
        whole = await run(subject, job)
        assert whole.end.reason == "stop"
        assert has_form(whole.text, wanted), whole.text
        if continuation(subject.name, job.params) == "no":
            continue
        deltas = [event for event in whole.events if isinstance(event, Delta)]
        for count in range(1, len(deltas), 3):
            ids = tuple(i for delta in deltas[:count] for i in delta.ids)
            delivered = DeliveredChoice(ids, "".join(delta.text for delta in deltas[:count]))
            again = await run(subject, replace(job, attempt=2, delivered={0: delivered}))
            assert has_form(again.text, wanted), again.text


_PAIR = {"type": "object", "properties": {"v": {"enum": [1, "é"]}, "next": {"type": "null"}}, "required": ["v", "next"]}
ODD_SCHEMAS = [
    ({"enum": [1, "a\"b", None, [True], {"x": "é"}]}, lambda v: v in (1, 'a"b', None, [True], {"x": "é"})),
    ({"type": ["integer", "null"], "minimum": -3, "maximum": 12}, lambda v: v is None or -3 <= v <= 12),
    (
        {"anyOf": [{"const": "x"}, {"$ref": "#/$defs/b"}], "$defs": {"b": {"type": "boolean"}}},
        lambda v: v in ("x", True, False),
    ),
    ({"type": "string", "pattern": "^[a-c]{2}é?$"}, lambda v: re.fullmatch("[a-c]{2}é?", v)),
    ({"type": "string", "minLength": 2, "maxLength": 4}, lambda v: 2 <= len(v) <= 4),
    ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v)),
    ({"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 3}, lambda v: 2 <= len(v) <= 3),
    (
        {"type": "array", "prefixItems": [{"const": 1}, {"const": "b"}], "items": False, "minItems": 2},
        lambda v: v == [1, "b"],
    ),
    ({"$ref": "#/$defs/n", "$defs": {"n": {**_PAIR, "additionalProperties": False}}}, lambda v: v["v"] in (1, "é")),
    ({"name": "w", "strict": True, "schema": {"const": {"a": []}}}, lambda v: v == {"a": []}),
]  # fmt: skip
"""With what must hold of every value."""


async def test_an_answer_has_the_form_of_whatever_schema(subject, grammars):
    asked = [(schema, holds, seed) for schema, holds in ODD_SCHEMAS for seed in range(3)]
    answers = await asyncio.gather(
        *(
            ask(subject, job_id=f"odd{i}", response_format={"type": "json_schema", "json_schema": schema}, seed=seed,
                **{**WILD, "top_k": 50})
            for i, (schema, _, seed) in enumerate(asked)
        )
    )  # fmt: skip
    whole = 0
    for (schema, holds, _), answer in zip(asked, answers, strict=True):
        if answer.end.reason == "stop":  # blanks may take all of the length
            whole += 1
            assert holds(json.loads(answer.text)), (schema, answer.text)
    assert whole > 0.8 * len(asked)


TOOLS = (
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Łódź", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city"], "additionalProperties": False,
    }}},
    {"type": "function", "function": {"name": "time", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string", "maxLength": 8}}, "required": ["zone"],
        "additionalProperties": False,
    }}},
)  # fmt: skip


def fits(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "time":
        return arguments.keys() == {"zone"} and isinstance(arguments["zone"], str)
    is_known = arguments["city"] in ("Łódź", "Rome") and arguments.keys() <= {"city", "days"}
    return call.function.name == "weather" and is_known and type(arguments.get("days", 0)) is int


@pytest.mark.parametrize("style", ["qwen", "llama3", "default"])
@pytest.mark.parametrize("forced", ["", "weather"], ids=["any", "named"])
async def test_a_forced_call_has_arguments_after_its_schema(subject, grammars, style, forced):
    """The grammar of a call that the prompt has begun, as a worker asks for it (`workers.served`)."""
    written = tool_format(style)
    opening = sandbox.render(sandbox.snippet(written.opening_named if forced else written.opening), {"name": forced})
    grammar = call_grammar(written, Offer(TOOLS, forced), opening, is_parallel=False)
    wanted = {"type": "grammar", "grammar": grammar}
    called = set()
    for seed in range(4):
        answer = await ask(subject, f"x {opening}", response_format=wanted, seed=seed, **WILD)
        if answer.end.reason == "length":  # a number may have any length
            continue
        [call] = parse(answer.text, {"tools": style, "prefix": opening}).tool_calls
        assert fits(call), call
        assert forced in ("", call.function.name)
        called.add(call.function.name)
    assert called


async def test_a_special_token_in_a_form_is_its_letters(subject, grammars):
    """Tokenised as a text it would be the special token, which is no text and would have ended the answer."""
    for special in (subject.eos_id, subject.special_id):
        word = subject.tokenizer.token_text(special)
        for wanted in (
            {"type": "json_schema", "json_schema": {"const": f"a{word}b"}},
            {"type": "regex", "pattern": f'"a{re.escape(word)}b"'},
            {"type": "grammar", "grammar": f'start: "\\"a" {json.dumps(word)} "b\\""'},
        ):
            answer = await ask(subject, response_format=wanted, max_new_tokens=40, **GREEDY)
            assert (answer.text, answer.end.reason) == (f'"a{word}b"', "stop")


async def test_a_form_that_can_not_be_held_to_fails_its_request_alone(subject, grammars):
    """Nothing must pass for a whole text that is none: neither where no text fits nor where there are too many ways."""
    with pytest.raises(InvalidRequest, match="response_format"):
        await ask(subject, response_format={"type": "json_schema", "json_schema": {"$ref": "#"}})
    ways = [{"type": "object", "properties": {f"k{i}": {"type": "string"}}} for i in range(2000)]
    neighbour = asyncio.create_task(ask(subject, job_id="beside", max_new_tokens=40, ignore_eos=True, **GREEDY))
    with pytest.raises((EngineError, InvalidRequest)):
        await ask(
            subject, response_format={"type": "json_schema", "json_schema": {"anyOf": ways}}, max_new_tokens=60, seed=1
        )
    assert_greedy(subject, (await neighbour).job, neighbour.result().only)
    await until(lambda: subject.engine.running == 0)


async def test_a_form_holds_to_the_end_even_if_eos_is_ignored_or_barred(subject, grammars):
    """The grammar's own end goes on until the limit; nothing else may follow it, nor come before its time."""
    wanted = {"type": "json_schema", "json_schema": SCHEMA}
    for more in ({"ignore_eos": True, "max_new_tokens": 120}, {"min_tokens": 150}):
        job = make_job(subject, response_format=wanted, seed=1, **{**WILD, **more})
        answer = await run(subject, job)
        assert has_form(answer.text, wanted), answer.text
        assert answer.end.reason == ("length" if "ignore_eos" in more else "stop")
        delivered = {0: DeliveredChoice(tuple(answer.only[:2]), subject.tokenizer.decode(answer.only[:2]))}
        if "\ufffd" not in delivered[0].text and len(answer.only) > 2:
            again = await run(subject, replace(job, attempt=2, delivered=delivered))
            assert has_form(again.text, wanted), again.text


async def test_a_form_that_makes_no_sense_is_refused(subject, grammars):
    with pytest.raises(InvalidRequest) as raised:
        await ask(subject, response_format={"type": "regex", "pattern": "(["})
    assert raised.value.details["param"] == "response_format"
    assert str(raised.value).startswith('response_format can\'t be used: at 1(8): invalid regex "(["')  # on each engine
    assert len(str(raised.value)) < 400
    assert (await ask(subject)).end.reason

"""What every engine must do, each as an effect that a reader sees. The truth about the model comes from elsewhere."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from tests.contract.reference import chi_square, improbable, log_softmax, probabilities, processed
from tests.processes import on_this_machine
from tokenfleet.engines.choice import DeliveredChoice
from tokenfleet.engines.generation import GenerationJob, generate_deltas
from tokenfleet.engines.support import CONTINUATION, continuation
from tokenfleet.engines.templates import sandbox
from tokenfleet.engines.templates.choice import Offer
from tokenfleet.engines.templates.forced import call_grammar
from tokenfleet.engines.templates.schema import tool_format
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ContextLengthExceeded, EngineError, InvalidRequest
from tokenfleet.wire.events import ChoiceFinished, Delta
from tokenfleet.wire.support import CORE, ENGINES, PARAMETERS, REFUSED, check_supported
from tokenfleet.wire.toolcalls import parse

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXTS = ["The quick brown fox", "Hello world, how are you?", "naïve café 世界 😀", "x", "Two spaces.  And\na line"]
GREEDY = {"temperature": 0}
FREE = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}


class Answer:
    """All events of one job, checked for what holds of every job."""

    def __init__(self, subject, job, events):
        self.job, self.events = job, events
        self.ends = {event.choice: event for event in events if isinstance(event, ChoiceFinished)}
        assert len(self.ends) == len([event for event in events if isinstance(event, ChoiceFinished)])
        self.ids = {choice: list(each.ids) for choice, each in job.delivered.items()}
        self.texts = {choice: each.text for choice, each in job.delivered.items()}
        self.logprobs = {}
        for event in events:
            ids = self.ids.setdefault(event.choice, [])
            self.texts.setdefault(event.choice, "")
            if isinstance(event, Delta):
                assert event.index == len(ids)
                assert event.ids
                event.text.encode()  # valid Unicode
                ids += event.ids
                self.texts[event.choice] += event.text
                self.logprobs.setdefault(event.choice, []).extend(event.logprobs)
            else:
                assert event.tokens == len(ids) <= job.max_new_tokens
                self._check_text(subject, event, ids, self.texts[event.choice])

    def _check_text(self, subject, end, ids, text):
        skip = self.job.params.skip_special_tokens
        ends_in_id = end.reason == "stop" and end.stop is None
        whole = subject.tokenizer.decode(ids[:-1] if ends_in_id else ids, skip_special_tokens=skip)
        match end.reason:
            case "stop" if end.stop is not None:
                assert whole.startswith(text + end.stop)
                within_minimum = subject.tokenizer.decode(ids[: self.job.params.min_tokens], skip_special_tokens=skip)
                assert end.stop not in text[len(within_minimum) :]
            case "stop":
                assert ids[-1] in {*self.job.params.stop_token_ids, subject.eos_id}
                assert text == whole
            case "length":
                assert len(ids) == self.job.max_new_tokens
                assert text == whole
            case reason:
                pytest.fail(f"a choice ended with {reason}")

    @property
    def only(self):
        [ids] = self.ids.values()
        return ids

    @property
    def text(self):
        [text] = self.texts.values()
        return text

    @property
    def end(self):
        [end] = self.ends.values()
        return end


def make_job(subject, text=TEXTS[0], *, job_id="j", attempt=1, delivered=None, **params):
    params = GenerationParams(**{"max_new_tokens": 16, **params})
    return GenerationJob(
        job_id=job_id,
        attempt=attempt,
        prompt_ids=tuple(subject.tokenizer.encode(text)),
        params=params,
        max_new_tokens=params.max_new_tokens,
        eos_ids=frozenset({subject.eos_id}),
        delivered=delivered or {},
    )


async def run(subject, job):
    return Answer(subject, job, [event async for event in generate_deltas(subject.engine, subject.tokenizer, job)])


async def ask(subject, text=TEXTS[0], **kwargs):
    return await run(subject, make_job(subject, text, **kwargs))


def by_rank(subject, params):
    """``params`` with the keys of logit_bias replaced: 0 is the best first token after TEXTS[0], 1 the next."""
    order = np.argsort(-subject.logits(subject.tokenizer.encode(TEXTS[0]), [])[0])
    if "logit_bias" not in params:
        return params
    return {**params, "logit_bias": {int(order[rank]): bias for rank, bias in params["logit_bias"].items()}}


async def until(condition, limit_s=10.0):
    deadline = time.monotonic() + on_this_machine(limit_s)
    while not condition():
        assert time.monotonic() < deadline, "did not come to pass"
        await asyncio.sleep(0.002)


def assert_greedy(subject, job, ids):
    """Teacher-forced: every id has the best score given its own prefix, or is within tolerance of it."""
    barred = {subject.eos_id, *job.params.stop_token_ids}
    if job.params.ignore_eos:
        barred.discard(subject.eos_id)
    truth = subject.logits(job.prompt_ids, ids)
    for place, token_id in enumerate(ids):
        scores = processed(truth[place], job.params, job.prompt_ids, ids[:place], barred)
        assert scores[token_id] >= scores.max() - subject.tolerance, f"token {place}"


# -- choosing tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0}, {"temperature": 1e-300, "top_k": 0}],
    ids=str,
)
async def test_greedy_takes_the_best_token_at_every_place(subject, text, how):
    answer = await ask(subject, text, **how)
    assert_greedy(subject, answer.job, answer.only)


async def test_greedy_texts_leave_no_doubt_and_are_the_best_ones_to_the_token(subject):
    """Without two near-equal best tokens on the way (the engine's arithmetic may choose either) the text is fixed."""
    texts = [*TEXTS, *(f"{text} {i}" for text in TEXTS for i in range(3))]
    answers = await asyncio.gather(
        *(
            ask(subject, text, job_id=f"g{i}", ignore_eos=True, max_new_tokens=6, **GREEDY)
            for i, text in enumerate(texts)
        )
    )
    clear = 0
    for answer in answers:
        truth = subject.logits(answer.job.prompt_ids, answer.only)[:-1]
        best = np.sort(truth, axis=-1)
        if (best[:, -1] - best[:, -2]).min() > subject.tolerance:
            assert answer.only == truth.argmax(axis=-1).tolist()
            clear += 1
    assert clear >= (0.9 if subject.is_wide else 0.75) * len(texts)


@pytest.mark.parametrize(
    "params",
    [
        {},
        FREE,
        {**FREE, "temperature": 0.4},
        {**FREE, "temperature": 2.5},
        {**FREE, "top_k": 5},
        {**FREE, "top_p": 0.5},
        {**FREE, "min_p": 0.3},
        {**FREE, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
        {**FREE, "logit_bias": {3: 1.0, 7: 2.5, 0: -1.5}},
        {**FREE, "top_k": 0},
    ],
    ids=str,
)
async def test_samples_have_the_distribution_asked_for(subject, params):
    """1,024 draws of a first token, by chi-square and by what must never be drawn. Seeded, so it never flickers."""
    params = by_rank(subject, params)
    answers = [await ask(subject, n=128, seed=seed, max_new_tokens=1, **params) for seed in range(8)]
    job = answers[0].job
    truth = subject.logits(job.prompt_ids, [])[0]
    probs = probabilities(processed(truth, job.params, job.prompt_ids, []), job.params)
    counts = np.zeros(len(probs))
    for answer in answers:
        for ids in answer.ids.values():
            counts[ids[0]] += 1
    assert counts.sum() == 1024
    # A token at the edge of top-k, top-p or min-p may fall on either side by the tolerance of logits.
    if not subject.is_exact:
        edge = doubtful(truth, job, probs, 2 * subject.tolerance)
        counts[edge], probs[edge] = 0, 0
        probs /= probs.sum()
    assert counts[probs == 0].sum() == 0
    statistic, degrees = chi_square(np.where(probs > 0, counts, 0), probs)
    assert not improbable(statistic, degrees), (statistic, degrees)


def doubtful(logits, job, probs, tolerance):
    """Whether each token would be let in or kept out, were its logit another by so much."""
    found = np.zeros(len(probs), bool)
    for token in range(len(probs)):
        for by in (-tolerance, tolerance):
            moved = logits.copy()
            moved[token] += by
            again = probabilities(processed(moved, job.params, job.prompt_ids, []), job.params)
            found[token] |= bool(again[token] > 0) != bool(probs[token] > 0)
    assert probs[~found].sum() > 0.5, "nearly all is in doubt"
    return found


async def test_the_default_parameters_are_those_of_llama_factory(subject):
    plain = await ask(subject, seed=1)
    spelled_out = await ask(subject, seed=1, do_sample=True, temperature=0.95, top_p=0.7, top_k=50, num_beams=1)
    assert plain.only == spelled_out.only


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -0.5},
        {"presence_penalty": -1.0, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
        {"logit_bias": {0: -4.0, 5: 1.0}},
        {"logit_bias": {6: 100.0}},
    ],
    ids=str,
)
async def test_penalties_and_biases_move_the_choice_as_defined(subject, params):
    moved, params = 0, by_rank(subject, params)
    for text in TEXTS:
        answer = await ask(subject, text, max_new_tokens=40, **GREEDY, **params)
        assert_greedy(subject, answer.job, answer.only)
        moved += answer.only != (await ask(subject, text, max_new_tokens=40, **GREEDY)).only
    assert moved, "no effect to be seen"


async def test_penalties_count_the_delivered_tokens(subject):
    job = make_job(subject, **GREEDY, max_new_tokens=30, frequency_penalty=0.7, presence_penalty=0.5)
    if continuation(subject.name, job.params) != "exact":
        pytest.skip("this engine does not continue with penalties")
    whole = await run(subject, job)
    delivered = {0: DeliveredChoice(tuple(whole.only[:20]), subject.tokenizer.decode(whole.only[:20]))}
    if delivered[0].text.endswith("\ufffd"):
        pytest.skip("no cut is possible there")
    rest = await run(subject, replace(job, delivered=delivered, attempt=2))
    assert_greedy(subject, job, rest.only)


# -- seeds and choices ------------------------------------------------------------------------------------------------


async def test_a_seed_gives_the_same_tokens_alone_and_in_company(subject):
    alone = await ask(subject, seed=5, **FREE)
    others = [ask(subject, text, job_id=f"other{i}", seed=i, **FREE) for i, text in enumerate(TEXTS)]
    same, *_ = await asyncio.gather(ask(subject, job_id="same", seed=5, **FREE), *others)
    assert same.only == alone.only
    assert (await ask(subject, seed=6, **FREE)).only != alone.only


async def test_without_a_seed_answers_differ(subject):
    answers = await asyncio.gather(*(ask(subject, job_id=f"j{i}", **FREE) for i in range(4)))
    assert len({tuple(answer.only) for answer in answers}) == 4


async def test_n_choices_differ_and_the_first_is_the_single_one(subject):
    answer = await ask(subject, n=4, seed=9, **FREE)
    assert sorted(answer.ends) == [0, 1, 2, 3]
    assert len({tuple(ids) for ids in answer.ids.values()}) == 4
    assert answer.ids[0] == (await ask(subject, seed=9, **FREE)).only


async def test_greedy_choices_are_all_the_same(subject):
    answer = await ask(subject, n=3, **GREEDY)
    for ids in answer.ids.values():
        assert_greedy(subject, answer.job, ids)


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
async def test_an_answer_ends_at_its_length(subject, tokens):
    answer = await ask(subject, max_new_tokens=tokens, ignore_eos=True, **GREEDY)
    assert len(answer.only) == tokens
    assert answer.end.reason == "length"


async def test_eos_ends_an_answer_and_has_no_text(subject):
    answer = await ask(subject, logit_bias={subject.eos_id: 100}, **GREEDY)
    assert (answer.only, answer.text) == ([subject.eos_id], "")
    assert (answer.end.reason, answer.end.stop) == ("stop", None)


@pytest.mark.parametrize("skip", [True, False])
async def test_ignored_eos_is_a_token_like_any_other(subject, skip):
    answer = await ask(
        subject, logit_bias={subject.eos_id: 100}, ignore_eos=True, skip_special_tokens=skip, max_new_tokens=3, **GREEDY
    )
    assert answer.only == [subject.eos_id] * 3
    assert answer.end.reason == "length"
    assert (answer.text == "") == skip


@pytest.mark.parametrize("ending", ["eos", "stop_token"])
async def test_min_tokens_bars_eos_and_stop_tokens(subject, ending):
    token_id = subject.eos_id if ending == "eos" else 60
    stop = {"stop_token_ids": (60,)} if ending == "stop_token" else {}
    answer = await ask(subject, logit_bias={token_id: 100}, min_tokens=5, **stop, **GREEDY)
    assert answer.only[5:] == [token_id]
    assert token_id not in answer.only[:5]
    assert_greedy(subject, answer.job, answer.only)


async def test_a_stop_token_ends_an_answer_even_if_eos_is_ignored(subject):
    plain = await ask(subject, ignore_eos=True, **GREEDY)
    token_id = plain.only[4]
    first = plain.only.index(token_id)
    answer = await ask(subject, ignore_eos=True, stop_token_ids=(token_id,), **GREEDY)
    assert answer.only == plain.only[: first + 1]
    assert (answer.end.reason, answer.end.stop) == ("stop", None)
    assert answer.text == subject.tokenizer.decode(plain.only[:first])


async def test_special_tokens_are_shown_on_request(subject):
    bias = {"logit_bias": {subject.special_id: 100}, "max_new_tokens": 2, **GREEDY}
    assert (await ask(subject, **bias)).text == ""
    shown = await ask(subject, skip_special_tokens=False, **bias)
    assert shown.text == 2 * subject.tokenizer.token_text(subject.special_id) != ""


async def test_every_piece_of_an_answer_can_stop_it(subject):
    """Stop strings that begin and end anywhere, inside of tokens and across several; what is before stays."""
    plain = await ask(subject, max_new_tokens=24, **GREEDY)
    text, draw = plain.text, random.Random(2)
    stops = {text[a:b] for a in range(len(text)) for b in (a + 1, a + 2, a + 3, a + 5, a + 9) if b <= len(text)}
    stops = sorted(stop for stop in stops if "\ufffd" not in stop)
    for stop in draw.sample(stops, min(40, len(stops))):
        answer = await ask(subject, max_new_tokens=24, stop=(stop, "never in there"), **GREEDY)
        assert answer.text == text[: text.index(stop)]
        assert (answer.end.reason, answer.end.stop) == ("stop", stop)
        assert answer.only == plain.only[: len(answer.only)]
        before = subject.tokenizer.decode(answer.only[:-1])
        assert stop not in before, "it went on past the stop string"


@pytest.mark.parametrize("skip", [True, False])
async def test_a_special_token_that_is_a_stop_string_stops_an_answer(subject, skip):
    """Also where its text is left out, and EOS is to be ignored."""
    for special in (subject.special_id, subject.eos_id):
        stop = subject.tokenizer.token_text(special)
        events = generate_deltas(
            subject.engine, subject.tokenizer,
            make_job(
                subject, logit_bias={special: 100}, stop=stop, ignore_eos=True, skip_special_tokens=skip, **GREEDY
            ),
        )  # fmt: skip
        delta, end = [event async for event in events]
        assert (delta.ids, delta.text) == ((special,), "")
        assert (end.reason, end.stop, end.tokens) == ("stop", stop, 1)


# -- grammars ---------------------------------------------------------------------------------------------------------

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


# -- logprobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        {**FREE, "seed": 3},
        {"seed": 4, "repetition_penalty": 1.3},
        {**GREEDY, "response_format": {"type": "regex", "pattern": "[a-z0-9]{12}"}},
    ],
    ids=str,
)
async def test_logprobs_are_the_models_own(subject, params):
    if params.keys() & REFUSED[subject.name].keys():
        pytest.skip("refused by this engine, as the table says")
    answer = await ask(subject, logprobs=True, top_logprobs=4, **params)
    ids = answer.only
    assert [each.id for each in answer.logprobs[0]] == ids
    truth = subject.logits(answer.job.prompt_ids, ids)
    for place, each in enumerate(answer.logprobs[0]):
        expected = log_softmax(truth[place])
        assert each.logprob == pytest.approx(expected[each.id], abs=2 * subject.tolerance)
        assert each.token == subject.tokenizer.token_text(each.id)
        assert [top.logprob for top in each.top] == pytest.approx(
            sorted(expected, reverse=True)[:4], abs=2 * subject.tolerance
        )
        assert all(top.logprob == pytest.approx(expected[top.id], abs=2 * subject.tolerance) for top in each.top)


async def test_no_logprobs_unless_asked_for(subject):
    assert (await ask(subject)).logprobs == {0: []}
    assert all(not each.top for each in (await ask(subject, logprobs=True)).logprobs[0])


# -- taking over ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        {**FREE, "seed": 11},
        {"seed": 12, "min_p": 0.02},
        {**GREEDY, "repetition_penalty": 1.4},
        {**FREE, "seed": 13, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {**GREEDY, "min_tokens": 12, "logit_bias": {60: 100}, "stop_token_ids": (60,)},
        {**GREEDY, "logprobs": True},
    ],
    ids=str,
)
async def test_a_choice_continues_from_every_cut(subject, params):
    job = make_job(subject, **params)
    whole = await run(subject, job)
    how = continuation(subject.name, job.params)
    cuts = [event.index for event in whole.events if isinstance(event, Delta)]
    same = 0
    for cut in cuts:
        log = [event for event in whole.events if isinstance(event, Delta) and event.index < cut]
        delivered = DeliveredChoice(tuple(whole.only[:cut]), "".join(delta.text for delta in log))
        again = await run(subject, replace(job, attempt=2, delivered={0: delivered}))
        assert again.only[:cut] == whole.only[:cut]
        assert len(again.only) <= job.max_new_tokens
        same += again.only[cut : cut + 1] == whole.only[cut : cut + 1]
        if how == "exact" and subject.is_wide and (subject.is_exact or job.params.is_greedy is False):
            assert (again.only, again.text, again.end) == (whole.only, whole.text, whole.end)
        elif how == "exact" and job.params.is_greedy:
            assert_greedy(subject, job, again.only)
    # In 16 bits a draw now and then falls between what prefill and decode compute; other noise would agree by chance.
    assert how != "exact" or same >= 0.9 * len(cuts)


async def test_a_stop_string_across_the_cut_is_found(subject):
    plain = await ask(subject, max_new_tokens=24, **GREEDY)
    text = plain.text
    places = [
        i for i in range(4, len(text) - 6) if "\ufffd" not in text[i : i + 6] and text.index(text[i : i + 6]) == i
    ]
    for place in places[:: max(1, len(places) // 8)]:
        job = make_job(subject, max_new_tokens=24, stop=(text[place : place + 6],), **GREEDY)
        whole = await run(subject, job)
        deltas = [event for event in whole.events if isinstance(event, Delta)]
        for count in range(len(deltas)):
            ids = tuple(i for delta in deltas[:count] for i in delta.ids)
            delivered = DeliveredChoice(ids, "".join(delta.text for delta in deltas[:count]))
            again = await run(subject, replace(job, attempt=2, delivered={0: delivered}))
            assert (again.text, again.end.stop) == (whole.text, whole.end.stop)


# -- aborts, neighbours, load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_stops_the_generation_within_a_step_or_two(subject, n):
    engine = subject.engine
    job = make_job(subject, n=n, max_new_tokens=400, ignore_eos=True)
    async with aclosing(generate_deltas(engine, subject.tokenizer, job)) as events:
        seen = set()
        async for event in events:
            seen.add(event.choice)
            if len(seen) == n:
                break
        assert engine.running == n
    steps = engine.steps
    await until(lambda: engine.running == 0)
    assert engine.steps <= steps + 2


async def test_neighbours_do_not_notice_an_abort(subject):
    expected = await ask(subject, seed=21, max_new_tokens=40, ignore_eos=True, **FREE)
    reading = asyncio.create_task(ask(subject, job_id="stays", seed=21, max_new_tokens=40, ignore_eos=True, **FREE))
    for i in range(5):
        job = make_job(subject, TEXTS[i], job_id=f"leaves{i}", max_new_tokens=200, ignore_eos=True)
        async with aclosing(generate_deltas(subject.engine, subject.tokenizer, job)) as events:
            await anext(events)
    assert (await reading).only == expected.only
    await until(lambda: subject.engine.running == 0)


async def test_more_requests_than_slots_are_all_answered_and_some_leave_while_they_wait(subject):
    slots = subject.engine.info.slots
    jobs = [make_job(subject, TEXTS[i % 5], job_id=f"j{i}", **GREEDY) for i in range(3 * slots)]
    tasks = [asyncio.create_task(run(subject, job)) for job in jobs]
    await until(lambda: subject.engine.running > 0)
    assert subject.engine.running <= slots
    tasks[-1].cancel()
    *answers, left = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(left, asyncio.CancelledError)
    for job, answer in zip(jobs, answers, strict=False):
        assert_greedy(subject, job, answer.only)
    await until(lambda: subject.engine.running == 0)


async def test_a_slow_reader_gets_what_waits_at_once(subject):
    engine, lengths = subject.engine, []
    job = make_job(subject, max_new_tokens=60, ignore_eos=True, **GREEDY)
    async with aclosing(generate_deltas(engine, subject.tokenizer, job)) as events:
        async for event in events:
            if isinstance(event, Delta):
                lengths.append(len(event.ids))
                steps = engine.steps
                await until(lambda: engine.running == 0 or engine.steps >= steps + 10)  # noqa: B023
    assert sum(lengths) == 60
    assert max(lengths) >= 5


async def test_progress_shows(subject):
    steps = subject.engine.steps
    await ask(subject, max_new_tokens=10, ignore_eos=True)
    assert subject.engine.steps >= steps + 9
    await subject.engine.check()


async def test_an_unknown_adapter_is_refused_by_name(subject):
    with pytest.raises(InvalidRequest, match="nobody") as raised:
        await run(subject, replace(make_job(subject), adapter="nobody"))
    assert (raised.value.code, raised.value.details["param"]) == ("unknown_adapter", "adapter")
    assert (await ask(subject)).end.reason


async def test_what_the_context_can_not_hold_is_refused_before_anything_is_computed(subject):
    job, room, steps = make_job(subject), subject.engine.info.context_tokens, subject.engine.steps
    for prompt_tokens, new in ((room + 5, 1), (room - 3, 4), (2, room - 1)):
        asked = replace(job, prompt_ids=(40,) * prompt_tokens, max_new_tokens=new)
        with pytest.raises(ContextLengthExceeded) as raised:
            await run(subject, asked)
        assert raised.value.details["context_tokens"] == room
    assert (subject.engine.running, subject.engine.steps) == (0, steps)


# -- the table --------------------------------------------------------------------------------------------------------


def used(param):
    """A request that uses ``param`` and nothing else out of the ordinary."""
    values = {
        "num_beams": 2, "length_penalty": 2.0, "response_format": {"type": "json_object"}, "repetition_penalty": 3.0,
    }  # fmt: skip
    return GenerationParams(**{param: values[param]})


async def test_what_the_table_refuses_is_refused_by_name(subject):
    for param, refusal in REFUSED[subject.name].items():
        with pytest.raises(InvalidRequest) as raised:
            check_supported(subject.name, used(param))
        assert (raised.value.code, raised.value.details["param"]) == ("unsupported_parameter", param)
        assert refusal.reason in str(raised.value)
        assert raised.value.hint


@pytest.mark.parametrize("name", ENGINES)
async def test_the_table_is_whole(name):
    assert set(REFUSED[name]) | set(CONTINUATION[name]) <= set(PARAMETERS)
    assert all(refusal.above is not None for param, refusal in REFUSED[name].items() if param in CORE)
    assert all(refusal.source for refusal in REFUSED[name].values())
    check_supported(name, GenerationParams())
    assert continuation(name, GenerationParams(do_sample=False)) == "exact"
    assert continuation(name, GenerationParams()) == "valid"  # no seed: another fair sample


def random_params(draw, refused):
    """Any of the parameters that the table doesn't refuse this engine, together."""
    length = draw.randint(1, 24)
    choices = {
        "do_sample": lambda: draw.random() < 0.8,
        "temperature": lambda: draw.choice([0, 0.3, 1, 1.7]),
        "top_p": lambda: draw.choice([0.05, 0.5, 1]),
        "top_k": lambda: draw.choice([-1, 0, 1, 7, 10_000]),
        "min_p": lambda: draw.choice([0.0, 0.1, 1.0]),
        "min_tokens": lambda: draw.randint(0, length),
        "repetition_penalty": lambda: draw.choice([0.7, 1.2, 2.0]),
        "presence_penalty": lambda: draw.uniform(-2, 2),
        "frequency_penalty": lambda: draw.uniform(-2, 2),
        "logit_bias": lambda: {draw.randrange(40, 100): draw.uniform(-100, 100) for _ in range(3)},
        "logprobs": lambda: True,
        "top_logprobs": lambda: draw.randint(1, 5),
        "stop": lambda: tuple(draw.choices(["a", "e", " t", "the", "\n", "é", "ing"], k=2)),
        "stop_token_ids": lambda: (draw.randrange(40, 100),),
        "ignore_eos": lambda: draw.random() < 0.5,
        "n": lambda: draw.randint(1, 3),
        "skip_special_tokens": lambda: draw.random() < 0.5,
        "num_beams": lambda: draw.randint(2, 4),
        "length_penalty": lambda: draw.choice([-1.0, 0.0, 2.0]),
        "response_format": lambda: draw.choice(
            [{"type": "json_object"}, {"type": "regex", "pattern": "[a-z]{1,9}( [a-z]+){2}"}]
        ),
    }
    assert choices.keys() == set(PARAMETERS) - {"seed", "max_new_tokens", "max_length"}  # these come from elsewhere
    possible = [name for name in sorted(choices) if name not in refused or refused[name].above is not None]
    params = {name: choices[name]() for name in draw.sample(possible, draw.randint(0, 7))}
    if "length_penalty" in params:
        params.setdefault("num_beams", 2)
    if "num_beams" in params:
        params["n"] = min(params.get("n", 1), params["num_beams"])
    if "top_logprobs" in params:
        params["logprobs"] = True
    return {"max_new_tokens": length, "seed": draw.randrange(2**63), **params}


@pytest.mark.parametrize("batch", range(10))
async def test_any_mixture_of_parameters_together(subject, batch):
    """200 requests, 20 at a time; every answer holds what `Answer` checks, greedy ones follow the model."""
    draw = random.Random(batch)
    jobs = [
        make_job(subject, draw.choice(TEXTS), job_id=f"mix{i}", **random_params(draw, REFUSED[subject.name]))
        for i in range(20)
    ]
    answers = await asyncio.gather(*(run(subject, job) for job in jobs))
    for job, answer in zip(jobs, answers, strict=True):
        assert sorted(answer.ends) == list(range(job.params.n))
        for choice, ids in answer.ids.items():
            assert len(answer.logprobs.get(choice, ())) == (len(ids) if job.params.logprobs else 0)
            assert all(len(each.top) == job.params.top_logprobs for each in answer.logprobs.get(choice, ()))
            is_free = job.params.num_beams == 1 and job.params.response_format.type == "text"
            if job.params.is_greedy and is_free:
                assert_greedy(subject, job, ids)
    await until(lambda: subject.engine.running == 0)

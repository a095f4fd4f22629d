"""Where an answer ends: its length, EOS, stop tokens and strings."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.contract.engine.asking import GREEDY, ask, assert_greedy, make_job, run
from tokenfleet.engines.generation import generate_deltas

pytestmark = pytest.mark.asyncio(loop_scope="session")


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


async def test_an_end_that_the_model_has_no_token_for_ends_nothing(subject):
    job = make_job(subject, min_tokens=5, logit_bias={subject.eos_id: 100}, **GREEDY)
    beyond = job.eos_ids | {subject.engine.info.vocab_size + 5}
    answer = await run(subject, replace(job, eos_ids=beyond))
    assert answer.only[5:] == [subject.eos_id]


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

"""Going on with what another attempt has delivered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.contract.engine.asking import FREE, GREEDY, ask, assert_greedy, make_job, run
from tokenfleet.engines.choice import DeliveredChoice
from tokenfleet.engines.support import continuation
from tokenfleet.wire.events import Delta

pytestmark = pytest.mark.asyncio(loop_scope="session")


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

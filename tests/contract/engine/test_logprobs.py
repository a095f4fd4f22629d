"""The probabilities that an answer comes with."""

from __future__ import annotations

import pytest

from tests.contract.engine.asking import FREE, GREEDY, ask
from tests.contract.reference import log_softmax
from tokenfleet.wire.support import REFUSED

pytestmark = pytest.mark.asyncio(loop_scope="session")


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

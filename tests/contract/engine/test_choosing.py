"""Which tokens are chosen: greedy, by the distribution asked for, by penalties and biases, by seeds."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.contract.engine.asking import FREE, GREEDY, TEXTS, ask, assert_greedy, by_rank
from tests.contract.reference import chi_square, improbable, probabilities, processed

pytestmark = pytest.mark.asyncio(loop_scope="session")


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

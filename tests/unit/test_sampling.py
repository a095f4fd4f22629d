"""Sampling on its own: logits in, ids out. What a whole engine does with it is tests/contract/test_transformers.py."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from tokenfleet.engines.transformers_engine.sampling import BatchSampler, SamplingState, uniform
from tokenfleet.wire.chat import GenerationParams

VOCAB = 12
PLAIN = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}


def logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def state(seed: int = 0, prompt: tuple[int, ...] = (), ids: tuple[int, ...] = (), stops=(), **params) -> SamplingState:
    return SamplingState(GenerationParams(**params), seed, prompt, list(ids), frozenset(stops))


def draws(row: torch.Tensor, count: int, **params) -> list[int]:
    """``count`` independent draws from the same logits."""
    sampler = BatchSampler([state(seed, **params) for seed in range(count)], row.shape[-1])
    return [drawn.id for drawn in sampler(row.expand(count, -1))]


def expected_by_transformers(row: torch.Tensor, params: dict) -> torch.Tensor:
    """The distribution that transformers' own processors give, in generate()'s order."""
    chain = [hf.TemperatureLogitsWarper(params.get("temperature", 0.95))]
    if params.get("top_k", 50) > 0:
        chain.append(hf.TopKLogitsWarper(params.get("top_k", 50)))
    if params.get("top_p", 0.7) < 1:
        chain.append(hf.TopPLogitsWarper(params.get("top_p", 0.7)))
    if params.get("min_p", 0) > 0:
        chain.append(hf.MinPLogitsWarper(params["min_p"]))
    scores = row
    for warper in chain:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return scores.softmax(-1)[0]


def chi_square_p(counts: list[int], expected: torch.Tensor) -> float:
    """The chance of counts at least this far from ``expected`` (Wilson-Hilferty's approximation)."""
    total = sum(counts)
    cells = [(count, total * p) for count, p in zip(counts, expected.tolist(), strict=True) if p > 0]
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 1 - statistics.NormalDist().cdf(z)


@pytest.mark.parametrize(
    "params",
    [
        {**PLAIN},
        {**PLAIN, "temperature": 0.5},
        {**PLAIN, "temperature": 3.0},
        {**PLAIN, "top_k": 4},
        {**PLAIN, "top_p": 0.8},
        {**PLAIN, "min_p": 0.2},
        {**PLAIN, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
        {},  # the defaults: temperature 0.95, top_k 50 (above this vocabulary), top_p 0.7
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_transformers_own_processors(params):
    row, count = logits(seed=3), 4000
    expected = expected_by_transformers(row, params)
    counts = torch.bincount(torch.tensor(draws(row, count, **params)), minlength=VOCAB).tolist()
    assert all(n == 0 for n, p in zip(counts, expected.tolist(), strict=True) if p == 0)
    assert chi_square_p(counts, expected) > 1e-3


@pytest.mark.parametrize("params", [{"do_sample": False}, {"temperature": 0}, {**PLAIN, "top_k": 1}], ids=str)
def test_greedy_takes_the_largest(params):
    rows = logits(50, vocab=1000)
    sampler = BatchSampler([state(i, **params) for i in range(50)], 1000)
    assert [drawn.id for drawn in sampler(rows)] == rows.argmax(-1).tolist()


def test_a_nucleus_wider_than_the_first_look_is_drawn_from_in_full():
    row = torch.zeros(1, 4096)  # flat: half of the mass is 2048 ids, far more than the 256 looked at first
    drawn = draws(row, 2000, temperature=1.0, top_k=0, top_p=0.5)
    assert len(set(drawn)) > 900


def test_a_draw_depends_on_seed_and_index_alone():
    rows = logits(8, vocab=500)
    states = [state(seed=row, ids=(5,) * row, temperature=1.3, top_k=0, top_p=1.0) for row in range(8)]
    together = [drawn.id for drawn in BatchSampler(states, 500)(rows)]
    alone = [BatchSampler([one], 500)(rows[row : row + 1])[0].id for row, one in enumerate(states)]
    assert together == alone
    mixed = [*states[::-1], state(seed=99), state(do_sample=False)]
    shuffled = BatchSampler(mixed, 500)(torch.cat([rows.flip(0), logits(2, seed=9, vocab=500)]))
    assert [drawn.id for drawn in shuffled[:8]][::-1] == together


def test_random_numbers_are_uniform_and_differ_by_seed_and_by_index():
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    tenths = torch.histc(torch.tensor(numbers), 10, 0, 1).tolist()
    assert chi_square_p([int(n) for n in tenths], torch.full((10,), 0.1)) > 1e-3
    assert uniform(2**63 - 1, 10**9) == uniform(2**63 - 1, 10**9)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=20), st.lists(st.integers(0, VOCAB - 1), max_size=20))
def test_repetition_penalty_is_transformers_own(prompt, ids):
    row = logits(seed=len(prompt) + 31 * len(ids))
    mine = BatchSampler([state(prompt=tuple(prompt), ids=tuple(ids), repetition_penalty=1.7)], VOCAB).scores(row)
    seen = torch.tensor([prompt + ids], dtype=torch.long)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.7)(seen, row) if seen.numel() else row
    assert torch.allclose(mine, theirs)


def test_presence_and_frequency_count_the_answer_but_not_the_prompt():
    row = torch.zeros(1, VOCAB)
    one = state(prompt=(1, 1, 1), ids=(2, 2, 2, 3), presence_penalty=0.5, frequency_penalty=0.25)
    assert BatchSampler([one], VOCAB).scores(row)[0].tolist() == [0, 0, -1.25, -0.75] + [0] * 8


def test_penalties_see_tokens_appended_after_the_sampler_was_built():
    one = state(do_sample=False, frequency_penalty=2)
    sampler, row, taken = BatchSampler([one], 3), torch.tensor([[1.0, 0.5, 0.0]]), []
    for _ in range(4):
        one.ids.append(sampler(row)[0].id)
        taken.append(one.ids[-1])
    assert taken == [0, 1, 2, 0]


def test_bias_bars_and_forces():
    row = logits(seed=4)
    best = int(row.argmax())
    barred = BatchSampler([state(do_sample=False, logit_bias={best: -100})], VOCAB)(row)[0].id
    forced = BatchSampler([state(**PLAIN, logit_bias={7: 100})], VOCAB)(row)[0].id
    assert barred != best
    assert forced == 7


def test_min_tokens_bars_stops_until_they_are_out():
    row = torch.zeros(1, VOCAB)
    row[0, 5] = 9
    for done, is_barred in ((0, True), (2, True), (3, False), (4, False)):
        one = state(ids=(1,) * done, stops=(5,), do_sample=False, min_tokens=3)
        assert (BatchSampler([one], VOCAB)(row)[0].id != 5) is is_barred


def test_logprobs_are_of_the_models_own_distribution():
    row = logits(seed=5)
    one = state(logprobs=True, top_logprobs=3, do_sample=False, temperature=0.1, logit_bias={2: 100})
    other = state(do_sample=False)
    with_logprob, without = BatchSampler([one, other], VOCAB)(row.expand(2, -1))
    raw = row.log_softmax(-1)[0]
    assert without.logprob is None
    assert with_logprob.id == with_logprob.logprob.id == 2
    assert with_logprob.logprob.logprob == pytest.approx(raw[2].item(), abs=1e-6)
    best = raw.topk(3)
    assert [token for token, _ in with_logprob.logprob.top] == best.indices.tolist()
    assert [value for _, value in with_logprob.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_a_row_that_is_no_number_is_told_apart_and_spares_its_neighbours():
    rows = logits(3, seed=6)
    rows[1] = math.nan
    states = [state(1, **PLAIN, logprobs=True), state(2, **PLAIN, logprobs=True), state(3)]
    drawn = BatchSampler(states, VOCAB)(rows)
    assert drawn[1].id == -1
    alone = BatchSampler([states[0]], VOCAB)(rows[:1])[0].id
    assert drawn[0].id == alone
    assert drawn[2].id >= 0


def test_a_grammar_wins_over_what_else_is_asked():
    class OnlyFour:
        def mask(self):
            return torch.arange(VOCAB) == 4

        def accept(self, token_id):
            pass

    one = state(stops=(4,), min_tokens=3, **PLAIN)
    one.grammar = OnlyFour()
    assert BatchSampler([one], VOCAB)(logits())[0].id == 4


any_params = st.fixed_dictionaries(
    {},
    optional={
        "do_sample": st.booleans(),
        "temperature": st.one_of(st.just(0), st.floats(1e-9, 100)),
        "top_k": st.integers(-1, 40),
        "top_p": st.floats(1e-6, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.1, 10),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100)),
        "min_tokens": st.integers(0, 5),
        "logprobs": st.just(True),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(any_params, min_size=1, max_size=5),
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10),
)
def test_any_mixture_gives_an_id_that_each_row_allows(mixture, ids, seed, logit_seed):
    rows = logits(len(mixture), seed=logit_seed)
    rows[:, 3] = -math.inf  # as some models give for ids they never use
    states = [state(seed, (1, 2), tuple(ids), stops=(0,), **params) for params in mixture]
    sampler = BatchSampler(states, VOCAB)
    scores = sampler.scores(rows)
    for row, drawn in enumerate(sampler(rows)):
        assert 0 <= drawn.id < VOCAB
        assert scores[row, drawn.id] > -math.inf
        assert (drawn.logprob is not None) is states[row].params.logprobs

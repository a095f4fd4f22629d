"""The table of refused parameters, and random mixtures of all that is not refused."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.contract.engine.asking import TEXTS, assert_greedy, make_job, run, until
from tokenfleet.engines.support import CONTINUATION, continuation
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.support import CORE, ENGINES, PARAMETERS, REFUSED, check_supported

pytestmark = pytest.mark.asyncio(loop_scope="session")


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

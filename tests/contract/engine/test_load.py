"""Aborts, neighbours, full slots, slow readers; what is refused before anything is computed."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from tests.contract.engine.asking import FREE, GREEDY, TEXTS, ask, assert_greedy, make_job, run, until
from tests.processes import once_in
from tokenfleet.engines.generation import generate_deltas
from tokenfleet.wire.errors import ContextLengthExceeded, InvalidRequest
from tokenfleet.wire.events import Delta

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("n", [1, 4])
@once_in(3)
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

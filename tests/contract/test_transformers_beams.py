"""Beam search in the transformers engine: what `generate(num_beams=...)` finds, among other requests."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
import pytest_asyncio

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.contract import small_models  # noqa: E402
from tests.contract.transformers_runs import answer, assert_best, prompt, sequence, started, until  # noqa: E402
from tests.processes import once_in  # noqa: E402
from tokenfleet.engines.choice import DeliveredChoice  # noqa: E402
from tokenfleet.engines.generation import GenerationJob, generate_deltas  # noqa: E402
from tokenfleet.engines.hf_tokenizer import HFTokenizer  # noqa: E402
from tokenfleet.wire.chat import GenerationParams  # noqa: E402
from tokenfleet.wire.errors import ContextLengthExceeded, InvalidRequest  # noqa: E402
from tokenfleet.wire.events import ChoiceFinished  # noqa: E402

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

GREEDY = {"do_sample": False}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = small_models.save("llama", folder)
    async with started(folder, max_batch_size=12, prefill_chunk_tokens=16) as engine:
        yield engine, model


def by_transformers(model, ids, new, eos=(), **params):
    """The texts that transformers finds, best first, each up to its end."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=new,
            eos_token_id=list(eos) or -1, pad_token_id=0, **{"do_sample": False, **params},
        )  # fmt: skip
    found = []
    for row in out[:, len(ids) :].tolist():
        end = next((place for place, token in enumerate(row) if token in eos), len(row) - 1)
        found.append(row[: end + 1])
    return found


CASES = [
    {"num_beams": 2},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "repetition_penalty": 1.7},
    {"num_beams": 3, "min_new_tokens": 9},
    {"num_beams": 7},
]


@pytest.mark.parametrize("params", CASES, ids=str)
async def test_beams_find_what_transformers_finds(llama, params):
    """Prompts that end at different steps and at the length, together in one engine with chats that aren't searched."""
    engine, model = llama
    ours = {("min_tokens" if name == "min_new_tokens" else name): value for name, value in params.items()}
    eos = tuple(range(20, 100))  # a random model meets them soon
    wanted = [sequence(prompt(5 + 9 * i, i), new=14, eos=eos[: 40 * (i % 3)], **GREEDY, **ours) for i in range(6)]
    chats = [sequence(prompt(11 + i, i), new=20, **GREEDY) for i in range(3)]
    answers = await asyncio.gather(*(answer(engine, each) for each in (*wanted, *chats)))
    reasons = set()
    for each, (ids, reason) in zip(wanted, answers, strict=False):
        assert [ids] == by_transformers(model, each.prompt_ids, 14, each.eos_ids, **params)
        assert reason == ("stop" if ids[-1] in each.eos_ids else "length")
        reasons.add(reason)
    assert "length" in reasons
    assert "stop" in reasons or params.get("length_penalty") == 2.0  # which hardly ever takes a short text
    for each, (ids, _) in zip(chats, answers[6:], strict=True):
        assert_best(model, each.prompt_ids, ids)
    assert (engine.running, engine.held_tokens) == (0, 0)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "bloom"])
async def test_beams_trade_caches_in_any_family(tmp_path, family):
    """Sliding windows, learned positions, ALiBi."""
    model = small_models.save(family, tmp_path)
    async with started(tmp_path) as engine:
        ids, _ = await answer(engine, sequence(prompt(20), new=16, num_beams=4, **GREEDY))
        assert [ids] == by_transformers(model, prompt(20), 16, num_beams=4)


def job(engine, params, **kwargs):
    params = GenerationParams(**{"max_new_tokens": 12, "num_beams": 4, **params})
    return GenerationJob("j", 1, tuple(prompt(9)), params, params.max_new_tokens, **kwargs)


async def events_of(engine, asked):
    return [event async for event in generate_deltas(engine, HFTokenizer(engine.tokenizer), asked)]


async def test_choices_are_the_texts_of_one_search_best_first(llama):
    engine, model = llama
    steps = engine.steps
    events = await events_of(engine, job(engine, {"n": 3, **GREEDY}))
    assert engine.steps - steps < 20, "each choice was searched by itself"
    found = {event.choice: list(event.ids) for event in events if not isinstance(event, ChoiceFinished)}
    assert [found[i] for i in range(3)] == by_transformers(model, prompt(9), 12, num_beams=4, num_return_sequences=3)
    assert len(events) == 6, "a choice is delivered whole, or it could not begin anew elsewhere"


async def test_stop_strings_and_logprobs_are_those_of_the_text_that_won(llama):
    engine, model = llama
    [delta, _] = await events_of(engine, job(engine, {"logprobs": True, "top_logprobs": 2, **GREEDY}))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt(9), *delta.ids]])).logits[0, 8:-1].log_softmax(-1)
    for row, told in zip(logits, delta.logprobs, strict=True):
        assert told.logprob == pytest.approx(row[told.id].item(), abs=1e-3)
        assert [top.logprob for top in told.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    text = delta.text
    place = next(i for i in range(len(text) // 2, len(text)) if "\ufffd" not in text[i : i + 3])
    stop = text[place : place + 3]
    [cut, end] = await events_of(engine, job(engine, {"stop": [stop], **GREEDY}))
    assert (cut.text, end.reason, end.stop) == (text[: text.index(stop)], "stop", stop)


async def test_beams_follow_their_grammar(llama):
    engine, _ = llama
    form = {"type": "regex", "pattern": "[0-9]{3}-(ab|cd)"}
    for params in (GREEDY, {"seed": 3, "temperature": 1.5}):
        events = await events_of(engine, job(engine, {"response_format": form, "max_new_tokens": 30, **params}))
        text = events[0].text
        assert text[:3].isdigit()
        assert text[3:] in ("-ab", "-cd")


async def test_sampled_beams_are_drawn_as_transformers_draws_them(llama):
    """Two samples of 600 texts of two tokens each, compared by chi-square. Ours are seeded, so it never flickers."""
    engine, model = llama
    params = {"num_beams": 2, "top_k": 3, "top_p": 1.0, "temperature": 1.3}
    torch.manual_seed(1)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt(9)] * 600), do_sample=True, max_new_tokens=2, eos_token_id=-1, pad_token_id=0,
            attention_mask=torch.ones(600, 9, dtype=torch.long), **params,
        )  # fmt: skip
    theirs = Counter(tuple(row) for row in out[:, 9:].tolist())
    wanted = [sequence(prompt(9), new=2, seed=seed, **params) for seed in range(600)]
    ours = Counter(tuple(ids) for ids, _ in await asyncio.gather(*(answer(engine, each) for each in wanted)))
    cells = [text for text in theirs | ours if theirs[text] + ours[text] >= 10]
    assert len(cells) >= 4
    assert sum(theirs[text] + ours[text] for text in cells) > 1100
    statistic = sum((theirs[text] - ours[text]) ** 2 / (theirs[text] + ours[text]) for text in cells)
    assert statistic < len(cells) + 4 * (2 * len(cells)) ** 0.5
    again = await answer(engine, wanted[5])
    assert again == await answer(engine, replace(wanted[5], sequence_id="elsewhere"))


async def test_a_search_that_lost_its_worker_begins_anew_and_comes_to_the_same(llama):
    engine, _ = llama
    for params in (GREEDY, {"seed": 8}):
        asked = job(engine, {"n": 2, **params})
        events = await events_of(engine, asked)
        assert await events_of(engine, replace(asked, attempt=2)) == events
        whole = {event.choice: event for event in events if not isinstance(event, ChoiceFinished)}
        ends = {event.choice: event for event in events if isinstance(event, ChoiceFinished)}
        delivered = {0: DeliveredChoice(whole[0].ids, whole[0].text)}  # its end was not stored any more
        again = await events_of(engine, replace(asked, attempt=2, delivered=delivered))
        assert sorted(again, key=lambda event: (event.choice, type(event).__name__)) == [ends[0], ends[1], whole[1]]


@once_in(3)
async def test_leaving_ends_a_search_and_frees_its_slots(llama):
    engine, _ = llama
    events = generate_deltas(engine, HFTokenizer(engine.tokenizer), job(engine, {"n": 2, "max_new_tokens": 400}))
    reading = asyncio.create_task(anext(events))
    await until(lambda: engine.running == 4)
    steps = engine.steps
    await until(lambda: engine.steps > steps)
    steps = engine.steps
    reading.cancel()
    await asyncio.wait([reading])
    await events.aclose()
    await until(lambda: engine.running == 0)
    assert engine.steps <= steps + 2
    assert engine.held_tokens == 0


@pytest.mark.parametrize(
    ("params", "error", "param"),
    [
        ({"length_penalty": 2.0}, InvalidRequest, "length_penalty"),
        ({"num_beams": 2, "n": 3}, InvalidRequest, "n"),
        ({"num_beams": 20}, InvalidRequest, "num_beams"),
    ],
)
async def test_a_search_that_makes_no_sense_is_refused(llama, params, error, param):
    with pytest.raises(error) as raised:
        await answer(llama[0], sequence(prompt(5), **params))
    assert raised.value.details["param"] == param


async def test_a_search_waits_for_room_and_never_takes_more_than_the_budget(tmp_path):
    small_models.save("llama", tmp_path)
    async with started(tmp_path, kv_budget_tokens=8 * 128) as engine:
        with pytest.raises(ContextLengthExceeded):
            await answer(engine, sequence(prompt(100), new=200, num_beams=8))
        wanted = [sequence(prompt(20, i), new=30, num_beams=4, **GREEDY) for i in range(4)]
        tasks = [asyncio.create_task(answer(engine, each)) for each in wanted]
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, engine.held_tokens)
            await asyncio.sleep(0)
        assert 0 < most <= 2 * 8 * 128
        assert {len(ids) for ids, _ in await asyncio.gather(*tasks)} == {30}

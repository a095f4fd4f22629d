"""What only the transformers engine has to show: its batches, on real forward passes of any model and of a trained one.

What every engine must do is in engine/. Memory, adapters, heads, beams, loading: the other test_transformers_*.py.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace

import pytest
import pytest_asyncio

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.contract import small_models  # noqa: E402
from tests.contract.transformers_runs import FREE, GREEDY, answer, assert_best, prompt, sequence, started, until  # noqa: E402
from tests.processes import once_in  # noqa: E402
from tokenfleet.wire.errors import (  # noqa: E402
    ConfigurationError,
    EngineError,
    InvalidRequest,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


# -- any causal model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(small_models.FAMILIES))
async def test_rows_of_a_changing_batch_do_not_touch_one_another(family, tmp_path):
    """Prompts of many lengths join and leave at different steps; each must get what the model alone gives it.
    Sliding windows are 8 tokens and prefill chunks 16, so that all of them cross both."""
    model = small_models.save(family, tmp_path)
    async with started(tmp_path, prefill_chunk_tokens=16) as engine:

        async def one(place, length, new):
            await until(lambda: engine.steps >= 3 * place)
            return await answer(engine, sequence(prompt(length, place), new=new, **GREEDY))

        wanted = [(5, 60), (40, 20), (1, 33), (17, 12), (60, 40), (3, 50), (33, 5), (8, 30), (21, 25), (64, 24)]
        base = engine.steps
        assert base == 0
        answers = await asyncio.gather(*(one(place, *pair) for place, pair in enumerate(wanted)))
        for place, ((length, new), (ids, reason)) in enumerate(zip(wanted, answers, strict=True)):
            assert (len(ids), reason) == (new, "length")
            assert_best(model, prompt(length, place), ids)
        assert (engine.running, engine.held_tokens) == (0, 0)


async def test_a_model_that_can_not_join_a_batch_is_refused(tmp_path):
    small_models.save_stateful(tmp_path)
    with pytest.raises(ConfigurationError, match="can't batch"):
        async with started(tmp_path):
            pass


# -- SmolLM2: a trained model, as users run it ------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?", "Count from one to ten.", "Who wrote Hamlet?", "Name three colours.",
    "What is 2 + 2?", "Write a haiku about rain.", "Why is the sky blue?", "Tell me a joke.",
    "What do bees make?", "Say hello in Spanish.", "What is water made of?", "Name a planet with rings.",
    "How many legs has a spider?", "What is the opposite of hot?", "Where do penguins live?", "Write one word.",
]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def smol():
    async with started("smollm2-135m-instruct", max_batch_size=16) as engine:
        yield engine


def chat(engine, text, **kwargs):
    messages = [{"role": "user", "content": text}]
    ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return sequence(ids, eos=engine.info.eos_ids, **kwargs)


async def test_sixteen_chats_of_mixed_lengths_follow_plain_transformers(smol):
    folder = small_models.folder_of("smollm2-135m-instruct")
    plain = await asyncio.to_thread(transformers.AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
    wanted = [
        chat(smol, f"Here is some text to read: {'la ' * (i * i // 4)}. {text}", new=6 + 2 * i, **GREEDY)
        for i, text in enumerate(QUESTIONS)
    ]
    answers = await asyncio.gather(*(answer(smol, each) for each in wanted))
    clear = 0
    for each, (ids, reason) in zip(wanted, answers, strict=True):
        assert reason == ("stop" if ids[-1] in smol.info.eos_ids else "length")
        clear += assert_best(plain, each.prompt_ids, ids)
    assert clear >= 0.9 * len(wanted), "texts with near-equal tokens show less"
    assert "Paris" in smol.tokenizer.decode((await answer(smol, chat(smol, QUESTIONS[0], **GREEDY)))[0])


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        {**FREE, "seed": 11},
        {"seed": 12, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "min_tokens": 9},
    ],
    ids=str,
)
async def test_a_sampled_answer_continues_exactly_wherever_it_is_cut(smol, params):
    seed = params.get("seed")
    whole = chat(smol, QUESTIONS[5], new=14, **{**params, "seed": seed})
    ids, reason = await answer(smol, whole)
    cuts = [1, 2, 5, len(ids) - 1, len(ids)]
    again = await asyncio.gather(*(answer(smol, replace(whole, delivered_ids=tuple(ids[:cut]))) for cut in cuts))
    assert again == [(ids, reason)] * len(cuts)


@once_in(3)
async def test_a_long_prompt_does_not_hold_up_its_neighbours(smol):
    """Between two prefill chunks all others get a token; a newcomer with a short prompt starts before it too."""
    long = chat(smol, "word " * 800, new=2, **GREEDY)
    got = 0

    async def read_along():
        nonlocal got
        async with aclosing(smol.generate(chat(smol, "Count.", new=200, ignore_eos=True, **GREEDY))) as chunks:
            async for chunk in chunks:
                got += len(chunk.ids)

    reading = asyncio.create_task(read_along())
    try:
        await until(lambda: got >= 2)
        before = got
        late = asyncio.create_task(answer(smol, long))
        await until(lambda: smol.running == 2)
        newcomer = asyncio.create_task(answer(smol, chat(smol, "Hi", new=3, **GREEDY)))
        await newcomer
        is_first = not late.done()
        await late
        assert is_first
        assert got - before >= 800 // 128
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        await until(lambda: smol.running == 0)


@once_in(3)
async def test_the_event_loop_is_never_blocked_for_a_step(smol):
    """While the engine computes, callbacks keep running: far more of them than steps."""
    ticks, reading = 0, asyncio.create_task(answer(smol, chat(smol, "word " * 300, new=10, **GREEDY)))
    steps = smol.steps
    while not reading.done():
        ticks += 1
        await asyncio.sleep(0.005)
    assert ticks > 2 * (smol.steps - steps)


@pytest.mark.parametrize(
    ("wanted", "is_met"),
    [
        (
            {
                "type": "json_schema",
                "json_schema": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
                    "required": ["city", "people"],
                    "additionalProperties": False,
                },
            },
            lambda text: set(json.loads(text)) == {"city", "people"},
        ),
        ({"type": "regex", "pattern": "(yes|no), [0-9]{3}"}, lambda text: text[-5:-3] == ", " and text[-3:].isdigit()),
        ({"type": "grammar", "grammar": 'root ::= "a" [b-d]+ "!"'}, lambda text: text[0] == "a" and text[-1] == "!"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
async def test_answers_follow_their_grammar_and_so_do_continued_ones(smol, wanted, is_met):
    params = {"response_format": wanted, "temperature": 1.5, "top_p": 1.0}
    each = [chat(smol, "A city, please.", new=40, seed=seed, **params) for seed in range(2)]
    for request, (ids, reason) in zip(each, await asyncio.gather(*(answer(smol, one) for one in each)), strict=True):
        text = smol.tokenizer.decode(ids, skip_special_tokens=True)
        assert reason == "length" or is_met(text), text
        cut = len(ids) // 2
        assert await answer(smol, replace(request, delivered_ids=tuple(ids[:cut]))) == (ids, reason)


async def test_a_grammar_that_makes_no_sense_is_refused(smol):
    for wanted in ({"type": "regex", "pattern": "(["}, {"type": "json_schema", "json_schema": {"type": "nonsense"}}):
        with pytest.raises(InvalidRequest, match="response_format"):
            await answer(smol, chat(smol, "x", response_format=wanted))


async def test_a_model_without_a_head_does_not_score(smol):
    with pytest.raises(EngineError, match="head"):
        await smol.score([(1, 2, 3)])

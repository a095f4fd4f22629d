"""What only the transformers engine has to show: its batches, caches, adapters and heads, on real forward passes.

What every engine must do is in engine/.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import time
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace

import psutil
import pytest
import pytest_asyncio

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.contract import small_models  # noqa: E402
from tokenfleet.engines.base import Sequence  # noqa: E402
from tokenfleet.engines.transformers_engine import TransformersEngine, TransformersOptions  # noqa: E402
from tokenfleet.wire.chat import GenerationParams  # noqa: E402
from tokenfleet.wire.errors import (  # noqa: E402
    ConfigurationError,
    ContextLengthExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

GREEDY = {"do_sample": False}
FREE = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}


@asynccontextmanager
async def started(folder, **options):
    options = {"infer_dtype": "float32", "max_batch_size": 8, **options}
    engine = TransformersEngine(TransformersOptions(model_name_or_path=str(folder), **options))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def sequence(ids, *, new=16, seed=None, delivered=(), eos=(), adapter=None, **params):
    params = GenerationParams(max_new_tokens=new, **params)
    return Sequence(
        sequence_id=f"s{id(ids)}",
        prompt_ids=tuple(ids),
        params=params,
        max_new_tokens=new,
        seed=seed,
        delivered_ids=tuple(delivered),
        eos_ids=frozenset(eos),
        adapter=adapter,
    )


async def answer(engine, wanted):
    """All ids of a sequence, delivered ones first, and its finish reason."""
    ids, reason = list(wanted.delivered_ids), None
    async with aclosing(engine.generate(wanted)) as chunks:
        async for chunk in chunks:
            assert reason is None, "a chunk after the last"
            ids += chunk.ids
            reason = chunk.finish_reason
    return ids, reason


async def until(condition, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come to pass"
        await asyncio.sleep(0.002)


def prompt(length, salt=0, vocab=400):
    return [(7 * place + 13 * salt) % (vocab - 10) + 5 for place in range(length)]


def assert_best(model, prompt_ids, ids, tolerance=1e-3):
    """Teacher-forced: every id is within ``tolerance`` of the best logit given its own prefix. Says whether the second
    best was always further off: then there is no other text with this property."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
    gaps = logits.max(-1).values - logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    assert gaps.max().item() <= tolerance
    best, second = logits.topk(2).values.unbind(-1)
    return (best - second).min().item() > tolerance


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
    await until(lambda: got >= 2)
    before = got
    late = asyncio.create_task(answer(smol, long))
    await until(lambda: smol.running == 2)
    newcomer = asyncio.create_task(answer(smol, chat(smol, "Hi", new=3, **GREEDY)))
    await newcomer
    assert not late.done()
    await late
    assert got - before >= 800 // 128
    reading.cancel()
    await asyncio.wait([reading])
    await until(lambda: smol.running == 0)


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


# -- memory, errors, ends ---------------------------------------------------------------------------------------------


async def test_sequences_wait_until_the_budget_has_room(tmp_path):
    model = small_models.save("llama", tmp_path)
    budget = 4 * 256
    async with started(tmp_path, kv_budget_tokens=budget, prefill_chunk_tokens=32) as engine:
        most = 0

        async def watch():
            nonlocal most
            while True:
                most = max(most, engine.held_tokens)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        wanted = [sequence(prompt(length, length), new=40, **GREEDY) for length in (10, 90, 30, 60, 120, 5, 100, 50)]
        answers = await asyncio.gather(*(answer(engine, each) for each in wanted))
        watching.cancel()
        for each, (ids, _) in zip(wanted, answers, strict=True):
            assert_best(model, each.prompt_ids, ids)
        # What joins is for a moment in two places: where it was prefilled and where it goes.
        assert 0 < most <= 2 * budget
        with pytest.raises(ContextLengthExceeded):
            await answer(engine, sequence(prompt(200), new=budget))


async def test_a_request_that_fails_leaves_its_neighbours_alone(tmp_path):
    """A token whose embedding is not a number stands for whatever makes a single row fail."""
    model = small_models.save("llama", tmp_path, poisoned_id=399)
    async with started(tmp_path) as engine:
        for _ in range(3):  # the rows that the bad one leaves behind are used again
            good = [sequence(prompt(9 + 4 * i, i), new=24, **GREEDY) for i in range(5)]
            bad = [
                sequence([4, 399, 5, 6], new=8, **GREEDY),
                sequence([4, 5], new=8, delivered=[7, 399], **GREEDY),
                sequence([4, 5, 10_000]),
                sequence([4], adapter="nobody"),
                sequence([]),
                sequence([4], logit_bias={5000: 1}),
                sequence(prompt(600)),
                sequence([4], num_beams=9),
            ]
            tasks = [asyncio.create_task(answer(engine, each)) for each in (*good, *bad)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            kinds = [type(result) for result in results[5:]]
            assert kinds == [EngineError] * 2 + [InvalidRequest] * 4 + [ContextLengthExceeded, InvalidRequest]
            for each, (ids, _) in zip(good, results[:5], strict=True):
                assert_best(model, each.prompt_ids, ids)
        await until(lambda: engine.running == 0)
        await engine.check()


async def test_a_pass_that_fails_costs_only_the_request_to_blame(tmp_path):
    """Forward passes that raise, in prefill and in decode, with others in the same batch."""
    model = small_models.save("llama", tmp_path)
    async with started(tmp_path) as engine:

        def fail(module, args):
            if (args[0] == 398).any():
                raise RuntimeError("no such luck")

        engine._loaded.model.get_input_embeddings().register_forward_pre_hook(fail)
        good = [sequence(prompt(10 + i, i), new=30, **GREEDY) for i in range(5)]
        in_prefill = sequence([*prompt(10), 398], new=8)
        in_decode = sequence(prompt(12), new=8, logit_bias={398: 100})
        tasks = [asyncio.create_task(answer(engine, each)) for each in (*good[:3], in_prefill, in_decode)]
        await until(lambda: engine.running == 5)
        tasks += [asyncio.create_task(answer(engine, each)) for each in good[3:]]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results[3:5]] == [EngineError] * 2
        for each, (ids, _) in zip(good, results[:3] + results[5:], strict=True):
            assert_best(model, each.prompt_ids, ids)
        await engine.check()
        engine._loaded.model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(EngineError):
            await answer(engine, sequence([5]))
        with pytest.raises(EngineDead):
            await engine.check()


async def test_for_want_of_memory_the_largest_request_fails_and_the_others_go_on(tmp_path):
    model = small_models.save("llama", tmp_path)
    async with started(tmp_path) as engine:
        is_full = True

        def fail(module, args):
            nonlocal is_full
            if is_full and args[0].shape == (3, 1):
                is_full = False
                raise torch.OutOfMemoryError("no room for three rows")

        engine._loaded.model.get_input_embeddings().register_forward_pre_hook(fail)
        wanted = [sequence(prompt(9 + i, i), new=new, **GREEDY) for i, new in enumerate((20, 90, 25))]
        small, large, other = await asyncio.gather(*(answer(engine, each) for each in wanted), return_exceptions=True)
        assert not is_full
        assert (type(large), large.code) == (EngineError, "out_of_memory")
        for each, (ids, _) in ((wanted[0], small), (wanted[2], other)):
            assert len(ids) == each.max_new_tokens
            assert_best(model, each.prompt_ids, ids)
        await engine.check()


@contextmanager
def at_most_more_memory(limit_bytes):
    """This process gets no more address space than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


async def test_a_request_that_finds_no_memory_fails_alone_and_gives_back_what_it_had(tmp_path):
    """The allocator's own refusal: with the long row all sixteen would take half a gigabyte, in eight pieces."""
    model = small_models.save_large_cache(tmp_path)
    async with started(tmp_path, max_batch_size=16, kv_budget_tokens=200_000) as engine:
        good = [sequence(prompt(10 + i, i), new=30, **GREEDY) for i in range(14)]
        tasks = [asyncio.create_task(answer(engine, each)) for each in good]
        await until(lambda: engine.running == 14)
        with at_most_more_memory(280 << 20):
            with pytest.raises(EngineError) as failed:
                await answer(engine, sequence(prompt(1000), new=8, **GREEDY))
            results = await asyncio.gather(*tasks)
        assert failed.value.code == "out_of_memory"
        assert "allocate memory" in str(failed.value.__cause__)
        for each, (ids, _) in zip(good, results, strict=True):
            assert len(ids) == 30
            assert_best(model, each.prompt_ids, ids)
        await engine.check()


async def test_closing_cancels_what_runs_and_what_waits(tmp_path):
    small_models.save("llama", tmp_path)
    async with started(tmp_path, max_batch_size=2) as engine:
        tasks = [
            asyncio.create_task(answer(engine, sequence(prompt(5, i), new=400, ignore_eos=True))) for i in range(5)
        ]
        await until(lambda: engine.running == 2)
        await engine.close()
        assert {reason for _, reason in await asyncio.gather(*tasks)} == {"cancelled"}
        with pytest.raises(EngineDead):
            await answer(engine, sequence([1]))
        with pytest.raises(EngineDead):
            await engine.check()


async def test_what_can_not_be_loaded_says_why(tmp_path):
    small_models.save("llama", tmp_path)
    for options, reason in (
        ({"adapters": {"a": str(tmp_path)}}, "adapter"),
        ({"device": "cuda"}, "GPU"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            async with started(tmp_path, **options):
                pass
    head = {"v_head.summary.weight": torch.zeros(1, 48)}
    weights = (tmp_path / "model.safetensors").read_bytes()
    for broken, reason in (
        (lambda: torch.save(head, tmp_path / "value_head.bin"), "takes 48 numbers"),
        (lambda: (tmp_path / "value_head.safetensors").write_bytes(b"x" * 50), r"value_head\.safetensors"),
        (lambda: (tmp_path / "model.safetensors").write_bytes(weights[:-9]), r"model\.safetensors .* can't be read"),
        (lambda: small_models.pickle_weights(tmp_path), "no safetensors"),
    ):
        (tmp_path / "model.safetensors").write_bytes(weights)
        broken()
        with pytest.raises(ConfigurationError, match=reason):
            async with started(tmp_path):
                pass
    small_models.save("llama", tmp_path / "other")
    small_models.save_lora(tmp_path / "other", tmp_path / "x")
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(b"x" * 50)
    for options in ({"adapters": {"x": str(tmp_path / "x")}}, {"adapter_name_or_path": str(tmp_path / "x")}):
        with pytest.raises(ConfigurationError, match=r"adapter_model\.safetensors"):
            async with started(tmp_path / "other", **options):
                pass


# -- adapters and heads -----------------------------------------------------------------------------------------------


async def test_each_row_is_computed_with_its_own_adapter(tmp_path):
    base = small_models.save("llama", tmp_path / "model")
    folders = {name: tmp_path / name for name in ("a.1", "b")}
    models = {None: base}
    for seed, (name, folder) in enumerate(folders.items()):
        kind = "scaled" if name == "b" else "lora"
        models[name] = small_models.save_lora(tmp_path / "model", folder, seed=seed, kind=kind)
    adapters = {name: str(folder) for name, folder in folders.items()}
    async with started(tmp_path / "model", adapters=adapters) as engine:
        assert engine.info.adapters == ("a.1", "b")
        wanted = [
            sequence(prompt(11), new=20, adapter=adapter, **GREEDY)  # one prompt: caches must not be shared
            for adapter in ("a.1", None, "b", "a.1", "b", None)
        ]
        answers = await asyncio.gather(*(answer(engine, each) for each in wanted))
        for each, (ids, _) in zip(wanted, answers, strict=True):
            assert_best(models[each.adapter], each.prompt_ids, ids)
        assert len({tuple(ids) for ids, _ in answers}) == 3, "the adapters are too weak to show anything"


@pytest.mark.parametrize("kind", ["dora", "ia3", "saved", "tokens"])
async def test_adapters_that_can_not_share_a_pass_get_batches_of_their_own(tmp_path, kind):
    models = {None: small_models.save("llama", tmp_path / "model")}
    models["x"] = small_models.save_lora(tmp_path / "model", tmp_path / "x", kind=kind)
    if kind != "ia3":  # peft has one kind of adapter beside a model
        models["plain"] = small_models.save_lora(tmp_path / "model", tmp_path / "plain")
    adapters = {name: str(tmp_path / name) for name in models if name}
    async with started(tmp_path / "model", adapters=adapters) as engine:
        names = itertools.cycle(models)
        wanted = [sequence(prompt(9 + i, i), new=15, adapter=next(names), **GREEDY) for i in range(7)]
        answers = await asyncio.gather(*(answer(engine, each) for each in wanted))
        for each, (ids, _) in zip(wanted, answers, strict=True):
            assert_best(models[each.adapter], each.prompt_ids, ids)


@pytest.mark.parametrize("kind", ["bias", "pissa"])
async def test_an_adapter_that_changes_the_model_for_all_is_merged_but_not_chosen(tmp_path, kind):
    small_models.save("qwen2", tmp_path / "model")
    model = small_models.save_lora(tmp_path / "model", tmp_path / "x", kind=kind)
    with pytest.raises(ConfigurationError, match=kind):
        async with started(tmp_path / "model", adapters={"x": str(tmp_path / "x")}):
            pass
    async with started(tmp_path / "model", adapter_name_or_path=str(tmp_path / "x")) as engine:
        ids, _ = await answer(engine, sequence(prompt(12), new=20, **GREEDY))
        assert_best(model, prompt(12), ids)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("how", ["adapters", "adapter_name_or_path"])
async def test_an_adapter_of_another_model_is_refused(tmp_path, how):
    """peft leaves out what it has no place for: nothing of these two would be left, or half."""
    small_models.save("llama", tmp_path / "model")
    for family in ("gpt_neox", "deeper"):
        if family == "deeper":
            deeper = transformers.LlamaConfig.from_pretrained(tmp_path / "model", num_hidden_layers=5)
            transformers.LlamaForCausalLM(deeper).save_pretrained(tmp_path / family)
            small_models.save_lora(tmp_path / family, tmp_path / "x")
        else:
            small_models.save_lora(tmp_path / "model", tmp_path / "x")
            weights = load_file(tmp_path / "x" / "adapter_model.safetensors")
            renamed = {name.replace("model.layers", "gpt_neox.layers"): each for name, each in weights.items()}
            save_file(renamed, tmp_path / "x" / "adapter_model.safetensors")
        path = str(tmp_path / "x")
        with pytest.raises(ConfigurationError, match="doesn't fit"):
            async with started(tmp_path / "model", **{how: {"x": path} if how == "adapters" else path}):
                pass


async def test_adapters_are_merged_in_their_order(tmp_path):
    base = small_models.save("llama", tmp_path / "model")
    for seed, name in enumerate(("a", "b")):
        small_models.save_lora(tmp_path / "model", tmp_path / name, seed=seed)
    both = small_models.merged(tmp_path / "model", [tmp_path / "a", tmp_path / "b"])
    async with started(tmp_path / "model", adapter_name_or_path=f"{tmp_path / 'a'}, {tmp_path / 'b'}") as engine:
        ids, _ = await answer(engine, sequence(prompt(12), new=20, **GREEDY))
        assert_best(both, prompt(12), ids)
        with pytest.raises(AssertionError):
            assert_best(base, prompt(12), ids)
        fingerprint = engine.info.fingerprint
    async with started(tmp_path / "model", adapter_name_or_path=str(tmp_path / "a")) as engine:
        assert engine.info.fingerprint != fingerprint


@pytest.mark.parametrize("form", ["safetensors", "bin"])
async def test_a_value_head_scores_the_last_token(tmp_path, form):
    model = small_models.save("llama", tmp_path)
    expected = small_models.save_value_head(model, tmp_path, form)
    texts = [tuple(prompt(length, length)) for length in (7, 30, 1, 64, 12, 100)]
    async with started(tmp_path, prefill_chunk_tokens=16) as engine:
        chats = [asyncio.create_task(answer(engine, sequence(prompt(5, i), new=30, **GREEDY))) for i in range(3)]
        scores = await engine.score(texts)
        assert scores == pytest.approx([expected(text) for text in texts], abs=1e-4)
        for place, task in enumerate(chats):
            assert_best(model, prompt(5, place), (await task)[0])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
async def test_the_value_head_of_the_last_adapter_comes_first(tmp_path, form):
    model = small_models.save("llama", tmp_path / "model")
    small_models.save_value_head(model, tmp_path / "model", "safetensors")
    adapted = small_models.save_lora(tmp_path / "model", tmp_path / "reward")
    expected = small_models.save_value_head(adapted, tmp_path / "reward", form, seed=6)
    texts = [tuple(prompt(length, length)) for length in (7, 30, 1)]
    async with started(tmp_path / "model", adapter_name_or_path=str(tmp_path / "reward")) as engine:
        assert engine.info.can_score
        assert await engine.score(texts) == pytest.approx([expected(text) for text in texts], abs=1e-4)


class _Runs:
    def __reduce__(self):
        return (print, ("a pickle ran",))


async def test_a_value_head_that_would_run_code_is_refused(tmp_path, capfd):
    small_models.save("llama", tmp_path)
    for broken in (
        lambda path: torch.save({"v_head.summary.weight": _Runs()}, path),
        lambda path: path.write_bytes(b"x"),
    ):
        broken(tmp_path / "value_head.bin")
        with pytest.raises(ConfigurationError, match=r"value_head\.bin"):
            async with started(tmp_path):
                pass
    assert "a pickle ran" not in capfd.readouterr().out


async def test_a_sequence_classifier_scores_and_does_not_generate(tmp_path):
    model = small_models.save_classifier(tmp_path)
    texts = [tuple(prompt(length, length)) for length in (9, 4, 33)]
    async with started(tmp_path) as engine:
        with torch.inference_mode():
            expected = [model(input_ids=torch.tensor([text])).logits.item() for text in texts]
        assert await engine.score(texts) == pytest.approx(expected, abs=1e-4)
        with pytest.raises(InvalidRequest, match="scores"):
            await answer(engine, sequence([1, 2]))
        with pytest.raises(ContextLengthExceeded):
            await engine.score([tuple(prompt(600))])


async def test_a_classifier_with_several_labels_gives_no_score(tmp_path):
    small_models.save_classifier(tmp_path, labels=3)
    with pytest.raises(ConfigurationError, match="3 labels"):
        async with started(tmp_path):
            pass


async def test_a_model_without_a_head_does_not_score(smol):
    with pytest.raises(EngineError, match="head"):
        await smol.score([(1, 2, 3)])

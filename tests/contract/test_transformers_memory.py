"""What the transformers engine does for want of memory, with what fails, and at its end."""

from __future__ import annotations

import asyncio
import resource
from contextlib import contextmanager

import psutil
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.contract import small_models  # noqa: E402
from tests.contract.transformers_runs import GREEDY, answer, assert_best, prompt, sequence, started, until  # noqa: E402
from tokenfleet.wire.errors import (  # noqa: E402
    ConfigurationError,
    ContextLengthExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


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

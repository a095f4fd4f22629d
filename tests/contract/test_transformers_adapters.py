"""Adapters and reward heads on the transformers engine."""

from __future__ import annotations

import asyncio
import itertools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.contract import small_models  # noqa: E402
from tests.contract.transformers_runs import GREEDY, answer, assert_best, prompt, sequence, started  # noqa: E402
from tokenfleet.wire.errors import (  # noqa: E402
    ConfigurationError,
    ContextLengthExceeded,
    InvalidRequest,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


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

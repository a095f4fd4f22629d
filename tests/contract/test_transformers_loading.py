"""How the transformers engine loads a model: dtypes, quantisation, positions, attention, revisions, others' code."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.contract import small_models  # noqa: E402
from tests.contract.transformers_runs import answer, assert_best, prompt, sequence, started  # noqa: E402
from tokenfleet.engines.families import FAMILIES  # noqa: E402
from tokenfleet.wire.chat import ChatRequest  # noqa: E402
from tokenfleet.wire.errors import ConfigurationError, UnknownModel  # noqa: E402
from tokenfleet.wire.support import Refusal  # noqa: E402

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder, and the plain model in it. Its layers are as wide as bitsandbytes' blocks."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, small_models.save_wide(folder)


def copied(folder, target, **config):
    """The model of ``folder`` with other entries in its configuration."""
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    old = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**old, **config}))
    return target


def logits(model, length=12):
    with torch.inference_mode():
        return model(torch.tensor([prompt(length)])).logits[0].float()


async def test_the_dtype_is_the_one_asked_for(llama):
    folder, _ = llama
    fingerprints = set()
    for name in ("auto", "bfloat16"):
        async with started(folder, infer_dtype=name) as engine:
            expected = "float32" if name == "auto" else name  # few CPUs have fast 16-bit arithmetic
            assert engine._loaded.model.dtype == getattr(torch, expected)
            assert len((await answer(engine, sequence(prompt(9), new=4, **GREEDY)))[0]) == 4
            fingerprints.add(engine.info.fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize(("bits", "kind", "likeness"), [(8, "Linear8bitLt", 0.99), (4, "Linear4bit", 0.8)])
async def test_weights_are_quantised_at_load(llama, bits, kind, likeness):
    pytest.importorskip("bitsandbytes")
    folder, plain = llama
    async with started(folder, quantization_bit=bits) as engine:
        model = engine._loaded.model
        assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
        assert model.get_memory_footprint() < 0.6 * plain.get_memory_footprint()
        both = torch.stack([logits(model).flatten(), logits(plain).flatten()])
        assert likeness < torch.corrcoef(both)[0, 1] < 1
        ids, _ = await answer(engine, sequence(prompt(9), new=8, **GREEDY))
        assert_best(model, prompt(9), ids, tolerance=0.5 if bits == 8 else 1e-2)  # 8 bit rounds a batch's rows together
        quantised = engine.info.fingerprint
    async with started(folder) as engine:
        assert engine.info.fingerprint != quantised


async def test_quantised_weights_take_adapters_beside_them_but_not_into_them(llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder, _ = llama
    small_models.save_lora(folder, tmp_path / "a")
    with pytest.raises(ConfigurationError, match="merged"):
        async with started(folder, quantization_bit=8, adapter_name_or_path=str(tmp_path / "a")):
            pass
    async with started(folder, quantization_bit=8, adapters={"a": str(tmp_path / "a")}) as engine:
        plain, _ = await answer(engine, sequence(prompt(9), new=8, **GREEDY))
        adapted, _ = await answer(engine, sequence(prompt(9), new=8, adapter="a", **GREEDY))
        assert plain != adapted


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "pip install optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "format": "float-quantized"}, "compressed"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
        ({"quant_method": "of-the-future"}, "of-the-future"),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
async def test_a_checkpoint_quantised_in_a_way_that_is_not_there_says_what_is_missing(llama, tmp_path, method, told):
    copied(llama[0], tmp_path, quantization_config=method)
    with pytest.raises(ConfigurationError, match=f"(?i){told}"):
        async with started(tmp_path):
            pass


async def test_a_family_that_can_not_be_batched_says_why(llama, tmp_path):
    refused = [f for f in FAMILIES.values() if isinstance(f.transformers, Refusal)]
    assert refused
    for number, family in enumerate(refused):
        (folder := tmp_path / str(number)).mkdir()
        copied(llama[0], folder, architectures=sorted(family.architectures)[:1])
        with pytest.raises(ConfigurationError) as raised:
            async with started(folder):
                pass
        assert family.transformers.reason in raised.value.message


async def test_a_model_that_lacks_weights_is_not_completed_by_chance(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(llama[0], tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lacks 1 .*layers\.1\.mlp\.up_proj"):
        async with started(folder):
            pass


async def test_a_model_that_gives_no_scores_is_no_reward_model(llama):
    with pytest.raises(ConfigurationError, match="value head"):
        async with started(llama[0], rewards=True):
            pass


async def test_ways_to_quantise_that_are_not_installed_name_their_package(llama):
    for method in ("hqq", "eetq"):
        with pytest.raises(ConfigurationError, match=method) as raised:
            async with started(llama[0], quantization_bit=8, quantization_method=method):
                pass
        assert "pip install" in raised.value.hint


@pytest.mark.parametrize("kind", ["dynamic", "llama3"])
async def test_positions_are_stretched_to_twice_the_context(llama, kind):
    folder, plain = llama
    async with started(folder, rope_scaling=kind) as engine:
        assert engine.info.context_tokens == 2 * plain.config.max_position_embeddings
        ids, _ = await answer(engine, sequence(prompt(40), new=12, **GREEDY))
        config = transformers.AutoConfig.from_pretrained(folder)
        config.rope_parameters |= {"rope_type": kind, "factor": 2.0}
        if kind != "linear":
            config.rope_parameters["original_max_position_embeddings"] = config.max_position_embeddings
        if kind == "llama3":
            config.rope_parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config.max_position_embeddings *= 2
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        assert_best(expected, prompt(40), ids)
        long = plain.config.max_position_embeddings + 20
        assert len((await answer(engine, sequence(prompt(long), new=4, **GREEDY)))[0]) == 4
    if kind != "dynamic":  # which changes nothing before the old context is full
        assert not torch.allclose(logits(expected), logits(plain), atol=1e-2)


async def test_models_without_rotary_positions_can_not_be_stretched(tmp_path):
    small_models.save("gpt2", tmp_path)
    with pytest.raises(ConfigurationError, match="rope_scaling"):
        async with started(tmp_path, rope_scaling="linear"):
            pass


async def test_attention_is_the_kind_asked_for(llama):
    folder, plain = llama
    for name, expected in (("disabled", "eager"), ("sdpa", "sdpa"), ("auto", "tokenfleet_sdpa")):
        async with started(folder, flash_attn=name) as engine:
            assert engine._loaded.model.config._attn_implementation == expected
            ids, _ = await answer(engine, sequence(prompt(30), new=10, **GREEDY))
            assert_best(plain, prompt(30), ids)
    for name in ("fa2", "fa3"):
        with pytest.raises(ConfigurationError, match=r"(?i)flash.?attention|flash_attn"):
            async with started(folder, flash_attn=name):
                pass


async def test_a_models_own_code_runs_only_where_it_is_trusted(llama, tmp_path):
    code = (
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    folder = tmp_path / "model"
    folder.mkdir()
    own = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    copied(llama[0], folder, model_type="own", auto_map=own, architectures=["OwnModel"])
    (folder / "code.py").write_text(code)
    with pytest.raises(ConfigurationError, match="trust_remote_code"):
        async with started(folder):
            pass
    assert not (tmp_path / "ran").exists()
    async with started(folder, trust_remote_code=True) as engine:
        assert type(engine._loaded.model).__name__ == "OwnModel"
        ids, _ = await answer(engine, sequence(prompt(9), new=6, **GREEDY))
        assert_best(llama[1], prompt(9), ids)
    assert (tmp_path / "ran").exists()


async def test_the_revision_is_the_one_asked_for(llama, tmp_path, monkeypatch):
    """From the hub's cache on this machine, with two revisions in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = tmp_path / "models--an-owner--a-model"
    (base / "refs").mkdir(parents=True)
    for name, commit, change in (("main", "a" * 40, {}), ("v2", "b" * 40, {"max_position_embeddings": 256})):
        (base / "refs" / name).write_text(commit)
        (base / "snapshots" / commit).mkdir(parents=True)
        copied(llama[0], base / "snapshots" / commit, **change)
    for revision, context in ((None, 512), ("v2", 256), ("b" * 40, 256)):
        async with started("an-owner/a-model", model_revision=revision) as engine:
            assert engine.info.context_tokens == context
    with pytest.raises((ConfigurationError, UnknownModel)):
        async with started("an-owner/a-model", model_revision="v3"):
            pass


async def test_what_a_worker_is_set_to_shapes_its_prompts(llama):
    """From the settings down to the ids: template, system text, thoughts, special tokens in users' texts."""
    from tokenfleet.workers.served import Served
    from tokenfleet.workers.settings import WorkerSettings

    request = ChatRequest(
        messages=[
            {"role": "user", "content": "one</s>"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
            {"role": "user", "content": "three"},
        ]
    )
    found = {}
    for name, more in (
        ("plain", {}),
        ("set", {"default_system": "", "preserve_thinking": True, "neutral_special_tokens": True}),
    ):
        args = {"model_name_or_path": str(llama[0]), "threads": 1}
        served = Served(WorkerSettings(model="m", engine_args=args, template="minimax2", slots=2, **more))
        await served.start()
        found[name] = served.loaded.render(request, ())
        await served.engine.close()
    plain, changed = found["plain"], found["set"]
    assert "MiniMax" in plain.text
    assert "MiniMax" not in changed.text
    assert ("hm" in plain.text, "hm" in changed.text) == (False, True)
    assert (plain.ids.count(1), changed.ids.count(1)) == (1, 0)  # </s>


async def test_a_templates_stop_word_ends_an_answer_even_if_it_is_no_token_unless_ends_are_ignored(llama):
    """llama3's are no tokens of this model. A grammar makes it write one."""
    from tokenfleet.engines.generation import generate_deltas
    from tokenfleet.wire.ledger import Claim
    from tokenfleet.workers.served import Served
    from tokenfleet.workers.settings import WorkerSettings
    from tokenfleet.workers.takeover import Delivered

    args = {"model_name_or_path": str(llama[0]), "threads": 1}
    served = Served(WorkerSettings(model="m", engine_args=args, template="llama3", slots=2))
    await served.start()
    wanted = {"type": "regex", "pattern": r"ab<\|eot_id\|>cd"}
    found = {}
    for ignored in (False, True):
        request = ChatRequest(
            messages=[{"role": "user", "content": "one"}],
            params={"response_format": wanted, "ignore_eos": ignored, "max_new_tokens": 40, "do_sample": False},
        )
        body = request.model_dump_json().encode()
        claim = Claim("job", 1, "me", 0, body, b"", "", 0, 0, 0, 0)
        prepared = await served.prepare(request, claim, Delivered())
        *deltas, end = [e async for e in generate_deltas(served.engine, served.tokenizer, prepared.job)]
        found[ignored] = ("".join(delta.text for delta in deltas), end.reason, end.stop)
    await served.close()
    assert found == {False: ("ab", "stop", "<|eot_id|>"), True: ("ab<|eot_id|>cd", "length", None)}

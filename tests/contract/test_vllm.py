"""What only the vLLM engine does. `make test-vllm-cpu` has an environment for it; elsewhere these are skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from contextlib import aclosing, asynccontextmanager

import psutil
import pytest
import pytest_asyncio

from tests.contract.adapted import PROMPT, check_each_has_its_adapter, ids_of
from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ConfigurationError, ContextLengthExceeded, EngineDead, EngineError, InvalidRequest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed: its pins exclude this environment's, see `make test-vllm-cpu`",
    ),
    pytest.mark.asyncio(loop_scope="module"),
]


@asynccontextmanager
async def started(folder, **options):
    from tokenfleet.engines.vllm_engine import VllmEngine, VllmOptions

    engine = VllmEngine(
        VllmOptions(
            model_name_or_path=str(folder), max_batch_size=4, vllm_enforce_eager=True,
            vllm_config={"kv_cache_memory_bytes": 1 << 27}, **{"infer_dtype": "float32", **options},
        )
    )  # fmt: skip
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(tmp_path_factory):
    """An engine with two adapters for all requests and two to choose from, and the plain model of each choice."""
    import torch
    import transformers as hf

    from tests.contract import small_models
    from tests.contract.subjects import _save_llama
    from tests.small_tokenizers import byte_level

    folder = tmp_path_factory.mktemp("vllm")
    _save_llama(folder / "model", byte_level(), torch, hf, head_dim=32)
    for seed, name in enumerate("abxy"):
        kind = {"a": "lora", "x": "apart"}.get(name, "scaled")
        small_models.save_lora(folder / "model", folder / name, seed=seed, kind=kind)
    always = [folder / "x", folder / "y"]
    plain = {
        None: small_models.merged(folder / "model", always),
        "a": small_models.merged(folder / "model", [*always, folder / "a"]),
        "b": small_models.merged(folder / "model", [*always, folder / "b"]),
    }
    async with started(
        folder / "model",
        adapter_name_or_path=",".join(map(str, always)),
        adapters={name: str(folder / name) for name in "ab"},
        infer_dtype="float16" if torch.cuda.is_available() else "float32",  # vLLM's LoRA kernels on a GPU
    ) as engine:
        yield engine, plain


async def test_each_request_is_computed_with_its_adapter_and_those_of_all_in_one_batch(models):
    await check_each_has_its_adapter(*models)


async def test_a_model_that_generates_does_not_score(models):
    engine, _ = models
    with pytest.raises(EngineError, match="rewards") as raised:
        await engine.score([(40, 41)])
    assert raised.value.code == "unsupported"


@pytest.mark.parametrize(
    ("wanted", "is_met"),
    [
        ({"type": "regex", "pattern": "[ab]{6}"}, lambda text: re.fullmatch("[ab]{6}", text)),
        (
            {"type": "json_schema", "json_schema": {"type": "object", "properties": {"ok": {"type": "boolean"}},
             "required": ["ok"], "additionalProperties": False}},
            lambda text: isinstance(json.loads(text)["ok"], bool),
        ),
        ({"type": "grammar", "grammar": 'start: "yes" | "no"'}, lambda text: text in {"yes", "no"}),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else "",
)  # fmt: skip
async def test_answers_follow_their_grammar(models, wanted, is_met):
    engine, _ = models
    for seed in range(4):
        ids = await ids_of(engine, do_sample=True, seed=seed, max_new_tokens=200, response_format=wanted)
        assert is_met(engine.tokenizer.decode(ids, skip_special_tokens=True))


async def test_a_grammar_that_makes_no_sense_is_refused_and_the_engine_lives(models):
    engine, _ = models
    with pytest.raises(InvalidRequest):
        await ids_of(engine, response_format={"type": "regex", "pattern": "("})
    assert await ids_of(engine)


async def test_a_killed_engine_core_fails_what_runs_and_whatever_comes(models):
    engine, _ = models
    params = GenerationParams(do_sample=False, ignore_eos=True)
    sequence = Sequence("dies", PROMPT, params, 400)
    cores = [child for child in psutil.Process().children() if "EngineCore" in " ".join(child.cmdline())]
    core = max(cores, key=psutil.Process.create_time)  # the contract's own engine may still be there

    async def read_and_kill():
        async with aclosing(engine.generate(sequence)) as chunks:
            await anext(chunks)
            os.kill(core.pid, signal.SIGKILL)
            async for _ in chunks:
                pass

    with pytest.raises(EngineDead):
        await read_and_kill()
    with pytest.raises(EngineDead):
        await engine.check()
    with pytest.raises(EngineDead):
        await ids_of(engine)


# -- engines of their own ---------------------------------------------------------------------------------------------


def near(scores):
    """``scores`` as an engine must give them: in float32 on a CPU; vLLM's attention on a GPU multiplies in TF32."""
    import torch

    return pytest.approx(scores, abs=0.05 if torch.cuda.is_available() else 1e-3)


TEXTS = [(40, 41, 42), (43,), tuple(range(50, 90)), (7, 8, 9, 10)]


async def test_a_value_head_scores_the_last_token_and_positions_stretch(tmp_path):
    """The head of an adapter comes before that beside the model. rope_scaling is in here since an engine costs half a
    minute."""
    import torch
    import transformers as hf

    from tests.contract import small_models
    from tests.contract.subjects import _save_llama
    from tests.small_tokenizers import byte_level
    from tokenfleet.engines.rope import scaled

    plain = _save_llama(tmp_path / "model", byte_level(), torch, hf, head_dim=32)
    adapted, folder, options = plain, tmp_path / "model", {}
    if not torch.cuda.is_available():  # adapters on a GPU take 16 bits: there the head is the model's own
        small_models.save_value_head(plain, tmp_path / "model", "safetensors", seed=6)
        folder = tmp_path / "adapter"
        adapted, options = small_models.save_lora(tmp_path / "model", folder), {"adapter_name_or_path": str(folder)}
    config = hf.AutoConfig.from_pretrained(tmp_path / "model")
    config.rope_parameters, config.max_position_embeddings = scaled(config.rope_parameters, 512, "linear")

    def scores(model, stretches=True):
        if stretches:
            state, model = model.state_dict(), hf.LlamaForCausalLM(config).eval()
            model.load_state_dict(state)
        score = small_models.save_value_head(model, folder, "safetensors")
        return [score(text) for text in TEXTS]

    expected = scores(adapted)
    assert expected != pytest.approx(scores(adapted, stretches=False), abs=0.2)
    assert adapted is plain or expected != pytest.approx(scores(plain), abs=0.2)
    async with started(tmp_path / "model", rewards=True, rope_scaling="linear", **options) as engine:
        assert engine.info.context_tokens == 1024
        assert engine.info.can_score
        assert await engine.score(TEXTS) == near(expected)
        with pytest.raises(InvalidRequest, match="scores"):
            await ids_of(engine)
        with pytest.raises(ContextLengthExceeded):
            await engine.score([tuple(range(2, 300)) * 4])
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await engine.score([(10_000,)])
        assert await engine.score(TEXTS[:1]) == near(expected[:1])


@pytest.mark.parametrize("method", ["gptq", "awq"])
async def test_a_checkpoint_in_four_bits_is_the_model_of_its_rounded_weights(tmp_path, method):
    from tests.contract import packed_models

    plain, other = packed_models.save(method, tmp_path / "packed"), packed_models.save("awq", tmp_path / "other")
    async with started(tmp_path / "packed", infer_dtype="auto") as engine:
        assert max(await packed_models.gaps(engine, plain)) < packed_models.TOLERANCE
        if method == "gptq":  # other roundings are told apart
            assert max(await packed_models.gaps(engine, other)) > 10 * packed_models.TOLERANCE


async def test_a_sequence_classifier_gives_its_own_score(tmp_path):
    import torch
    import transformers as hf

    from tests.small_tokenizers import byte_level

    torch.manual_seed(6)
    config = hf.LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    model = hf.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    hf.PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>").save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([text])).logits.item() for text in TEXTS]
    async with started(tmp_path) as engine:
        assert await engine.score(TEXTS) == near(expected)


async def test_what_can_not_be_loaded_says_why(tmp_path):
    import torch
    import transformers as hf

    from tests.contract import small_models
    from tests.contract.subjects import _save_llama
    from tests.small_tokenizers import byte_level

    _save_llama(tmp_path / "model", byte_level(), torch, hf, head_dim=32)
    small_models.save_lora(tmp_path / "model", tmp_path / "dora", kind="dora")
    small_models.save_lora(tmp_path / "model", tmp_path / "lora")
    two = f"{tmp_path / 'lora'},{tmp_path / 'dora'}"
    for options, reason in (
        ({"rewards": True}, "value head"),
        ({"adapters": {"a": str(tmp_path / "model")}}, "adapter"),
        ({"adapters": {"a": str(tmp_path / "lora")}, "vllm_max_lora_rank": 2}, "rank 4"),
        ({"adapter_name_or_path": two}, "use_dora"),
        ({"adapters": {"a": str(tmp_path / "dora")}}, "use_dora"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            async with started(tmp_path / "model", infer_dtype="float16", **options):
                pass
    if not torch.cuda.is_available():
        for bits in (4, 8):
            with pytest.raises(ConfigurationError, match="on a CPU"):
                async with started(tmp_path / "model", quantization_bit=bits):
                    pass
    small_models.save_classifier(tmp_path / "classes", labels=3)
    small_models.pickle_weights(tmp_path / "model")
    for name, reason in (("classes", "3 labels"), ("model", "safetensors")):
        with pytest.raises(ConfigurationError, match=reason):
            async with started(tmp_path / name):
                pass

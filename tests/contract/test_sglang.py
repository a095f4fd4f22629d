"""What only the SGLang engine does. `make test-sglang-cpu` has an environment for it; elsewhere these are skipped."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import re
import signal
from contextlib import aclosing

import psutil
import pytest
import pytest_asyncio

from tests.contract.adapted import PROMPT, check_each_has_its_adapter, ids_of
from tests.processes import all_gone, on_this_machine
from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ConfigurationError, ContextLengthExceeded, EngineDead, InvalidRequest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None,
        reason="sglang is not installed: its pins exclude this environment's, see `make test-sglang-cpu`",
    ),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(400),
]
HANDLER = logging.NullHandler()


def options_of(folder, **others):
    import torch

    from tests.contract.subjects import SGLANG_ON_GPU
    from tokenfleet.engines.sglang_engine import SglangOptions

    adapters = {name: str(folder / name) for name in "ab" if (folder / name).is_dir()}
    on_gpu = torch.cuda.is_available()  # SGLang's kernels for one take 16 bits only
    config = {**(SGLANG_ON_GPU if on_gpu else {}), **others.pop("sglang_config", {})}
    return SglangOptions(
        model_name_or_path=str(folder / "model"), infer_dtype="float16" if on_gpu else "float32", max_batch_size=4,
        adapters=adapters, sglang_config=config, **others,
    )  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(tmp_path_factory):
    """An engine with two adapters for all requests and two to choose from, and the plain model of each choice."""
    import torch
    import transformers as hf

    from tests.contract import small_models
    from tests.contract.subjects import _save_llama
    from tests.small_tokenizers import byte_level
    from tokenfleet.engines.sglang_engine import SglangEngine

    folder = tmp_path_factory.mktemp("sglang")
    _save_llama(folder / "model", byte_level(), torch, hf)
    for seed, name in enumerate("abxy"):
        kind = {"a": "lora", "b": "scaled"}.get(name, "apart")
        small_models.save_lora(folder / "model", folder / name, seed=seed, kind=kind)
    plain, always = {}, [folder / "x", folder / "y"]
    for name, folders in ((None, always), ("a", [*always, folder / "a"]), ("b", [*always, folder / "b"])):
        merged = small_models.merged(folder / "model", folders)
        # Once SGLang is imported, from_pretrained leaves rotary frequencies uninitialised; the constructor doesn't.
        plain[name] = hf.LlamaForCausalLM(merged.config).eval()
        plain[name].load_state_dict(merged.state_dict())
    # So little cache, and so much hope, that four long answers together don't fit.
    tight = {"max_total_tokens": 1024, "schedule_conservativeness": 0.05}
    engine = SglangEngine(options_of(folder, sglang_config=tight, adapter_name_or_path=",".join(map(str, always))))
    logging.getLogger().addHandler(HANDLER)
    level = logging.getLogger().level
    await engine.start()
    assert logging.getLogger().level == level
    yield engine, plain
    await engine.close()
    logging.getLogger().removeHandler(HANDLER)


async def test_each_request_is_computed_with_its_own_adapter_in_one_batch(models):
    await check_each_has_its_adapter(*models)


async def test_an_answer_of_a_grammar_is_whole(models):
    engine, _ = models
    wanted = {"type": "grammar", "grammar": 'start: "yes" | "no"'}
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for seed in range(3):
        ids = await ids_of(engine, do_sample=True, seed=seed, max_new_tokens=200, response_format=wanted)
        assert re.fullmatch("yes|no", engine.tokenizer.decode(ids, skip_special_tokens=True))
    shaped = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    ids = await ids_of(engine, max_new_tokens=200, response_format=shaped)
    assert isinstance(json.loads(engine.tokenizer.decode(ids, skip_special_tokens=True))["ok"], bool)


async def test_to_the_last_token_that_fits_and_no_further(models):
    engine, _ = models
    room = engine.info.context_tokens - len(PROMPT)
    assert len(await ids_of(engine, max_new_tokens=room, ignore_eos=True)) == room
    with pytest.raises(ContextLengthExceeded):
        await ids_of(engine, max_new_tokens=room + 1, ignore_eos=True)


async def test_leaving_ends_one_request_alone_and_is_forgotten(models):
    """SGLang aborts whatever begins with the id it is told: here ids 1 and 10 to 19 would go together."""
    engine, _ = models
    manager = engine._started.front.tokenizer_manager
    params = GenerationParams(do_sample=False, ignore_eos=True)
    expected = await ids_of(engine, max_new_tokens=100, ignore_eos=True)

    async def leave():
        async with aclosing(engine.generate(Sequence("x", PROMPT, params, 400))) as chunks:
            await anext(chunks)

    staying = [asyncio.create_task(ids_of(engine, max_new_tokens=100, ignore_eos=True)) for _ in range(3)]
    for _ in range(17):
        await leave()
    assert await asyncio.gather(*staying) == [expected] * 3
    async with asyncio.timeout(on_this_machine(30)):
        while manager.rid_to_state or manager.readers:
            await asyncio.sleep(0.01)


async def test_an_answer_is_the_same_if_its_cache_is_taken_away_on_the_way(models, monkeypatch):
    engine, _ = models
    manager = engine._started.front.tokenizer_manager
    handle, retractions = type(manager)._handle_batch_output, []

    async def watch(manager, outputs):
        retractions.extend(outputs.retraction_counts or ())
        await handle(manager, outputs)

    monkeypatch.setattr(type(manager), "_handle_batch_output", watch)
    params = {"do_sample": True, "max_new_tokens": 400, "repetition_penalty": 1.2, "frequency_penalty": 0.2}
    params |= {"stop_token_ids": (99,), "logit_bias": {99: -100.0}, "ignore_eos": True}
    alone = [await ids_of(engine, seed=seed, **params) for seed in range(2)]
    assert not any(retractions)
    together = await asyncio.gather(*(ids_of(engine, seed=seed, **params) for seed in range(4)))
    assert any(retractions), "none was: this proves nothing"
    assert together[:2] == alone


async def test_the_process_keeps_its_signals_its_event_loop_and_its_log(models):
    assert HANDLER in logging.getLogger().handlers
    assert signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert type(asyncio.get_event_loop_policy()).__module__.startswith("asyncio")


async def test_a_scheduler_that_fails_is_an_engine_fault_and_nobody_elses(models):
    """It would send SIGQUIT to this process, which has no handler for it and would end."""
    engine, _ = models
    params = GenerationParams(do_sample=False, ignore_eos=True)
    front = engine._started.front
    [scheduler] = front.children
    assert scheduler in psutil.Process().children()

    async def read_and_break():
        async with aclosing(engine.generate(Sequence("dies", PROMPT, params, 400))) as chunks:
            await anext(chunks)
            await front.tokenizer_manager.send_to_scheduler.send(b"no message of SGLang's")
            async for _ in chunks:
                pass

    async with asyncio.timeout(on_this_machine(30)):
        with pytest.raises(EngineDead):
            await read_and_break()
    with pytest.raises(EngineDead):
        await engine.check()
    with pytest.raises(EngineDead):
        await ids_of(engine)
    await engine.close()
    assert all_gone([scheduler.pid])
    await engine.close()


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
async def test_positions_stretch_as_those_of_transformers(kind, tmp_path):
    """What SGLang reads of rope_scaling and makes of it; a whole engine with it is below."""
    import torch
    import transformers as hf

    from tests.contract import small_models
    from tokenfleet.engines.rope import overridden, scaled
    from tokenfleet.engines.sglang_engine import compat

    compat.import_sglang()
    from sglang.srt.layers.rotary_embedding import get_rope
    from sglang.srt.utils.hf_transformers_utils import get_config, get_context_length

    plain = small_models.save_classifier(tmp_path).config
    changed, context = overridden(tmp_path, kind, trust_remote_code=False)
    read = get_config(str(tmp_path), trust_remote_code=False, model_override_args=changed)
    assert get_context_length(read) == context == 2 * plain.max_position_embeddings
    rope, most, width = read.rope_parameters, read.max_position_embeddings, plain.head_dim
    cache = get_rope(width, width, most, rope["rope_theta"], rope_scaling=rope, dtype=torch.float32).cos_sin_cache
    own = hf.LlamaConfig.from_pretrained(tmp_path)
    own.rope_parameters, own.max_position_embeddings = scaled(own.rope_parameters, context // 2, kind)
    cos, sin = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(own)(torch.zeros(1), torch.arange(context)[None])
    expected = torch.cat([cos[0, :, : width // 2], sin[0, :, : width // 2]], dim=-1)
    torch.testing.assert_close(cache[:context], expected, atol=1e-4, rtol=0)
    unstretched = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(plain)(
        torch.zeros(1), torch.arange(context)[None]
    )
    assert not torch.allclose(unstretched[0], cos, atol=0.1)


async def test_bits_on_a_cpu_are_refused(tmp_path):
    import torch

    from tests.contract import small_models
    from tokenfleet.engines.sglang_engine import SglangEngine

    if torch.cuda.is_available():
        pytest.skip("a GPU has them")
    small_models.save_classifier(tmp_path / "model")
    with pytest.raises(ConfigurationError, match="on a CPU"):
        await SglangEngine(options_of(tmp_path, quantization_bit=8)).start()


async def test_what_can_not_be_loaded_says_why(tmp_path):
    from tests.contract import small_models
    from tokenfleet.engines.sglang_engine import SglangEngine

    small_models.save("llama", tmp_path / "model")
    small_models.save_lora(tmp_path / "model", tmp_path / "a", kind="dora")
    with pytest.raises(ConfigurationError, match="use_dora"):
        await SglangEngine(options_of(tmp_path)).start()
    (tmp_path / "a").rename(tmp_path / "unused")
    small_models.pickle_weights(tmp_path / "model")
    with pytest.raises(ConfigurationError, match="safetensors"):
        await SglangEngine(options_of(tmp_path)).start()
    small_models.save_classifier(tmp_path / "model", labels=3)
    with pytest.raises(ConfigurationError, match="3 labels"):
        await SglangEngine(options_of(tmp_path)).start()


async def test_a_sequence_classifier_scores_with_stretched_positions_and_writes_nothing(tmp_path):
    import torch
    import transformers as hf

    from tests.contract import small_models
    from tokenfleet.engines.rope import scaled
    from tokenfleet.engines.sglang_engine import SglangEngine

    plain = small_models.save_classifier(tmp_path / "model").eval()
    config = hf.AutoConfig.from_pretrained(tmp_path / "model")
    most = config.max_position_embeddings
    config.rope_parameters, config.max_position_embeddings = scaled(config.rope_parameters, most, "linear")
    model = hf.LlamaForSequenceClassification(config).eval()
    model.load_state_dict(plain.state_dict())
    texts = [(5, 6, 7), tuple(range(40, 90)), (99,)]
    engine = SglangEngine(options_of(tmp_path, rope_scaling="linear"))
    await engine.start()
    try:
        assert engine.info.context_tokens == 2 * most - 2
        with torch.no_grad():
            expected = [model(torch.tensor([ids])).logits[0, 0].item() for ids in texts]
            unlike = [plain(torch.tensor([ids])).logits[0, 0].item() for ids in texts]
        assert expected != pytest.approx(unlike, abs=0.1)
        assert await engine.score(texts) == pytest.approx(expected, abs=0.1 if torch.cuda.is_available() else 1e-3)
        assert len({round(value, 3) for value in expected}) == 3
        with pytest.raises(InvalidRequest):
            await ids_of(engine)
    finally:
        await engine.close()

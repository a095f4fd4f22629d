"""LLaMA-Factory's files for `chat` and `api` mean here what they say there, or are refused by name."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tokenfleet.cli.arguments import merged
from tokenfleet.engines.registry import options_of
from tokenfleet.producer.arguments import split_arguments
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.workers.settings import WorkerSettings

CLASSES = {"transformers": "TransformersOptions", "vllm": "VllmOptions", "sglang": "SglangOptions"}
SMALL = "model_name_or_path: Qwen/Qwen3-4B-Instruct-2507\ntemplate: qwen3_nothink\ntrust_remote_code: true\n"
LORA = SMALL + "adapter_name_or_path: saves/qwen3-4b/lora/sft\nfinetuning_type: lora\nstage: sft\n"
VLLM = LORA + (
    "infer_backend: vllm\ninfer_dtype: bfloat16\nvllm_maxlen: 4096\nvllm_gpu_util: 0.9\nvllm_enforce_eager: true\n"
    "vllm_max_lora_rank: 32\nflash_attn: auto\nmax_new_tokens: 512\nrepetition_penalty: 1.1\n"
)
SGLANG = LORA + (
    "infer_backend: sglang\nsglang_maxlen: 4096\nsglang_mem_fraction: 0.7\nsglang_tp_size: -1\nuse_kv_cache: true\n"
)


def read(text: str, folder: Path, *words: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """A worker's settings, its engine's options, and the defaults of requests, out of a file."""
    file = folder / "a.yaml"
    file.write_text(text)
    args, generation = split_arguments(merged([str(file), *words], {}, {}))
    worker = args.local_fleet().worker
    engine = worker["engine"]
    module = importlib.import_module(f"tokenfleet.engines.{engine}_engine.options")
    return worker, options_of(getattr(module, CLASSES[engine]), worker["engine_args"], engine), generation


@pytest.mark.parametrize("backend", ["huggingface", "vllm", "sglang"])
@pytest.mark.parametrize("text", [SMALL, LORA], ids=["full", "lora"])
def test_the_examples_run_on_every_engine(text: str, backend: str, tmp_path: Path) -> None:
    worker, options, _ = read(f"{text}infer_backend: {backend}  # choices: [huggingface, vllm, sglang]\n", tmp_path)
    assert worker["template"] == "qwen3_nothink"
    assert worker["model"] == "Qwen3-4B-Instruct-2507"
    assert options.trust_remote_code is True
    assert options.adapter_name_or_path == (("saves/qwen3-4b/lora/sft",) if text is LORA else ())


def test_what_is_of_vllm_or_sglang_reaches_it(tmp_path: Path) -> None:
    _, options, generation = read(VLLM, tmp_path)
    assert (options.vllm_maxlen, options.vllm_gpu_util, options.vllm_enforce_eager) == (4096, 0.9, True)
    assert (options.vllm_max_lora_rank, options.infer_dtype) == (32, "bfloat16")
    assert generation == {"max_new_tokens": 512, "repetition_penalty": 1.1}
    _, options, _ = read(SGLANG, tmp_path)
    assert (options.sglang_maxlen, options.sglang_mem_fraction, options.sglang_tp_size) == (4096, 0.7, None)


@pytest.mark.parametrize(
    ("given", "means"),
    [
        (
            'vllm_config: \'{"max_model_len": 8192, "gpu_memory_utilization": 0.8, "max_num_seqs": 64, "seed": 1}\'',
            {"vllm_maxlen": 8192, "vllm_gpu_util": 0.8, "max_batch_size": 64, "vllm_config": {"seed": 1}},
        ),
        (
            "vllm_config: {dtype: half}\ninfer_dtype: auto\n",
            "vllm_config says dtype='half', and infer_dtype says 'auto'",
        ),
        ("vllm_config: {max_model_len: 8192}\nvllm_maxlen: 8192", {"vllm_maxlen": 8192, "vllm_config": {}}),
        ("vllm_config: {max_model_len: 8192}\nvllm_maxlen: 4096", "vllm_config says max_model_len=8192"),
        (
            "vllm_config: {dtype: bfloat16, enforce_eager: true}",
            {"infer_dtype": "bfloat16", "vllm_enforce_eager": True},
        ),
        ("vllm_config: {trust_remote_code: true}", {"trust_remote_code": True}),
        ("vllm_config: {max_num_seqs: 0}", "max_batch_size"),
        ("vllm_config: {runner: pooling}", "'runner', which tokenfleet sets itself. See"),
        ("vllm_config: '{'", "JSON"),
        ("vllm_config: [1]", "vllm_config: Input should be a valid dictionary"),
        (
            "sglang_config: {context_length: 8192, mem_fraction_static: 0.8, max_running_requests: 64, tp_size: -1}",
            {"sglang_maxlen": 8192, "sglang_mem_fraction": 0.8, "max_batch_size": 64, "sglang_tp_size": None},
        ),
        ("sglang_config: {quantization: fp8}\nquantization_bit: 8", "exclude one another"),
    ],
)
def test_an_engines_own_names_of_our_options_are_understood(
    given: str, means: dict[str, Any] | str, tmp_path: Path
) -> None:
    engine = given.partition("_")[0]
    text = f"model_name_or_path: m\ninfer_backend: {engine}\n{given}\n"
    if isinstance(means, str):
        with pytest.raises(ConfigurationError) as caught:
            read(text, tmp_path)
        assert means in str(caught.value)
        assert "Value error" not in str(caught.value)
        return
    _, options, _ = read(text, tmp_path)
    assert {name: getattr(options, name) for name in means} == means


@pytest.mark.parametrize(
    ("settings", "concurrency"),
    [
        ({"engine": "vllm", "engine_args": {"vllm_config": {"max_num_seqs": 64}}}, 64),
        ({"engine": "sglang", "engine_args": {"sglang_config": {"max_running_requests": 32}}}, 32),
        ({"engine": "vllm", "engine_args": {"max_batch_size": 8}}, 8),
        ({"engine": "vllm", "engine_args": {"vllm_config": '{"max_num_seqs": 64}'}}, 64),
        ({"engine": "vllm", "engine_args": {"max_batch_size": 8}, "slots": 4}, 4),
        ({"engine": "vllm", "engine_args": {"max_batch_size": 8}, "slots": 16}, 8),
        ({"engine": "vllm", "engine_args": {"vllm_config": "x"}}, 256),
        ({"engine": "vllm", "engine_args": {"max_batch_size": "x"}}, 256),
        ({"engine": "transformers"}, 16),
    ],
)
def test_a_worker_takes_as_many_jobs_as_its_engine(settings: dict[str, Any], concurrency: int) -> None:
    assert WorkerSettings(**settings).concurrency == concurrency


def test_the_documented_command_line_is_understood(tmp_path: Path) -> None:
    words = ("temperature=0.6", "vllm_config.max_num_seqs=64")
    _, options, generation = read(f"{SMALL}infer_backend: vllm\n", tmp_path, *words)
    assert options.max_batch_size == 64
    assert generation == {"temperature": 0.6}


def test_what_is_of_training_alone_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = f"{SMALL}cutoff_len: 2048\nlora_rank: 8\nlora_target: all\nuse_fast_tokenizer: true\nresize_vocab: null\n"
    with caplog.at_level(logging.WARNING):
        assert read(text, tmp_path, "low_cpu_mem_usage=true")[1] == read(SMALL, tmp_path)[1]
    assert len(caplog.records) == 1
    assert "cutoff_len, lora_rank, lora_target" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("use_kv_cache: false", "LLaMA-Factory"),
        ("resize_vocab: true", "Save the model"),
        ("double_quantization: false", "Leave it out"),
        ("tool_format: glm4", "A template brings"),
        ("hf_hub_token: hf_secret", "HF_TOKEN"),
        ("output_dir: saves", "Unknown argument: output_dir"),
        ("infer_backend: ktransformers", "infer_backend"),
        ("infer_backend: vllm\nflash_attn: fa2", "attention_backend"),
        ("infer_backend: sglang\nflash_attn: disabled", "attention_backend"),
        ("vllm_maxlen: 4096", "vllm_maxlen means nothing to the engine 'transformers'"),
    ],
)
def test_what_would_be_done_otherwise_is_refused_by_name(line: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(f"model_name_or_path: m\n{line}\n", tmp_path)
    assert hint in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_options_that_contradict_one_another_are_told_in_plain_words() -> None:
    from tokenfleet.engines.vllm_engine.options import VllmOptions

    with pytest.raises(ConfigurationError) as caught:
        options_of(VllmOptions, {"model_name_or_path": "m", "image_max_pixels": 1, "image_min_pixels": 2}, "vllm")
    assert caught.value.message == "Engine vllm: image_min_pixels is larger than image_max_pixels."
    with pytest.raises(ConfigurationError) as caught:
        options_of(VllmOptions, {"model_name_or_path": "m", "flash_attn": "fa2"}, "vllm")
    assert caught.value.message == "Engine vllm: flash_attn: There is no such option."
    assert isinstance(caught.value.__cause__, ValidationError)

"""What the vLLM engine does without vLLM."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest
from pydantic import ValidationError

from tests.processes import all_gone, eventually, is_alive
from tokenfleet.engines.lifeline import leave_with_parent
from tokenfleet.engines.vllm_engine.options import VllmOptions


def _child(pids):
    leave_with_parent()
    pids.send(os.getpid())
    time.sleep(60)


def _parent(pids):
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(pids,))
    child.start()
    child.join()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_spawned_process_leaves_with_its_parent(how):
    spawn = multiprocessing.get_context("spawn")
    reader, writer = spawn.Pipe(duplex=False)
    parent = spawn.Process(target=_parent, args=(writer,))
    parent.start()
    try:
        assert reader.poll(30)
        pid = reader.recv()
        assert is_alive(pid)
        os.kill(parent.pid, how)
        eventually(lambda: all_gone([pid]), 10, "the child gone")
    finally:
        parent.kill()
        parent.join()
        reader.close()
        writer.close()


def test_vllm_config_is_a_mapping_or_json():
    for given in ({"max_num_batched_tokens": 64}, '{"max_num_batched_tokens": 64}'):
        assert VllmOptions(model_name_or_path="m", vllm_config=given).vllm_config == {"max_num_batched_tokens": 64}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vllm_config": {"dtype": "float16"}, "infer_dtype": "float32"}, "dtype"),
        ({"vllm_config": {"speculative_config": {}}}, "speculative_config"),
        ({"vllm_config": "max_num_seqs"}, "JSON"),
        ({"vllm_config": {"quantization": "fp8"}}, "quantization"),
        ({"quantization_method": "fp8"}, "quantization_bit"),
        ({"quantization_bit": 4, "quantization_method": "fp8"}, "bnb"),
        ({"vllm_maxlenn": 3}, "vllm_maxlenn"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_is_refused_by_name(options, says):
    with pytest.raises(ValidationError, match=says):
        VllmOptions(model_name_or_path="m", **options)


def _save_lora(folder, modules, *, rank, alpha, **config):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    torch.manual_seed(rank)
    pairs = {module: (torch.randn(rank, 6), torch.randn(4, rank)) for module in modules}
    folder.mkdir()
    save_file(
        {
            f"{module}.lora_{name}.weight": part
            for module, pair in pairs.items()
            for name, part in zip("AB", pair, strict=True)
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha, **config}))
    return pairs


def test_joined_adapters_add_what_each_of_them_adds(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from tokenfleet.engines.vllm_engine.adapters import joined, read

    first = _save_lora(tmp_path / "first", ["x.q_proj", "x.v_proj"], rank=2, alpha=8)
    second = _save_lora(tmp_path / "second", ["x.v_proj", "x.down"], rank=3, alpha=6, use_rslora=True)
    both = [read(tmp_path / name, allow_pickle=False) for name in ("first", "second")]
    adapter = joined(both, tmp_path / "joined")
    assert (adapter.rank, read(adapter.path, allow_pickle=False).rank) == (5, 5)
    weights = load_file(adapter.path / "adapter_model.safetensors")
    for module in ("x.q_proj", "x.v_proj", "x.down"):
        expected = torch.zeros(4, 6)
        for pairs, scaling in ((first, 8 / 2), (second, 6 / 3**0.5)):
            if module in pairs:
                a, b = pairs[module]
                expected += scaling * (b @ a)
        added = weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"]
        torch.testing.assert_close(added, expected)


@pytest.mark.parametrize("odd", ["use_dora", "modules_to_save"])
def test_an_adapter_that_is_more_than_a_plain_lora_is_not_joined(tmp_path, odd):
    from tokenfleet.engines.vllm_engine.adapters import joined, read
    from tokenfleet.wire.errors import ConfigurationError

    _save_lora(tmp_path / "plain", ["x.q_proj"], rank=2, alpha=8)
    _save_lora(tmp_path / "odd", ["x.q_proj"], rank=2, alpha=8, **{odd: ["lm_head"]})
    both = [read(tmp_path / name, allow_pickle=False) for name in ("plain", "odd")]
    with pytest.raises(ConfigurationError, match=odd):
        joined(both, tmp_path / "joined")

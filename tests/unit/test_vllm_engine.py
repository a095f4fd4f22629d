"""What the vLLM engine does without vLLM."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from pydantic import ValidationError

from tests.processes import all_gone, is_alive, wait_until
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
        wait_until(lambda: all_gone([pid]), 10, "the child gone")
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
        ({"vllm_config": {"worker_extension_cls": "a.B"}}, "worker_extension_cls"),
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

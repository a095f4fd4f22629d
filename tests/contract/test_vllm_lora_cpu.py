"""Our multiplication of adapters in vLLM on a CPU, held to vLLM's own, which takes each token for itself."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed: its pins exclude this environment's, see `make test-vllm-cpu`",
)
RANK, WIDE, WIDTHS, ADAPTERS = 8, 32, (24, 16, 16), 3
STEPS = {
    "a token of each chat": [0, None, 1, 0, None, 1, 2],
    "prompts": [0] * 40 + [None] * 20 + [1] * 33,
    "prompts beside tokens": [1, None, 0, 1, *[2] * 50, *[1] * 30, *[None] * 7, *[2] * 21],
    "no adapter": [None] * 9,
    "one token": [2],
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_gets_of_its_adapters_what_vllm_would_give_it(step, precision):
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper import punica_cpu

    from tokenfleet.engines.vllm_engine import lora_cpu

    class Ours(punica_cpu.PunicaWrapperCPU):
        pass

    assert lora_cpu.fits(Ours), "this vLLM's wrapper is another one: its own slow kernels are used"
    lora_cpu.replace(Ours)
    torch.manual_seed(0)
    dtype = getattr(torch, precision)
    x = torch.randn(len(step), WIDE, dtype=dtype)
    # One more than there are adapters: vLLM's kernels take the last one for a row without any.
    a = tuple(torch.randn(ADAPTERS + 1, 1, RANK, WIDE, dtype=dtype) for _ in WIDTHS)
    b = tuple(torch.randn(ADAPTERS + 1, 1, width, RANK, dtype=dtype) for width in WIDTHS)
    for each in (*a, *b):
        each[ADAPTERS] = 0
    outputs = []
    for kind in (punica_cpu.PunicaWrapperCPU, Ours):
        wrapper = kind(256, 16, "cpu")
        numbers = tuple(0 if place is None else place + 1 for place in step)
        mapping = LoRAMapping(numbers, numbers, is_prefill=True)
        wrapper.update_metadata(mapping, [1, 2, 3, None], ADAPTERS + 1, 100)
        y = torch.ones(len(step), sum(WIDTHS), dtype=dtype)
        wrapper.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
        outputs.append(y.float())
    theirs, ours = outputs
    assert float((theirs - ours).abs().max()) <= (1e-6 if precision == "float32" else 0.01) * float(theirs.abs().max())
    changed = (ours != 1).any(dim=1).tolist()
    assert changed == [place is not None for place in step]


@pytest.mark.parametrize("name", ["processors", "worker"])
def test_the_process_that_computes_multiplies_so(name, monkeypatch):
    """By what vLLM imports there: the one for models that generate, the other for those that score."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.worker.gpu_input_batch import InputBatch

    from tokenfleet.engines.vllm_engine import compat

    module = importlib.import_module(f"tokenfleet.engines.vllm_engine.{name}")
    theirs = PunicaWrapperCPU.add_lora_linear
    monkeypatch.setattr(PunicaWrapperCPU, "add_lora_linear", theirs)  # and back, at the end of the test
    monkeypatch.setattr(PunicaWrapperCPU, "update_metadata", PunicaWrapperCPU.update_metadata)
    monkeypatch.setattr(InputBatch, "logitsprocs_need_output_token_ids", None, raising=False)
    monkeypatch.setattr(compat, "is_front_end", False)
    importlib.reload(module)
    assert PunicaWrapperCPU.add_lora_linear is not theirs

"""What of the SGLang engine needs no SGLang: its options, its random numbers, its pace, what it tells the sampler."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tokenfleet.engines.base import Sequence
from tokenfleet.engines.sglang_engine import SglangOptions
from tokenfleet.engines.sglang_engine.params import sampling_params
from tokenfleet.engines.sglang_engine.scheduler import Pace
from tokenfleet.wire.chat import GenerationParams

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sglang_config": {"sampling_backend": "flashinfer"}}, "sampling_backend"),
        ({"sglang_config": '{"speculative_algorithm": "EAGLE"}'}, "speculative_algorithm"),
        ({"sglang_config": {"load_format": "pt"}}, "load_format"),
        ({"sglang_config": {"preferred_sampling_params": '{"min_new_tokens": 9}'}}, "preferred_sampling_params"),
        ({"sglang_config": "{"}, "JSON"),
        ({"quantization_method": "fp8"}, "quantization_bit"),
        ({"quantization_bit": 8, "quantization_method": "bnb"}, "bnb"),
        ({"quantization_bit": 4}, "quantization_bit=4"),
        ({"quantization_bit": 8, "quantization": "w8a8_int8"}, "quantization"),
        ({"rope_scaling": "dynamic"}, "rope_scaling"),
        ({"sglang_mem_fraction": 1.5}, "sglang_mem_fraction"),
        ({"vllm_maxlen": 5}, "vllm_maxlen"),
    ],
)
def test_options_that_would_change_a_requests_meaning_are_refused_by_name(options, named):
    with pytest.raises(ValidationError, match=named):
        SglangOptions(model_name_or_path="m", **options)


def test_a_format_that_reads_no_pickle_is_taken_and_another_one_when_allowed():
    assert SglangOptions(model_name_or_path="m", sglang_config={"load_format": "dummy"})
    assert SglangOptions(model_name_or_path="m", sglang_config={"load_format": "pt"}, allow_pickle=True)


def test_random_numbers_are_functions_of_key_and_index_and_look_like_chance():
    torch = pytest.importorskip("torch")
    from tokenfleet.engines.sglang_engine.uniform import streams, uniform

    keys, index = torch.arange(100)[:, None], torch.arange(500)[None, :]
    numbers = uniform(streams(keys), index)
    assert torch.equal(numbers, uniform(streams(keys), index))
    assert torch.equal(numbers[3:4, 7:9], uniform(streams(torch.tensor([[3]])), torch.tensor([[7, 8]])))
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert numbers.unique().numel() == numbers.numel()
    counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 160  # chi-square of 99: above this once in 10,000
    for other in (numbers.roll(1, 0), numbers.roll(1, 1)):  # neighbours know nothing of one another
        assert abs(float(torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1])) < 0.02


@pytest.mark.parametrize("width", [1, 50, 256, 257, 5000, 49152])
def test_a_number_picks_the_place_where_its_share_of_the_weights_is(width):
    torch = pytest.importorskip("torch")
    from tokenfleet.engines.sglang_engine.torch_draw import inverse

    generator = torch.Generator().manual_seed(width)
    weights = torch.randn(64, width, generator=generator).mul(4).exp()
    weights[torch.rand(64, width, generator=generator) < 0.5] = 0
    weights[:, width // 2] = 1
    numbers = torch.rand(64, 1, generator=generator, dtype=torch.float64)
    numbers[:4, 0] = torch.tensor([0, 2**-53, 1 - 2**-53, 0.5])
    shares = weights.double().numpy().cumsum(axis=1) / weights.double().numpy().sum(axis=1, keepdims=True)
    for row, place in enumerate(inverse(weights, numbers).tolist()):
        number = float(numbers[row, 0])
        assert weights[row, place] > 0
        assert shares[row, place] > number - 1e-12
        assert place == 0 or shares[row, place - 1] <= number + 1e-12


def test_one_reader_gets_each_step_and_many_get_several_at_once(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)

    def intervals(requests, step_s):
        nonlocal now_s
        pace = Pace()
        for _ in range(200):
            now_s += step_s
            last = pace.interval(requests)
        return last

    assert intervals(1, 0.0005) == 1
    assert intervals(15, 0.002) == 1
    assert 8 <= intervals(256, 0.0035) <= 12  # a small model on an H100: 72,000 tokens a second at 10
    assert intervals(256, 0.05) == 1  # a large one: there is time for every step


def test_what_ends_a_text_is_told_to_sglang_and_the_rest_to_the_sampler():
    params = GenerationParams(seed=7, min_tokens=5, repetition_penalty=3.0, logit_bias={4: 1.5}, stop_token_ids=(9,))
    sequence = Sequence("s", (1, 2), params, 20, seed=7, delivered_ids=(3, 4), eos_ids=frozenset({1}))
    told = sampling_params(sequence)
    # SGLang would ignore stop_token_ids with EOS.
    assert (told["max_new_tokens"], told["stop_token_ids"], told["ignore_eos"]) == (18, [1, 9], False)
    ours = told["custom_params"]
    assert (ours["prompt"], ours["delivered"], ours["min_tokens"], ours["barred"]) == (2, 2, 5, [1, 9])
    assert (ours["repetition_penalty"], ours["bias_ids"], ours["bias"]) == (3.0, [4], [1.5])
    assert told == sampling_params(sequence)
    unseeded = [sampling_params(Sequence("s", (1,), GenerationParams(), 5))["custom_params"]["seed"] for _ in range(9)]
    assert len(set(unseeded)) == 9

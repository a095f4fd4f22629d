"""LoRA adapters as vLLM and SGLang get them, without either."""

from __future__ import annotations

import json

import pytest


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

    from tokenfleet.engines.lora import read
    from tokenfleet.engines.lora_joining import joined

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


def test_an_adapter_with_scalings_of_its_own_for_some_modules_has_one_afterwards(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from tokenfleet.engines.lora import read
    from tokenfleet.engines.lora_joining import joined

    names = [f"base_model.model.layers.{layer}.{name}_proj" for layer in (1, 11) for name in "qv"]
    patterns = {r"layers\.1\.q_proj": 6, "v_proj": 12}
    pairs = _save_lora(tmp_path / "x", names, rank=2, alpha=8, use_rslora=True, alpha_pattern=patterns)
    adapter = read(tmp_path / "x", allow_pickle=False)
    assert not adapter.is_uniform
    [made] = [joined([adapter], tmp_path / "made")]
    assert made.is_uniform
    assert made.config["r"] == made.config["lora_alpha"] == 2
    weights = load_file(made.path / "adapter_model.safetensors")
    for name, alpha in zip(names, (6, 12, 8, 12), strict=True):
        a, b = pairs[name]
        added = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        torch.testing.assert_close(added, alpha / 2**0.5 * (b @ a))
    plain = _save_lora(tmp_path / "plain", names, rank=2, alpha=8) and read(tmp_path / "plain", allow_pickle=False)
    assert joined([plain], tmp_path / "unused") is plain


@pytest.mark.parametrize(
    "odd",
    [
        {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"init_lora_weights": "pissa_niter_4"},
        {"lora_bias": True}, {"trainable_token_indices": [1]}, {"peft_type": "IA3"}, {"something_new": {"a": 1}},
    ],
    ids=lambda odd: next(iter(odd)),
)  # fmt: skip
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused_by_what_it_is(tmp_path, odd):
    from tokenfleet.engines.lora import read
    from tokenfleet.wire.errors import ConfigurationError

    _save_lora(tmp_path / "odd", ["x.q_proj"], rank=2, alpha=8, **odd)
    with pytest.raises(ConfigurationError, match=next(iter(odd))):
        read(tmp_path / "odd", allow_pickle=False)


def test_an_adapter_of_another_model_does_not_fit(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from tokenfleet.engines.lora import check_fits, read
    from tokenfleet.wire.errors import ConfigurationError

    model = {f"model.layers.{layer}.q_proj.weight": torch.zeros(4, 6) for layer in range(2)}
    packed = {"model.layers.0.v_proj.weight": torch.zeros(3, 3, dtype=torch.uint8)}
    (tmp_path / "model").mkdir()
    save_file(model | packed, tmp_path / "model" / "model.safetensors")
    prefix = "base_model.model."
    for name, modules, told in (
        ("fits", ["model.layers.1.q_proj", "model.layers.0.v_proj", "language_model.layers.7.q_proj"], None),
        ("deeper", ["model.layers.0.q_proj", "model.layers.2.q_proj"], "layers.2"),
        ("wider", ["model.layers.0.q_proj"], "4 x 8"),
    ):
        folder = tmp_path / name
        _save_lora(folder, [prefix + module for module in modules], rank=2, alpha=8)
        if name == "wider":
            weights = {"lora_A": torch.zeros(2, 8), "lora_B": torch.zeros(4, 2)}
            named = {f"{prefix}{modules[0]}.{part}.weight": value for part, value in weights.items()}
            save_file(named, folder / "adapter_model.safetensors")
        adapter = read(folder, allow_pickle=False)
        if told is None:
            check_fits(adapter, tmp_path / "model")
            continue
        with pytest.raises(ConfigurationError, match=told):
            check_fits(adapter, tmp_path / "model")
    (tmp_path / "fits" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigurationError, match="can't be read"):
        check_fits(read(tmp_path / "fits", allow_pickle=False), tmp_path / "model")


def test_sglang_gets_zeros_for_what_an_adapter_leaves_alone_of_modules_computed_together(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from tokenfleet.engines.lora import read
    from tokenfleet.engines.sglang_engine.adapters import completed
    from tokenfleet.wire.errors import ConfigurationError

    heights = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    (tmp_path / "model").mkdir()
    save_file(
        {f"l.0.{name}.weight": torch.zeros(h, 6) for name, h in heights.items()}, tmp_path / "model/x.safetensors"
    )
    stem = "base_model.model.l.0."
    _save_lora(
        tmp_path / "q", [f"{stem}q_proj", f"{stem}up_proj"], rank=2, alpha=8, target_modules=["q_proj", "up_proj"]
    )
    made = completed(read(tmp_path / "q", allow_pickle=False), tmp_path / "model", tmp_path / "made")
    before, weights = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "q", made.path))
    assert made.config["target_modules"] == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    for name, value in weights.items():
        assert value.equal(before[name]) if name in before else not value.any()
    shapes = {name: tuple(weights[f"{stem}{name}.lora_B.weight"].shape) for name in (*heights, "gate_proj")}
    assert shapes == {"q_proj": (4, 2), "k_proj": (2, 2), "v_proj": (2, 2), "gate_proj": (4, 2)}
    whole = read(made.path, allow_pickle=False)
    assert completed(whole, tmp_path / "model", tmp_path / "unused") is whole
    (tmp_path / "model/x.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="SGLang can't apply"):
        completed(read(tmp_path / "q", allow_pickle=False), tmp_path / "model", tmp_path / "unused")


def test_sglang_on_a_cpu_gets_no_adapter_of_lm_head(tmp_path, monkeypatch):
    """It applied them to the wrong rows: 8.8 off the best logit in a batch of six, seen with 0.5.23."""
    torch = pytest.importorskip("torch")
    from tokenfleet.engines.lora import read
    from tokenfleet.engines.sglang_engine.adapters import completed
    from tokenfleet.wire.errors import ConfigurationError

    _save_lora(tmp_path / "x", ["base_model.model.lm_head"], rank=2, alpha=8, target_modules=["lm_head"])
    adapter = read(tmp_path / "x", allow_pickle=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="lm_head"):
        completed(adapter, tmp_path, tmp_path / "made")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert completed(adapter, tmp_path, tmp_path / "made") is adapter

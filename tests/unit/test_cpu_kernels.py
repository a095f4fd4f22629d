"""What the transformers engine puts in the place of transformers' own code on a CPU computes the same."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from tokenfleet.engines.transformers_engine.attention import _grouped_sdpa  # noqa: E402
from tokenfleet.engines.transformers_engine.norms import PlainRMSNorm, simplify_norms  # noqa: E402

SIZES = {
    "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip


def model_of(config):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.2, 2.0)
    return model


@pytest.mark.parametrize(
    ("config", "replaced"),
    [
        (transformers.LlamaConfig(**SIZES), 5),
        (transformers.Qwen3Config(**SIZES), 9),  # of queries and keys, too
        (transformers.Gemma3TextConfig(**SIZES), 0),  # its weights are offsets from one
        (transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=64), 0),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_norms_are_replaced_only_where_the_model_computes_the_same(config, replaced):
    model, ids = model_of(config), torch.arange(14).view(2, 7)
    expected = model(ids).logits
    assert simplify_norms(model) == replaced
    assert sum(isinstance(module, PlainRMSNorm) for module in model.modules()) == replaced
    assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_in_half_precision_is_left_to_the_model():
    model = model_of(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    assert simplify_norms(model) == 0


@pytest.mark.parametrize("heads", [(6, 2), (6, 1), (4, 2)])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("is_additive", [False, True])
def test_heads_that_share_keys_attend_as_if_the_keys_were_copied(heads, columns, is_additive):
    """Rows with paddings of their own, keys that are a window of a larger buffer."""
    torch.manual_seed(5)
    heads, key_heads = heads
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = heads // key_heads, True, False
    query = torch.randn(3, columns, heads, 8).transpose(1, 2)
    key, value = (torch.randn(3, key_heads, 40, 8)[:, :, 9:29] for _ in range(2))
    places = torch.arange(20)
    seen = (places[None, :] >= torch.tensor([0, 4, 11])[:, None])[:, None, None, :]
    mask = seen & (places[None, :] <= places[20 - columns :, None])
    if is_additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    ours, _ = _grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert ours.shape == theirs.shape == (3, columns, heads, 8)
    assert torch.allclose(ours, theirs, atol=1e-5)

"""A small Llama with its linear layers in 4 bits as GPTQ's and AWQ's tools save them: rounded to nearest, not tuned."""

from __future__ import annotations

import json
from contextlib import aclosing
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file

from tests.contract import small_models
from tokenfleet.engines.base import Sequence
from tokenfleet.wire.chat import GenerationParams

GROUP = 128
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which output of eight stands in each nibble (casper-hansen/AutoAWQ, awq/utils/packing_utils.py)."""
TOLERANCE = 0.1
"""Of `gaps`, in float16 against float32; the best two logits are mostly some 0.4 apart."""
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
             "checkpoint_format": "gptq", "lm_head": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}  # fmt: skip


def save(method: str, folder: Path):
    """Save the packed model; gives the plain one with the same rounded weights, in float32."""
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(
        hf.LlamaConfig(
            vocab_size=small_models.VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1,
            pad_token_id=0, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        )
    ).eval().float()  # fmt: skip
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            values, zeros, scales = _rounded(module.weight.detach(), has_zeros=method == "awq")
            groups = values.view(len(scales), GROUP, -1)
            module.weight.data = ((groups - zeros[:, None]) * scales[:, None].float()).flatten(0, 1).T.contiguous()
            pack = _gptq if method == "gptq" else _awq
            tensors |= {f"{name}.{key}": value for key, value in pack(values, zeros).items()}
            tensors[f"{name}.scales"] = scales
    small_models._saved(model, folder)
    packed = {name.rpartition(".")[0] for name in tensors}
    plain = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in packed}
    plain = {name: value.half().contiguous() for name, value in plain.items()}
    save_file({**plain, **tensors}, folder / "model.safetensors", {"format": "pt"})
    for name, value in plain.items():  # the rest is as exact as it is saved
        model.get_parameter(name).data = value.float()
    config = json.loads((folder / "config.json").read_text())
    written = {**config, "dtype": "float16", "quantization_config": CONFIGS[method]}
    (folder / "config.json").write_text(json.dumps(written))
    return model


async def gaps(engine, plain) -> list[float]:
    """By how much each token of a greedy answer fell short of the plain model's best one, as logits."""
    prompt = tuple(range(20, 60))
    sequence = Sequence("packed", prompt, GenerationParams(do_sample=False, ignore_eos=True), 24)
    async with aclosing(engine.generate(sequence)) as chunks:
        ids = [token async for chunk in chunks for token in chunk.ids]
    with torch.inference_mode():
        logits = plain(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return [float(row.max() - row[token]) for row, token in zip(logits, ids, strict=True)]


def _rounded(weight: torch.Tensor, *, has_zeros: bool):
    """``[out, in]`` → values 0 to 15 ``[in, out]``, zeros and scales ``[groups, out]``, so that a weight is
    (value - zero) * scale."""
    groups = weight.T.reshape(-1, GROUP, weight.shape[0])
    low, high = groups.amin(1), groups.amax(1)
    if has_zeros:
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
    else:
        scales = (torch.maximum(high, -low) / 7.5).half()
        zeros = torch.full_like(low, 8)
    values = (groups / scales[:, None].float()).round() + zeros[:, None]
    return values.clamp(0, 15).flatten(0, 1), zeros, scales


def _gptq(values: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight inputs to a number; its zeros, eight outputs to one, are stored less one
    (AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_exllama.py)."""
    index = torch.arange(len(values), dtype=torch.int32) // GROUP
    return {"qweight": _packed(values.T).T.contiguous(), "qzeros": _packed(zeros - 1), "g_idx": index}


def _awq(values: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    def in_order(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(len(rows), -1, 8)[:, :, _AWQ_ORDER].flatten(1)

    return {"qweight": _packed(in_order(values)), "qzeros": _packed(in_order(zeros))}


def _packed(rows: torch.Tensor) -> torch.Tensor:
    """``[n, 8 m]`` of 0 to 15 → ``[n, m]`` int32, the first in the lowest bits."""
    nibbles = rows.to(torch.int64).reshape(len(rows), -1, 8) << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.int32)

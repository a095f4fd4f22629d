"""The kernel that chooses tokens on a GPU, and torch's operations that do on a CPU, against plain Python.

Without a GPU the kernel runs in Triton's interpreter, which has to be chosen before Triton is imported: in a process of
its own."""

from __future__ import annotations

import math
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = [pytest.mark.contract, pytest.mark.timeout(200)]
PROMPT = 3
ROWS = 4


def cases(seed, sizes, dtypes):
    """(scores ``[ROWS, vocab]``, rows), with candidates that a grammar excludes; in 16 bits with ties."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for vocab in sizes:
        scores = torch.randn(ROWS, vocab) * draw.choice([0.5, 3, 10])
        scores = scores.to(draw.choice(dtypes))
        if draw.random() < 0.3:
            scores[:, 1::3] = -math.inf
        sampled = [
            {
                "seed": draw.randrange(1 << 62), "temperature": draw.choice([1e-3, 0.5, 0.95, 1.0, 2.0, 100.0]),
                "top_p": draw.choice([1.0, 1.0, 0.9, 0.7, 0.1, 0.0]), "min_p": draw.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
                "top_k": draw.choice([-1, -1, 1, 2, 5, 50, 5000]), "prompt": PROMPT,
            }
            for _ in range(ROWS)
        ]  # fmt: skip
        yield scores, [row if draw.random() < 0.9 else {"prompt": PROMPT} for row in sampled]


def choice(scores, row, number):
    """(the token that ``number`` picks, how close ``number`` is to another's). Of equal scores the first is taken."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if "seed" not in row:
        return order[0], 1.0
    top = scores[order[0]]
    order = [i for i in order if scores[i] > -math.inf][: row["top_k"] if row["top_k"] > 0 else None]
    weights = {i: math.exp((scores[i] - top) / row["temperature"]) for i in order}
    total = math.fsum(weights.values())
    kept, before = [], 0.0
    for place, i in enumerate(order):
        in_nucleus = row["top_p"] == 1 or before < row["top_p"] * total
        if place == 0 or (in_nucleus and weights[i] >= row["min_p"]):
            kept.append(i)
        before += weights[i]
    kept.sort()
    total = math.fsum(weights[i] for i in kept)
    distance, passed, found = 1.0, 0.0, None
    for i in kept:
        passed += weights[i] / total
        distance = min(distance, abs(passed - number))
        if found is None and passed > number:
            found = i
    return found if found is not None else kept[-1], distance


def wrong_choices(kind, seed, sizes, device):
    """How many rows were tried, and those that came out otherwise than ``choice`` says."""
    from tokenfleet.engines.sglang_engine import triton_draw
    from tokenfleet.engines.sglang_engine.torch_draw import TorchDraw
    from tokenfleet.engines.sglang_engine.uniform import streams, uniform

    if device == "cpu":
        triton_draw._TILE = 256  # several to a row
    drawing = {"torch": TorchDraw, "triton": triton_draw.TritonDraw}[kind]
    # torch's own order of equal scores is nobody's promise.
    dtypes = [torch.float32] if kind == "torch" else [torch.float32, torch.bfloat16, torch.float16]
    positions = torch.arange(ROWS) + 5
    tried, wrong = 0, []
    for scores, rows in cases(seed, sizes, dtypes):
        draw = drawing(rows, scores.shape[1], torch.device(device))
        ids = draw(scores.to(device), positions.to(device)).tolist()
        keys = torch.tensor([[row.get("seed", 0)] for row in rows])
        numbers = uniform(streams(keys), positions[:, None] + 1 - PROMPT)[:, 0].tolist()
        for values, row, number, token in zip(scores.float().tolist(), rows, numbers, ids, strict=True):
            wanted, distance = choice(values, row, number)
            tried += 1
            if token != wanted and distance > 1e-5:
                wrong.append((scores.shape[1], str(scores.dtype), row, token, wanted))
    return tried, wrong


def test_the_kernel_chooses_what_plain_python_does(monkeypatch):
    sizes = [1, 7, 256, 300, 1000] * 8
    if torch.cuda.is_available():
        tried, wrong = wrong_choices("triton", 1, [*sizes, 8192, 49152, 151936], "cuda")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            tried, wrong = process.submit(wrong_choices, "triton", 1, sizes, "cpu").result()
    assert wrong == []
    assert tried >= ROWS * len(sizes)


def test_torch_chooses_what_plain_python_does():
    tried, wrong = wrong_choices("torch", 2, [1, 7, 256, 300, 1000, 8192] * 20, "cpu")
    assert wrong == []
    assert tried == 120 * ROWS


@pytest.mark.parametrize("scores", ["*bf16", "*fp16", "*fp32"])
def test_the_kernel_compiles_for_a_card(scores):
    """Triton's compiler needs none, but takes less Python than its interpreter."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tokenfleet.engines.sglang_engine import draw_kernel, triton_draw

    pointers = {"positions": "*i64", "floats": "*fp32", "whole": "*i64", "ids": "*i64"}
    signature = {"scores": scores, **pointers, "stride": "i32", "vocab": "i32", "tile": "constexpr"}
    source = ASTSource(draw_kernel.draw, signature, {"tile": triton_draw._TILE})
    for capability in (80, 90):
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_draw._WARPS})
        assert compiled.asm["cubin"]

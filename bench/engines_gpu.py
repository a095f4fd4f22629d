"""An engine's own offline batch against our adapter over it, on a GPU (or, to try the script, a CPU).

    python -m bench.engines_gpu vllm|sglang [--streams 256] [--tokens 512] [--rounds 3] [--tiny] [--limit-s 200]

A Llama of SmolLM2-135M's shape with random weights in bfloat16 (its weights don't change the work), prompts of 64
random ids, sampling at temperature 1 without cuts, EOS ignored. Each side has a process of its own, so that one's
memory is not the other's; both are timed over the same rounds after one that warms up. What a side does is printed as
it happens, with its seconds; a side that takes longer than its limit is ended, what it had found is kept. The sides:

offline      the engine's own batch call (`LLM.generate`, `Engine.generate`), with and without detokenizing
adapter      `Engine.generate` of ours, a reader for each stream: ids in, ids out
deltas       the same with text: `generate_deltas`, what a worker publishes
one stream   the adapter alone with one stream: how many tokens come in a delta when nothing else runs
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TINY = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 2048}
CONTEXT_TOKENS = 2048


def save_model(folder: Path, shape: dict[str, Any]) -> None:
    """Random weights, and a byte-level tokenizer with a token for every id."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters]
    draw = random.Random(0)
    known = set(words)
    while len(words) < shape["vocab_size"]:
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyzĠ", k=draw.randint(2, 8)))
        if word not in known:
            known.add(word)
            words.append(word)
    backend = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def prompts(args: argparse.Namespace) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(300, 2000) for _ in range(64)] for _ in range(args.streams)]


def report(**figures: Any) -> None:
    print("RESULT " + json.dumps(figures), flush=True)


def stage(what: str) -> None:
    print(what, flush=True)


# -- offline ----------------------------------------------------------------------------------------------------------


def offline_vllm(args: argparse.Namespace) -> None:
    from tokenfleet.engines.vllm_engine import compat

    compat.prepare_environment()
    import vllm

    stage("imported; the engine starts")
    engine = vllm.LLM(
        args.model, dtype="bfloat16", max_num_seqs=args.streams, max_model_len=CONTEXT_TOKENS,
        enforce_eager=args.tiny, disable_log_stats=True, **args.options,
    )  # fmt: skip
    batch = [{"prompt_token_ids": ids} for ids in prompts(args)]
    for detokenize in (False, True):
        sampling = vllm.SamplingParams(
            temperature=1, max_tokens=args.tokens, ignore_eos=True, detokenize=detokenize, seed=None
        )

        def run(sampling: Any = sampling) -> int:
            outputs = engine.generate(batch, sampling, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        measure("offline, text" if detokenize else "offline, ids", run, args)


def offline_sglang(args: argparse.Namespace) -> None:
    import sglang

    stage("imported; the engine starts")
    engine = sglang.Engine(
        model_path=args.model, dtype="bfloat16", max_running_requests=args.streams, context_length=CONTEXT_TOKENS,
        log_level="info", log_requests=False, sampling_backend="pytorch",
        grammar_backend="none", **args.options,
    )  # fmt: skip
    sampling = {"temperature": 1, "max_new_tokens": args.tokens, "ignore_eos": True}

    def run() -> int:
        outputs = engine.generate(input_ids=prompts(args), sampling_params=sampling)
        return sum(output["meta_info"]["completion_tokens"] for output in outputs)

    measure("offline", run, args)
    engine.shutdown()


def measure(name: str, run: Any, args: argparse.Namespace) -> None:
    stage(f"{name}: warming up")
    run()
    stage(f"{name}: {args.rounds} rounds")
    rates = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        made = run()
        rates.append(made / (time.perf_counter() - start))
    report(side=name, rates=rates)


# -- adapter ----------------------------------------------------------------------------------------------------------


async def adapter(args: argparse.Namespace) -> None:
    from tokenfleet.engines import registry
    from tokenfleet.engines.base import Sequence
    from tokenfleet.engines.generation import GenerationJob, generate_deltas
    from tokenfleet.wire.chat import GenerationParams
    from tokenfleet.wire.events import Delta

    stage("the engine starts")
    loaded = await registry.load(args.engine, args.adapter_options, registry.ModelSettings("135m", slots=args.streams))
    engine, tokenizer = loaded.engine, loaded.tokenizer
    batch = prompts(args)
    params = GenerationParams(
        temperature=1, top_p=1, top_k=-1, max_new_tokens=args.tokens, ignore_eos=True, skip_special_tokens=True
    )

    async def ids_only(place: int) -> tuple[int, int]:
        sequence = Sequence(f"ids{place}", tuple(batch[place]), params, args.tokens)
        made = chunks = 0
        async with aclosing(engine.generate(sequence)) as stream:
            async for chunk in stream:
                made += len(chunk.ids)
                chunks += 1
        return made, chunks

    async def with_text(place: int) -> tuple[int, int]:
        job = GenerationJob(f"text{place}", 1, tuple(batch[place]), params, args.tokens, eos_ids=frozenset({1}))
        made = chunks = 0
        async with aclosing(generate_deltas(engine, tokenizer, job)) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    made += len(event.ids)
                    chunks += 1
        return made, chunks

    for name, one, streams in (
        ("adapter, ids", ids_only, args.streams),
        ("adapter, deltas with text", with_text, args.streams),
        ("adapter, one stream", ids_only, 1),
    ):
        stage(f"{name}: warming up, {args.rounds} rounds")
        rates, sizes = [], []
        for lap in range(args.rounds + 1):
            start, cpu = time.perf_counter(), time.process_time()
            counts = await asyncio.gather(*(one(place) for place in range(streams)))
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            made = sum(count for count, _ in counts)
            if lap:
                rates.append(made / took)
                sizes.append(made / sum(chunks for _, chunks in counts))
        report(side=name, rates=rates, tokens_a_delta=statistics.median(sizes), cpu=cpu / took)
    await engine.close()


# -- both -------------------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    if args.side == "adapter":
        asyncio.run(adapter(args))
    elif args.engine == "vllm":
        offline_vllm(args)
    else:
        offline_sglang(args)


def adapter_options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"model_name_or_path": args.model, "infer_dtype": "bfloat16"}
    if args.engine == "vllm":
        return options | {
            "vllm_maxlen": CONTEXT_TOKENS, "vllm_enforce_eager": args.tiny, "vllm_config": args.options,
        }  # fmt: skip
    return options | {"sglang_maxlen": CONTEXT_TOKENS, "sglang_config": args.options}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="two layers, no graphs: to try the script")
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of the engine, JSON")
    parser.add_argument("--side", choices=["offline", "adapter"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--sides", default="offline,adapter", help="which, separated by commas")
    parser.add_argument("--limit-s", type=float, default=200, help="of each side, its start included")
    args = parser.parse_args()
    if args.side:
        args.options = {**quick_start(args), **args.options}
        args.adapter_options = adapter_options(args)
        child(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), TINY if args.tiny else SHAPE)
        print(machine(args.engine), flush=True)
        results: list[dict[str, Any]] = []
        for side in args.sides.split(","):
            results += run_side(side, folder, args.limit_s)
        table(results, args)


def run_side(side: str, folder: str, limit_s: float) -> list[dict[str, Any]]:
    """What it reports, up to its limit; each of its lines is shown when it comes."""
    command = [sys.executable, "-m", "bench.engines_gpu", *sys.argv[1:], "--side", side, "--model", folder]
    began, results = time.monotonic(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{side} {time.monotonic() - began:5.0f} s] {line.rstrip()}", flush=True)
        if line.startswith("RESULT "):
            results.append(json.loads(line[7:]))
    if status := process.wait():
        late = time.monotonic() - began >= limit_s
        print(f"{side} {f'was ended after {limit_s:g} s' if late else f'failed: exit status {status}'}", flush=True)
    timer.cancel()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it may have left behind, and with it the GPU's memory
    return results


def quick_start(args: argparse.Namespace) -> dict[str, Any]:
    """For both sides of SGLang on a GPU: by default 0.5.17 captures graphs for 36 sizes of decode batches and, piece by
    piece, for 58 lengths of prefill, before it answers anything. Prefill is no part of what is measured."""
    import torch

    if args.engine != "sglang" or not torch.cuda.is_available():
        return {}
    sizes = sorted({*(size for size in (1, 4, 16, 64, 128, 192, 256) if size < args.streams), args.streams})
    return {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": sizes}


def machine(engine: str) -> str:
    from importlib.metadata import version

    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {_version(version, name)}" for name in (engine, "torch", "transformers"))
    return f"{card}, Python {platform.python_version()}, {versions}, {time.strftime('%Y-%m-%d')}"


def _version(version: Any, name: str) -> str:
    try:
        return str(version(name))
    except Exception:
        return str(version(f"{name}-cpu"))


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"{args.streams} streams of {args.tokens} tokens, medians of {args.rounds} (least to most)")
    offline = max((statistics.median(each["rates"]) for each in results if each["side"].startswith("offl")), default=0)
    for each in results:
        median = statistics.median(each["rates"])
        line = f"  {each['side']:<28}{median:>9,.0f} tok/s ({min(each['rates']):,.0f}-{max(each['rates']):,.0f})"
        if "tokens_a_delta" in each:
            line += f"  {each['tokens_a_delta']:.1f} tokens a delta  {each['cpu']:.0%} CPU of this process"
        if offline and "one stream" not in each["side"]:
            line += f"  {median / offline:.2f} x offline"
        print(line)


if __name__ == "__main__":
    main()

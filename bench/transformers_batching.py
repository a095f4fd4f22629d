"""The transformers engine against transformers' own static batch and continuous batching, all in one run.

    python -m bench.transformers_batching [--rounds 3] [--chats 16] [--own-continuous]
        [--greedy-only] [--threads N]

Chats of one length (128 new tokens) and of mixed lengths (32 to 256), greedy, float32, SmolLM2-135M, with as many
slots as chats. Rounds alternate between the sides, so a busy machine slows both; CPU seconds, which it slows less, are
printed beside the wall clock. Only tokens that a chat asked for count: a static batch goes on until its last is done.

The static batch has a process of its own, as a worker has: the same steps took a fourth longer in a second computing
thread of one process (docs/performance.md has a likely reason).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tokenfleet.engines import models
from tokenfleet.engines.base import Sequence
from tokenfleet.engines.transformers_engine import TransformersEngine, TransformersOptions
from tokenfleet.wire.chat import GenerationParams

MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Chat:
    ids: tuple[int, ...]
    tokens: int


@dataclass
class Times:
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)

    def line(self, name: str, tokens: int, against: Times | None) -> str:
        wall, cpu = statistics.median(self.wall_s), statistics.median(self.cpu_s)
        spread = f"{tokens / max(self.wall_s):.1f}-{tokens / min(self.wall_s):.1f}"
        text = f"  {name:<34}{tokens / wall:>8.1f} tok/s ({spread}){1000 * cpu / tokens:>9.1f} CPU-ms/token"
        if self.first_token_s:
            text += f"   first token {statistics.median(self.first_token_s):.2f} s"
        if against is not None and against is not self:
            ratio = statistics.median(theirs / mine for mine, theirs in zip(self.wall_s, against.wall_s, strict=True))
            text += f"   {ratio:.2f}x static (CPU {statistics.median(against.cpu_s) / cpu:.2f}x)"
        return text


async def timed(times: Times, run: Callable[[], Awaitable[int]], tokens: int) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    made = await run()
    times.wall_s.append(time.perf_counter() - wall)
    times.cpu_s.append(time.process_time() - cpu)
    assert made >= tokens, f"{made} tokens instead of {tokens}"


async def by_engine(engine: TransformersEngine, chats: list[Chat], times: Times, **params: Any) -> int:
    start = time.perf_counter()

    async def one(place: int, chat: Chat) -> int:
        wanted = GenerationParams(max_new_tokens=chat.tokens, ignore_eos=True, **params)
        sequence = Sequence(f"chat{place}", chat.ids, wanted, chat.tokens, seed=place)
        made = 0
        async with aclosing(engine.generate(sequence)) as chunks:
            async for chunk in chunks:
                if not made:
                    first.append(time.perf_counter() - start)
                made += len(chunk.ids)
        return made

    first: list[float] = []
    made = sum(await asyncio.gather(*(one(place, chat) for place, chat in enumerate(chats))))
    times.first_token_s.append(statistics.median(first))
    return made


_static: list[Any] = []
"""The static batch's model, in its process."""


def _plain() -> Any:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(models.resolve(MODEL), dtype=torch.float32).eval()


def _load_static(threads: int) -> None:
    torch.set_num_threads(threads)
    _static.append(_plain())


def static_batch(chats: list[Chat]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    longest, most = max(len(chat.ids) for chat in chats), max(chat.tokens for chat in chats)
    ids = torch.tensor([[2] * (longest - len(chat.ids)) + list(chat.ids) for chat in chats])
    mask = torch.tensor([[0] * (longest - len(chat.ids)) + [1] * len(chat.ids) for chat in chats])
    with torch.inference_mode():
        out = _static[0].generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most, min_new_tokens=most
        )
    assert out.shape[1] == longest + most
    return time.perf_counter() - wall, time.process_time() - cpu


async def by_own_continuous(model: Any, chats: list[Chat]) -> int:
    """transformers' continuous batching manager, as its documentation streams from it."""
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=2, max_new_tokens=256)
    manager = model.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=1024, max_batch_tokens=512),
    )
    manager.start()
    try:
        for place, chat in enumerate(chats):
            manager.add_request(list(chat.ids), request_id=str(place), max_new_tokens=chat.tokens, streaming=True)
        made = {}
        while len(made) < len(chats):
            result = await asyncio.to_thread(manager.get_result, timeout=10)
            if result is not None and result.is_finished():
                made[result.request_id] = len(result.generated_tokens)
            assert result is not None or manager.is_running(), manager.background_thread_status.fatal_error
    finally:
        await asyncio.to_thread(manager.stop, block=True)
    return sum(made.values())


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--own-continuous", action="store_true", help="also transformers' own continuous batching")
    parser.add_argument("--greedy-only", action="store_true", help="leave default sampling out: half the time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plain = _plain() if args.own_continuous else None
    spawn = multiprocessing.get_context("spawn")
    static = ProcessPoolExecutor(1, mp_context=spawn, initializer=_load_static, initargs=(args.threads,))
    await asyncio.get_running_loop().run_in_executor(static, os.getpid)
    engine = TransformersEngine(
        TransformersOptions(
            model_name_or_path=MODEL, infer_dtype="float32", max_batch_size=args.chats, threads=args.threads
        )
    )
    await engine.start()
    text = "Tell me a long story about a red fox who learns to swim, chapter {}."
    prompts = [
        tuple(
            engine.tokenizer.apply_chat_template(
                [{"role": "user", "content": text.format(i + 10)}], add_generation_prompt=True, return_dict=False
            )
        )
        for i in range(args.chats)
    ]
    assert len({len(ids) for ids in prompts}) == 1, "padding would slow the static batch's attention down"
    loads = {
        "equal lengths, 128 tokens each": [Chat(ids, 128) for ids in prompts],
        "mixed lengths, 32 to 256": [
            Chat(ids, 32 + round(224 * i / (args.chats - 1))) for i, ids in enumerate(prompts)
        ],
    }
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, load average "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}; {MODEL} float32, {args.chats} chats, greedy, {args.rounds} rounds (median)",
        flush=True,
    )
    for name, chats in loads.items():
        await compare(name, chats, engine, static, plain, args)
    static.shutdown()
    await engine.close()


async def compare(
    name: str, chats: list[Chat], engine: TransformersEngine, other: ProcessPoolExecutor, plain: Any, args: Any
) -> None:
    tokens = sum(chat.tokens for chat in chats)
    static, mine, sampled, own = Times(), Times(), Times(), Times()
    greedy = {"do_sample": False}
    for _ in range(args.rounds):
        wall_s, cpu_s = await asyncio.get_running_loop().run_in_executor(other, static_batch, chats)
        static.wall_s.append(wall_s)
        static.cpu_s.append(cpu_s)
        await timed(mine, lambda: by_engine(engine, chats, mine, **greedy), tokens)
        if not args.greedy_only:
            await timed(sampled, lambda: by_engine(engine, chats, sampled), tokens)
        if args.own_continuous:
            await timed(own, lambda: by_own_continuous(plain, chats), tokens)
    print(f"{name}: {tokens} tokens", flush=True)
    print(static.line("transformers, static batch", tokens, None))
    print(mine.line("tokenfleet", tokens, static))
    if not args.greedy_only:
        print(sampled.line("tokenfleet, default sampling", tokens, static), flush=True)
    if args.own_continuous:
        print(own.line("transformers, continuous batching", tokens, static))


if __name__ == "__main__":
    asyncio.run(main())

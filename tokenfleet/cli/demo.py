"""``tokenfleet demo``: the main job, start to end: a fleet, some chats at once, their tokens, what they took."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import click

from tokenfleet.cli.connection import FLEET, MODEL, REDIS_URL, connected
from tokenfleet.cli.output import for_stream, note, seconds, table, write
from tokenfleet.cli.signals import jobs_end_with_us
from tokenfleet.wire.errors import TokenfleetError

if TYPE_CHECKING:
    from tokenfleet.producer.aio_job import AsyncJob, AsyncStream
    from tokenfleet.wire.jobs import JobStatus
    from tokenfleet.wire.results import ChatResult

PROMPTS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "Give me one tip for better sleep.",
)
_COLOURS = ("cyan", "green", "yellow", "magenta")
_LINE = 76


@click.command("demo")
@click.option("--redis-url", envvar=REDIS_URL, metavar="URL", help="Show a running fleet instead of the local one.")
@click.option("--fleet", envvar=FLEET, default="default", show_default=True, help="The fleet's name.")
@click.option("--model", envvar=MODEL, metavar="NAME", help="Which of its served models.")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer.")
def command(redis_url: str | None, fleet: str, model: str | None, tokens: int) -> None:
    """Start a local fleet with a small real model, chat with it four times at once, and tell what it took.

    The fleet stays for a while, so that `tokenfleet chat` answers at once.
    """
    if redis_url:
        asyncio.run(_show(redis_url, fleet, model, tokens))
        return
    from tokenfleet.cli.local import join, only_model, say_how_long
    from tokenfleet.producer.arguments import FleetArguments

    started = time.monotonic()
    with join(FleetArguments(fleet=fleet)) as local:
        note(f"Local fleet {fleet!r} serves {', '.join(local.models)} ({seconds(time.monotonic() - started)}).")
        asyncio.run(_show(local.url, local.fleet, only_model(local, FleetArguments(model=model)), tokens))
    named = "" if fleet == "default" else f" --fleet {fleet}"
    note(
        "\nWhat to try next:\n"
        f"  tokenfleet chat{named}                     talk to it\n"
        f"  tokenfleet submit{named} 'Hello!'          queue a job: prints its id; `tokenfleet watch ID` follows it\n"
        f"  tokenfleet status{named}                   models, workers, queues\n"
        "  python -c \"from tokenfleet import ChatModel; print(ChatModel().chat('Hello!')[0].response_text)\""
    )
    say_how_long(fleet)


@dataclass
class Shown:
    """One of the demo's jobs."""

    number: int
    prompt: str
    job: AsyncJob
    text: str = ""
    result: ChatResult | None = None
    status: JobStatus | None = None
    waiting: str = ""
    """Text that no line holds yet (`_Lines`)."""


class _Display(Protocol):
    def add(self, shown: Shown, piece: str) -> None: ...
    def end(self, shown: Shown) -> None: ...


async def _show(url: str, fleet: str, model: str | None, tokens: int) -> None:
    async with connected(url, fleet, model) as client, jobs_end_with_us():
        begin = time.monotonic()
        named: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "cancel_on_disconnect": True}
        jobs = await client.submit_many(PROMPTS, **named)
        sent_s = time.monotonic() - begin
        all_shown = [Shown(i, prompt, job) for i, (prompt, job) in enumerate(zip(PROMPTS, jobs, strict=True), 1)]
        async with contextlib.AsyncExitStack() as stack:
            streams = [stack.push_async_exit(job.stream()) for job in jobs]  # whatever ends this, ends the jobs
            note(f"{len(jobs)} jobs queued in {seconds(sent_s)}; their tokens as they come:\n")
            display: _Display = stack.enter_context(_Live(all_shown)) if sys.stdout.isatty() else _Lines()
            try:
                async with asyncio.TaskGroup() as group:
                    for shown, stream in zip(all_shown, streams, strict=True):
                        group.create_task(_follow(stream, shown, display))
            except* TokenfleetError as errors:
                raise errors.exceptions[0] from None
        _print_answers(all_shown, time.monotonic() - begin)


async def _follow(stream: AsyncStream, shown: Shown, display: _Display) -> None:
    from tokenfleet.producer.aio_job import piece_of
    from tokenfleet.producer.assembly import Assembly

    assembly = Assembly(shown.job.id)
    async for event in stream:
        assembly.add(event)
        if piece := piece_of(event):
            shown.text += piece
            display.add(shown, piece)
    display.end(shown)
    shown.result = assembly.result()
    shown.status = await shown.job.status()


@dataclass
class _Lines:
    """For pipes and logs: a line of one job whenever it has one, marked with its number."""

    last: int = field(default=0)

    def add(self, shown: Shown, piece: str) -> None:
        shown.waiting += piece
        while "\n" in shown.waiting or len(shown.waiting) > _LINE:
            line, newline, rest = shown.waiting.partition("\n")
            if len(line) > _LINE:
                cut = line.rfind(" ", 1, _LINE)
                cut = cut if cut > 0 else _LINE
                line, rest = line[:cut], line[cut:].lstrip(" ") + newline + rest
            self._print(shown, line)
            shown.waiting = rest

    def end(self, shown: Shown) -> None:
        if shown.waiting:
            self._print(shown, shown.waiting)

    def _print(self, shown: Shown, line: str) -> None:
        write(f"[{shown.number}] {line}\n")


class _Live:
    """For terminals: all answers grow side by side, each in its colour; gone when the block is left."""

    def __init__(self, all_shown: list[Shown]) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        def render() -> Group:
            lines: list[Text] = []
            for shown, colour in zip(all_shown, _COLOURS, strict=False):
                lines.append(Text(f"{shown.number}. {shown.prompt}", style="bold"))
                text = shown.text.strip() or "..."
                lines.append(Text(for_stream(text.replace("\n\n", "\n"), sys.stdout), style=colour))
            return Group(*lines)

        self._live = Live(get_renderable=render, refresh_per_second=12, transient=True)

    def __enter__(self) -> _Live:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def add(self, shown: Shown, piece: str) -> None:
        """The display looks by itself, twelve times a second."""

    def end(self, shown: Shown) -> None:
        pass


def _print_answers(all_shown: list[Shown], wall_s: float) -> None:
    write("\n")
    rows = []
    tokens = 0
    for shown in all_shown:
        assert shown.result is not None
        assert shown.status is not None
        write(f"{shown.number}. {shown.prompt}\n   {shown.result.text.strip().replace(chr(10), chr(10) + '   ')}\n")
        usage, timing = shown.result.usage, shown.status.timing
        tokens += usage.completion_tokens
        rate = "" if timing.tokens_per_s is None else f"{timing.tokens_per_s:.1f}"
        reason = shown.result.choices[0].finish_reason if shown.result.choices else ""
        rows.append(
            (
                str(shown.number),
                seconds(timing.queue_wait_s),
                seconds(timing.ttft_s),
                str(usage.prompt_tokens),
                str(usage.completion_tokens),
                rate,
                reason,
                shown.job.id,
            )
        )
    write("\n")
    table(("JOB", "QUEUE WAIT", "FIRST TOKEN", "PROMPT", "TOKENS", "TOKENS/S", "END", "ID"), rows)
    write(f"\n{tokens} tokens in {seconds(wall_s)}: {tokens / wall_s:.1f} tokens/s over all jobs.\n")

"""``tokenfleet chat``: a conversation at the terminal, or in a pipe: each line a turn, answers on stdout."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from tokenfleet.cli.arguments import (
    CONTEXT,
    SectionedCommand,
    argument_options,
    from_environment,
    given_flags,
    merged,
)
from tokenfleet.cli.connection import MODEL
from tokenfleet.cli.media import media_options, media_parts, media_settings
from tokenfleet.cli.output import note, print_error, write
from tokenfleet.cli.signals import jobs_end_with_us
from tokenfleet.cli.typed import TypedLines
from tokenfleet.wire.errors import TokenfleetError

if TYPE_CHECKING:
    from tokenfleet.producer.aio import AsyncClient

_QUIET_S = 1.0  # how long an answer may keep the user waiting without a word


@click.command("chat", cls=SectionedCommand, context_settings=CONTEXT)
@argument_options("Fleet", "Model", "vLLM", "SGLang", "Media", "Workers", "Generation")
@click.option("--system", metavar="TEXT", help="System message of this chat.")
@click.option("--adapter", metavar="NAME", help="Which of the model's adapters to use.")
@media_options
@click.argument("config", nargs=-1, metavar="[FILE] [KEY=VALUE]...")
@click.pass_context
def command(
    ctx: click.Context, /, config: tuple[str, ...], system: str | None, adapter: str | None, **more: Any
) -> int:
    """Chat with a model.

    Joins the local fleet, starting it if need be, or with --redis-url any fleet. FILE is a YAML or JSON file of the
    arguments below, as LLaMA-Factory takes it; KEY=VALUE words and flags win over it.

    Images, videos and audios go with the first message.

    `clear` drops the history, `exit` or Ctrl-D quits, Ctrl-C stops the answer. In a pipe each line is one turn.
    """
    from tokenfleet.producer.aio import AsyncClient
    from tokenfleet.producer.arguments import split_arguments

    args, generation = split_arguments(merged(config, given_flags(ctx), from_environment(ctx)))
    request = {**generation, "system": system, "adapter": adapter}
    with contextlib.ExitStack() as stack:
        if args.redis_url:
            args.check_remote("default_system")
            request["enable_thinking"] = args.enable_thinking
            request["system"] = system or args.default_system
            url, fleet, model = args.redis_url, args.fleet, args.model or _environment_model()
            settings = media_settings()
        else:
            from tokenfleet.cli.local import join, only_model

            local = stack.enter_context(join(args))
            url, fleet, model = local.url, local.fleet, only_model(local, args)
            settings = local.media
        connect = functools.partial(AsyncClient, url, fleet=fleet, model=model, media=settings)
        chat = Chat(stack.enter_context(asyncio.Runner()), connect, model, request, media_parts(more))
        stack.callback(chat.close)
        return chat.run()


class Chat:
    """One conversation. Each answer is one run of the event loop, so that Ctrl-C cancels it and nothing else."""

    def __init__(
        self,
        runner: asyncio.Runner,
        make_client: Callable[[], AsyncClient],
        model: str | None,
        request: dict[str, Any],
        media: list[dict[str, Any]],
    ) -> None:
        async def connect() -> AsyncClient:
            client = make_client()
            try:
                await client.check()
            except BaseException:
                await client.aclose()
                raise
            return client

        self._runner = runner
        self._client = runner.run(connect())
        self._model = model
        self._request = request
        self._media = media
        self._messages: list[dict[str, Any]] = []
        self._lines = TypedLines("\nUser: ")

    def close(self) -> None:
        self._runner.run(self._client.aclose())

    def run(self) -> int:
        if self._lines.is_interactive:
            which = f" with {self._model}" if self._model else ""
            note(f"Chat{which}. `clear` drops the history, `exit` quits, Ctrl-C stops an answer.")
        while True:
            try:
                line = self._lines.next()
                match None if line is None else line.strip():
                    case None | "exit":
                        return 0
                    case "clear":
                        self._messages.clear()
                        note("The history is cleared.")
                    case "":
                        continue
                    case text:
                        self._turn(text)
            except KeyboardInterrupt:  # also one that comes just before an answer, or just behind it
                if not self._lines.is_interactive:
                    raise
                note("(`exit` or Ctrl-D quits)")

    def _turn(self, line: str) -> None:
        """Ask, print the answer, remember both. In a pipe an error or Ctrl-C ends the program."""
        # Media belong to the first message, also to that after `clear` or a failure.
        has_media = bool(self._media) and not self._messages
        content: Any = [*self._media, {"type": "text", "text": line}] if has_media else line
        question = {"role": "user", "content": content}
        if self._lines.is_interactive:
            sys.stderr.write("Assistant: ")
            sys.stderr.flush()
        answer = _Answer()
        try:
            self._runner.run(self._answer([*self._messages, question], answer))
        except KeyboardInterrupt:
            if not answer.is_over:
                raise click.Abort from None  # pressed again while it was being stopped
            answer.was_stopped = True
        except TokenfleetError as error:
            if answer.text and not answer.text.endswith("\n"):
                write("\n")
            if not self._lines.is_interactive:
                raise
            print_error(error.code, error.message, error.hint)
            return
        if not (text := answer.text).endswith("\n"):
            write("\n")
        if text:
            self._messages += [question, {"role": "assistant", "content": text}]
        if answer.was_stopped:
            if not self._lines.is_interactive:
                raise KeyboardInterrupt
            note("(stopped)")

    async def _answer(self, messages: list[dict[str, Any]], answer: _Answer) -> None:
        """Print the answer as it comes and collect it."""
        async with jobs_end_with_us():
            try:
                job = await self._client.submit(messages, **self._request, cancel_on_disconnect=True)
                async with job.stream() as stream, _telling(job) as first, contextlib.aclosing(stream.text()) as texts:
                    async for piece in texts:
                        first.set()
                        answer.pieces.append(piece)
                        write(piece)
            except asyncio.CancelledError:
                answer.was_stopped = True
        answer.is_over = True


@dataclass
class _Answer:
    pieces: list[str] = field(default_factory=list)
    was_stopped: bool = False
    is_over: bool = False
    """Its job has ended, or was cancelled."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@contextlib.asynccontextmanager
async def _telling(job: Any) -> AsyncIterator[asyncio.Event]:
    """Within the block, say why nothing comes, unless the event is set soon."""
    event = asyncio.Event()

    async def tell() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUIET_S):
                await event.wait()
        if event.is_set():
            return
        with contextlib.suppress(TokenfleetError):
            status = await job.status()
            if status.waiting_for_worker:
                note(f"(no worker serves {status.model} now; waiting for one)")
            elif status.position:
                note(f"(waiting in the queue, {status.position} before it)")

    task = asyncio.create_task(tell())
    try:
        yield event
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _environment_model() -> str | None:
    import os

    return os.environ.get(MODEL) or None

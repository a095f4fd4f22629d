"""``tokenfleet submit``: queue a prompt and print the job's id."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from tokenfleet.cli.arguments import CONTEXT, SectionedCommand, argument_options, given_flags
from tokenfleet.cli.connection import connected
from tokenfleet.cli.media import media_arguments, media_options
from tokenfleet.cli.output import write, write_json
from tokenfleet.wire.errors import InvalidRequest


@click.command("submit", cls=SectionedCommand, context_settings=CONTEXT)
@argument_options("Fleet", "Job", "Generation")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--messages", metavar="FILE", help="A JSON list of messages instead of PROMPT; - for stdin.")
@click.option("--tools", metavar="FILE", help="A JSON list of tool definitions.")
@click.option("--adapter", metavar="NAME", help="Which of the model's adapters to use.")
@click.option("--enable_thinking", type=click.BOOL, metavar="[true|false]", help="Whether a model that can think does.")
@media_options
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Kept with the job. May be given again.")
@click.option("--job_id", metavar="ID", help="A UUID of your own: the same again is the same job.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the id.")
@click.argument("prompt", required=False)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    prompt: str | None,
    redis_url: str | None,
    fleet: str | None,
    model: str | None,
    messages: str | None,
    tools: str | None,
    tags: tuple[str, ...],
    as_json: bool,
    **more: Any,
) -> None:
    """Queue PROMPT (- reads it from stdin) and print the job's id at once.

    `tokenfleet watch ID` prints the answer, here or elsewhere, now or later.
    """
    flags = {name: value for name, value in given_flags(ctx).items() if name not in ("redis_url", "fleet", "model")}
    named = {
        **flags,
        **{name: more[name] for name in ("system", "adapter", "enable_thinking", "job_id")},
        "tools": None if tools is None else _read_json("tools", tools),
        "tags": _tags(tags) or None,
        **media_arguments(more),
    }
    job_id = asyncio.run(_submit(redis_url, fleet or "default", model, _content(prompt, messages), named))
    if as_json:
        write_json({"id": job_id})
    else:
        write(f"{job_id}\n")


async def _submit(url: str | None, fleet: str, model: str | None, messages: Any, named: dict[str, Any]) -> str:
    async with connected(url, fleet, model) as client:
        return (await client.submit(messages, **named)).id


def _content(prompt: str | None, messages: str | None) -> Any:
    if (prompt is None) == (messages is None):
        raise click.UsageError("Give PROMPT (- for stdin) or --messages FILE.")
    if messages is not None:
        return _read_json("messages", messages)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    if not text.strip():
        raise InvalidRequest("The prompt is empty.", param="messages")
    return text


def _read_json(name: str, file: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{name}: {file} can't be read: {error.strerror}.", param=name) from error
    except ValueError as error:
        raise InvalidRequest(f"{name}: {file} is not JSON: {error}", param=name) from error


def _tags(words: tuple[str, ...]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--tag {word}: KEY=VALUE is needed.")
        tags[key] = value
    return tags

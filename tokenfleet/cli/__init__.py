"""The command line: ``tokenfleet COMMAND``. Each command is a module of its own, imported when it is used.

stdout carries results only; notes, progress and errors go to stderr. An error is one line,
``error [code]: message hint``, and a traceback only with ``--debug``.

| status | meaning                                                                            |
|--------|------------------------------------------------------------------------------------|
| 0      | done                                                                               |
| 1      | the job failed, was cancelled or expired; the engine failed; a bug of ours         |
| 2      | it was asked for wrongly: arguments, settings, the request, an unknown model or job |
| 3      | not now: no fleet, no worker ready, Redis away, the queue is full                  |
| 130    | Ctrl-C                                                                             |
| 141    | whoever read our output left                                                       |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import tokenfleet
from tokenfleet.cli.lazy import LazyGroup
from tokenfleet.cli.output import ReaderLeft, print_error
from tokenfleet.wire.errors import CallerError, ConfigurationError, FleetUnavailable, Overloaded, TokenfleetError

FAILED, WRONG_USE, NOT_NOW, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 130, 141

# name: what `tokenfleet --help` says of it. The command is `command` in the module of that name.
COMMANDS = {
    "demo": "Start a local fleet with a small model and watch it answer.",
    "chat": "Chat with a model, on a local fleet or a running one.",
    "up": "Start a local fleet: Redis, supervisor, workers.",
    "down": "Stop a local fleet.",
    "worker": "Run one worker in the foreground.",
    "submit": "Queue a prompt; prints the job's id.",
    "watch": "Print a job's answer as it is written.",
    "status": "Tell how the fleet, or one job, is doing.",
    "cancel": "End a job, queued or running.",
    "dead": "List, show and requeue jobs that were given up.",
    "models": "List the served models.",
    "serve": "Serve OpenAI's API on a fleet.",
    "keys": "Make, list and revoke the gateway's API keys.",
}


@click.group(
    cls=LazyGroup,
    commands_help=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Shell completion: see docs/cli.md. Exit status: 0 done, 1 failed, 2 wrong use, 3 no fleet or not ready.",
)
@click.version_option(tokenfleet.__version__, message="tokenfleet %(version)s")
@click.option("--debug", is_flag=True, envvar="TOKENFLEET_DEBUG", help="Log to stderr and show tracebacks.")
@click.pass_obj
def root(seen: dict[str, Any] | None, debug: bool) -> None:
    """A message-queue driven fleet of LLM inference workers."""
    if seen is not None:
        seen["debug"] = debug
    if debug:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s %(levelname)s %(message)s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; its exit status."""
    seen: dict[str, Any] = {}
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a stray byte in a pipe, or a poor terminal, is no reason to die
    try:
        return int(root.main(argv, prog_name="tokenfleet", standalone_mode=False, obj=seen) or 0)
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            return WRONG_USE
        print_error("usage", error.format_message(), _usage_hint(error))
        return WRONG_USE
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except TokenfleetError as error:
        if seen.get("debug"):
            raise
        print_error(error.code, error.message, error.hint)
        return exit_status(error)
    except ReaderLeft:
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:  # the outermost frame: a bug of ours is one line, too
        if seen.get("debug"):
            raise
        print_error(
            "internal_error", f"{type(error).__name__}: {error}", "Run it with `tokenfleet --debug` to see more."
        )
        return FAILED


def exit_status(error: TokenfleetError) -> int:
    match error:
        case CallerError() | ConfigurationError():
            return WRONG_USE
        case FleetUnavailable() | Overloaded():
            return NOT_NOW
        case _:
            return FAILED


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"See `{context.command_path} --help`." if context is not None else ""

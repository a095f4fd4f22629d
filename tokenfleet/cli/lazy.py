"""A click group that knows its commands' names and one line about each, and imports a command when it is used."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem


class LazyGroup(click.Group):
    """``commands_help``: name → one line. The command ``name`` is ``tokenfleet.cli.<name>.command``."""

    def __init__(self, *args: Any, commands_help: Mapping[str, str], **more: Any) -> None:
        super().__init__(*args, **more)
        self.commands_help = commands_help

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_help)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_help:
            return None
        command = import_module(f"tokenfleet.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands_help and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self.commands_help)
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.commands_help.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click's, but without importing all commands at each press of the Tab key."""
        names = [
            CompletionItem(name, help=text) for name, text in self.commands_help.items() if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

"""What a user types: lines edited at a terminal, or the lines of a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


class TypedLines:
    """The lines of stdin. At a terminal each is asked for, can be edited, and comes back with the arrow keys."""

    def __init__(self, prompt: str) -> None:
        self.is_interactive = sys.stdin.isatty()
        self._session: PromptSession[str] | None = None
        if self.is_interactive:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.output import create_output

            # Not `input` with readline: it drops a Ctrl-C that comes while it takes in keys.
            self._session = PromptSession(
                prompt,
                output=create_output(always_prefer_tty=True),  # the prompt is no result
                enable_suspend=True,
                complete_while_typing=False,  # nor room kept for it
            )

    def next(self) -> str | None:
        """One line; None at the end. Raises `KeyboardInterrupt` for a Ctrl-C at the terminal."""
        if self._session is None:
            return sys.stdin.readline() or None
        try:
            return self._session.prompt()
        except EOFError:
            return None

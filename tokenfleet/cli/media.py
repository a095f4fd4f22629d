"""``--image``, ``--video`` and ``--audio`` of commands that send a chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tokenfleet.wire.media import MediaSettings

KINDS = ("image", "video", "audio")
FOLDER = "TOKENFLEET_MEDIA_FOLDER"

Command = TypeVar("Command", bound=Callable[..., Any])


def media_options(command: Command) -> Command:
    """A file each; they come to the command as ``image``, ``video`` and ``audio``, tuples of names."""
    for kind in reversed(KINDS):
        text = f"A file to send along, at <{kind}> in the text or before it. May be given again."
        command = click.option(f"--{kind}", multiple=True, metavar="FILE", help=text)(command)
    return command


def media_arguments(given: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    """The options as `AsyncClient.submit` takes them."""
    return {f"{kind}s": [Path(name) for name in given[kind]] for kind in KINDS if given.get(kind)}


def media_parts(given: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The options as content parts of a message, in LLaMA-Factory's order."""
    return [{"type": kind, kind: Path(name)} for kind in reversed(KINDS) for name in given.get(kind, ())]


def media_settings(local_folder: str = "") -> MediaSettings:
    """With the local fleet's folder, or the one that the environment names, if there is one."""
    from tokenfleet.wire.media import MediaSettings

    folder = local_folder or os.environ.get(FOLDER)
    return MediaSettings(folder=Path(folder)) if folder else MediaSettings()

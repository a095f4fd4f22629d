"""What goes to the terminal or the pipe: results to stdout, all else to stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import IO, Any

# A model's text could move the cursor, set the window's title or worse. Newlines and tabs are fine.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ReaderLeft(Exception):  # not an OSError: click answers a broken pipe with status 1
    """Nobody reads our stdout any more."""


def print_error(code: str, message: str, hint: str = "") -> None:
    """One line, however many the message has."""
    text = " ".join(message.split())
    if hint:
        text += f"{'' if text.endswith(('.', '!', '?', ':')) else '.'} {' '.join(hint.split())}"
    print(f"error [{code}]: {for_stream(text, sys.stderr)}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Something the user should know that is no result."""
    print(for_stream(text, sys.stderr), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """A piece of a result, at once. Raises `ReaderLeft`."""
    try:
        sys.stdout.write(for_stream(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderLeft from None


def write_json(value: Any) -> None:
    """One JSON value on one line."""
    write(json.dumps(value, ensure_ascii=False) + "\n")


def for_stream(text: str, stream: IO[str]) -> str:
    """Text as it is for a pipe or a file; without control characters for a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if stream.isatty() else text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns: with rich on a terminal, as plain aligned text in a pipe. "-" stands for nothing."""
    rows = [[cell or "-" for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in heads:
            shown.add_column(head, overflow="fold")
        for row in rows:
            shown.add_row(*(Text(for_stream(cell, sys.stdout)) for cell in row))
        Console().print(shown)
        return
    widths = [max(len(line[column]) for line in (heads, *rows)) for column in range(len(heads))]
    for line in (heads, *rows):
        write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")


def fields(pairs: Sequence[tuple[str, str | None]]) -> None:
    """``name  value`` lines; None is left out."""
    shown = [(name, value) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        write(f"{name.ljust(width)}  {value}\n")


def seconds(value: float | None) -> str:
    """A time for people: ``42 ms``, ``1.28 s``, ``-``."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def amount(size_bytes: int) -> str:
    """A size for people, in powers of 1024."""
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"

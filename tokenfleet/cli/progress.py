"""How far a starting fleet is, on stderr: a moving bar on a terminal, a line for each new step in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tokenfleet.cli.output import for_stream, note

if TYPE_CHECKING:
    from tokenfleet.wire.local_files import FleetState


@contextmanager
def progress() -> Iterator[Callable[[FleetState], None]]:
    """What `ensure` and `wait_ready` take as ``on_progress``."""
    if not sys.stderr.isatty():
        last = [""]

        def tell(state: FleetState) -> None:
            step = _step(state)
            if step and step != last[0]:
                last[0] = step
                note(f"{step} ...")

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("looking for the fleet", total=None)

        def show(state: FleetState) -> None:
            text = for_stream(_step(state) or state.state, sys.stderr)
            share = None if state.progress is None else round(state.progress * 100)
            bar.update(task, description=text, total=None if share is None else 100, completed=share or 0)

        yield show


def _step(state: FleetState) -> str:
    if state.state in ("ready", "failed") or any(worker.error for worker in state.workers):
        return ""  # whoever waits tells these
    return state.detail or state.state

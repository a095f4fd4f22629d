"""How a worker tells its supervisor, and so every waiting client, how far it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from tokenfleet.wire.errors import TokenfleetError
from tokenfleet.wire.local_files import WorkerReport
from tokenfleet.wire.private_files import write_private

ENV = "TOKENFLEET_STATE_FILE"


def report_state(
    state: Literal["loading", "ready", "failed"],
    *,
    detail: str = "",
    progress: float | None = None,
    models: tuple[str, ...] = (),
    is_busy: bool = False,
    error: TokenfleetError | None = None,
) -> None:
    """Replace this worker's report; does nothing in a worker without a supervisor. 0.1 ms: not for every token.

    ``loading`` with ``detail`` and ``progress`` (0 to 1) while the engine loads: ("loading weights", 0.43).
    ``ready`` with the ``models`` served, once the *ledger* lists this worker; again with ``is_busy`` when the first job
    begins and when the last one ends: a busy fleet doesn't stop for want of clients.
    ``failed`` before leaving. With a non-retryable ``error`` (`ConfigurationError`) the worker is given up, and that is
    what waiting clients get; else it is started again.
    """
    if not (path := os.environ.get(ENV)):
        return
    body = None if error is None else error.to_body()
    detail = detail or (error.message if error else "")
    report = WorkerReport(state=state, detail=detail, progress=progress, models=models, is_busy=is_busy, error=body)
    write_private(Path(path), msgspec.json.encode(report))

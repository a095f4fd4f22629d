"""A whole Celery app, as small as can be, for a test of the supervisor with real Celery workers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import worker_ready

from tokenfleet.wire.urls import to_celery
from tokenfleet.workers.worker_state import report_state

settings = json.loads(Path(os.environ["TOKENFLEET_CONFIG"]).read_text())
app = Celery("tiny", broker=to_celery(settings["redis_url"]), backend=to_celery(settings["redis_url"]))


@app.task(name="tiny.add")
def add(a: int, b: int) -> int:
    return a + b


@worker_ready.connect
def _ready(**_: Any) -> None:
    report_state("ready", models=("adder",))

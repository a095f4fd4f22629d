"""A Celery app with one task that does nothing but say when it began: the floor of any job's latency."""

from __future__ import annotations

import os
import time

from celery import Celery
from redis import Redis

from tokenfleet.wire import urls

app = Celery("noop")
app.conf.task_ignore_result = True
_client: list[Redis] = []


def configure(url: str) -> None:
    app.conf.broker_url = url


if "NOOP_URL" in os.environ:
    configure(os.environ["NOOP_URL"])


@app.task(name="bench.noop")
def noop() -> None:
    began = time.time()
    if not _client:
        _client.append(urls.connect(os.environ["NOOP_URL"]))
    _client[0].lpush("noop:began", repr(began))

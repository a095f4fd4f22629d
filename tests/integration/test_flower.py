"""``celery -A workers.app flower``, as any Celery user starts it: jobs show state and worker, never their text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleets import MODEL, ROOT, Fleet, wait_until
from tests.processes import free_port
from tokenfleet import Job

SECRET = "xyzzy-plugh"


@pytest.fixture
def flower(served: Fleet) -> Iterator[str]:
    port = free_port()
    env = {
        **os.environ,
        "TOKENFLEET_REDIS_URL": served.redis.url, "TOKENFLEET_FLEET": served.redis.fleet, "TOKENFLEET_MODEL": MODEL,
        "TOKENFLEET_ENGINE": "scripted", "FLOWER_UNAUTHENTICATED_API": "true",
    }  # fmt: skip
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "die_with_parent.py"), str(reader), sys.executable, "-m", "celery",
         "-A", "workers.app", "flower", "--address=127.0.0.1", f"--port={port}"],
        cwd=ROOT, env=env, pass_fds=[reader], start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(reader)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    os.close(writer)


def get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.loads(reply.read())
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def test_flower_shows_a_job_and_not_its_text(flower: str, served: Fleet) -> None:
    wait_until(lambda: get(f"{flower}/api/workers?refresh=1"), 30, "Flower sees the worker")
    client = served.client()
    jobs: list[Job] = []

    def shown() -> Any:
        """What it says of any job; of those that ran before it listened it knows nothing."""
        jobs.append(client.submit(SECRET, max_new_tokens=10))
        jobs[-1].result(20)
        tasks = [get(f"{flower}/api/task/info/{job.id}") for job in jobs]
        return next((task for task in tasks if task and task["state"] == "SUCCESS"), None)

    task = wait_until(shown, 30, "Flower shows a job")
    text = client.job(task["uuid"]).result(20).text
    assert task["name"] == "tokenfleet.run"
    assert served.redis.fleet in task["worker"]
    everything = json.dumps(get(f"{flower}/api/tasks"))
    assert SECRET not in everything
    assert text not in everything
    running = served.client().submit(SECRET, max_new_tokens=5000)
    wait_until(lambda: running.status().completion_tokens > 3, 10)
    request = urllib.request.Request(f"{flower}/api/task/revoke/{running.id}?terminate=true", method="POST", data=b"")
    urllib.request.urlopen(request, timeout=10).read()
    wait_until(lambda: running.status().state == "cancelled", 10)

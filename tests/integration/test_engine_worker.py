"""A real Celery worker with vLLM or SGLang."""

from __future__ import annotations

import json
import time
from itertools import islice

import psutil
import pytest

from tests.faults.trial import ledger_of
from tests.fleets import Fleet, wait_until
from tests.installed_engine import MODEL, core_of, needs_one, start, wait_ready
from tests.processes import all_gone
from tokenfleet.wire.events import Delta
from tokenfleet.wire.toolcalls import parse

pytestmark = [needs_one, pytest.mark.slow, pytest.mark.timeout(500)]


def test_a_chat_is_answered_and_a_core_that_dies_while_nothing_runs_takes_its_worker_along(fleet: Fleet) -> None:
    worker = start(fleet)
    wait_ready(fleet, worker)
    client = fleet.client()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    job = client.submit(question, model=MODEL, do_sample=False, max_new_tokens=24)
    with job.stream() as stream:
        events = list(stream)
    text = "".join(event.text for event in events if isinstance(event, Delta))
    assert text.startswith("The capital of France is Paris.")
    tool = {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False,
    }}  # fmt: skip
    forced = client.submit(
        question, model=MODEL, do_sample=False, max_new_tokens=60, tools=[{"type": "function", "function": tool}],
        tool_choice="required", parallel_tool_calls=False,
    )  # fmt: skip
    called = forced.result(60)
    [call] = parse(called.choices[0].text, called.parser).tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    left = client.submit("Count.", model=MODEL, max_new_tokens=900, ignore_eos=True)
    with left.stream() as stream:
        assert any(isinstance(event, Delta) for event in islice(stream, 20))
    left.cancel()
    family = [psutil.Process(worker.pid), *worker.children()]
    wait_until(lambda: [int(each["running"]) for each in client.workers()] == [0], 20, "nothing runs")
    core_of(worker).kill()
    killed = time.monotonic()
    late = client.submit(question, model=MODEL, do_sample=False, max_new_tokens=24)
    assert worker.wait(60) != 0, "a supervisor would not start it again"
    print(f"the worker had left {time.monotonic() - killed:.1f} s after its core's death")
    wait_until(lambda: all_gone([process.pid for process in family]), 10, "all of the worker's processes gone")
    assert ledger_of(fleet, late)["state"] == "queued"

"""A real Celery worker with SGLang. `make test-sglang-cpu` has an environment for it; elsewhere these are skipped."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from itertools import islice

import psutil
import pytest

from tests.fleets import Fleet, Worker, wait_until
from tests.processes import all_gone
from tokenfleet.wire.events import Delta

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None,
        reason="sglang is not installed: its pins exclude this environment's, see `make test-sglang-cpu`",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(500),
]
MODEL = "smollm2-135m-instruct"
_START_S = 300
_OPTIONS = {
    "model_name_or_path": MODEL, "infer_dtype": "float32", "max_batch_size": 8, "sglang_maxlen": 1024,
    "sglang_config": {"max_total_tokens": 2048},
}  # fmt: skip


@pytest.fixture
def worker(fleet: Fleet) -> Iterator[Worker]:
    env = {"TOKENFLEET_MODEL": MODEL, "TOKENFLEET_ENGINE": "sglang", "TOKENFLEET_ENGINE_ARGS": json.dumps(_OPTIONS)}
    worker = fleet.start_worker(wait=False, env=env)
    state = fleet.folder / "state-0.json"

    def is_ready() -> bool:
        assert worker.process.poll() is None, f"the worker exited:\n{worker.log[-3000:]}"
        return state.exists() and b'"ready"' in state.read_bytes() and " ready." in worker.log

    wait_until(is_ready, _START_S, "a ready SGLang worker")
    return worker


def test_a_chat_is_answered_and_nothing_outlives_the_worker(fleet: Fleet, worker: Worker) -> None:
    client = fleet.client()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    job = client.submit(question, model=MODEL, do_sample=False, max_new_tokens=24)
    with job.stream() as stream:
        events = list(stream)
    text = "".join(event.text for event in events if isinstance(event, Delta))
    assert text.startswith("The capital of France is Paris.")
    family = [psutil.Process(worker.pid), *worker.children()]
    assert len(family) > 1, "no scheduler to be seen: this would prove nothing"
    with client.submit("Count.", model=MODEL, max_new_tokens=900, ignore_eos=True).stream() as stream:
        assert any(isinstance(event, Delta) for event in islice(stream, 20))
        worker.kill_main(signal.SIGKILL)
        wait_until(lambda: all_gone([process.pid for process in family]), 10, "all of the worker's processes gone")

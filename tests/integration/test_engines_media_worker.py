"""Images through real Celery workers with vLLM or SGLang, from a file to the answer and over a worker's death.
`make test-vllm-cpu` and `make test-sglang-cpu` have environments for them; elsewhere these are skipped."""

from __future__ import annotations

import base64
import importlib.util
import json
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests import media_files as files
from tests.faults.trial import ledger_of
from tests.fleets import Fleet, Worker, wait_until
from tokenfleet import Client
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.events import Delta, Finished

ENGINES = [name for name in ("vllm", "sglang") if importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.skipif(
        not ENGINES, reason="neither vllm nor sglang is installed: their pins exclude this environment's"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(500),
]
MODEL = "tiny-llava"
_START_S = 200
_MORE = {
    "vllm": {"vllm_enforce_eager": True, "vllm_maxlen": 1024, "vllm_config": {"kv_cache_memory_bytes": 1 << 28}},
    "sglang": {"sglang_maxlen": 1024},
}
GREEDY = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 16}


def started(fleet: Fleet, engine: str, model: Path, index: int) -> Worker:
    args = {"model_name_or_path": str(model), "infer_dtype": "float32", "max_batch_size": 4, **_MORE[engine]}
    env = {"TOKENFLEET_MODEL": MODEL, "TOKENFLEET_ENGINE": engine, "TOKENFLEET_ENGINE_ARGS": json.dumps(args)}
    worker = fleet.start_worker(wait=False, env=env)
    state = fleet.folder / f"state-{index}.json"

    def is_ready() -> bool:
        assert worker.process.poll() is None, f"the worker exited:\n{worker.log[-3000:]}"
        return state.exists() and b'"ready"' in state.read_bytes() and " ready." in worker.log

    wait_until(is_ready, _START_S, f"a ready worker with {engine}")
    return worker


def gap(engine: str, model: Any, folder: Path, client: Client, data: bytes) -> float:
    """By how much an answer is not the best that transformers' own model has, in logits."""
    from tests.contract.test_engines_media import Served, processor
    from tokenfleet.engines.base import Media

    plain = processor(folder)
    served = Served(engine, "llava", model, None, plain, plain)
    no_images = dict.fromkeys(served.barred, -100.0)
    job = client.submit("What is this?", images=[data], model=MODEL, logit_bias=no_images, **GREEDY)
    with job.stream() as stream:
        ids = [token for event in stream if isinstance(event, Delta) for token in event.ids]
    assert len(ids) == GREEDY["max_new_tokens"]
    media = [Media("image", data)]
    return float(served.gap(served.expected(["image", "What is this?"], media), media, ids))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_goes_from_a_file_to_the_answer_and_survives_its_worker(
    engine: str, fleet: Fleet, tmp_path: Path
) -> None:
    from tests.contract import small_multimodal

    model = small_multimodal.save("llava", tmp_path / "model", head_dim=32)
    small_multimodal.as_on_the_hub(tmp_path / "model")
    worker = started(fleet, engine, tmp_path / "model", 0)
    client = fleet.client()
    data, other = files.image_file(1), files.image_file(2)
    (tmp_path / "cat.png").write_bytes(data)

    def text(messages: Any, **named: Any) -> str:
        return str(client.chat(messages, model=MODEL, **GREEDY, **named).text)

    answer = text("What is this?", images=[tmp_path / "cat.png"])
    assert answer != text("What is this?", images=[other])
    assert answer == text("<image>What is this?", images=[data])
    assert gap(engine, model, tmp_path / "model", client, data) < 1e-3
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    assert answer == text([{"role": "user", "content": parts}])
    usage = client.submit("Hi <image> <image>", images=[data, other], model=MODEL, **GREEDY).result(60).usage
    bare = client.submit("Hi  ", model=MODEL, **GREEDY).result(60).usage
    assert usage.prompt_tokens - bare.prompt_tokens == 2 * 4  # each is four patches
    with pytest.raises(InvalidRequest) as caught:
        text("What is this?", images=[data[:200]])
    assert caught.value.code == "invalid_media"
    with pytest.raises(InvalidRequest) as caught:
        text("What is this?", audios=[files.audio_file(1)])
    assert caught.value.code == "unsupported_modality"

    long = {**GREEDY, "max_new_tokens": 600}
    undisturbed = client.chat("Describe it.", images=[data], model=MODEL, **long).text
    while True:
        job = client.submit("Describe it.", images=[data], model=MODEL, **long)
        stream = job.stream()
        head = list(islice(stream, 5))
        worker.kill_group(signal.SIGSTOP)
        if ledger_of(fleet, job)["state"] == "running":
            break
        worker.kill_group(signal.SIGCONT)  # the machine stood still and the answer is over: once more
        stream.close()
    worker.kill_group()
    started(fleet, engine, tmp_path / "model", 1)
    with stream:
        events = [*head, *stream]
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.attempts == 2
    assert "".join(event.text for event in events if isinstance(event, Delta)) == undisturbed

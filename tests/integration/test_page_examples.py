"""The examples of docs/gateway.md and docs/media.md, as they stand there. (README's: test_readme.py.)"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import openai
import pytest

from tests.batches import row
from tests.fleets import ROOT, Fleet, wait_until
from tests.gateways import start_gateway
from tests.media_files import image_file, video_file


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_every_fragment_of_these_pages_says_what_it_is() -> None:
    for page in ("gateway.md", "media.md"):
        fences = re.findall(r"^```(\w*)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh", "json"}
        assert not any(fences[1::2])


def test_media(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.redis.fleet = "default"
    worker = fleet.start_worker(env={"TOKENFLEET_MODEL": "qwen2.5-vl-7b"}, modalities=["text", "image", "video"])
    for name, seed in (("cat", 1), ("dog", 2)):
        (tmp_path / f"{name}.png").write_bytes(image_file(seed))
    (tmp_path / "talk.mp4").write_bytes(video_file(3))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENFLEET_REDIS_URL", fleet.redis.url)
    [example] = blocks("media.md", "python")
    exec(compile(example, "docs/media.md", "exec"), {})
    wait_until(lambda: sum(line["event"] == "prefill" for line in worker.record) == 4, 20)


def test_gateway(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.start_worker(env={"TOKENFLEET_MODEL": "smollm2-135m-instruct"})
    gateway = start_gateway(fleet)
    try:
        [shell] = blocks("gateway.md", "sh")
        start, curl = shell.split("curl ")
        assert start.split() == ["tokenfleet", "up", "--detach", "tokenfleet", "serve", "--port", "8000"]
        command = "curl -sS " + curl.replace("http://127.0.0.1:8000", gateway.url)
        said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
        assert said.startswith("id: ")
        assert said.endswith("data: [DONE]\n\n")
        (tmp_path / "rows.jsonl").write_text(json.dumps(row("a", model="smollm2-135m-instruct")))
        monkeypatch.chdir(tmp_path)
        [example] = blocks("gateway.md", "python")
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
            names = {"client": client}
            exec(compile(example, "docs/gateway.md", "exec"), names)
            batch_id = names["batch"].id
            done = wait_until(lambda: (b := client.batches.retrieve(batch_id)).status == "completed" and b, 30)
            assert done.request_counts.completed == 1
        for fragment in blocks("gateway.md", "json"):
            assert json.loads(fragment)
    finally:
        gateway.close()

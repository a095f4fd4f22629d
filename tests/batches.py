"""Batches through OpenAI's client, for tests."""

from __future__ import annotations

import json
from typing import Any

import openai
from openai.types import Batch

from tests.fleets import MODEL, Worker, wait_until

ENDED = ("completed", "failed", "expired", "cancelled")


def row(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    said = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    if url == "/v1/chat/completions":
        said["messages"] = [{"role": "user", "content": f"Say {custom_id}."}]
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": said | body}


def begun(worker: Worker) -> int:
    """Rows that have begun in its engine."""
    return sum(line["event"] == "prefill" for line in worker.record)


def upload(client: openai.OpenAI, rows: list[Any], name: str = "rows.jsonl") -> str:
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows)
    return client.files.create(file=(name, text.encode()), purpose="batch").id


def create(client: openai.OpenAI, rows: list[Any], window: str = "24h", **more: Any) -> Batch:
    url = more.pop("endpoint", "/v1/chat/completions")
    return client.batches.create(input_file_id=upload(client, rows), endpoint=url, completion_window=window, **more)  # type: ignore[call-overload]


def ended(client: openai.OpenAI, batch_id: str, timeout_s: float = 40) -> Batch:
    return wait_until(lambda: (b := client.batches.retrieve(batch_id)).status in ENDED and b, timeout_s, "batch ends")


def rows_of(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found), "a row came twice"
    return {each["custom_id"]: each for each in found}

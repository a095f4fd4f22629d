"""A program that knows only a Redis client and docs/wire.md submits a job, follows it live and cancels another."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from typing import Any

import pytest

from tests.fleets import MODEL, ROOT, Fleet, wait_until


def script(name: str, head: str) -> str:
    folder = ROOT / "wire" / "lua"
    return "\n".join([head, (folder / "common.lua").read_text(), (folder / f"{name}.lua").read_text()])


def queue_of(fleet: str, model: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:40]
    return f"tokenfleet.{fleet}.{slug}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def submit(client: Any, fleet: str, max_tokens: int, content: Any = "Hi!", media: tuple[str, ...] = ()) -> str:
    job_id = str(uuid.uuid4())
    request = {
        "kind": "chat",
        "messages": [{"role": "user", "content": content}],
        "params": {"max_new_tokens": max_tokens, "do_sample": False},
    }
    reply = client.eval(
        script("submit", "#!lua"), 0, f"tokenfleet:{fleet}:", job_id, "my digest", MODEL, queue_of(fleet, MODEL), 0, 0,
        60_000, 60_000, 1000, "request", json.dumps(request), "retention_ms", 60_000,
        *(("media", " ".join(media)) if media else ()),
    )  # fmt: skip
    assert reply[0] == b"accepted", reply
    return job_id


def read(client: Any, fleet: str, job_id: str, after: int) -> list[tuple[int, dict[str, Any]]]:
    entries = client.xrange(f"tokenfleet:{fleet}:log:{job_id}", f"({after}-0" if after else "-", "+")
    return [(int(entry_id.split(b"-")[0]), json.loads(fields[b"e"])) for entry_id, fields in entries]


def test_a_stranger_submits_and_follows(served: Fleet) -> None:
    client, fleet = served.redis.client(), served.redis.fleet
    job_id = submit(client, fleet, 50)
    pubsub = client.pubsub()
    pubsub.subscribe(f"tokenfleet:{fleet}:live:{job_id}")
    wait_until(lambda: (m := pubsub.get_message(timeout=1)) and m["type"] == "subscribe", 5)
    events = read(client, fleet, job_id, 0)
    while events[-1][1]["type"] not in ("finished", "failed"):
        message = pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0)
        last = events[-1][0]
        if message is None:
            if int(client.hget(f"tokenfleet:{fleet}:job:{job_id}", "seq")) > last:
                events += read(client, fleet, job_id, last)
            continue
        live = json.loads(message["data"])
        if live["seq"] > last + 1:
            events += read(client, fleet, job_id, last)
        else:
            events += [(live["seq"] + k, e) for k, e in enumerate(live["events"]) if live["seq"] + k > last]
    assert [seq for seq, _ in events] == list(range(1, len(events) + 1))
    assert [e["type"] for _, e in events][:2] == ["queued", "started"]
    deltas = [e for _, e in events if e["type"] == "delta"]
    assert sum(len(d["ids"]) for d in deltas) == 50
    assert events[-1][1]["usage"]["completion_tokens"] == 50
    text = "".join(d["text"] for d in deltas)
    assert served.client().job(job_id).result(30).text == text
    page = (ROOT / "docs" / "wire.md").read_text()
    for _, event in events:
        assert f"| `{event['type']}` |" in page
        for name in set(event) - {"type"}:
            assert f"`{name}`" in page, f"the page does not tell of {name}"


def test_a_stranger_cancels(served: Fleet) -> None:
    client, fleet = served.redis.client(), served.redis.fleet
    job_id = submit(client, fleet, 5000)
    wait_until(lambda: int(client.hget(f"tokenfleet:{fleet}:job:{job_id}", "tokens") or 0) > 3, 10)
    reply = client.eval(script("cancel", "#!lua flags=allow-oom"), 0, f"tokenfleet:{fleet}:", job_id, "enough")
    assert reply == [b"cancelled"]
    assert read(client, fleet, job_id, 0)[-1][1]["type"] == "cancelled"


def test_a_stranger_uploads_an_image(fleet: Fleet) -> None:
    fleet.start_worker(modalities=["text", "image"], token_ms=0)
    client, name = fleet.redis.client(), fleet.redis.fleet
    image = b"\x89PNG\r\n\x1a\n" + b"any bytes: the scripted engine decodes nothing"
    ref = hashlib.sha256(image).hexdigest()
    entry = f"{hashlib.sha256(b'').hexdigest()[:16]}:{ref}"
    content = [{"type": "image", "ref": ref}, {"type": "text", "text": "Hi!"}]
    with pytest.raises(AssertionError, match=f"media_gone.*{entry}"):
        submit(client, name, 5, content, (entry,))
    touch = lambda: client.eval(script("media_touch", "#!lua flags=allow-oom"), 0, f"tokenfleet:{name}:", 60_000, entry)  # noqa: E731
    assert touch() == [0]
    put = (script("media_put", "#!lua"), 0, f"tokenfleet:{name}:", entry, 60_000, len(image), "data", image)
    assert client.eval(*put) == [b"stored"]
    assert client.eval(*put) == [b"exists"]
    assert touch() == [1]
    job_id = submit(client, name, 5, content, (entry,))
    ours = fleet.client()
    text = ours.job(job_id).result(20).text
    assert text == ours.chat("Hi!", images=[image], do_sample=False, max_new_tokens=5).text
    assert text != ours.chat("Hi!", do_sample=False, max_new_tokens=5).text

"""The Batch API under the official client: rows, bad rows, bad files, cancel, expiry, and deaths of everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.batches import create, ended, row, rows_of, upload
from tests.fleets import MODEL, Fleet, wait_until
from tests.gateways import Gateway, start_gateway


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def gateway(served: Fleet, storage: Path) -> Iterator[Gateway]:
    gateway = start_gateway(served, storage=storage, batch_lease_s=2, max_file_bytes=300_000, batch_window=16)
    yield gateway
    gateway.close()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_rows_keep_their_ids_and_a_bad_row_fails_alone(client: openai.OpenAI) -> None:
    rows = [row(f"r{k}") for k in range(40)]
    rows[7]["body"]["temperature"] = "hot"
    rows[8]["body"]["model"] = "nothing"
    rows[9]["body"]["stream"] = True
    rows[10]["body"]["n"] = 2
    batch = create(client, rows, metadata={"for": "me"})
    assert batch.status in ("validating", "in_progress", "finalizing", "completed")
    batch = ended(client, batch.id)
    assert batch.status == "completed", batch.errors
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (40, 37, 3)
    assert batch.metadata == {"for": "me"}
    good, bad = rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id)
    assert set(bad) == {"r7", "r8", "r9"}
    assert {each["response"]["body"]["error"]["code"] for each in bad.values()} == {
        "invalid_request",
        "model_not_found",
        "unsupported_parameter",
    }
    assert set(good) == {f"r{k}" for k in range(40)} - set(bad)
    answers = {k: openai.types.chat.ChatCompletion.model_validate(v["response"]["body"]) for k, v in good.items()}
    assert len(answers["r10"].choices) == 2
    assert all(answer.choices[0].finish_reason == "length" for answer in answers.values())
    assert batch.usage.output_tokens == sum(answer.usage.completion_tokens for answer in answers.values())
    assert batch.model == MODEL
    direct = client.chat.completions.create(
        model=MODEL, messages=rows[0]["body"]["messages"], max_tokens=4, temperature=0
    )
    assert direct.choices[0].message.content == answers["r0"].choices[0].message.content


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/responses", {"input": "Hi!", "max_tokens": None, "max_output_tokens": 16}),
    ],
)
def test_other_endpoints(client: openai.OpenAI, url: str, body: dict[str, Any]) -> None:
    rows = [row(f"r{k}", url, **body) for k in range(3)]
    for each in rows:
        each["body"] = {k: v for k, v in each["body"].items() if v is not None}
    batch = ended(client, create(client, rows, endpoint=url).id)
    assert batch.request_counts.completed == 3, client.files.content(batch.error_file_id).text
    assert batch.usage.output_tokens > 0


def test_scores_are_a_batch_too(client: openai.OpenAI) -> None:
    url = "/v1/score/evaluation"
    rows = [
        {"custom_id": f"r{k}", "method": "POST", "url": url, "body": {"model": MODEL, "messages": [f"Text {k}", "b"]}}
        for k in range(3)
    ]
    rows[1]["body"]["messages"] = []
    batch = ended(client, create(client, rows, endpoint=url).id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    good, bad = rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id)
    assert set(bad) == {"r1"}
    for custom_id, line in good.items():
        asked = next(row["body"] for row in rows if row["custom_id"] == custom_id)
        direct: Any = client.post("/score/evaluation", body=asked, cast_to=object)
        assert line["response"]["body"]["scores"] == direct["scores"]
        assert len(direct["scores"]) == 2


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["not json"], "invalid_json_line"),
        (["[" * 5000], "invalid_json_line"),
        (['{"custom_id": "a"}'], "invalid_row"),
        ([row("a"), row("b"), row("a")], "duplicate_custom_id"),
        ([row("a", "/v1/completions", prompt="x")], "mismatched_endpoint"),
        ([row("a") | {"method": "DELETE"}], "invalid_method"),
        ([row("a") | {"url": "http://127.0.0.1/steal"}], "mismatched_endpoint"),
        ([row("a") | {"body": [1]}], "invalid_row"),
        ([row("a") | {"custom_id": ""}], "invalid_custom_id"),
        ([row("a") | {"custom_id": 7}], "invalid_row"),
        (['{"custom_id": "\\ud800", "method": "POST", "url": "x", "body": {}}'], None),
        (["\x00\x01"], "invalid_json_line"),
        (["", " ", ""], "empty_file"),
    ],
    ids=str,
)
def test_a_bad_file_fails_as_a_whole_and_says_where(client: openai.OpenAI, lines: list[Any], code: str | None) -> None:
    batch = ended(client, create(client, lines).id, 20)
    assert batch.status == "failed"
    assert code is None or batch.errors.data[0].code == code
    assert batch.output_file_id is None
    if len(lines) == 3 and code == "duplicate_custom_id":
        assert batch.errors.data[0].line == 3


def test_a_cancelled_batch_keeps_what_was_done(client: openai.OpenAI, served: Fleet) -> None:
    rows = [row(f"quick{k}") for k in range(5)] + [row(f"slow{k}", max_tokens=20_000) for k in range(30)]
    batch = create(client, rows)
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 5, 20)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at >= batch.cancelling_at
    good, bad = rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id)
    assert set(good) == {f"quick{k}" for k in range(5)}
    assert set(bad) == {f"slow{k}" for k in range(30)}
    assert {each["error"]["code"] for each in bad.values()} == {"batch_cancelled"}
    # No job of it runs on.
    redis, p = served.redis.client(), f"tokenfleet:{served.redis.fleet}:"
    wait_until(lambda: redis.zcard(f"{p}deadlines") == 0, 10)
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_an_expired_batch_gives_partial_results(client: openai.OpenAI) -> None:
    rows = [row("quick")] + [row(f"slow{k}", max_tokens=20_000) for k in range(20)]
    batch = ended(client, create(client, rows, "6s").id)
    assert batch.status == "expired"
    assert batch.expired_at is not None
    assert set(rows_of(client, batch.output_file_id)) == {"quick"}
    bad = rows_of(client, batch.error_file_id)
    assert {each["error"]["code"] for each in bad.values()} == {"batch_expired"}
    assert len(bad) == 20


def test_files_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    ids = [upload(client, [row("x")], f"f{k}.jsonl") for k in range(3)]
    listed = [file.id for file in client.files.list(purpose="batch", limit=2)]  # pages by itself
    assert listed[:3] == ids[::-1]
    assert [file.id for file in client.files.list(order="asc")][-3:] == ids
    file = client.files.retrieve(ids[0])
    assert (file.filename, file.purpose, file.status) == ("f0.jsonl", "batch", "processed")
    assert json.loads(client.files.content(ids[0]).text) == row("x")
    assert file.bytes == len(client.files.content(ids[0]).content)
    assert client.files.delete(ids[0]).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(ids[0])


def test_batches_are_listed_the_newest_first(client: openai.OpenAI) -> None:
    ids = [create(client, ["not json"]).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == ids[:0:-1]
    assert page.has_more
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == ids[::-1]  # pages by itself
    with pytest.raises(openai.BadRequestError):
        client.batches.list(after="batch_" + "0" * 32)


def test_uploads_are_capped_and_names_are_no_paths(client: openai.OpenAI, storage: Path) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("big.jsonl", b"x" * 300_001), purpose="batch")
    assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("a.jsonl", b"x"), purpose="vision")
    name = "../../../../etc/cron.d/evil"
    file = client.files.create(file=(name, b"{}"), purpose="batch")
    assert all(path.name.startswith("file-") for path in (storage / "files").iterdir())
    assert not (storage.parent / "etc").exists()
    client.files.delete(file.id)
    for wrong in ("..%2f..%2fetc%2fpasswd", "file-../../x", "file-" + "0" * 32, "%00", "batches/x"):
        with pytest.raises(openai.NotFoundError):
            client.get(f"/files/{wrong}", cast_to=object)
        with pytest.raises(openai.NotFoundError):
            client.get(f"/files/{wrong}/content", cast_to=object)
        with pytest.raises(openai.NotFoundError):
            client.get(f"/batches/{wrong}", cast_to=object)


def test_a_storage_that_fails_is_a_typed_error(client: openai.OpenAI, storage: Path) -> None:
    file_id = upload(client, [row("a")])
    [path] = (storage / "files").glob(f"{file_id}*")
    path.unlink()
    with pytest.raises(openai.NotFoundError):
        client.files.content(file_id)
    batch = ended(client, client.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id)  # fmt: skip
    assert (batch.status, batch.errors.data[0].code) == ("failed", "input_file_missing")
    folder, away = storage / "files", storage / "away"
    folder.rename(away)
    folder.write_bytes(b"no folder")
    try:
        with pytest.raises(openai.APIStatusError) as caught:
            upload(client, [row("a")])
        assert (caught.value.status_code, caught.value.code) == (503, "storage_failed")
    finally:
        folder.unlink()
        away.rename(folder)
    client.files.delete(file_id)


def test_an_idempotency_key_makes_one_file_and_one_batch(client: openai.OpenAI) -> None:
    key = {"extra_headers": {"Idempotency-Key": "the-same"}}
    content = json.dumps(row("only")).encode()
    first = client.files.create(file=("a.jsonl", content), purpose="batch", **key)
    assert client.files.create(file=("a.jsonl", content), purpose="batch", **key).id == first.id
    with pytest.raises(openai.ConflictError):
        client.files.create(file=("a.jsonl", content + b" "), purpose="batch", **key)
    wanted = {"input_file_id": first.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = client.batches.create(**wanted, **key)
    assert client.batches.create(**wanted, **key).id == batch.id
    with pytest.raises(openai.ConflictError):
        client.batches.create(**wanted | {"completion_window": "1h"}, **key)
    assert ended(client, batch.id).request_counts.completed == 1


def test_two_gateways_never_drive_one_batch(client: openai.OpenAI, served: Fleet, storage: Path) -> None:
    """Every row begins in the engine once; when its driver dies the other goes on without running rows again."""
    others = [start_gateway(served, storage=storage, batch_lease_s=2, batch_window=16) for _ in range(2)]
    before = len(served.workers[0].record)
    batch = create(client, [row(f"r{k}", max_tokens=40) for k in range(100)])
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 10, 20)
    for other in others:  # perhaps one of them drives it
        other.close()
    batch = ended(client, batch.id)
    assert batch.request_counts.completed == 100
    begun = [line for line in served.workers[0].record[before:] if line["event"] == "prefill"]
    assert len(begun) == 100

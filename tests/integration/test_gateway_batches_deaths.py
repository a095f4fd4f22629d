"""Batches over deaths, outages and rival gateways, and who may see them: each on a fleet of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import openai
import psutil
import pytest

from tests.batches import ENDED, begun, create, ended, row, rows_of, upload
from tests.faults.trial import running
from tests.fleets import Fleet, wait_until
from tests.gateways import start_gateway


def test_nobody_sees_anothers_files_and_batches(fleet: Fleet, tmp_path: Path) -> None:
    from tests.integration.test_gateway_tenants import cli

    fleet.start_worker()
    keys = [cli(fleet, "keys", "create", tenant) for tenant in ("alice", "bob")]
    gateway = start_gateway(fleet, storage=tmp_path / "s")
    url = f"{gateway.url}/v1"
    try:
        with openai.OpenAI(base_url=url, api_key=keys[0]) as alice, openai.OpenAI(base_url=url, api_key=keys[1]) as bob:
            batch = ended(alice, create(alice, [row("a")]).id)
            assert not list(bob.batches.list())
            assert not list(bob.files.list())
            for call in (
                lambda: bob.batches.retrieve(batch.id),
                lambda: bob.batches.cancel(batch.id),
                lambda: bob.files.retrieve(batch.input_file_id),
                lambda: bob.files.content(batch.output_file_id),
                lambda: bob.files.delete(batch.output_file_id),
                lambda: bob.batches.create(
                    input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    call()
            assert rows_of(alice, batch.output_file_id)
    finally:
        gateway.close()


def test_a_batch_survives_the_death_of_everything(fleet: Fleet, tmp_path: Path) -> None:
    """Gateways, worker and Redis are killed while rows are running; each row is answered once, as if nothing were."""
    worker = fleet.start_worker(token_ms=20.0)
    settings = {"storage": tmp_path / "s", "batch_lease_s": 2, "batch_window": 8}
    gateways = [start_gateway(fleet, **settings) for _ in range(2)]
    rows = [row(f"r{k}", max_tokens=60) for k in range(80)]
    client = openai.OpenAI(base_url=f"{gateways[0].url}/v1", api_key="none", max_retries=0)
    batch_id = create(client, rows).id
    wait_until(lambda: client.batches.retrieve(batch_id).request_counts.completed >= 5, 30)
    client.close()
    wait_until(lambda: running(worker), 5, "rows are running")
    for gateway in gateways:
        for child in psutil.Process(gateway.process.pid).children(recursive=True):
            child.kill()
        gateway.close()
    worker.kill_group(signal.SIGKILL)
    fleet.redis.kill9()
    fleet.redis.restart()
    fleet.start_worker()
    second = start_gateway(fleet, **settings)
    try:
        with openai.OpenAI(base_url=f"{second.url}/v1", api_key="none", max_retries=0) as client:
            batch = ended(client, batch_id, 60)
            assert batch.status == "completed"
            assert batch.request_counts.completed == 80
            good = rows_of(client, batch.output_file_id)
            assert set(good) == {f"r{k}" for k in range(80)}
            assert {each["response"]["body"]["usage"]["completion_tokens"] for each in good.values()} == {60}
        assert not list((tmp_path / "s" / "batches").iterdir())
    finally:
        second.close()


def test_files_and_batches_are_counted(fleet: Fleet, tmp_path: Path) -> None:
    """Without a worker: batches wait, a hundred of them and no more."""
    fleet.start_worker().kill_group()
    gateway = start_gateway(fleet, storage=tmp_path / "s", max_stored_bytes=2000)
    try:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            file_id = upload(client, [row("a")])
            wanted = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            for _ in range(100):
                client.batches.create(**wanted)
            with pytest.raises(openai.RateLimitError) as caught:
                client.batches.create(**wanted)
            assert caught.value.code == "too_many_batches"
            with pytest.raises(openai.APIStatusError) as full:
                client.files.create(file=("large.jsonl", b"x" * 1990), purpose="batch")
            assert full.value.code == "storage_full"
            client.files.delete(file_id)
            assert client.files.create(file=("large.jsonl", b"x" * 1990), purpose="batch").bytes == 1990
            assert len(list((tmp_path / "s" / "files").iterdir())) == 1
    finally:
        gateway.close()


def test_a_stopped_gateway_hands_over_at_once_and_an_outage_of_redis_is_waited_out(
    fleet: Fleet, tmp_path: Path
) -> None:
    worker = fleet.start_worker(token_ms=10.0)
    settings = {"storage": tmp_path / "s", "batch_lease_s": 600, "batch_window": 8}  # nobody waits for that lease
    first = start_gateway(fleet, **settings)
    with openai.OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0) as client:
        batch_id = create(client, [row(f"r{k}", max_tokens=60) for k in range(100)]).id
        wait_until(lambda: any(line["event"] == "end" for line in worker.record), 20)
    first.process.send_signal(signal.SIGTERM)
    try:
        assert first.process.wait(60) in (0, -signal.SIGTERM)
    finally:
        first.close()
    second = start_gateway(fleet, **settings)
    try:
        with openai.OpenAI(base_url=f"{second.url}/v1", api_key="none", max_retries=0) as client:
            before = client.batches.retrieve(batch_id).request_counts.completed
            wait_until(lambda: client.batches.retrieve(batch_id).request_counts.completed > before, 20)
            assert begun(worker) < 100, "the batch is through: nothing would be waited out"
            fleet.redis.kill9()
            with pytest.raises(openai.APIStatusError) as caught:
                client.batches.retrieve(batch_id)
            assert caught.value.status_code == 503
            fleet.redis.restart()

            def status() -> str:
                try:
                    return client.batches.retrieve(batch_id).status
                except openai.APIStatusError:
                    return ""

            wait_until(lambda: status() in ENDED, 60)
            batch = client.batches.retrieve(batch_id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 100)
            assert set(rows_of(client, batch.output_file_id)) == {f"r{k}" for k in range(100)}
    finally:
        second.close()


def test_a_frozen_driver_that_wakes_up_is_fenced(fleet: Fleet, tmp_path: Path) -> None:
    worker = fleet.start_worker()
    settings = {"storage": tmp_path / "s", "batch_lease_s": 3, "batch_window": 4}
    frozen = start_gateway(fleet, **settings)
    with openai.OpenAI(base_url=f"{frozen.url}/v1", api_key="none", max_retries=0) as client:
        batch_id = create(client, [row(f"r{k}", max_tokens=60) for k in range(60)]).id
        wait_until(lambda: any(line["event"] == "end" for line in worker.record), 20)
    os.killpg(frozen.process.pid, signal.SIGSTOP)
    redis, key = fleet.redis.client(), f"tokenfleet:{fleet.redis.fleet}:batch:{batch_id}"
    owner = redis.hget(key, "owner")
    second = start_gateway(fleet, **settings)
    try:
        wait_until(lambda: redis.hget(key, "owner") != owner, 20)
        new = redis.hget(key, "owner")
        assert begun(worker) < 60, "the batch is through: nobody could disturb it"
        os.killpg(frozen.process.pid, signal.SIGCONT)
        with openai.OpenAI(base_url=f"{second.url}/v1", api_key="none", max_retries=0) as client:
            batch = ended(client, batch_id)
            assert redis.hget(key, "owner") == new
            assert batch.request_counts.completed == 60
            assert set(rows_of(client, batch.output_file_id)) == {f"r{k}" for k in range(60)}
        assert begun(worker) == 60, "no row ran twice"
    finally:
        os.killpg(frozen.process.pid, signal.SIGCONT)
        frozen.close()
        second.close()

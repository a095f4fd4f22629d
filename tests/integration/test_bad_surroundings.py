"""What a user meets when something around the fleet is wrong: a typed error that says what to do."""

from __future__ import annotations

import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleets import ROOT, Fleet, wait_until
from tests.servers import RedisServer, new_fleet_name, running_server
from tokenfleet import Client
from tokenfleet.wire.errors import ConfigurationError, FleetUnavailable, UnknownModel


def test_no_redis() -> None:
    with pytest.raises(FleetUnavailable) as caught:
        Client("unix:///nowhere/redis.sock")
    assert caught.value.code == "redis_unavailable"


def test_a_url_that_is_none() -> None:
    with pytest.raises(ConfigurationError):
        Client("http://example.org")


class _OldRedis(socketserver.StreamRequestHandler):
    """Speaks as much RESP2 as a client needs to learn that this is Redis 6.2."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                words.append(self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2].upper())
            if words[0] == b"INFO":
                body = b"redis_version:6.2.7\r\nmaxmemory_policy:noeviction\r\n"
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(body), body))
            elif words[0] == b"HELLO":
                self.wfile.write(b"-ERR unknown command\r\n")
            else:
                self.wfile.write(b"+OK\r\n")


@pytest.fixture
def old_redis() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _OldRedis) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0?protocol=2"
        server.shutdown()


def test_a_redis_too_old(old_redis: str) -> None:
    with pytest.raises(FleetUnavailable) as caught:
        Client(old_redis)
    assert caught.value.code == "redis_too_old"


def test_a_redis_that_may_evict() -> None:
    with running_server(maxmemory_policy="allkeys-lru", maxmemory="100mb") as server:
        with pytest.raises(FleetUnavailable) as caught:
            Client(server.url)
        assert caught.value.code == "wrong_eviction_policy"


def test_a_fleet_without_models(shared_redis: RedisServer) -> None:
    with Client(shared_redis.url, fleet=shared_redis.fleet) as client, pytest.raises(UnknownModel):
        client.submit("hello")


def worker_error(redis: RedisServer, **env: str) -> tuple[int, str]:
    settings = {"TOKENFLEET_REDIS_URL": redis.url, "TOKENFLEET_FLEET": new_fleet_name(), **env}
    worker = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-l", "info"],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    return worker.returncode, worker.stdout + worker.stderr


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "TOKENFLEET_MODEL"),
        ({"TOKENFLEET_MODEL": "m", "TOKENFLEET_ENGINE": "abacus"}, "TOKENFLEET_ENGINE"),
        (
            {"TOKENFLEET_MODEL": "m", "TOKENFLEET_ENGINE": "scripted", "TOKENFLEET_ENGINE_ARGS": '{"tokn_ms": 1}'},
            "tokn_ms",
        ),
        (
            {"TOKENFLEET_MODEL": "m", "TOKENFLEET_ENGINE_ARGS": '{"model_name_or_path": "/no/such/folder"}'},
            "/no/such/folder",
        ),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line(
    shared_redis: RedisServer, env: dict[str, str], said: str
) -> None:
    status, output = worker_error(shared_redis, **env)
    assert status != 0
    lines = [line for line in output.splitlines() if said in line]
    assert lines, output[-2000:]
    assert "Traceback" not in output


def test_a_worker_that_starts_before_redis_waits_for_it(tmp_path: Path) -> None:
    with running_server() as server:
        redis = RedisServer(server, new_fleet_name())
        redis.kill9()
        fleet = Fleet(redis, tmp_path)
        worker = fleet.start_worker(wait=False)
        try:
            wait_until(lambda: "no heartbeat" in worker.log, 20, "the worker's first try")
            redis.restart()
            fleet.wait_ready(worker, 0)
            assert len(fleet.client().submit("hi", max_new_tokens=3).result(20).choices[0].ids) == 3
        finally:
            fleet.close()


def test_garbage_in_broker_log_and_channel_kills_nobody(fleet: Fleet) -> None:
    worker = fleet.start_worker()
    client, server = fleet.client(), fleet.redis.client()
    prefix = f"tokenfleet:{fleet.redis.fleet}:"
    from tokenfleet.wire.keys import Keys, new_id

    queue = Keys(fleet.redis.fleet).queue("scripted")
    good = client.submit("hello", max_new_tokens=200)
    ghost = new_id()
    headers = {"lang": "py", "task": "tokenfleet.run", "id": ghost}
    delivery = {"delivery_tag": new_id(), "delivery_info": {"exchange": "", "routing_key": queue}}
    message = {
        "body": json.dumps([[ghost], {}, {}]), "content-encoding": "utf-8", "content-type": "application/json",
        "headers": headers, "properties": delivery,
    }  # fmt: skip
    server.lpush(queue, json.dumps(message))
    server.lpush(queue, json.dumps({**message, "headers": {**headers, "task": "no.such.task"}}))
    server.lpush(queue, json.dumps({**message, "body": json.dumps([["*:?"], {}, {}])}))
    server.publish(prefix + "live:" + good.id, b"\xff not json")
    server.publish(prefix + "live:" + good.id, b'{"seq": 3, "events": [{"type": "surprise"}]}')
    assert len(good.result(30).choices[0].ids) == 200
    with worker.frozen():
        bad = client.submit("hello", max_new_tokens=3)
        server.hset(prefix + "job:" + bad.id, "request", b'{"kind": "chat", "messages": 7}')
    with pytest.raises(Exception, match="request"):
        bad.result(20)
    assert len(client.submit("hello", max_new_tokens=3).result(20).choices[0].ids) == 3
    assert worker.process.poll() is None
    worker.kill_main(signal.SIGTERM)
    assert worker.wait(60) == 0

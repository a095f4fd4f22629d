"""Keys, tenants and their limits, over several gateways."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from tests.fleets import MODEL, Fleet, wait_until
from tests.gateways import Gateway, start_gateway
from tokenfleet.cli import root
from tokenfleet.producer.gateway.app import create_app
from tokenfleet.producer.gateway.guard import OPEN_PATHS
from tokenfleet.producer.gateway.settings import GatewaySettings

MESSAGES: list = [{"role": "user", "content": "Say something."}]


def cli(fleet: Fleet, *words: str) -> str:
    where = ["--redis-url", fleet.redis.url, "--fleet", fleet.redis.fleet]
    result = CliRunner().invoke(root, [*words[:2], *where, *words[2:]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@pytest.fixture(scope="module")
def keys(served: Fleet) -> dict[str, str]:
    return {tenant: cli(served, "keys", "create", tenant) for tenant in ("alice", "bob", "carol")}


@pytest.fixture(scope="module")
def gateways(served: Fleet, keys: dict[str, str]) -> Iterator[list[Gateway]]:
    started = [start_gateway(served) for _ in range(2)]
    yield started
    for gateway in started:
        gateway.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]


def call(gateway: Gateway, path: str, key: str | None = None, method: str = "GET", **headers: str) -> Answer:
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = headers.pop("body", None)
    request = urllib.request.Request(
        f"{gateway.url}{path}", data=data.encode() if data else None, method=method, headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return Answer(reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())


_clients: list[openai.OpenAI] = []


@pytest.fixture(scope="module", autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    for client in _clients:
        client.close()


def client_of(gateway: Gateway, key: str) -> openai.OpenAI:
    _clients.append(openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0))
    return _clients[-1]


def test_no_route_answers_without_a_valid_key(gateways: list[Gateway]) -> None:
    app = create_app(GatewaySettings())
    routes = [(path, method) for path, methods in paths_of(app) for method in methods]
    assert len(routes) >= 8
    for path, method in [*routes, ("/nothing", "GET"), ("/v1/chat/completions", "DELETE")]:
        path = path.replace("{", "").replace("}", "").replace(":path", "")
        for key in (None, "tf-wrong", "x" * 5000):
            answer = call(gateways[0], path, key, method)
            if path in OPEN_PATHS:
                assert answer.status == 200
            else:
                assert answer.status == 401, (method, path)
                assert answer.code in ("missing_api_key", "invalid_api_key")


def paths_of(app: Any) -> list[tuple[str, list[str]]]:
    """Every route, those of included routers too."""
    found, routes = [], list(app.routes)
    while routes:
        route = routes.pop()
        if hasattr(route, "path"):
            found.append((route.path, sorted(getattr(route, "methods", None) or ["GET"])))
        else:
            routes += route.original_router.routes
    assert set(app.openapi()["paths"]) <= {path.replace(":path", "") for path, _ in found}
    return found


def test_keys_are_stored_hashed(served: Fleet, keys: dict[str, str]) -> None:
    stored = served.redis.client().hgetall(f"tokenfleet:{served.redis.fleet}:apikeys")
    assert len(stored) == len(keys)
    for secret in keys.values():
        assert secret not in str(stored)


def test_a_revoked_key_is_dead_within_seconds(served: Fleet, gateways: list[Gateway]) -> None:
    key = cli(served, "keys", "create", "mallory")
    assert call(gateways[0], "/v1/models", key).status == 200
    key_id = next(line.split()[0] for line in cli(served, "keys", "list").splitlines() if "mallory" in line)
    cli(served, "keys", "revoke", key_id)
    wait_until(lambda: call(gateways[0], "/v1/models", key).status == 401, 5)


def test_requests_per_minute_hold_over_all_gateways(
    served: Fleet, gateways: list[Gateway], keys: dict[str, str]
) -> None:
    cli(served, "keys", "limits", "alice", "--requests-per-minute", "6")
    body = json.dumps({"model": MODEL, "messages": MESSAGES, "max_tokens": 1})
    wait_until(lambda: "x-ratelimit-limit-requests" in call(gateways[0], "/v1/models", keys["alice"]).headers, 5)
    wait_until(lambda: "x-ratelimit-limit-requests" in call(gateways[1], "/v1/models", keys["alice"]).headers, 5)

    def ask(k: int) -> Answer:
        content = {"Content-Type": "application/json", "body": body}
        return call(gateways[k % 2], "/v1/chat/completions", keys["alice"], "POST", **content)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    refused = [answer for answer in answers if answer.status == 429]
    assert 12 - len(refused) in (6, 7)  # one may have come back meanwhile
    for answer in refused:
        assert answer.code == "rate_limited"
        assert 1 <= int(answer.headers["retry-after"]) <= 10
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answers[0].headers["x-ratelimit-limit-requests"] == "6"
    for answer in answers:  # ten seconds until one is back: what was just taken counts
        assert 10 <= float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    # Nobody else is touched, and looking costs nothing.
    assert client_of(gateways[0], keys["bob"]).chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    assert call(gateways[0], "/v1/models", keys["alice"]).status == 200
    assert cli(served, "keys", "limits", "alice", "--clear") == "no limits"


def test_tokens_per_minute_count_what_was_used(served: Fleet, gateways: list[Gateway], keys: dict[str, str]) -> None:
    cli(served, "keys", "limits", "carol", "--tokens-per-minute", "60")
    client = client_of(gateways[0], keys["carol"])
    wait_until(lambda: "x-ratelimit-limit-tokens" in call(gateways[0], "/v1/models", keys["carol"]).headers, 5)
    used = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100).usage.total_tokens
    assert used > 100
    raw = call(gateways[1], "/v1/models", keys["carol"])
    assert raw.headers["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    # The debt is paid off at one token a second.
    assert used - 60 - 10 <= int(caught.value.response.headers["retry-after"]) <= used - 60 + 2


def test_tokens_are_taken_at_admission_and_settled_at_the_end(
    served: Fleet, gateways: list[Gateway], keys: dict[str, str]
) -> None:
    """Twelve at once, each up to some 325 of 1000 tokens a minute: three come in. What they leave over comes back:
    they hang until they are cancelled, so that much is left over however slow the machine is."""
    key = cli(served, "keys", "create", "dora")
    cli(served, "keys", "limits", "dora", "--tokens-per-minute", "1000")

    def left() -> int:
        return int(call(gateways[0], "/v1/models", key).headers["x-ratelimit-remaining-tokens"])

    told: list[Any] = []

    def ask(k: int) -> Any:
        client = client_of(gateways[k % 2], key)
        try:
            made = client.responses.with_raw_response.create(
                model=MODEL, input="[[fault: hang at 20]]", max_output_tokens=290, background=True
            )
            told.append(made)
            return made.parse()
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    refused = [each for each in answers if isinstance(each, openai.RateLimitError)]
    # What one is told already counts what it may use itself.
    lowest = min(int(each.headers["x-ratelimit-remaining-tokens"]) for each in told)
    assert lowest < 1000 - 3 * 290 + 100  # some has come back meanwhile
    let_in = [each for each in answers if each not in refused]
    assert len(let_in) == 3
    for error in refused:
        assert error.code == "rate_limited"
        assert 1 <= int(error.response.headers["retry-after"]) <= 20
    assert left() < 300
    client = client_of(gateways[0], key)
    for each in let_in:
        client.responses.cancel(each.id)
    used = sum(client.responses.retrieve(each.id).usage.total_tokens for each in let_in)
    assert left() < 1000 - used + 250  # refilled by 17 a second meanwhile
    assert left() >= 1000 - used - 5
    for _ in range(8):  # a bound of 100 each, and little used: more than the 1000 all in all
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": '[[say: "short"]]'}], max_tokens=100
        )


def test_concurrent_jobs_and_the_queue_share_are_bounded(
    served: Fleet, gateways: list[Gateway], keys: dict[str, str]
) -> None:
    cli(served, "keys", "limits", "bob", "--concurrent-jobs", "2")
    running, go_on = threading.Barrier(3), threading.Event()

    def stream(k: int) -> None:
        wanted = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5000, "stream": True}
        with client_of(gateways[k], keys["bob"]).chat.completions.create(**wanted) as chunks:
            next(iter(chunks))
            running.wait(60)
            go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream, k) for k in range(2)]
        running.wait(60)
        for gateway in gateways:
            with pytest.raises(openai.RateLimitError) as caught:
                client_of(gateway, keys["bob"]).chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
            assert caught.value.code == "too_many_jobs"
            assert "retry-after" in caught.value.response.headers
        go_on.set()
        for future in streams:
            future.result(20)

    def is_free() -> bool:
        try:
            client_of(gateways[0], keys["bob"]).chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
        except openai.RateLimitError:
            return False
        return True

    wait_until(is_free, 10)
    key = f"tokenfleet:{served.redis.fleet}:tenant:bob"
    wait_until(lambda: served.redis.client().zcard(key) == 0, 5)


def test_a_share_of_the_queue_is_no_more(fleet: Fleet) -> None:
    worker = fleet.start_worker()
    worker.kill_group()
    cli(fleet, "keys", "limits", "t", "--queue-share", "0.05")
    client = fleet.client(max_queued=100)
    for _ in range(5):
        client.submit("x", model=MODEL, tenant="t")
    from tokenfleet.wire.errors import Overloaded

    with pytest.raises(Overloaded) as caught:
        client.submit("x", model=MODEL, tenant="t")
    assert caught.value.code == "queue_share_full"
    client.submit("x", model=MODEL, tenant="other")


def test_an_idempotency_key_belongs_to_its_tenant(gateways: list[Gateway], keys: dict[str, str]) -> None:
    wanted = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 3, "extra_headers": {"Idempotency-Key": "k1"}}
    mine = client_of(gateways[0], keys["alice"]).completions.create(**wanted)
    again = client_of(gateways[1], keys["alice"]).completions.create(**wanted)
    assert mine.id == again.id
    assert [choice.text for choice in mine.choices] == [choice.text for choice in again.choices]
    other = client_of(gateways[0], keys["bob"]).completions.create(**wanted)
    assert other.id != mine.id
    with pytest.raises(openai.ConflictError):
        client_of(gateways[1], keys["alice"]).completions.create(**wanted | {"max_tokens": 4})


def test_nobody_reads_anothers_chat_or_response(gateways: list[Gateway], keys: dict[str, str]) -> None:
    mine, theirs = client_of(gateways[0], keys["alice"]), client_of(gateways[1], keys["bob"])
    chat = mine.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2)
    response = mine.responses.create(model=MODEL, input="Hi!", background=True, max_output_tokens=16)
    assert mine.chat.completions.retrieve(chat.id).choices == chat.choices
    assert mine.responses.retrieve(response.id).id == response.id
    for call in (
        lambda: theirs.chat.completions.retrieve(chat.id),
        lambda: theirs.chat.completions.retrieve(response.id.replace("resp_", "chatcmpl-")),
        lambda: mine.chat.completions.retrieve(response.id.replace("resp_", "chatcmpl-")),
        lambda: mine.chat.completions.retrieve("chatcmpl-../../x"),
        lambda: theirs.responses.retrieve(response.id),
        lambda: theirs.responses.cancel(response.id),
        lambda: theirs.responses.delete(response.id),
        lambda: theirs.responses.input_items.list(response.id),
        lambda: theirs.responses.retrieve("resp_" + chat.id.removeprefix("chatcmpl-").replace("-", "")),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.BadRequestError):
        theirs.responses.create(model=MODEL, input="And?", previous_response_id=response.id)


def test_a_compressed_body_is_refused_unread(gateways: list[Gateway], keys: dict[str, str]) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json", "body": "\x1f\x8b"}
    answer = call(gateways[0], "/v1/chat/completions", keys["bob"], "POST", **headers)
    assert (answer.status, answer.code) == (415, "unsupported_encoding")


def test_a_response_is_its_tenants_alone(gateways: list[Gateway], keys: dict[str, str]) -> None:
    alice, bob = (client_of(gateways[0], keys[name]).responses for name in ("alice", "bob"))
    made = alice.create(model=MODEL, input="Hi.", max_output_tokens=4, background=True)
    tries: list[Any] = [
        bob.retrieve, bob.cancel, bob.delete, lambda i: list(bob.retrieve(i, stream=True)),
        lambda i: list(bob.input_items.list(i)),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(openai.NotFoundError) as caught:
            attempt(made.id)
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        bob.create(model=MODEL, input="Hi.", previous_response_id=made.id)
    assert refused.value.code == "previous_response_not_found"
    assert alice.retrieve(made.id).id == made.id


def test_a_responses_key_is_one_response(gateways: list[Gateway], keys: dict[str, str]) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "Go on.", "max_output_tokens": 20}
    once: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "one response"}}
    first, again = (client_of(gateway, keys["alice"]).responses.create(**asked, **once) for gateway in gateways)
    assert first == again
    assert client_of(gateways[0], keys["bob"]).responses.create(**asked, **once).id != first.id
    with pytest.raises(openai.ConflictError):
        client_of(gateways[0], keys["alice"]).responses.create(**{**asked, "max_output_tokens": 21}, **once)

"""Webhooks: signed, tried again, on the gateway that is left; never inside."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.batches import begun, create, ended, row
from tests.fleets import MODEL, Fleet, wait_until
from tests.gateways import Gateway, start_gateway
from tests.integration.test_gateway_tenants import cli
from tests.receiver import Call, Receiver, receiver

MESSAGES: list = [{"role": "user", "content": "Say something."}]
OPEN = {"webhook_http": True, "webhook_allowed_networks": '["127.0.0.0/8"]', "webhook_retry_s": 0.2}


@pytest.fixture(scope="module")
def secret(served: Fleet) -> str:
    return cli(served, "keys", "webhook-secret")


@pytest.fixture(scope="module")
def gateway(served: Fleet, secret: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = start_gateway(served, storage=tmp_path_factory.mktemp("storage"), **OPEN)
    yield gateway
    gateway.close()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def hook(seen: Receiver, path: str = "/hook") -> dict[str, dict[str, dict[str, str]]]:
    return {"extra_body": {"webhook": {"url": seen.url + path}}}


def test_chats_responses_and_batches_tell_of_their_ends(client: openai.OpenAI, secret: str) -> None:
    with receiver() as seen:
        chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, **hook(seen))
        wanted = {"model": MODEL, "input": "Hi!", "background": True}
        whole = client.responses.create(**wanted, **hook(seen), instructions='[[say: "done"]]')
        cut = client.responses.create(**wanted, max_output_tokens=16, **hook(seen))
        stopped = client.responses.create(**wanted, max_output_tokens=20_000, **hook(seen))
        client.responses.cancel(stopped.id)
        batch = ended(client, create(client, [row("a")], **hook(seen)).id)
        wait_until(lambda: len(seen.calls_by_id()) >= 5, 20)
        calls = seen.calls_by_id().values()
        events = [client.webhooks.unwrap(call.body, call.headers, secret=secret) for call in calls]
        told = {event.data.id: event.type for event in events}
        assert told[chat.id] == "chat.completion.completed"
        assert client.chat.completions.retrieve(chat.id) == chat
        assert told[whole.id] in ("response.completed", "response.incomplete")
        assert told[cut.id] == "response.incomplete"
        assert told[stopped.id] == "response.cancelled"
        assert told[batch.id] == "batch.completed"
        assert len(told) == len(events) == 5
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(seen.calls[0].body + b" ", seen.calls[0].headers, secret=secret)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(seen.calls[0].body, seen.calls[0].headers, secret="whsec_" + "A" * 44)


def ask_and_leave(gateway: Gateway, served: Fleet, path: str, body: dict[str, Any]) -> None:
    """Ask, and go as soon as a long answer has begun."""
    [worker] = served.workers
    before = begun(worker)
    with closing(http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)) as connection:
        body = {"model": MODEL, "max_tokens": 600, **body}
        connection.request("POST", f"/v1/{path}", json.dumps(body), {"Content-Type": "application/json"})
        wait_until(lambda: begun(worker) > before, 20, "it runs")


def test_a_completion_tells_of_its_end_and_can_be_read_then(
    client: openai.OpenAI, gateway: Gateway, served: Fleet, secret: str
) -> None:
    with receiver() as seen:
        text = client.completions.create(model=MODEL, prompt="Say something.", max_tokens=3, n=2, **hook(seen))
        ask_and_leave(gateway, served, "completions", {"prompt": "Say more.", "webhook": {"url": seen.url}})
        wait_until(lambda: len(seen.calls_by_id()) == 2, 20)
        events = [json.loads(call.body) for call in seen.calls_by_id().values()]
        assert client.webhooks.verify_signature(seen.calls[0].body, seen.calls[0].headers, secret=secret) is None
        assert {event["type"] for event in events} == {"completion.completed"}
        [other] = {event["data"]["id"] for event in events} - {text.id}

        def read(completion_id: str) -> openai.types.Completion:
            return client.get(f"/completions/{completion_id}", cast_to=openai.types.Completion)

        assert read(text.id) == text
        assert read(other).usage.completion_tokens == 600
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(text.id.replace("cmpl-", "chatcmpl-"))
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt=["a", "b"], **hook(seen))
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "webhook")


def test_a_failed_call_is_made_again_with_the_same_id(client: openai.OpenAI) -> None:
    answers = iter([500, 302, 429])
    with receiver(lambda call: next(answers, 200)) as seen:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, **hook(seen))
        wait_until(lambda: len(seen.calls) >= 4, 20)
        assert len({call.headers["webhook-id"] for call in seen.calls}) == 1
        assert len({call.body for call in seen.calls}) == 1


def test_who_left_is_told_all_the_same(gateway: Gateway, served: Fleet) -> None:
    with receiver() as seen:
        ask_and_leave(gateway, served, "chat/completions", {"messages": MESSAGES, "webhook": {"url": seen.url}})
        wait_until(lambda: seen.calls, 20)
        assert json.loads(seen.calls[0].body)["type"] == "chat.completion.completed"


def test_another_gateway_delivers_what_a_dead_one_could_not(
    served: Fleet, client: openai.OpenAI, secret: str, tmp_path: Path
) -> None:
    is_up = False

    def answer(call: Call) -> int:
        return 200 if is_up else 503

    with receiver(answer) as seen:
        doomed = start_gateway(served, storage=tmp_path, **OPEN)
        with openai.OpenAI(base_url=f"{doomed.url}/v1", api_key="none", max_retries=0) as there:
            there.responses.create(model=MODEL, input="Hi!", background=True, max_output_tokens=16, **hook(seen))
        wait_until(lambda: seen.calls, 20)
        doomed.close()
        is_up = True
        wait_until(lambda: len(seen.calls) >= 2 and seen.calls[-1], 40)
        assert client.webhooks.unwrap(seen.calls[-1].body, seen.calls[-1].headers, secret=secret)
        wait_until(lambda: not served.redis.client().zcard(f"tokenfleet:{served.redis.fleet}:hooks"), 10)


def test_what_is_not_called(fleet: Fleet, tmp_path: Path) -> None:
    """By default: all but https to the public internet."""
    fleet.start_worker()
    cli(fleet, "keys", "webhook-secret")
    gateway = start_gateway(fleet, storage=tmp_path, webhook_retry_s=0.2, webhook_http=True)
    strict = start_gateway(fleet, storage=tmp_path)
    try:
        with receiver() as canary, openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            port = canary.port
            for host in (
                "127.0.0.1",
                "localhost",
                "127.1",
                "0x7f000001",
                "2130706433",
                "[::ffff:127.0.0.1]",
                "0.0.0.0",
            ):
                url = f"http://{host}:{port}/inside"
                client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"webhook": {"url": url}}
                )
            redis, name = fleet.redis.client(), f"tokenfleet:{fleet.redis.fleet}:hooks"
            wait_until(lambda: not redis.zcard(name), 20)
            assert canary.calls == []
        with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0) as client:
            for webhook in ({"url": "http://example.com"}, {"url": "file:///etc/passwd"}, {"url": 1}, "x", {"u": "x"}):
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(
                        model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"webhook": webhook}
                    )
    finally:
        gateway.close()
        strict.close()


def test_no_redirect_is_followed(client: openai.OpenAI) -> None:
    with receiver() as canary, receiver(lambda call: f"{canary.url}/inside") as seen:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, **hook(seen))
        wait_until(lambda: len(seen.calls) >= 2, 20)
        seen.answer = lambda call: 200
        done = len(seen.calls)
        wait_until(lambda: len(seen.calls) > done, 20)
        assert canary.calls == []

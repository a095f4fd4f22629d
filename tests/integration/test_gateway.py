"""The gateway under the official client: its types validate every answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from tests.fleets import MODEL, ROOT, Fleet, wait_until
from tests.gateways import Gateway, start_gateway

MESSAGES: list = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def gateway(served: Fleet) -> Iterator[Gateway]:
    gateway = start_gateway(served)
    yield gateway
    gateway.close()


@pytest.fixture
def client(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def status_of(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_whole_completion(client: openai.OpenAI) -> None:
    wanted = {"max_tokens": 12, "n": 2, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **wanted)
    assert answer.object == "chat.completion"
    assert len(answer.choices) == 2
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    logprobs = answer.choices[0].logprobs.content
    assert len(logprobs) == 12
    assert all(len(token.top_logprobs) == 2 for token in logprobs)


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    wanted = {"model": MODEL, "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    chunks = list(client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    whole = client.chat.completions.create(**wanted)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 30
    assert len({c.id for c in chunks}) == 1


async def test_the_async_client_streams_too(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=10, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


def raw_stream(gateway: Gateway, path: str, body: dict[str, Any]) -> list[tuple[int | None, Any]]:
    """(id, data) of every server-sent event, up to the last word."""
    request = urllib.request.Request(
        f"{gateway.url}/v1{path}", json.dumps({"model": MODEL, "stream": True, **body}).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        *events, done, rest = reply.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found = []
    for event in events:
        fields = dict(line.split(": ", 1) for line in event.split("\n") if not line.startswith(":"))
        assert fields.keys() <= {"id", "data"}
        found.append((int(fields["id"]) if "id" in fields else None, json.loads(fields["data"])))
    return found


def text_chunk(data: dict[str, Any]) -> None:
    # OpenAI's one type for it is the whole answer's, which has an end.
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in data["choices"]]
    Completion.model_validate(data | {"choices": choices}, strict=True)


def chat_chunk(data: dict[str, Any]) -> None:
    ChatCompletionChunk.model_validate(data, strict=True)


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(("path", "body", "reasons"), [
    ("/chat/completions", {"messages": MESSAGES, "max_tokens": 6}, ["length"]),
    ("/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "n": 3, "logprobs": True, "top_logprobs": 2, **USAGE},
     ["length"] * 3),
    ("/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "n": 2,
                           "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, ["length"] * 2),
    ("/chat/completions", {"messages": [{"role": "user", "content": f"[[say: {json.dumps('a b' + CALL + CALL)}]]"}],
                           "tools": [TOOL], **USAGE}, ["tool_calls"]),
    ("/chat/completions", {"messages": [{"role": "user", "content": '[[say: "<think>so</think>yes"]]'}],
                           "enable_thinking": True, **USAGE}, ["stop"]),
    ("/completions", {"prompt": "Go.", "max_tokens": 6}, ["length"]),
    ("/completions", {"prompt": ["Go.", "On."], "max_tokens": 6, "n": 2, "logprobs": 2, **USAGE}, ["length"] * 4),
], ids=["chat", "choices", "usage so far", "calls", "thoughts", "text", "texts"])  # fmt: skip
def test_every_event_of_a_stream_has_openais_shape(
    gateway: Gateway, path: str, body: dict[str, Any], reasons: list[str]
) -> None:
    events = raw_stream(gateway, path, body)
    ids = [number for number, _ in events if number is not None]
    if not isinstance(body.get("prompt"), list):  # each prompt is a job with numbers of its own
        assert ids == sorted(set(ids))
    ended: dict[int, str] = {}
    begun: set[int] = set()
    for _, data in events:
        (chat_chunk if path.startswith("/chat") else text_chunk)(data)
        assert {name: data[name] for name in ("id", "created", "model")} == {
            name: events[0][1][name] for name in ("id", "created", "model")
        }
        for choice in data["choices"]:
            assert choice["index"] not in ended
            if path.startswith("/chat"):  # the role comes once, first
                assert ("role" in choice["delta"]) == (choice["index"] not in begun)
            begun.add(choice["index"])
            if choice["finish_reason"]:
                ended[choice["index"]] = choice["finish_reason"]
    assert [ended[index] for index in sorted(ended)] == reasons
    last = events[-1][1]
    assert (last["choices"] == []) == ("stream_options" in body)
    if "stream_options" in body:
        usage = last["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert all(data["choices"] for _, data in events[:-1])


def test_a_stream_that_fails_says_so_in_its_last_event(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "[[fault: raise at 5]]"}]
    *chunks, (_, last) = raw_stream(gateway, "/chat/completions", {"messages": messages, "max_tokens": 20})
    for _, data in chunks:
        chat_chunk(data)
        assert not any(choice["finish_reason"] for choice in data["choices"])
    assert chunks
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert last["error"]["code"]


def test_stop_strings_and_vllms_extras(client: openai.OpenAI) -> None:
    said = [{"role": "user", "content": '[[say: "one two STOP three"]]'}]
    extra = {"top_k": 5, "min_p": 0.1}
    answer = client.chat.completions.create(model=MODEL, messages=said, stop="STOP", extra_body=extra)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content.rstrip() == "one two"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5, n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 20
    assert len(answer.choices[0].logprobs.tokens) == 5
    chunks = list(client.completions.create(model=MODEL, prompt="a", max_tokens=5, stream=True))
    assert "".join(c.choices[0].text for c in chunks)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"messages": []}, "invalid_request"),
        ({"temperature": 1000}, "invalid_request"),
        ({"tempurature": 1}, "unknown_field"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "word " * 40_000}]}, "context_length_exceeded"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "invalid_request"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_media"),
    ],
)  # fmt: skip
def test_bad_requests_are_400_with_a_stable_code(client: openai.OpenAI, body: dict, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": MODEL, "messages": MESSAGES, **body}, cast_to=object)
    assert caught.value.code == code


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nothing", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_body_too_large_is_refused_before_it_is_read(gateway: Gateway) -> None:
    request = urllib.request.Request(f"{gateway.url}/v1/chat/completions", data=b"x", method="POST")
    request.add_unredirected_header("Content-Length", str(10**9))
    assert status_of(request) == 413


def test_a_client_that_leaves_cancels_its_job(client: openai.OpenAI, served: Fleet) -> None:
    def aborts() -> int:
        return sum(line["event"] == "end" and line["reason"] == "abort" for line in served.workers[0].record)

    before = aborts()
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5000, stream=True)
    list(islice(stream, 5))
    stream.close()
    wait_until(lambda: aborts() == before + 1, 10)


def test_an_idempotency_key_is_one_job_and_resumes(client: openai.OpenAI, gateway: Gateway, served: Fleet) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "stream": True}

    def events(url: str, last: str | None = None) -> list[tuple[str, str]]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": "once"}
        if last:
            headers["Last-Event-ID"] = last
        request = urllib.request.Request(f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            lines = reply.read().decode().split("\n\n")
        return [tuple(part.partition(": ")[2] for part in line.split("\n")) for line in lines if line.startswith("id:")]

    first = events(gateway.url)
    other = start_gateway(served)
    try:
        cut = first[len(first) // 2][0]
        assert events(other.url, cut) == [e for e in first if int(e[0]) > int(cut)]
    finally:
        other.close()
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=41, extra_headers={"Idempotency-Key": "once"}
        )


def test_health_and_readiness(gateway: Gateway) -> None:
    for path in ("/health", "/ready"):
        with urllib.request.urlopen(f"{gateway.url}{path}", timeout=30) as reply:
            assert reply.status == 200


def test_once_there_is_a_key_every_route_needs_one(served: Fleet) -> None:
    import asyncio

    from tokenfleet.producer.apikeys import KeyStore
    from tokenfleet.wire import urls
    from tokenfleet.wire.keys import Keys

    async def make(revoke: str | None = None) -> tuple[str, str]:
        redis = urls.connect_async(served.redis.url)
        store = KeyStore(redis, Keys(served.redis.fleet))
        if revoke:
            assert await store.revoke(revoke)
            await redis.aclose()
            return "", ""
        secret, key = await store.create("alice")
        await redis.aclose()
        return secret, key.id

    secret, key_id = asyncio.run(make())
    gateway = start_gateway(served)
    try:
        for path in ("/v1/models", "/v1/chat/completions", "/openapi.json"):
            assert status_of(urllib.request.Request(f"{gateway.url}{path}")) in (401, 405)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="wrong").models.list()
        assert openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=secret).models.list().data
    finally:
        gateway.close()
        asyncio.run(make(key_id))


def test_no_public_address_without_keys(fleet: Fleet) -> None:
    gateway = start_gateway(fleet, wait=False, host="0.0.0.0")
    try:
        assert gateway.process.wait(60) != 0
    finally:
        gateway.close()


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["--host", "0.0.0.0"], {}, "The gateway does not serve on 0.0.0.0 without API keys."),
        ([], {"TOKENFLEET_GATEWAY_RETENTION_S": "-1"}, "TOKENFLEET_GATEWAY_RETENTION_S: "),
        ([], {"TOKENFLEET_GATEWAY_FETCH_ALLOWED_NETWORKS": "10.0.0.0/8"}, "Settings can't be read: "),
    ],
)
def test_a_gateway_that_can_not_start_says_why_in_one_line(
    served: Fleet, words: list[str], env: dict[str, str], said: str
) -> None:
    where = ["--redis-url", served.redis.url, "--fleet", served.redis.fleet]
    command = [sys.executable, "-m", "tokenfleet", "serve", *where, *words]
    done = subprocess.run(command, env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error [configuration_error]: {said}")


def test_a_refusal_names_the_field_as_the_caller_did(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
    calls = {
        "max_tokens": lambda: client.chat.completions.create(**asked, max_tokens=-5),
        "max_completion_tokens": lambda: client.chat.completions.create(**asked, max_completion_tokens=-5),
        "max_output_tokens": lambda: client.responses.create(model=MODEL, input="Hi!", max_output_tokens=-5),
        "temperature": lambda: client.chat.completions.create(**asked, temperature=-5),
    }
    for name, call in calls.items():
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.param == name
        assert f" {name}: " in caught.value.body["message"]

"""Chats with tools and thoughts, tokens, clients that leave, readiness and metrics; the official client throughout."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import openai
import psutil
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.fleets import MODEL, Fleet, Worker, wait_until
from tests.gateways import Gateway, start_gateway
from tests.processes import Standstill, in_time
from tokenfleet.wire.keys import Keys

MESSAGES: list[Any] = [{"role": "user", "content": "Say something."}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = (
    "<think>Let me look.</think>Looking. "
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
    '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Kyiv"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def gateway(served: Fleet) -> Iterator[Gateway]:
    gateway = start_gateway(served, keepalive_s=0.2, head_held_s=1)
    yield gateway
    gateway.close()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": f"[[say: {json.dumps(text, ensure_ascii=False)}]]"}]


def call(gateway: Gateway, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{gateway.url}{path}", data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            status, text = int(reply.status), reply.read()
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read()
    return status, text if path == "/metrics" or "stream" in (body or ()) else json.loads(text)


def figure(gateway: Gateway, name: str) -> float:
    text = call(gateway, "/metrics")[1].decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


# -- chats ------------------------------------------------------------------------------------------------------------


def test_thoughts_and_parallel_calls_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": say(CALLS), "tools": TOOLS, "extra_body": {"enable_thinking": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    ChatCompletion.model_validate(whole.model_dump(), strict=True)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert (message.reasoning_content, message.content) == ("Let me look.", "Looking.")
    assert [json.loads(c.function.arguments)["city"] for c in message.tool_calls] == ["Łódź", "Kyiv"]
    state = ChatCompletionStreamState()
    reasoning, reasons = "", []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        state.handle_chunk(chunk)
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    put_together = state.get_final_completion()
    assert put_together.choices[0].message.content == message.content
    assert [c.function.arguments for c in put_together.choices[0].message.tool_calls] == [
        c.function.arguments for c in message.tool_calls
    ]
    assert (reasoning, reasons) == ("Let me look.", ["tool_calls"])
    usages = [answer.usage.model_dump() for answer in (put_together, whole)]
    for usage in usages:  # about as many as there are of the text, where they came together with others
        details = usage.pop("completion_tokens_details")
        assert 10 < details.pop("reasoning_tokens") < usage["completion_tokens"] / 2
    assert usages[0] == usages[1]


def test_no_tools_no_calls_and_one_call_if_not_parallel(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": say(CALLS)}
    assert "<tool_call>" in client.chat.completions.create(**asked).choices[0].message.content
    none = client.chat.completions.create(**asked, tools=TOOLS, tool_choice="none").choices[0]
    assert (none.finish_reason, none.message.tool_calls) == ("stop", None)
    one = client.chat.completions.create(**asked, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1


def test_results_of_tools_in_a_row(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=say(CALLS), tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in first.tool_calls]
    messages = [*say("x"), first.model_dump(exclude_none=True), *results, *say("Sunny in both.")]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "Sunny in both."


def test_usage_adds_up_in_a_stream_of_several_choices(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 9, "n": 3, "logprobs": True}
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    tokens = [len(choice.logprobs.content) for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert sum(tokens) == 27 == chunks[-1].usage.completion_tokens == chunks[-2].usage.completion_tokens
    assert {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason} == {
        0: "length", 1: "length", 2: "length",
    }  # fmt: skip


def test_completions_of_several_prompts_stream_side_by_side(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": ["a", "b", "c"], "max_tokens": 30, "logprobs": 1, "n": 2}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 180
    order = [chunk.choices[0].index for chunk in chunks if chunk.choices]
    assert set(order) == set(range(6))
    assert order.index(4) < len(order) - 1 - order[::-1].index(0)
    whole = client.completions.create(**asked)
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == choice.index]
        offsets = [offset for part in mine if part.logprobs for offset in part.logprobs.text_offset]
        assert len(offsets) == 30
        assert offsets == sorted(offsets)


def test_a_completions_stream_goes_on_by_its_key(gateway: Gateway) -> None:
    body = {"model": MODEL, "prompt": "Go on.", "max_tokens": 30, "stream": True}

    def events(**headers: str) -> list[bytes]:
        text = call(gateway, "/v1/completions", body, **{"Idempotency-Key": "one completion"}, **headers)[1]
        return [block for block in text.split(b"\n\n") if block.startswith(b"id: ")]

    first = events()
    cut = len(first) // 2
    last = first[cut].split(b"\n")[0].removeprefix(b"id: ").decode()
    assert events(**{"Last-Event-ID": last}) == first[cut + 1 :]


@pytest.mark.parametrize(("extra", "code"), [
    ({"functions": [{"name": "x"}]}, "unsupported_parameter"), ({"max_tokens": 0}, "invalid_request"),
    ({"stream_options": {"include_usage": True}}, "invalid_request"),
    ({"guided_choice": ["a"]}, "unsupported_parameter"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "invalid_request"),
    ({"reasoning_effort": "x"}, "invalid_request"), ({"response_format": {"type": "regex"}}, "invalid_request"),
    ({"response_format": {"type": "grammar", "grammar": 'start: "a"'}}, "unsupported_parameter"),
    ({"tools": TOOLS, "tool_choice": "required"}, "unsupported_parameter"), ({"tool_choice": "x"}, "invalid_request"),
    ({"stream": True, "response_format": {"type": "json_object"}}, "unsupported_parameter"),
    ({"stream": True, "messages": [{"role": "user", "content": "word " * 40_000}]}, "context_length_exceeded"),
])  # fmt: skip
def test_refusals_are_statuses_even_of_streams(
    client: openai.OpenAI, served: Fleet, extra: dict[str, Any], code: str
) -> None:
    def prefills() -> int:
        return sum(line["event"] == "prefill" for line in served.workers[0].record)

    before = prefills()
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": MODEL, "messages": MESSAGES, **extra}, cast_to=object)
    assert caught.value.code == code
    assert prefills() == before  # no engine was touched
    if code == "context_length_exceeded":
        assert re.search(r"\d{5}.*\d{4}", caught.value.message)


def test_unknown_fields_may_be_ignored(served: Fleet) -> None:
    gateway = start_gateway(served, unknown_fields="ignore")
    try:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "tempurature": 1}
        assert call(gateway, "/v1/chat/completions", body)[0] == 200
        assert call(gateway, "/v1/chat/completions", {**body, "functions": []})[1]["error"]["code"]
    finally:
        gateway.close()


def test_a_stream_that_waits_sends_comments(client: openai.OpenAI, gateway: Gateway) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "[[fault: block 2 at 0]]"}], "max_tokens": 2}
    text = call(gateway, "/v1/chat/completions", {**body, "stream": True})[1]
    assert text.count(b": waiting\n") > 1
    assert b": waiting\n\n" not in text
    chunks = list(client.chat.completions.create(**body, stream=True))  # the client passes over them
    assert chunks[-1].choices[0].finish_reason == "length"


# -- clients that leave -----------------------------------------------------------------------------------------------


def aborts(fleet: Fleet) -> int:
    return sum(line["event"] == "end" and line["reason"] == "abort" for line in fleet.workers[0].record)


def test_a_stream_is_not_silent_while_a_tool_call_is_written(gateway: Gateway) -> None:
    """A call is shown whole: here after 2 s of tokens that nobody sees, ten times what a proxy may wait."""
    call_text = json.dumps({"name": "weather", "arguments": {"city": "x" * 400}})
    said = json.dumps(f"Looking. <tool_call>\n{call_text}\n</tool_call>")
    messages = [{"role": "user", "content": f"[[spell: {said}]]"}]
    body = {"model": MODEL, "messages": messages, "tools": TOOLS, "stream": True}
    status, text = call(gateway, "/v1/chat/completions", body)
    assert status == 200
    said_first, has_call, _ = text.partition(b'"tool_calls":[')
    assert has_call
    _, has_text, silent = said_first.rpartition(b'"content":"')
    assert has_text
    assert silent.count(b": waiting\n") >= 3
    assert b": waiting\n\n" not in text
    assert text.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
@pytest.mark.parametrize("is_streaming", [True, False], ids=["streaming", "waiting"])
def test_who_leaves_is_cancelled_in_two_seconds(
    gateway: Gateway, served: Fleet, route: str, is_streaming: bool
) -> None:
    [worker] = served.workers
    asked = {"chat": {"messages": MESSAGES}, "completions": {"prompt": "Go on."}, "responses": {"input": "Go."}}[route]
    limit = {"responses": "max_output_tokens"}.get(route, "max_tokens")
    body = json.dumps({"model": MODEL, "stream": is_streaming, limit: 20_000, **asked})
    path = {"chat": "chat/completions"}.get(route, route)

    def seconds_until_cancelled() -> float:
        before, begun = aborts(served), prefills(worker)
        with closing(http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)) as connection:
            connection.request("POST", f"/v1/{path}", body, {"Content-Type": "application/json"})
            if is_streaming:
                reply = connection.getresponse()
                for _ in range(5):
                    assert reply.readline()
                reply.close()
            wait_until(lambda: prefills(worker) == begun + 1, 20, "it runs")
            stalls = Standstill()
        left = time.monotonic()
        wait_until(lambda: aborts(served) == before + 1, 20)
        return time.monotonic() - left - stalls.end()

    in_time(seconds_until_cancelled, 2.5)  # 2 s, and what the test itself takes


def test_who_is_refused_leaves_no_job_behind(gateway: Gateway, served: Fleet) -> None:
    """One of several prompts is too large to be queued; a stream is to go on after an event that there can't be."""
    before = states(served).keys()
    body = {"model": MODEL, "max_tokens": 30_000, "prompt": ["Go on.", "Go on.", "x" * (5 << 20)]}
    status, answer = call(gateway, "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "request_too_large")
    after = states(served)
    assert [state for job, state in after.items() if job not in before] == ["cancelled"] * 2
    for path, asked in (("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": "Go."}),
                        ("responses", {"input": "Go."})):  # fmt: skip
        body = {"model": MODEL, "stream": True, **asked}
        status, answer = call(gateway, f"/v1/{path}", body, **{"Last-Event-ID": "the last one"})
        assert (status, json.loads(answer)["error"]["param"]) == (400, "Last-Event-ID")
    assert states(served).keys() <= after.keys()


def states(served: Fleet) -> dict[bytes, str]:
    """Of each job's key."""
    with served.redis.client() as redis:
        keys = list(redis.scan_iter(match=Keys(served.redis.fleet).job("*"), count=1000))
        return {key: (redis.hget(key, "state") or b"").decode() for key in keys}


def prefills(worker: Worker) -> int:
    return sum(line["event"] == "prefill" for line in worker.record)


def test_a_background_response_goes_on_without_its_client(client: openai.OpenAI, served: Fleet) -> None:
    before = aborts(served)
    stream = client.responses.create(model=MODEL, input="Go.", max_output_tokens=300, background=True, stream=True)
    [first, *_] = islice(stream, 5)
    stream.close()
    wait_until(lambda: client.responses.retrieve(first.response.id).status == "incomplete", 20)
    assert client.responses.retrieve(first.response.id).usage.output_tokens == 300
    assert aborts(served) == before


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_tokenize_and_detokenize(gateway: Gateway, client: openai.OpenAI) -> None:
    text = "the river naïve 🚀"
    status, told = call(gateway, "/tokenize", {"model": MODEL, "prompt": text, "return_token_strs": True})
    assert status == 200, told
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 32768
    assert call(gateway, "/detokenize", {"model": MODEL, "tokens": told["tokens"]})[1] == {"prompt": text}
    count = call(gateway, "/tokenize", {"model": MODEL, "messages": MESSAGES})[1]["count"]
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    assert answer.usage.prompt_tokens == count


@pytest.mark.parametrize(("path", "body", "status", "code"), [
    ("/tokenize", {"model": "nothing", "prompt": "x"}, 404, "model_not_found"),
    ("/tokenize", {"prompt": "x"}, 400, "invalid_request"), ("/tokenize", {"model": MODEL}, 400, "invalid_request"),
    ("/tokenize", {"model": MODEL, "prompt": "x", "messages": MESSAGES}, 400, "invalid_request"),
    ("/tokenize", {"model": MODEL, "messages": [{"role": "judge"}]}, 400, "invalid_request"),
    ("/detokenize", {"model": MODEL, "tokens": [2**30]}, 400, "invalid_request"),
    ("/detokenize", {"model": MODEL, "tokens": ["x"]}, 400, "invalid_request"),
])  # fmt: skip
def test_bad_questions(gateway: Gateway, path: str, body: Any, status: int, code: str) -> None:
    found, told = call(gateway, path, body)
    assert (found, told["error"]["code"]) == (status, code)


# -- operations -------------------------------------------------------------------------------------------------------


def test_a_gateways_process_that_stands_still_for_seconds_is_not_killed(served: Fleet) -> None:
    gateway = start_gateway(served, processes=2)
    try:

        def both() -> list[psutil.Process]:
            children = psutil.Process(gateway.process.pid).children()
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

        wait_until(lambda: len(both()) == 2, 20, "two processes")
        one, other = both()
        one.suspend()
        stopped = time.monotonic()
        while time.monotonic() - stopped < 6:
            assert call(gateway, "/health")[0] == 200
            time.sleep(0.2)
        one.resume()
        assert one.is_running()
        assert other.is_running()
    finally:
        os.killpg(gateway.process.pid, signal.SIGKILL)
        gateway.close()


def test_metrics_tell_what_requests_met_and_nothing_about_them(served: Fleet) -> None:
    gateway = start_gateway(served, processes=2)
    try:
        secret = "A-very-secret-word"
        body = {"model": MODEL, "messages": [{"role": "user", "content": secret}], "max_tokens": 20, "user": "mallory"}
        for _ in range(6):
            assert call(gateway, "/v1/chat/completions", {**body, "stream": True})[0] == 200
        assert call(gateway, "/v1/chat/completions", {**body, "temperature": -1})[0] == 400
        assert call(gateway, "/v1/chat/completions", {**body, "model": secret})[0] == 404
        long = [{"role": "user", "content": "word " * 40_000}]
        assert call(gateway, "/v1/chat/completions", {**body, "messages": long})[0] == 400
        for _ in range(8):  # whichever process answers
            text = call(gateway, "/metrics")[1].decode()
            assert 'tokenfleet_time_to_first_token_seconds_count{model="scripted"} 6.0' in text
            assert 'tokenfleet_completion_tokens_total{model="scripted"} 120.0' in text
            assert 'tokenfleet_queue_wait_seconds_count{model="scripted"} 6.0' in text
            assert 'tokenfleet_refusals_total{code="model_not_found",model=""} 1.0' in text
            assert 'tokenfleet_refusals_total{code="context_length_exceeded",model="scripted"} 1.0' in text
            assert 'tokenfleet_requests_total{route="/v1/chat/completions",status="400"} 2.0' in text
            assert 'tokenfleet_workers{model="scripted"} 1.0' in text
            assert secret not in text
            assert "mallory" not in text
        assert figure(gateway, 'tokenfleet_inter_token_seconds_count{model="scripted"}') > 0
        wait_until(lambda: figure(gateway, 'tokenfleet_open_requests{model="scripted"}') == 0, 5)
    finally:
        os.killpg(gateway.process.pid, signal.SIGKILL)
        gateway.close()


def test_ready_says_what_is_missing(fleet: Fleet) -> None:
    worker = fleet.start_worker(env={"TOKENFLEET_LEASE": '{"heartbeat_s": 0.3, "lease_s": 1}'})
    gateway = start_gateway(fleet)
    try:
        status, told = wait_until(lambda: (r := call(gateway, "/ready"))[0] == 200 and r, 10)
        assert told["models"][MODEL]["workers"] == 1
        worker.kill_group()
        status, told = wait_until(lambda: (r := call(gateway, "/ready"))[0] == 503 and r, 10)
        assert (told["reason"], told["missing"]) == ("no_worker", [MODEL])
        status, told = call(gateway, "/tokenize", {"model": MODEL, "prompt": "x"})
        assert (status, told["error"]["code"]) == (503, "no_worker")
        with fleet.redis.stop_cont():
            assert call(gateway, "/health")[0] == 200
        fleet.redis.kill9()
        assert call(gateway, "/ready") == (503, {"status": "unready", "reason": "redis_unavailable"})
        assert call(gateway, "/health")[0] == 200
    finally:
        gateway.close()

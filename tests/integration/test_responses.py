"""The Responses API under the official client; every event is held to OpenAI's own types, and to their order."""

from __future__ import annotations

import http.client
import json
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.fleets import MODEL, Fleet, wait_until
from tests.gateways import Gateway, start_gateway

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEMS: TypeAdapter[Any] = TypeAdapter(ResponseItem)
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}
]
CALLS = (
    "<think>Let me look.</think>Looking. "
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
    '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Kyiv"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def gateway(served: Fleet) -> Iterator[Gateway]:
    gateway = start_gateway(served)
    yield gateway
    gateway.close()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def say(text: str) -> str:
    return f"[[say: {json.dumps(text, ensure_ascii=False)}]]"


def raw_events(
    gateway: Gateway, path: str, body: dict[str, Any] | None = None, **headers: str
) -> list[tuple[int, Any]]:
    """(id, data) of every server-sent event, each checked against OpenAI's types."""
    connection = http.client.HTTPConnection("127.0.0.1", int(gateway.url.rsplit(":", 1)[1]), timeout=30)
    with closing(connection):
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", f"/v1/responses{path}", content, headers)
        reply = connection.getresponse()
        text = reply.read().decode()
    assert reply.status == 200, text
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    found = []
    for block in text.split("\n\n"):
        if block:
            fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
            data = json.loads(fields["data"])
            assert data["type"] == fields["event"]
            EVENTS.validate_python(data, strict=True)
            found.append((int(fields["id"]), data))
    return found


def check_order(events: Sequence[Any]) -> None:
    """What OpenAI's streams keep to: numbers without gap, items opened, grown and closed one after the other."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")
    done: list[Any] = []
    text, item = "", None
    for event in events[1:-1]:
        kind = event["type"]
        if kind in ("response.queued", "response.in_progress"):
            assert not done
            assert item is None
        elif kind == "response.output_item.added":
            assert item is None
            assert event["output_index"] == len(done)
            text, item = "", event["item"]
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == item["id"]
            done.append(event["item"])
            item = None
        else:
            assert event["item_id"] == item["id"]
            assert event["output_index"] == len(done)
            if kind.endswith(".delta"):
                text += event["delta"]
            elif kind.endswith((".text.done", "_text.done", "arguments.done")):
                assert event.get("text", event.get("arguments")) == text
    assert item is None
    assert events[-1]["response"]["output"] == done


def test_the_plain_form(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input=say("Rivers bend."), instructions="Be brief.", metadata={"team": "blue"}, temperature=0
    )
    Response.model_validate(answer.model_dump(), strict=True)
    assert answer.output_text == "Rivers bend."
    assert answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert (answer.metadata, answer.instructions, answer.temperature) == ({"team": "blue"}, "Be brief.", 0)
    assert client.responses.retrieve(answer.id).model_dump() == answer.model_dump()


def test_it_says_when_it_was_cut_and_has_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input="Go on.", max_output_tokens=16, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"
    assert answer.usage.output_tokens == 16
    logprobs = answer.output[0].content[0].logprobs
    assert len(logprobs) == 16
    assert len(logprobs[0].top_logprobs) == 2


def test_a_stream_of_thoughts_text_and_parallel_calls(gateway: Gateway, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": say(CALLS), "tools": TOOLS, "reasoning": {"effort": "high"}}
    numbered = raw_events(gateway, "", {**asked, "stream": True})
    events = [event for _, event in numbered]
    check_order(events)
    thought, message, first, second = events[-1]["response"]["output"]
    assert thought["content"][0]["text"] == "Let me look."
    assert message["content"][0]["text"] == "Looking."
    assert [json.loads(call["arguments"])["city"] for call in (first, second)] == ["Łódź", "Kyiv"]
    assert first["call_id"] != second["call_id"]
    assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] > 10
    ids = [number for number, _ in numbered]
    assert ids == sorted(ids)
    final = None
    with client.responses.stream(**asked) as stream:  # the client puts the events together by itself
        for event in stream:
            final = event
        assert stream.get_final_response().output_text == "Looking."
    assert final.type == "response.completed"


async def test_the_async_client_and_results_of_tools(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        first = await client.responses.create(model=MODEL, input=say(CALLS), tools=TOOLS, parallel_tool_calls=True)
        calls = [item for item in first.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
        second = await client.responses.create(
            model=MODEL, input=[*results, {"role": "user", "content": say("Sunny in both.")}],
            previous_response_id=first.id, tools=TOOLS,
        )  # fmt: skip
        assert second.output_text == "Sunny in both."
        assert second.usage.input_tokens > first.usage.input_tokens
        by_hand = await client.responses.create(
            model=MODEL, tools=TOOLS,
            input=[{"role": "user", "content": say(CALLS)}, *(item.model_dump() for item in first.output),
                   *results, {"role": "user", "content": say("Sunny in both.")}],
        )  # fmt: skip
        assert by_hand.usage.input_tokens == second.usage.input_tokens


def test_instructions_hold_for_one_response(client: openai.OpenAI) -> None:
    def tokens(**asked: Any) -> int:
        return client.responses.create(model=MODEL, max_output_tokens=4, **asked).usage.input_tokens

    first = client.responses.create(model=MODEL, input="One.", instructions="A long instruction.", max_output_tokens=4)
    answer = {"role": "assistant", "content": first.output_text}
    goes_on = tokens(input="Two.", previous_response_id=first.id)
    assert goes_on == tokens(input=[{"role": "user", "content": "One."}, answer, {"role": "user", "content": "Two."}])


def test_in_the_background_polled_and_resumed_at_every_number(gateway: Gateway, client: openai.OpenAI) -> None:
    queued = client.responses.create(model=MODEL, input="Go on.", max_output_tokens=60, background=True)
    assert queued.status in ("queued", "in_progress")
    done = wait_until(lambda: (r := client.responses.retrieve(queued.id)).status == "incomplete" and r, 20)
    path = f"/{queued.id}?stream=true"
    numbered = raw_events(gateway, path)
    everything = [event for _, event in numbered]
    check_order(everything)
    assert [event["type"] for event in everything[:3]] == [
        "response.created", "response.queued", "response.in_progress",
    ]  # fmt: skip
    assert Response.model_validate(everything[-1]["response"]).output_text == done.output_text
    for cut in range(0, len(everything), 7):
        assert [event for _, event in raw_events(gateway, f"{path}&starting_after={cut}")] == everything[cut + 1 :]
    last_id = numbered[len(numbered) // 2][0]
    again = [event for _, event in raw_events(gateway, path, **{"Last-Event-ID": str(last_id)})]
    assert again == everything[-len(again) :]
    assert again[0]["sequence_number"] <= everything[len(everything) // 2 + 1]["sequence_number"]
    streamed = [event.model_dump() for event in client.responses.retrieve(queued.id, stream=True, starting_after=10)]
    assert streamed[0]["sequence_number"] == 11


def test_polls_of_a_running_response_read_no_log(served: Fleet, client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="Go on.", max_output_tokens=5000, background=True)
    running = wait_until(lambda: (r := client.responses.retrieve(made.id)).status == "in_progress" and r, 20)
    redis, log = served.redis.client(), f"tokenfleet:{served.redis.fleet}:log:{uuid.UUID(made.id[5:])}"
    wait_until(lambda: redis.xlen(log) > 20, 20)

    def reads() -> int:
        return int(redis.info("commandstats").get("cmdstat_xrange", {"calls": 0})["calls"])

    before = reads()
    for _ in range(10):
        polled = client.responses.retrieve(made.id)
        assert (polled.status, polled.output, polled.created_at) == ("in_progress", [], running.created_at)
    assert reads() == before
    cancelled = client.responses.cancel(made.id)
    assert cancelled.output_text
    assert client.responses.retrieve(made.id) == cancelled


def test_cancel_and_delete(client: openai.OpenAI) -> None:
    running = client.responses.create(model=MODEL, input="Go on.", max_output_tokens=5000, background=True)
    cancelled = client.responses.cancel(running.id)
    assert cancelled.status == "cancelled"
    assert client.responses.cancel(running.id).status == "cancelled"
    client.responses.delete(running.id)
    for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(running.id)
        assert caught.value.code == "response_not_found"
    running = client.responses.create(model=MODEL, input="Go on.", max_output_tokens=5000, background=True)
    client.responses.delete(running.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(running.id)


def test_a_stream_tells_of_a_cancel(gateway: Gateway, client: openai.OpenAI) -> None:
    stream = client.responses.create(model=MODEL, input="Go on.", max_output_tokens=5000, background=True, stream=True)
    seen = list(islice(stream, 12))
    client.responses.cancel(seen[0].response.id)
    seen += list(stream)
    assert seen[-1].response.status == "cancelled"
    check_order([event.model_dump(exclude_unset=True) for event in seen])


def test_input_items(client: openai.OpenAI) -> None:
    given: list[Any] = [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "Two."},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"role": "user", "content": [{"type": "input_text", "text": "Three."}]},
    ]
    made = client.responses.create(model=MODEL, input=given, tools=TOOLS, max_output_tokens=4)
    items = list(client.responses.input_items.list(made.id, order="asc", limit=2))  # follows the pages
    assert [item.type for item in items] == [
        "message", "message", "function_call", "function_call_output", "message",
    ]  # fmt: skip
    assert items[-1].content[0].text == "Three."
    for item in items:
        ITEMS.validate_python(item.model_dump(exclude_unset=True))


@pytest.mark.parametrize(("asked", "code"), [
    ({"input": []}, "invalid_request"), ({"input": [{"role": "judge", "content": "x"}]}, "invalid_request"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter"), ({"truncation": "auto"}, "unsupported_parameter"),
    ({"conversation": "c"}, "unsupported_parameter"),
    ({"previous_response_id": "resp_x"}, "previous_response_not_found"),
    ({"background": True, "store": False}, "invalid_request"), ({"max_output_tokens": 0}, "invalid_request"),
    ({"text": {"format": {"type": "json_object"}}}, "unsupported_parameter"), ({"tempurature": 1}, "unknown_field"),
    ({"input": "word " * 40_000}, "context_length_exceeded"),
    ({"input": "word " * 40_000, "stream": True}, "context_length_exceeded"),
])  # fmt: skip
def test_bad_requests(client: openai.OpenAI, asked: dict[str, Any], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body={"model": MODEL, "input": "Hi.", **asked}, cast_to=object)
    assert caught.value.code == code


def test_what_is_not_stored_is_not_shown(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Hi.", max_output_tokens=4, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_" + "0" * 32)


def test_a_failure_is_told_by_a_background_response(client: openai.OpenAI) -> None:
    failed = client.responses.create(model=MODEL, input="[[fault: raise at 3]]", background=True, stream=True)
    last = list(failed)[-1]
    assert last.type == "response.failed"
    assert last.response.error.message.startswith("engine_error: ")
    assert last.response.output[0].status == "incomplete"


def test_retention_is_a_jobs_own(client: openai.OpenAI) -> None:
    short = client.responses.create(model=MODEL, input="Hi.", max_output_tokens=2, extra_body={"retention_s": 1.5})

    def is_gone() -> bool:
        try:
            client.responses.retrieve(short.id)
        except openai.NotFoundError:
            return True
        return False

    wait_until(is_gone, 20)


@pytest.mark.fault
def test_readers_go_on_after_the_deaths_of_gateway_and_worker(fleet: Fleet) -> None:
    victim = fleet.start_worker(token_ms=25.0)  # slow: all that comes before its death finds it mid-stream
    gateways = [start_gateway(fleet), start_gateway(fleet)]
    try:
        doomed, other = (
            openai.OpenAI(base_url=f"{g.url}/v1", api_key="none", max_retries=0, timeout=60) for g in gateways
        )
        stream = doomed.responses.create(
            model=MODEL, input="Go on.", max_output_tokens=600, background=True, stream=True, temperature=0
        )
        seen = [event.model_dump(exclude_unset=True) for event in islice(stream, 40)]  # it is mid-stream
        gateways[0].process.kill()
        with pytest.raises(openai.APIConnectionError), closing(stream):
            seen += [event.model_dump(exclude_unset=True) for event in stream]
        doomed.close()
        response_id = seen[0]["response"]["id"]
        path, readers = f"/{response_id}?stream=true", 5
        cuts = [seen[-1]["sequence_number"], -1, 3, 20, 38]
        results: list[list[Any]] = [[] for _ in range(readers)]

        def read(k: int) -> None:
            results[k] = [event for _, event in raw_events(gateways[1], f"{path}&starting_after={cuts[k]}")]

        threads = [threading.Thread(target=read, args=(k,)) for k in range(readers)]
        for thread in threads:
            thread.start()
        with other.responses.retrieve(response_id, stream=True, starting_after=cuts[0]) as live:
            list(islice(live, 30))  # it goes on, mid-stream still
            fleet.start_worker(token_ms=1.0, wait=False)
            victim.kill_group()
        for thread in threads:
            thread.join(60)
        everything = results[1]
        check_order(everything)
        assert seen == everything[: len(seen)]
        for cut, result in zip(cuts, results, strict=True):
            assert result == everything[cut + 1 :]
        assert everything[-1]["response"]["usage"]["output_tokens"] == 600
        assert [event for _, event in raw_events(gateways[1], path)] == everything
        assert fleet.client().job(str(uuid.UUID(response_id.removeprefix("resp_")))).status().attempts == 2
        other.close()
    finally:
        for gateway in gateways:
            gateway.close()

"""LLaMA-Factory's Python API on a fleet, and the parity of the blocking and the asynchronous client."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from tests.fleets import MODEL, ROOT, Fleet, wait_until
from tokenfleet import AsyncClient, AsyncJob, AsyncStream, ChatModel, Client, Job, JobStream, Response
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest
from tokenfleet.wire.toolcalls import ParsedDelta, assemble

MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def model(served: Fleet) -> Iterator[ChatModel]:
    args = {"redis_url": served.redis.url, "fleet": served.redis.fleet, "model": MODEL, "max_new_tokens": 12}
    with ChatModel(args) as model:
        yield model


def test_chat_gives_a_response_per_choice_and_leaves_the_messages_alone(model: ChatModel) -> None:
    messages = copy.deepcopy(MESSAGES)
    responses = model.chat(messages, system="Be brief.", num_return_sequences=3)
    assert messages == MESSAGES
    assert len(responses) == 3
    for response in responses:
        assert isinstance(response, Response)
        assert response.response_length == 12
        assert response.prompt_length > 0
        assert response.finish_reason == "length"


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"max_new_tokens": None}, 12),  # not given, as in LLaMA-Factory
        ({"max_tokens": 5}, 5),
        ({"max_length": 60}, 60),  # with the prompt's; the default of this model's calls is 12 without
    ],
)
def test_what_a_call_gives_wins_over_the_defaults_by_whichever_name(model: ChatModel, given: dict, tokens: int) -> None:
    [response] = model.chat(MESSAGES, **given)
    prompt = response.prompt_length if "max_length" in given else 0
    assert prompt + response.response_length == tokens


def test_system_as_first_message_is_the_same_as_system(model: ChatModel) -> None:
    as_message = model.chat([{"role": "system", "content": "Be brief."}, *MESSAGES], do_sample=False)
    as_argument = model.chat(MESSAGES, system="Be brief.", do_sample=False)
    assert as_message[0].response_text == as_argument[0].response_text


def test_streams_and_waits_give_the_same_text_in_all_four_ways(model: ChatModel) -> None:
    async def stream() -> str:
        return "".join([piece async for piece in model.astream_chat(MESSAGES, do_sample=False)])

    async def whole() -> str:
        return (await model.achat(MESSAGES, do_sample=False))[0].response_text

    texts = {
        model.chat(MESSAGES, do_sample=False)[0].response_text,
        "".join(model.stream_chat(MESSAGES, do_sample=False)),
        asyncio.run(stream()),
        asyncio.run(whole()),
    }
    assert len(texts) == 1
    assert texts.pop()


def test_leaving_a_stream_early_cancels_the_job(model: ChatModel, served: Fleet) -> None:
    def aborts() -> int:
        return sum(line["event"] == "end" and line["reason"] == "abort" for line in served.workers[0].record)

    before = aborts()
    pieces = model.stream_chat(MESSAGES, max_new_tokens=5000)
    next(pieces)
    pieces.close()
    wait_until(lambda: aborts() == before + 1, 10)


def test_scores_come_one_a_text(model: ChatModel) -> None:
    scores = model.get_scores(["a", "b", "a"])
    assert len(scores) == 3
    assert scores[0] == scores[2] != scores[1]
    assert asyncio.run(model.aget_scores(["b"])) == [scores[1]]
    with pytest.raises(InvalidRequest):
        model.get_scores("one string is no list")
    with pytest.raises(InvalidRequest) as caught:
        model.get_scores(["a", ""])
    assert (caught.value.code, caught.value.details["param"]) == ("invalid_request", "texts")


def test_unknown_arguments_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="modle_name_or_path"):
        ChatModel({"modle_name_or_path": "x"})
    running = {"redis_url": "redis://127.0.0.1:1", "model": "m"}
    for useless in ({"template": "qwen"}, {"infer_backend": "vllm", "vllm_config": {"seed": 1}}):
        with pytest.raises(ConfigurationError, match=f"{min(useless)}.*: the workers of a running fleet decide that"):
            ChatModel({**running, **useless})
    with pytest.raises(ConfigurationError, match="vllm_maxlen"):
        ChatModel({"infer_backend": "hf", "vllm_maxlen": 100})
    with pytest.raises(ConfigurationError, match="temperature"):
        ChatModel({"temperature": float("nan")})


def test_a_private_fleet_serves_and_leaves_nothing() -> None:
    program = (
        "from tokenfleet.chat import ChatModel\n"
        "model = ChatModel({'infer_backend': 'scripted', 'max_new_tokens': 5})\n"
        "print(model.chat('Hi!')[0].response_length, model._fleet.url)\n"
    )
    before = {p.pid for p in psutil.process_iter()}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    length, url = run.stdout.split()
    assert length == "5"
    socket = url.partition("@")[2].partition("?")[0]

    def leftovers() -> list[str]:
        new = (p for p in psutil.process_iter(["cmdline"]) if p.pid not in before)
        return [line for p in new if socket.rsplit("/", 1)[0] in (line := " ".join(p.info["cmdline"] or ()))]

    wait_until(lambda: not leftovers(), 10, "no process of the private fleet")


LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}}
CALLS = "".join(
    f'<tool_call>\n{{"name": "look", "arguments": {{"at": "{at}"}}}}\n</tool_call>\n' for at in ("sky 😀", "sea")
)


def test_tool_calls_come_out_of_the_clients_whole_and_streamed_and_their_results_go_in(served: Fleet) -> None:
    said = json.dumps(f"<think>Which?</think>I look. {CALLS}")
    with Client(served.redis.url, fleet=served.redis.fleet, model=MODEL) as client:
        question = [{"role": "user", "content": f"[[spell: {said}]]"}]
        job = client.submit(question, tools=[LOOK], enable_thinking=True, max_new_tokens=400, n=2)
        result = job.result(30)
        for choice in range(2):
            answer = result.parsed(choice)
            assert (answer.reasoning, answer.content, answer.finish_reason) == ("Which?", "I look.", "tool_calls")
            assert [json.loads(call.function.arguments)["at"] for call in answer.tool_calls] == ["sky 😀", "sea"]
            deltas = list(client.job(job.id).parsed(choice))
            assert len(deltas) > 6
            assert assemble(deltas) == replace(answer, finish_reason="")
        assert result.parsed(0).tool_calls != result.parsed(1).tool_calls  # other ids

        async def streamed() -> list[ParsedDelta]:
            async with AsyncClient(served.redis.url, fleet=served.redis.fleet) as client:
                return [delta async for delta in client.job(job.id).parsed()]

        assert assemble(asyncio.run(streamed())) == assemble(list(job.parsed()))
        answer = result.parsed()
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": f"[[say: {json.dumps(f'seen {i}')}]]"}
            for i, call in enumerate(answer.tool_calls)
        ]
        assert client.submit([*question, answer.message, *results], tools=[LOOK]).result(30).text == "seen 1"
        cut = client.submit(question, tools=[LOOK], max_new_tokens=60).result(30).parsed()
        assert (cut.tool_calls, cut.finish_reason) == ((), "length")
        with job.stream(after=1) as late, pytest.raises(InvalidRequest, match="beginning"):
            next(late.parsed())


@pytest.mark.parametrize(
    ("blocking", "asynchronous"), [(Client, AsyncClient), (Job, AsyncJob), (JobStream, AsyncStream)]
)
def test_the_blocking_client_has_what_the_asynchronous_one_has(blocking: type, asynchronous: type) -> None:
    def public(cls: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    wanted, has = public(asynchronous), public(blocking)
    renamed = {"aclose": "close"}
    only_async = {"next_batch"}
    for name, parameters in wanted.items():
        if name not in only_async:
            assert has.get(renamed.get(name, name)) == parameters, name

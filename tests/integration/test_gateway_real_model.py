"""The official client on a fleet with a real model: SmolLM2 on transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.batches import create, ended, rows_of
from tests.fleets import ROOT, Fleet
from tests.gateways import start_gateway
from tests.servers import RedisServer, new_fleet_name

MODEL = "smollm2-135m-instruct"
PARIS: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def real_fleet(_session_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    pytest.importorskip("torch")
    fleet = Fleet(RedisServer(_session_server, new_fleet_name()), tmp_path_factory.mktemp("fleet"))
    real = {
        "TOKENFLEET_MODEL": MODEL,
        "TOKENFLEET_ENGINE": "transformers",
        "TOKENFLEET_ENGINE_ARGS": json.dumps({"model_name_or_path": MODEL, "threads": 1, "max_batch_size": 4}),
    }
    fleet.start_worker(env=real)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def url(real_fleet: Fleet) -> Iterator[str]:
    gateway = start_gateway(real_fleet)
    yield f"{gateway.url}/v1"
    gateway.close()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_whole_streamed_and_as_a_response_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=PARIS, **GREEDY)
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            messages=PARIS, stream=True, stream_options={"include_usage": True}, logprobs=True, **GREEDY
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    logprobs = [token for c in chunks if c.choices and c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert len(logprobs) == whole.usage.completion_tokens
    response = client.responses.create(model=MODEL, input=PARIS, temperature=0, max_output_tokens=24)
    Response.model_validate(response.model_dump(), strict=True)
    assert response.output_text == text
    assert response.usage.input_tokens == whole.usage.prompt_tokens


async def test_the_async_client(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=120) as client:
        stream = await client.responses.create(
            model=MODEL, input="Count to five.", temperature=0, max_output_tokens=16, stream=True
        )
        kinds = [event.type async for event in stream]
        assert kinds[-1] in ("response.completed", "response.incomplete")
        answer = await client.completions.create(model=MODEL, prompt="1, 2, 3,", temperature=0, max_tokens=6)
        assert "4" in answer.choices[0].text


def test_the_readmes_example_runs_as_it_stands(url: str) -> None:
    section = (ROOT / "README.md").read_text().split("## OpenAI's API", 1)[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1].replace("http://127.0.0.1:8000/v1", url)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "output_tokens=48" in done.stdout


class City(BaseModel):
    name: str
    is_capital: bool


def test_structured_outputs(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(messages=PARIS, response_format=City, **{**GREEDY, "max_tokens": 60})
    assert isinstance(parsed.choices[0].message.parsed, City)
    response = client.responses.parse(model=MODEL, input=PARIS, text_format=City, temperature=0, max_output_tokens=60)
    assert isinstance(response.output_parsed, City)
    picked = client.chat.completions.create(
        messages=PARIS, extra_body={"structured_outputs": {"choice": ["Paris", "Rome"]}}, **GREEDY
    )
    assert picked.choices[0].message.content in ("Paris", "Rome")
    for form in ({"type": "regex", "pattern": "Rom[ae]"}, {"type": "grammar", "grammar": 'start: "Rom" /[ae]/'}):
        formed: Any = client.post(
            "/chat/completions", body={"messages": PARIS, "response_format": form, **GREEDY}, cast_to=object
        )
        assert formed["choices"][0]["message"]["content"] in ("Roma", "Rome")


def test_tokens_are_counted_as_the_chat_counts_them(client: openai.OpenAI, url: str) -> None:
    root = client.with_options(base_url=url.removesuffix("/v1"))
    told: Any = root.post("/tokenize", body={"model": MODEL, "messages": PARIS}, cast_to=object)
    answer = client.chat.completions.create(messages=PARIS, **{**GREEDY, "max_tokens": 1})
    assert told["count"] == answer.usage.prompt_tokens
    text: Any = root.post("/detokenize", body={"model": MODEL, "tokens": told["tokens"]}, cast_to=object)
    assert "capital of France" in text["prompt"]


def test_a_prompt_too_long_is_refused_with_the_counts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "word " * 20_000}], stream=True, **GREEDY)
    assert caught.value.code == "context_length_exceeded"
    assert "8192" in caught.value.message


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["any", "named"]
)
def test_a_tool_must_be_called_with_its_own_arguments(client: openai.OpenAI, choice: Any) -> None:
    parameters = {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False,
    }  # fmt: skip
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    asked: dict[str, Any] = {"messages": PARIS, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**asked, **{**GREEDY, "max_tokens": 60}).choices[0]
    assert answer.finish_reason == "tool_calls"
    [called] = answer.message.tool_calls
    assert called.function.name == "weather"
    assert json.loads(called.function.arguments)["city"] in ("Paris", "Rome")
    chunks = list(client.chat.completions.create(**asked, **{**GREEDY, "max_tokens": 60}, stream=True))
    calls = [part for c in chunks for part in c.choices[0].delta.tool_calls or ()]
    assert [(part.id, part.function.name) for part in calls if part.id] == [(calls[0].id, "weather")]
    pieces = [part.function.arguments for part in calls if part.function.arguments]
    assert "".join(pieces) == called.function.arguments
    assert len(pieces) > 1  # as they are written
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_batch_of_a_reward_models_scores(real_fleet: Fleet, client: openai.OpenAI, tmp_path: Path) -> None:
    """A small Llama with a value head; what it must say is computed beside it, of the ids that its worker tells."""
    from tests.contract import small_models

    expected = small_models.save_value_head(small_models.save("llama", tmp_path / "m"), tmp_path / "m", "safetensors")
    options = {"model_name_or_path": str(tmp_path / "m"), "threads": 1}
    env = {"TOKENFLEET_ENGINE": "transformers", "TOKENFLEET_ENGINE_ARGS": json.dumps(options)}
    real_fleet.start_worker(env={"TOKENFLEET_MODEL": "reward", **env})
    rows = [
        {"custom_id": f"r{k}", "method": "POST", "url": "/v1/score/evaluation",
         "body": {"model": "reward" if k else MODEL, "messages": [f"Text {k}.", "Another, longer one."]}}
        for k in range(20)
    ]  # fmt: skip
    batch = ended(client, create(client, rows, endpoint="/v1/score/evaluation").id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (19, 1)
    assert rows_of(client, batch.error_file_id)["r0"]["response"]["status_code"] == 400  # no reward model
    for custom_id, line in rows_of(client, batch.output_file_id).items():
        texts = [f"Text {custom_id[1:]}.", "Another, longer one."]
        asked = [{"model": "reward", "prompt": text} for text in texts]
        ids = [
            client.post(str(client.base_url).removesuffix("/v1/") + "/tokenize", body=each, cast_to=object)["tokens"]
            for each in asked
        ]  # type: ignore[index]
        assert line["response"]["body"]["scores"] == pytest.approx([expected(each) for each in ids], abs=1e-4)

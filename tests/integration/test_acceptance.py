"""What a model's workers would refuse is refused at submit, by what the fleet's registry says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fleets import MODEL, Fleet
from tests.shells import Shell
from tokenfleet import AsyncClient, Client
from tokenfleet.producer.acceptance import Acceptance
from tokenfleet.wire import scripts
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import JobOptions, ServedModel
from tokenfleet.wire.keys import new_id


def register(client: Client, name: str, **facts: Any) -> None:
    client.thread.run(client.aio.ledger.serve(ServedModel(name, **facts), new_id()))


def beat(client: Client, model: str, engine: str) -> None:
    """A worker's lease, for a minute."""
    ledger = client.aio.ledger
    says = ("model", model, "engine", engine)
    args = (ledger.keys.prefix, new_id(), 60_000, "register", 0, *says)
    client.thread.run(scripts.run(ledger.client, "beat", *args))


def refused(client: Client, model: str, **named: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        client.submit("Hi", model=model, **named)
    [info] = [each for each in client.overview().models if each.model.name == model]
    assert (info.waiting, info.running) == (0, 0), "nothing was queued"
    return caught.value


def test_a_parameter_that_the_engine_refuses_is_refused_at_submit_and_by_its_worker(served: Fleet) -> None:
    client = served.client()
    error = refused(client, MODEL, num_beams=4)
    assert error.code == "unsupported_parameter"
    assert {"param": "num_beams", "engine": "scripted"}.items() <= error.details.items()
    assert "transformers" in error.hint
    # From a client that does not look: the worker says the same, before it renders anything.
    body = json.dumps({"kind": "chat", "messages": [{"role": "user", "content": "Hi"}], "params": {"num_beams": 4}})
    job_id = new_id()
    client.thread.run(client.aio.ledger.submit(job_id, MODEL, body.encode(), JobOptions()))
    with pytest.raises(InvalidRequest) as caught:
        client.job(job_id).result(20)
    assert (caught.value.code, caught.value.details) == (error.code, error.details)


def test_the_command_line_says_so_too(served: Fleet) -> None:
    shell = Shell(TOKENFLEET_REDIS_URL=served.redis.url, TOKENFLEET_FLEET=served.redis.fleet)
    line = shell.error("submit", "--num_beams", "4", "Hi")
    assert "unsupported_parameter" in line
    assert "num_beams=4" in line


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_model_without_a_worker_now_is_what_it_was_last(served: Fleet, engine: str) -> None:
    client = served.client()
    register(client, f"on-{engine}", engine=engine)
    assert refused(client, f"on-{engine}", num_beams=2).details["engine"] == engine
    job = client.submit("Hi", model=f"on-{engine}", response_format={"type": "json_object"})
    assert job.status().waiting_for_worker
    job.cancel()


def test_what_was_refused_is_taken_as_soon_as_another_engine_serves_the_model(served: Fleet) -> None:
    client = served.client()
    register(client, "moves", engine="sglang")
    client.submit("Hi", model="moves").cancel()  # so that it is known
    refused(client, "moves", num_beams=2)
    register(client, "moves", engine="transformers")
    client.submit("Hi", model="moves", num_beams=2).cancel()


def test_a_model_on_two_engines_takes_what_both_take(served: Fleet) -> None:
    client = served.client()
    for engine in ("transformers", "vllm"):
        register(client, "shared", engine="transformers")
        beat(client, "shared", engine)
    assert refused(client, "shared", num_beams=2).details["engine"] == "vllm"
    client.submit("Hi", model="shared", response_format={"type": "json_object"}).cancel()


def test_an_engine_of_a_newer_release_is_asked_itself(served: Fleet) -> None:
    client = served.client()
    register(client, "newer", engine="tensorrt")
    client.submit("Hi", model="newer", num_beams=2).cancel()


def test_a_chat_is_not_for_a_reward_model_nor_a_score_for_another(served: Fleet) -> None:
    client = served.client()
    register(client, "rewards", engine="vllm", can_score=True, can_generate=False)
    error = refused(client, "rewards")
    assert (error.code, error.details["param"]) == ("unsupported", "model")
    assert "scores" in error.message
    client.submit_scores(["Hi"], model="rewards").cancel()
    register(client, "texts", engine="vllm")
    with pytest.raises(InvalidRequest) as caught:
        client.submit_scores(["Hi"], model="texts")
    assert caught.value.code == "unsupported"


def test_an_adapter_that_the_model_does_not_have_is_refused_at_submit(served: Fleet) -> None:
    client = served.client()
    register(client, "adapted", engine="vllm", adapters=("poet",))
    error = refused(client, "adapted", adapter="painter")
    assert (error.code, error.details["param"]) == ("unknown_adapter", "adapter")
    assert "poet" in error.hint
    client.submit("Hi", model="adapted", adapter="poet").cancel()


async def test_many_submits_at_once_look_once(served: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    look_up = Acceptance._look_up

    async def counted(self: Acceptance, name: str) -> Any:
        nonlocal looks
        looks += 1
        return await look_up(self, name)

    monkeypatch.setattr(Acceptance, "_look_up", counted)
    async with AsyncClient(served.redis.url, fleet=served.redis.fleet, model=MODEL) as client:
        jobs = await client.submit_many(["Hi"] * 100, max_new_tokens=1)
        assert looks == 1
        for job in jobs:
            await job.result(30)

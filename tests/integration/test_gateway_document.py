"""The served OpenAPI document, and requests made from it: whatever fits the document is never answered with a 5xx."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.fleets import MODEL, Fleet
from tests.gateways import Gateway, start_gateway
from tests.servers import RedisServer, new_fleet_name


@pytest.fixture(scope="module")
def small(_session_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Before a model whose answers end at once: most requests don't say how long they may be."""
    fleet = Fleet(RedisServer(_session_server, new_fleet_name()), tmp_path_factory.mktemp("fleet"))
    fleet.start_worker(token_ms=0.0, context_tokens=96, ttft_ms=0.0)
    gateway = start_gateway(fleet, head_held_s=1)
    yield gateway
    gateway.close()
    fleet.close()


def document(gateway: Gateway) -> dict[str, Any]:
    with urllib.request.urlopen(f"{gateway.url}/openapi.json", timeout=30) as reply:
        return dict(json.loads(reply.read()))


def test_every_post_route_documents_its_body(small: Gateway) -> None:
    for path, methods in document(small)["paths"].items():
        if "post" in methods and not path.endswith("/cancel"):
            assert "requestBody" in methods["post"], path


def operations(gateway: Gateway) -> Iterator[Any]:
    told = document(gateway)
    for methods in told["paths"].values():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "model" in body.get("schema", {}).get("properties", {}):
            body["schema"]["properties"]["model"] = {"enum": [MODEL]}  # else all are 404
            body["schema"]["additionalProperties"] = False
    schema = schemathesis.openapi.from_dict(told)
    schema.config.update(base_url=gateway.url)
    for result in schema.get_all_operations():
        yield result.ok()


LIMITS = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


def statuses_of(operation: Any) -> set[int]:
    """Of requests that fit the document."""
    seen: set[int] = set()

    @LIMITS
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        reply = case.call(timeout=30)
        assert reply.status_code < 500, (reply.status_code, reply.text[:500])
        if reply.status_code >= 400:
            assert reply.json()["error"]["code"]
        seen.add(reply.status_code)

    check()
    return seen


def test_nothing_that_fits_the_document_is_a_server_error(small: Gateway) -> None:
    statuses = {operation.label: statuses_of(operation) for operation in operations(small)}
    answering = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "POST /tokenize"}
    # Which of them draw a request that makes sense is chance; that some do and reach a worker isn't.
    assert len({label for label in answering if 200 in statuses[label]}) >= 2, statuses
    assert len(statuses) > 15


def test_a_good_request_still_succeeds(small: Gateway) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
    request = urllib.request.Request(f"{small.url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.status == 200

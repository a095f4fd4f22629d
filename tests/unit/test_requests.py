"""What callers ask for arrives at the worker as they asked for it."""

from __future__ import annotations

import pytest

from tokenfleet.engines.generation import resolve_max_new_tokens
from tokenfleet.producer.gateway.chat_requests import from_chat_body
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import dump_request, parse_request
from tokenfleet.wire.requests import chat_request

CHAT = {"messages": [{"role": "user", "content": "Hi!"}]}


def _arrived(request: ChatRequest) -> ChatRequest:
    there = parse_request(dump_request(request))
    assert isinstance(there, ChatRequest)
    return there


@pytest.mark.parametrize(
    ("more", "tokens"), [({}, 3000), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 1024}, 1024)]
)
def test_a_chat_of_openais_api_has_no_limit_but_the_contexts_and_its_own(more, tokens):
    settings = GatewaySettings(redis_url="redis://nowhere")
    request, _ = from_chat_body({**CHAT, **more}, settings, "", cancel_on_disconnect=True)
    assert resolve_max_new_tokens(_arrived(request).params, 1000, 4000) == tokens


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 1024),
        ({"max_new_tokens": None}, 3000),
        ({"max_length": 3000}, 2000),
        ({"max_length": 3000, "max_new_tokens": 1024}, 1024),  # the default's number, but asked for
    ],
)
def test_how_many_tokens_a_clients_answer_may_have(given, tokens):
    request, _ = chat_request("Hi!", given)
    assert resolve_max_new_tokens(_arrived(request).params, 1000, 4000) == tokens


@pytest.mark.parametrize(("seed", "arrived"), [(0, 0), (5, 5), (-1, 2**63 - 1), (-(2**63), 0), (2**63 - 1, 2**63 - 1)])
def test_a_seed_is_any_number_of_64_bits_as_in_openais_api(seed, arrived):
    request, _ = chat_request("Hi!", {"seed": seed}, is_json=True)
    assert _arrived(request).params.seed == arrived


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"min_tokens": 9, "max_new_tokens": 3}, "min_tokens"),
        ({"prompt": "x"}, "messages"),
    ],
)
def test_of_two_fields_that_do_not_go_together_one_is_named(given, param):
    with pytest.raises(InvalidRequest) as raised:
        chat_request("Hi!", given)
    assert raised.value.details["param"] == param

"""Whatever is sent to the gateway is answered with a typed 4xx, and the next good request succeeds."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
from collections.abc import Iterator
from itertools import product
from typing import Any

import psutil
import pytest

from tests.fleets import MODEL, Fleet
from tests.gateways import Gateway, start_gateway

GOOD = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
GOOD_TEXT = {"model": MODEL, "prompt": "Hi.", "max_tokens": 2}
GOOD_RESPONSE = {"model": MODEL, "input": "Hi.", "max_output_tokens": 2}
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@pytest.fixture(scope="module")
def gateway(served: Fleet) -> Iterator[Gateway]:
    gateway = start_gateway(served, max_body_bytes=2_000_000)
    yield gateway
    gateway.close()


@pytest.fixture
def caller(gateway: Gateway) -> Iterator[Caller]:
    caller = Caller(gateway)
    yield caller
    caller.close()


def port_of(gateway: Gateway) -> int:
    return int(gateway.url.rsplit(":", 1)[1])


class Caller:
    """One connection, made anew when the gateway closed it."""

    def __init__(self, gateway: Gateway) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port_of(gateway), timeout=20)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        try:
            self._connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
            reply = self._connection.getresponse()
            return reply.status, reply.read()
        except (http.client.HTTPException, OSError):
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()


def refused(caller: Caller, path: str, body: bytes, **headers: str) -> str:
    """The code of the 4xx; "" if the body was good after all."""
    status, answer = caller.post(path, body, **headers)
    if status == 200:
        return ""
    assert 400 <= status < 500, (status, path, body[:300], answer[:300])
    error = json.loads(answer)["error"]
    assert error["code"], body[:300]
    assert error["type"], body[:300]
    assert isinstance(error["message"], str), body[:300]
    assert len(answer) < 20_000
    return str(error["code"])


def hostile_values() -> Iterator[bytes]:
    yield from (
        b'"x"', b'""', b"-1", b"1e400", b"-1e400", b"1" * 400, b"9007199254740993", b"0.5", b"NaN", b"Infinity",
        b"true",
        b"[]", b"{}", b'[null]', b'[{}]', b'[[]]', b'{"a": {"b": []}}', b'"\\ud800"', b'"\\u0000"', b'["\\ud83d"]',
        b'[{"type": "nothing"}]', b'{"type": 3}', b'{"type": "json_schema"}', b'{"type": ["text"]}',
        b'[{"role": "user"}]', b'[{"role": [], "content": {}}]', b'[{"role": "user", "content": [3]}]',
        b'[{"role": "assistant", "tool_calls": [3]}]', b'[{"role": "tool", "content": "x", "tool_call_id": {}}]',
        b'[{"type": "function"}]', b'[{"type": "function", "function": {"name": 3}}]', b'{"7": "x"}', b'{"": 1}',
    )  # fmt: skip


FIELDS = {
    CHAT: (GOOD, "messages model stream stream_options n temperature top_p top_k min_p seed stop stop_token_ids "
           "logprobs top_logprobs max_tokens max_completion_tokens tools tool_choice parallel_tool_calls logit_bias "
           "response_format chat_template_kwargs structured_outputs guided_json guided_choice reasoning_effort "
           "retention_s priority "
           "enable_thinking adapter presence_penalty functions extra"),
    TEXT: (GOOD_TEXT, "prompt model stream n echo suffix best_of logprobs stop max_tokens logit_bias guided_regex"),
    RESPONSES: (GOOD_RESPONSE, "input model instructions tools tool_choice text reasoning include stream background "
                "store previous_response_id max_output_tokens metadata truncation temperature conversation"),
}  # fmt: skip


def test_a_thousand_hostile_bodies(caller: Caller) -> None:
    refusals = 0
    for path, (good, fields) in FIELDS.items():
        for field, value in product(fields.split(), hostile_values()):
            rest = {name: v for name, v in good.items() if name != field}
            body = json.dumps(rest)[:-1].encode() + b', "' + field.encode() + b'": ' + value + b"}"
            refusals += bool(refused(caller, path, body))
    assert refusals > 1000
    for path, (good, _) in FIELDS.items():
        assert refused(caller, path, json.dumps(good).encode()) == ""


SCORES, TOKENIZE = "/v1/score/evaluation", "/tokenize"
WRONG_TYPES: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    CHAT: (GOOD, {
        "temperature": ["0", True], "top_p": ["1"], "top_k": ["5", 1.5], "seed": ["1", True], "n": ["1", True],
        "max_tokens": ["2", True, 2.5], "logprobs": ["yes", 1, 0, ""], "top_logprobs": ["1", True], "stop": [3, [3]],
        "stop_token_ids": [["1"], [True]], "logit_bias": [[], {"5": "1"}, {"x": 1}], "stream": [1, "true"],
        "parallel_tool_calls": ["yes", 0], "tools": ["[]", {}], "enable_thinking": ["no", 1], "ignore_eos": ["no", 0],
        "adapter": [3], "user": [3], "store": ["no", 0], "metadata": ["x", []], "retention_s": ["5", True],
    }),
    TEXT: (GOOD_TEXT, {
        "temperature": ["0"], "logprobs": [-1, "1", True, 99], "max_tokens": ["2", True], "echo": [0, "no"],
        "best_of": [True, "1"], "prompt": [3, [1, "2"], [1, True]], "user": [3], "n": ["2"],
    }),
    RESPONSES: (GOOD_RESPONSE, {
        "temperature": ["0"], "max_output_tokens": ["2", True], "top_logprobs": ["1", True, -1], "store": ["no", 0],
        "background": ["no", 0], "parallel_tool_calls": ["yes"], "max_tool_calls": [True], "user": [3], "seed": ["1"],
        "service_tier": [3], "prompt_cache_key": [3],
    }),
    SCORES: ({"model": MODEL, "messages": ["x"]}, {"max_length": ["3", True], "messages": ["x", [3]]}),
    TOKENIZE: ({"model": MODEL, "messages": GOOD["messages"]}, {
        "return_token_strs": [1, "no"], "tools": ["[]"], "chat_template_kwargs": [[], "x"],
    }),
}  # fmt: skip


@pytest.mark.parametrize("path", WRONG_TYPES)
def test_a_value_of_another_json_type_is_refused_by_its_fields_name(caller: Caller, path: str) -> None:
    good, fields = WRONG_TYPES[path]
    for field, values in fields.items():
        for value in values:
            status, answer = caller.post(path, json.dumps({**good, field: value}).encode())
            assert status == 400, (field, value, answer[:300])
            assert json.loads(answer)["error"]["param"].partition(".")[0] == field, (value, answer[:300])


def test_an_unknown_field_is_refused_on_every_route(caller: Caller) -> None:
    for path, (good, _) in WRONG_TYPES.items():
        assert refused(caller, path, json.dumps({**good, "tempurature": 1}).encode()) == "unknown_field"
    assert refused(caller, "/detokenize", b'{"model": "scripted", "tokens": [1], "more": 1}') == "unknown_field"


def test_json_types_that_say_the_same_are_taken(caller: Caller) -> None:
    """Whole numbers for others, one string for a list of one, numbers as an object's names, null for nothing."""
    same = {"temperature": 0, "top_p": 1, "stop": "x", "logit_bias": {"5": 1}, "seed": None, "logprobs": False}
    assert refused(caller, CHAT, json.dumps({**GOOD, **same, "top_logprobs": 0, "stop_token_ids": [1]}).encode()) == ""
    assert refused(caller, TEXT, json.dumps({**GOOD_TEXT, "logprobs": 0, "echo": False, "best_of": 1}).encode()) == ""
    assert refused(caller, RESPONSES, json.dumps({**GOOD_RESPONSE, "top_logprobs": 0, "user": "x"}).encode()) == ""


def test_broken_json_and_broken_text(caller: Caller) -> None:
    draw = random.Random(7)
    good = json.dumps({**GOOD, "messages": [{"role": "user", "content": 'é "\\" 🚀'}]}, ensure_ascii=False).encode()
    for _ in range(300):
        body = bytearray(good)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(body))
            body[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        refused(caller, CHAT, bytes(body))
    for body in (
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xef\xbb\xbf{}",
        b"\x00",
        b"\xff\xfe{\x00}\x00",
        good[:-1],
        good + good,
    ):
        assert refused(caller, CHAT, body) == "invalid_json"
    assert refused(caller, CHAT, good) == ""


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "x", "messages": ' + b"[" * 65 + b"]" * 65 + b"}",
     b"[" + b"[]," * 300_000 + b"[]]", b'{"a": "' + b'\\"' * 900_000, b'"' * 900_001,
     b"[" * 70 + b'"' + b"\\" * 900_000],
    ids=["brackets", "objects", "one level too deep", "too many", "an open string", "quotes", "backslashes"],
)  # fmt: skip
def test_nesting_is_refused_before_it_is_parsed(caller: Caller, body: bytes) -> None:
    assert refused(caller, CHAT, body) == "invalid_json"
    assert refused(caller, CHAT, json.dumps(GOOD).encode()) == ""


def test_sizes_are_limited_before_anything_is_read(caller: Caller) -> None:
    assert refused(caller, CHAT, b"x" * 2_000_001) == "request_too_large"
    assert refused(caller, CHAT, b"{}", **{"Content-Encoding": "gzip"}) == "unsupported_encoding"
    many = {f"X-{k}": "y" for k in range(101)}
    assert refused(caller, CHAT, b"{}", **many) == "headers_too_large"
    assert refused(caller, f"/v1/{'x' * 9000}", b"{}") == "headers_too_large"
    assert refused(caller, CHAT, json.dumps(GOOD).encode()) == ""


def sent_until_cut(connection: socket.socket) -> int:
    sent = 0
    try:
        while sent < 100_000_000:
            connection.sendall(b"x" * 65536)
            sent += 65536
    except OSError:
        pass
    return sent


def test_a_head_without_end_is_cut_off(gateway: Gateway) -> None:
    before = psutil.Process(gateway.process.pid).memory_info().rss
    for start in (b"GET /health HTTP/1.1\r\nX-Long: ", b"GET /"):
        with socket.create_connection(("127.0.0.1", port_of(gateway)), timeout=30) as connection:
            connection.sendall(start)
            assert sent_until_cut(connection) < 5_000_000
    assert psutil.Process(gateway.process.pid).memory_info().rss < before + 20_000_000


def test_a_bad_request_harms_no_stream_beside_it(gateway: Gateway, caller: Caller) -> None:
    texts: list[bytes] = []

    def stream() -> None:
        body = json.dumps({**GOOD, "max_tokens": 150, "stream": True}).encode()
        with contextlib.closing(Caller(gateway)) as other:
            texts.append(other.post(CHAT, body)[1])

    beside = threading.Thread(target=stream)
    beside.start()
    while beside.is_alive():
        assert refused(caller, CHAT, b"[" + b"[]," * 60_000 + b"[]]")
    assert texts[0].endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in texts[0]


@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", "/v1/nothing", 404, "route_not_found"), ("DELETE", CHAT, 405, "method_not_allowed"),
    ("GET", "/v1/models/../../etc/passwd", 404, "model_not_found"), ("GET", "/v1/models/%00", 404, "model_not_found"),
])  # fmt: skip
def test_routing_errors_have_the_same_shape(gateway: Gateway, method: str, path: str, status: int, code: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(gateway), timeout=30)
    connection.request(method, path)
    with contextlib.closing(connection):
        reply = connection.getresponse()
        answer = reply.read()
    assert reply.status == status
    assert json.loads(answer)["error"]["code"] == code

"""``/tokenize`` and ``/detokenize``, with vLLM's bodies. A worker of the model answers; no GPU has a part in it."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tokenfleet.producer.gateway import documents
from tokenfleet.producer.gateway.bodies import read_body
from tokenfleet.producer.gateway.chat_requests import check_fields, in_callers_words, message_of
from tokenfleet.wire.asks import Question, ask
from tokenfleet.wire.chat import TextPart
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.jobs import dump_request
from tokenfleet.wire.requests import chat_request, check_size

router = APIRouter()
_FLAGS = ("add_special_tokens", "add_generation_prompt", "continue_final_message", "return_token_strs")
_KNOWN = frozenset({"model", "prompt", "messages", "tools", "chat_template_kwargs", *_FLAGS})


@router.post("/tokenize", openapi_extra=documents.TOKENIZE)
async def tokenize(request: Request) -> Response:
    """``prompt``, or ``messages`` (with ``tools``, ``chat_template_kwargs``) as the chat route would render them."""
    body = await read_body(request)
    check_fields(body, _KNOWN, request.app.state.settings)
    for name in _FLAGS:
        if not isinstance(body.get(name), bool | None):
            raise InvalidRequest(f"{name}: true or false is needed.", param=name)
    if body.get("add_generation_prompt") is False or body.get("continue_final_message"):
        raise InvalidRequest(
            "Messages are tokenized as a chat would be: the assistant is next.", code="unsupported_parameter",
            param="add_generation_prompt",
        )  # fmt: skip
    reply = await ask(request.app.state.client.ledger, _model(body), _question(request, body))
    answer = {"count": len(reply.ids), "max_model_len": reply.context_tokens, "tokens": reply.ids}
    return _json({**answer, "token_strs": reply.strings if body.get("return_token_strs") else None})


@router.post("/detokenize", openapi_extra=documents.DETOKENIZE)
async def detokenize(request: Request) -> Response:
    body = await read_body(request)
    check_fields(body, {"model", "tokens"}, request.app.state.settings)
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise InvalidRequest("tokens: a list of token ids is needed.", param="tokens")
    reply = await ask(request.app.state.client.ledger, _model(body), Question(ids=tuple(tokens)))
    return _json({"prompt": reply.text})


def _model(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model: the name of a served model is needed.", param="model")
    return model.partition(":")[0]


def _question(request: Request, body: dict[str, Any]) -> Question:
    prompt, messages, strings = body.get("prompt"), body.get("messages"), bool(body.get("return_token_strs"))
    if isinstance(prompt, str) and messages is None:
        if body.get("add_special_tokens") is False:
            return Question(text=prompt, wants_strings=strings)
        chat, _ = chat_request((), {"prompt": prompt or None}, is_json=True)
    elif isinstance(messages, list) and messages and prompt is None:
        named = {"tools": body.get("tools"), "template_kwargs": body.get("chat_template_kwargs")}
        settings = request.app.state.settings
        with in_callers_words(body):
            asked = [message_of(message, k, settings) for k, message in enumerate(messages)]
            chat, _ = chat_request(asked, named, is_json=True)
        if any(not isinstance(p, TextPart) for m in chat.messages if isinstance(m.content, tuple) for p in m.content):
            raise InvalidRequest("Only text can be tokenized here.", code="unsupported_media", param="messages")
    else:
        raise InvalidRequest("prompt (a string) or messages (a list) is needed.", param="prompt")
    dumped = dump_request(chat)
    check_size(dumped)
    return Question(request=msgspec.Raw(dumped), wants_strings=strings)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")

"""``/v1/models`` and ``/v1/score/evaluation``."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tokenfleet.producer.gateway import documents
from tokenfleet.producer.gateway.bodies import read_body
from tokenfleet.producer.gateway.chat import submit, whole
from tokenfleet.producer.gateway.chat_requests import check_fields
from tokenfleet.wire.errors import InvalidRequest, UnknownModel
from tokenfleet.wire.jobs import ServedModel
from tokenfleet.wire.requests import score_request

router = APIRouter()
_SCORE = frozenset({"model", "messages", "max_length"})


def _object(name: str, parent: str | None = None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "tokenfleet",
        "root": parent or name,
        "parent": parent,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Served models, and their adapters as ``model:adapter``."""
    models: dict[str, ServedModel] = await request.app.state.client.models()
    data = []
    for name, model in sorted(models.items()):
        data.append(_object(name))
        data += [_object(f"{name}:{adapter}", name) for adapter in model.adapters]
    return {"object": "list", "data": data}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    for model in (await list_models(request))["data"]:
        if model["id"] == name:
            return dict(model)
    raise UnknownModel(f"This fleet serves no model named {name[:128]!r}.", param="model")


@router.post("/v1/score/evaluation", openapi_extra=documents.SCORES)
async def score(request: Request) -> Response:
    """LLaMA-Factory's: ``{model, messages: [str], max_length}`` → ``{id, object, model, scores}``."""
    body = await read_body(request)
    check_fields(body, _SCORE, request.app.state.settings)
    texts = body.get("messages")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("messages: a list of strings is needed.", param="messages")
    settings, tenant = request.app.state.settings, request.state.tenant
    key = request.headers.get("idempotency-key")
    named = {"max_length": body.get("max_length"), "tenant": tenant, "retention_s": settings.retention_s,
             "deadline_s": settings.deadline_s, "queue_ttl_s": settings.queue_ttl_s}  # fmt: skip
    asked, options = score_request(texts, named, is_json=True)
    job, _ = await submit(request, asked, options, body, key)
    results, _ = await whole(request, [job])
    answer = {
        "id": f"scoreval-{uuid.UUID(job.id).hex}",
        "object": "score.evaluation",
        "model": body.get("model"),
        "scores": list(results[0].scores or ()),
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")

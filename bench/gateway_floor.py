"""A bare FastAPI application that streams chats from a scripted engine in its own process: no queue, no fleet.

    python -m bench.gateway_floor PORT '{"ttft_ms": 20, "token_ms": 5, "slots": 512}'

What any HTTP server in Python costs over the engine; also an upstream for other proxies."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from tokenfleet.engines.generation import GenerationJob, generate_deltas
from tokenfleet.engines.scripted import ScriptedEngine, ScriptedOptions
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.events import Delta


def make(options: dict[str, Any]) -> FastAPI:
    engine, numbers = ScriptedEngine(ScriptedOptions.model_validate(options)), itertools.count()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.close()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": "bench"}]}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        limit = body["max_tokens"]
        ids = tuple(engine.tokenizer.encode(body["messages"][-1]["content"]))
        params = GenerationParams(do_sample=False, max_new_tokens=limit)
        job = GenerationJob(f"job-{next(numbers)}", 1, ids, params, limit)

        def chunk(delta: dict[str, Any], reason: str | None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            head = {"id": job.job_id, "object": "chat.completion.chunk", "created": 0, "model": "scripted"}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        async def chunks() -> AsyncIterator[str]:
            async for event in generate_deltas(engine, engine.tokenizer, job):
                if isinstance(event, Delta):
                    yield chunk({"role": "assistant", "content": event.text}, None)
            yield chunk({}, "length")
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    uvicorn.run(make(json.loads(sys.argv[2])), port=int(sys.argv[1]), log_level="warning")

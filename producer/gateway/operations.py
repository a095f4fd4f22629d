"""``/health`` (this process), ``/ready`` (the fleet, honestly)."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tokenfleet.wire.errors import TokenfleetError

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 if Redis answers and every served model has a live worker; else 503 with what is missing."""
    try:
        models = await request.app.state.client.models()
        workers = await request.app.state.client.workers()
    except TokenfleetError as error:
        return JSONResponse({"status": "unready", "reason": error.code}, status_code=503)
    alive = {worker.get("model") for worker in workers}
    missing = sorted(name for name in models if name not in alive)
    if not models or missing:
        return JSONResponse({"status": "unready", "reason": "no_worker", "models": missing}, status_code=503)
    return JSONResponse({"status": "ready", "models": sorted(models), "workers": len(workers)})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus: what this gateway's requests met, and the fleet's own figures."""
    fleet = await request.app.state.client.overview()
    text = request.app.state.metrics.render(fleet)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The routes as OpenAPI; behind the same key as they are."""
    return JSONResponse(request.app.openapi())

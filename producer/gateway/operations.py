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
    """200 if Redis answers and every served model has a worker with a valid lease; else 503 with what is missing.

    A worker whose engine stands still loses its lease by its own decision, so a lease says that it makes progress."""
    try:
        fleet = await request.app.state.client.overview()
    except TokenfleetError as error:
        return JSONResponse({"status": "unready", "reason": error.code}, status_code=503)
    models = {
        info.model.name: {"workers": info.workers, "running": info.running, "waiting": info.waiting}
        for info in fleet.models
    }
    missing = sorted(info.model.name for info in fleet.models if not info.workers)
    if not models or missing:
        return JSONResponse(
            {"status": "unready", "reason": "no_worker", "missing": missing, "models": models}, status_code=503
        )
    return JSONResponse({"status": "ready", "models": models, "workers": len(fleet.workers)})


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

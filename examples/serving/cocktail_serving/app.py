"""The service's addresses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .answers import Lingering
from .engine import Engine
from .history import History
from .inputs import Expected, Refused, read_body
from .metrics import Metrics
from .settings import Limits

__all__ = ["create_app"]

DISCARDED = 16
"""Times a body's limit that is read of a larger one, so that whoever sends it sees the answer."""
PAGE = Path(__file__).with_name("page.html")
SAFE = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""The page is one file, and asks nothing of any other server."""


def create_app(engine: Engine, expected: Expected, limits: Limits) -> FastAPI:
    """The service.

    Args:
        engine: Runs requests; started and stopped with the application.
        expected: What an example must be.
        limits: What is refused.
    """
    metrics, history = Metrics(engine), History(engine)
    engine.watchers = [metrics, history]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    # No generated pages of documentation: they load their scripts from elsewhere.
    app = FastAPI(title="Cocktail", lifespan=lifespan, docs_url=None, redoc_url=None)
    page = PAGE.read_text(encoding="utf-8")

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> Response:
        for w in engine.watchers:
            w.refused(error.status)
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status in (408, 413, 415):  # a part of the body may still be on its way
            return Lingering(
                {"error": str(error)}, error.status, headers, limits.body_seconds, DISCARDED * limits.body_bytes
            )
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse({"error": said}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        """Outputs of the active network for an array as ``numpy.save`` writes it."""
        examples = expected.read(await read_body(request, limits))
        answer = await engine.run(examples, limits.answer_seconds)
        return JSONResponse(
            {
                "network": answer.network,
                "accuracy_expected": engine.networks[answer.network].accuracy,
                "classes": answer.outputs.argmax(1).tolist(),
                "outputs": answer.outputs.tolist(),
                "waited_ms": round(1e3 * answer.waited, 3),
                "ran_ms": round(1e3 * answer.ran, 3),
            }
        )

    @app.get("/health/live")
    async def live() -> Response:
        """Whether the process works; if not, start it anew."""
        return JSONResponse({"live": engine.alive}, 200 if engine.alive else 503)

    @app.get("/health/ready")
    async def ready() -> Response:
        """Whether requests are let in; if not, send them elsewhere."""
        return JSONResponse({"ready": engine.ready}, 200 if engine.ready else 503)

    @app.get("/metrics")
    async def told() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/history")
    async def seconds(after: int = Query(-1, ge=-1)) -> dict[str, Any]:
        """The last minutes, a row a second, for the page."""
        ladder = [
            {"name": n.name, "ms": round(1e3 * n.seconds, 4), "accuracy": n.accuracy} for n in engine.networks.values()
        ]
        goal = round(1e3 * engine.controller.policy.goal, 3)
        return {"goal_ms": goal, "networks": ladder, "seconds": history.after(after)}

    @app.get("/", response_class=HTMLResponse)
    async def shown() -> Response:
        """The live page."""
        return HTMLResponse(page, headers=SAFE)

    return app

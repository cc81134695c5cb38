"""The gateway's HTTP application: an allow-list of paths, each with its method; everything else is 404."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serve.auth import Keys
from serve.errors import ApiError, on_api_error, on_crash, on_http_exception
from serve.feedback import Feedback
from serve.proxy import Proxy
from serve.routing import Router
from thumbwheel.events import new_id
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit
from thumbwheel.settings import Settings


def create_app(
    settings: Settings, router: Router, log: SqliteLog, commit: GroupCommit, keys: Keys, engine_url: Callable[[], str]
) -> FastAPI:
    """The application in front of one engine. `engine_url` is asked at every request: a restart may move the port.

    It opens and closes its connections to the engine; `log` and `commit` are closed by who made them, after it.
    """
    proxy = Proxy(settings, router, commit, keys, engine_url)
    feedback = Feedback(settings, log, commit, keys)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await proxy.open()
        try:
            yield
        finally:
            await proxy.close()

    async def models(request: Request) -> Response:
        keys.authenticate(request.headers.get("authorization")).require("inference", "evaluator", "operator")
        card = model_card(settings.gateway.model_name, settings.engine.max_model_len, started)
        return Response(orjson.dumps({"object": "list", "data": [card]}), media_type="application/json")

    async def healthz(request: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def readyz(request: Request) -> Response:
        if (why := router.why_not_ready()) is not None:
            raise ApiError(503, f"The gateway is not ready: {why}.")
        return Response(b'{"status":"ready"}', media_type="application/json")

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_crash)
    # Plain Starlette routes: the bodies belong to vLLM, which checks them; checking them here again would cost time.
    app.add_route("/v1/chat/completions", proxy.chat, methods=["POST"])  # type: ignore[arg-type]
    app.add_route("/v1/completions", proxy.complete, methods=["POST"])  # type: ignore[arg-type]
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/feedback", feedback.submit, methods=["POST"])
    app.add_route("/v1/feedback/{response_id}", feedback.retract, methods=["DELETE"])
    app.add_route("/healthz", healthz, methods=["GET"])
    app.add_route("/readyz", readyz, methods=["GET"])
    app.add_route("/metrics", metrics, methods=["GET"])
    return app


def model_card(name: str, max_model_len: int, created: int) -> dict[str, object]:
    """A model in the list, with vLLM's fields in vLLM's order."""
    permission = {
        "id": f"modelperm-{new_id().replace('-', '')[-16:]}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": name,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [permission],
    }

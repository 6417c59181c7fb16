"""The routes: what paths there are and which errors they answer with. The work is in `service`.

Nothing that a request says opens an address, nor any file but those of an adapter in the folder that the server was
given for them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..version import __version__
from .answer_schemas import (
    ChatCompletion,
    Completion,
    Embeddings,
    Error,
    Health,
    Model,
    Models,
    ServerStats,
    dumped,
)
from .errors import ApiError
from .guard import Guard
from .interface import Engine
from .limits import ServerConfig
from .page import ChatPage
from .schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from .service import Service

FAILS: dict[int | str, dict[str, Any]] = {"default": {"model": Error, "description": "What went wrong."}}
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk as JSON; [DONE] at the end."}},
    "required": ["data"],
}
EVENTS = {"text/event-stream": {"schema": EVENT}}


def create_app(engine: Engine, config: ServerConfig | None = None) -> FastAPI:
    """An ASGI application that serves `engine`.

    Its `state.service` is the `Service`; the engine's thread runs while the application does.

    Args:
        engine: nobody else may use it meanwhile.
        config: whom it answers, and within which limits; `host` and `port` are for `run`.
    """
    service = Service(engine, config or ServerConfig())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="fastgen",
        version=__version__,
        description="OpenAI's API for a model on this machine.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, config=service.config, answered=service.metrics.answered)
    add_errors(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_health(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/completions",
        responses={200: {"model": Completion, "content": EVENTS, "description": "Completions."}, **FAILS},
        response_class=Response,
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        return await service.complete(body, request)

    @app.post(
        "/v1/chat/completions",
        responses={
            200: {"model": ChatCompletion, "content": EVENTS, "description": "The next turn."},
            **FAILS,
        },
        response_class=Response,
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The assistant's next turn."""
        return await service.chat(body, request)

    @app.post("/v1/embeddings", response_model=Embeddings, responses=FAILS)
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts."""
        return await service.embed(body, request)


def _add_models(app: FastAPI, service: Service) -> None:
    def model(name: str) -> Model:
        return Model(
            id=name,
            object="model",
            created=service.created,
            owned_by="fastgen",
            parent=None if name == service.served_name else service.served_name,
            max_model_len=service.max_model_len,
        )

    @app.get("/v1/models", responses=FAILS)
    async def list_models() -> Models:
        """The model and its adapters."""
        return Models(object="list", data=[model(name) for name in await service.models()])

    @app.get("/v1/models/{model_id:path}", responses=FAILS)
    async def get_model(model_id: str) -> Model:
        """One of them."""
        known = await service.models()
        if model_id not in known:
            raise ApiError(
                404, f"expected one of {', '.join(known)}, got {model_id!r}", code="model_not_found"
            )
        return model(model_id)


def _add_health(app: FastAPI, service: Service) -> None:
    page = ChatPage()

    @app.get("/health", response_model=Health, responses={503: {"model": Health}, **FAILS})
    async def health() -> Response:
        """Whether requests are taken."""
        health = service.health()
        return Response(dumped(health), 200 if health.status == "ok" else 503, media_type="application/json")

    @app.get("/stats", responses=FAILS)
    async def stats() -> ServerStats:
        """What the engine is busy with."""
        return service.stats()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **FAILS})
    async def metrics() -> Response:
        """The same and more, for Prometheus."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        """A page to chat on."""
        return page.response()

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        """Browsers ask."""
        return Response(status_code=204)


def add_errors(app: FastAPI) -> None:
    """Answer errors in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return malformed_body(error).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()


def malformed_body(error: RequestValidationError) -> ApiError:
    """The first fields at fault, with what was expected of them."""
    faults: dict[str, list[str]] = {}
    # An unknown field first: where there are alternatives, the others' faults say nothing.
    for fault in sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden"):
        where = _place(error.body, fault["loc"][1:])
        unknown = fault["type"] == "extra_forbidden"
        message = "is not a field of this request" if unknown else str(fault["msg"])[:200]
        field = ".".join(where if unknown else where[:1])
        faults.setdefault(field or "body", []).append(message)
    field = next(iter(faults), "body")
    messages = list(dict.fromkeys(faults.get(field, ["expected JSON"])))[:4]
    return ApiError(400, f"{field}: {' / '.join(messages)}", code="invalid_value", param=field[:200])


def _place(body: Any, location: Sequence[int | str]) -> list[str]:
    """Where in a body a fault is; alternatives, which add their names to its location, are left out."""
    found: list[str] = []
    for part in location:
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            if found or not isinstance(body, dict):
                continue
        found.append(str(part))
    return found

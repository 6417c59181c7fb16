"""The routes in front of the replicas, and the server made of them. The work is in `front`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fastapi import FastAPI, Request
from starlette.responses import Response

from ...errors import ConfigError
from ...ranks import processes
from ..answer_schemas import dumped
from ..app import add_errors
from ..guard import Guard
from ..limits import ServerConfig
from ..page import ChatPage
from ..run import HttpServer
from .front import Front
from .pool import Launch
from .worker import Loadable, Work, work

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
LOOKING = ("/v1/models", "/v1/models/{model_id:path}", "/openapi.json")


class ReplicaServer:
    """Serves several replicas of an engine on one address.

    Args:
        engine: that each of them loads.
        config: see `ServerConfig`; of the limits `queued` is divided among them.
        replicas: 2 or more.
        gpus: that each takes; 0: the CPU.
    """

    def __init__(self, engine: Loadable, config: ServerConfig, *, replicas: int, gpus: int = 0) -> None:
        if replicas < 2:
            raise ConfigError(
                f"ReplicaServer(replicas=...): expected >= 2, got {replicas}; use Server for one"
            )
        self.config = config
        self._engine = engine
        self._replicas = replicas
        self._gpus = gpus

    def run(self, ready: Callable[[str], None]) -> None:
        """Serve until a signal comes; see `HttpServer.run`.

        Raises:
            WorkerError: a replica could not start at first; later ones are started again.
        """
        with tempfile.TemporaryDirectory(prefix="fastgen-") as folder:
            self.server(folder).run(ready)

    def server(self, folder: str) -> HttpServer:
        """The server, with sockets in `folder`."""
        front = Front(self._launch, self._replicas, folder, self.config)
        return HttpServer(create_app(front), front, self.config)

    @property
    def _launch(self) -> Launch:
        limits = self.config.limits
        inside = replace(
            self.config,
            api_keys=(),
            cors_origins=(),
            allowed_hosts=None,
            end_on_failure=True,
            limits=replace(limits, queued=-(-limits.queued // self._replicas)),
        )

        def launch(number: int, path: str) -> tuple[BaseProcess, Connection]:
            gpus = (number * self._gpus, self._gpus) if self._gpus else None
            asked = Work(number, self._engine, replace(inside, socket_path=path), gpus)
            return processes.start(work, asked, name=f"fastgen-replica-{number}")

        return launch


def create_app(front: Front) -> FastAPI:
    """An ASGI application that serves `front`, which is opened and closed by others."""
    app = FastAPI(title="fastgen", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, config=front.config, answered=front.totals.answered)
    add_errors(app)
    _add_forwarded(app, front)
    _add_health(app, front)
    return app


def _add_forwarded(app: FastAPI, front: Front) -> None:
    async def generate(request: Request) -> Response:
        return await front.generate(request)

    async def look(request: Request) -> Response:
        return await front.look(request)

    for path in GENERATING:
        app.post(path)(generate)
    for path in LOOKING:
        app.get(path)(look)


def _add_health(app: FastAPI, front: Front) -> None:
    page = ChatPage()

    @app.get("/health")
    async def health() -> Response:
        health = front.health()
        return Response(dumped(health), 200 if health.status == "ok" else 503, media_type="application/json")

    @app.get("/stats")
    async def stats() -> Response:
        return Response(dumped(await front.stats()), media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await front.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def chat_page() -> Response:
        return page.response()

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

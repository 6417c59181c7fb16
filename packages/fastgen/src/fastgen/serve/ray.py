"""The same server over the machines of a Ray cluster: Ray Serve starts the replicas, and sends requests to them.

Needs the extra `fastgen[ray]`, which nothing else here imports. Each replica is one engine, in one process or in
several of one machine that share its layers; Ray gives it the GPUs that it reserved, and starts another in its place
when its engine has failed. Keys and limits hold in each replica.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from ..errors import ConfigError
from .app import create_app
from .engine_spec import EngineSpec
from .limits import ServerConfig
from .service import Service

if TYPE_CHECKING:
    from ..config import EngineConfig


def application(
    path: str,
    engine: EngineConfig,
    server: ServerConfig | None = None,
    *,
    num_replicas: int = 1,
    num_gpus: float = 0.0,
    num_cpus: float | None = None,
    tensor_parallel: int = 1,
    adapters: dict[str, str] | None = None,
) -> Any:
    """A Ray Serve application that serves a model, for `ray.serve.run`.

    Args:
        path: the model's directory, under the same name on every machine.
        engine: how each replica's engine runs.
        server: whom it answers, and within which limits; Ray decides where it listens.
        num_replicas: engines.
        num_gpus: that Ray reserves for each; as many as `tensor_parallel` says, where it runs on GPUs.
        num_cpus: that Ray reserves for each, and threads of an engine on the CPU; None: what Ray gives (1).
        tensor_parallel: processes of one machine that share each replica's layers.
        adapters: LoRA adapters, name to directory.

    Raises:
        ConfigError: Ray Serve is not installed, or too few GPUs are reserved.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            "fastgen.serve.ray: expected Ray Serve, got none; install it with pip install 'ray[serve]'"
        ) from error
    if 0 < num_gpus < tensor_parallel:
        raise ConfigError(
            f"application(num_gpus=...): expected {tensor_parallel} or more for tensor_parallel={tensor_parallel}, "
            f"got {num_gpus:g}"
        )
    config = server or ServerConfig()
    # Ray's proxy is called by the cluster's names, of which a replica knows none.
    inside = replace(config, host="0.0.0.0", adapters=tuple(adapters or ()))
    spec = EngineSpec(path, engine, tensor_parallel, tuple((adapters or {}).items()))
    process = _Process()

    def build() -> FastAPI:
        """In the replica's process."""
        return process.serve(spec, inside)

    class Replica:
        """What Ray asks how it is."""

        def check_health(self) -> None:
            """Raise if Ray should start another replica in this one's place."""
            process.check()

    options = {"num_gpus": num_gpus} if num_cpus is None else {"num_gpus": num_gpus, "num_cpus": num_cpus}
    deployed = serve.deployment(
        serve.ingress(build)(Replica),
        name="fastgen",
        num_replicas=num_replicas,
        ray_actor_options=options,
        max_ongoing_requests=config.limits.concurrent,
    )
    return deployed.bind()


@dataclass
class _Process:
    """A replica's process: its engine, until the process ends."""

    engines: ExitStack | None = None
    service: Service | None = None

    def serve(self, spec: EngineSpec, config: ServerConfig) -> FastAPI:
        self.engines = ExitStack()
        app = create_app(self.engines.enter_context(spec.loaded()), config)
        self.service = app.state.service
        return app

    def check(self) -> None:
        if self.service is not None and self.service.loop.failure is not None:
            raise self.service.loop.failure

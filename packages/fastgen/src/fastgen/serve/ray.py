"""The same server over the machines of a Ray cluster: Ray Serve starts the replicas, and sends requests to them.

Needs the extra `fastgen[ray]`, which nothing else here imports. Each replica is one engine in one process; Ray gives it
the GPU that it reserved. Keys and limits hold in each replica.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from ..errors import ConfigError
from .app import create_app
from .interface import Engine
from .limits import ServerConfig

if TYPE_CHECKING:
    from ..config import EngineConfig


def application(
    path: str,
    engine: EngineConfig,
    server: ServerConfig | None = None,
    *,
    num_replicas: int = 1,
    num_gpus: float = 0.0,
    adapters: dict[str, str] | None = None,
) -> Any:
    """A Ray Serve application that serves a model, for `ray.serve.run`.

    Args:
        path: the model's directory, under the same name on every machine.
        engine: how each replica's engine runs.
        server: whom it answers, and within which limits; Ray decides where it listens.
        num_replicas: engines.
        num_gpus: that Ray reserves for each.
        adapters: LoRA adapters, name to directory.

    Raises:
        ConfigError: Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            "fastgen.serve.ray: expected Ray Serve, got none; install it with pip install 'ray[serve]'"
        ) from error
    config = server or ServerConfig()
    # Ray's proxy is called by the cluster's names, of which a replica knows none.
    inside = replace(config, host="0.0.0.0", adapters=tuple(adapters or ()))

    def build() -> FastAPI:
        """In the replica's process."""
        from ..llm import build_engine

        loaded: Engine = build_engine(path, engine)
        for name, directory in (adapters or {}).items():
            loaded.load_adapter(name, directory)
        return create_app(loaded, inside)

    deployed = serve.deployment(
        serve.ingress(build)(),
        name="fastgen",
        num_replicas=num_replicas,
        ray_actor_options={"num_gpus": num_gpus},
        max_ongoing_requests=config.limits.concurrent,
    )
    return deployed.bind()

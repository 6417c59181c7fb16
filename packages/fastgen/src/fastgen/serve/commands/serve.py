"""`fastgen serve`: options, and the server made of them."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..interface import EngineError
from ..limits import LOOPBACK, Limits, ServerConfig
from .options import adapter_pairs, add_engine_options, amount, engine_spec, positive, text_of

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from ..engine_spec import EngineSpec
    from ..replicas import ReplicaServer

EPILOG = """
examples:
  fastgen serve ./model
  fastgen serve ./model --port 9000 --weights int8 --cache-gib 4
  fastgen serve ./model --host 0.0.0.0 --api-key-file keys.txt       other machines may ask, with a key
  fastgen serve ./model --adapters legal=./lora-legal                "model": "legal" chooses the adapter
  fastgen serve ./model --adapter-folder ./loras                     each directory in it is a model, too
  fastgen serve ./model --speculate ngram                            guess tokens from the text so far
  fastgen serve ./model --tensor-parallel 2                          each layer over two GPUs
  fastgen serve ./model --replicas 4                                 four servers behind one address

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'

  from openai import OpenAI
  OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").models.list()

On SIGTERM new requests get 503, running ones may finish within --drain-timeout, then it exits with 0.
An engine that fails ends the server with an error; a replica that ends is started again.
"""


def add_serve(commands: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server with a chat page",
        description="Serve a model: OpenAI's API, Prometheus metrics at /metrics and a chat page at /.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="the model's directory")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    parser.add_argument(
        "--replicas",
        type=positive,
        metavar="N",
        default=1,
        help="servers behind this address, each of --tensor-parallel processes (1)",
    )
    parser.add_argument("--name", help="the model's name in the API (default: the directory's)")
    parser.add_argument(
        "--adapter-folder",
        metavar="DIR",
        help="each directory in it that is a LoRA adapter is a model in the API, loaded when it is first asked for",
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="ask for a key; may be repeated"
    )
    access.add_argument(
        "--api-key-file", metavar="FILE", help="a key a line: other users see a command's arguments"
    )
    access.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="web pages that may ask"
    )
    access.add_argument(
        "--allowed-host", action="append", metavar="NAME", help="names by which this server may be called"
    )
    _add_limits(parser)
    add_engine_options(parser)
    parser.add_argument("--verbose", action="store_true", help="log what happens to standard error")
    parser.set_defaults(run=run_serve)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-body-mib", type=amount, default=8.0, metavar="X", help="of a request (8), else 413"
    )
    limits.add_argument("--max-prompt-tokens", type=positive, metavar="N", help="(the model's), else 400")
    limits.add_argument(
        "--max-tokens", type=positive, metavar="N", help="of an output (the model's), else 400"
    )
    limits.add_argument(
        "--max-concurrent", type=positive, default=512, metavar="N", help="requests (512), else 429"
    )
    limits.add_argument(
        "--max-queued", type=positive, default=1024, metavar="N", help="prompts (1024), else 503"
    )
    limits.add_argument(
        "--request-timeout", type=amount, default=600.0, metavar="S", help="seconds (600), else 504"
    )
    limits.add_argument(
        "--drain-timeout", type=amount, default=30.0, metavar="S", help="seconds to finish in (30)"
    )


def server_config(args: argparse.Namespace) -> ServerConfig:
    """What the options stand for."""
    keys = list(args.api_key)
    if args.api_key_file:
        keys += [line.strip() for line in text_of(args.api_key_file).splitlines() if line.strip()]
        if not keys:
            raise ConfigError(f"--api-key-file: expected a key a line in {args.api_key_file}, got none")
    limits = Limits(
        body_bytes=int(args.max_body_mib * 2**20),
        prompt_tokens=args.max_prompt_tokens,
        max_tokens=args.max_tokens,
        concurrent=args.max_concurrent,
        queued=args.max_queued,
        request_timeout_s=args.request_timeout,
        drain_timeout_s=args.drain_timeout,
    )
    return ServerConfig(
        host=args.host,
        port=args.port,
        api_keys=tuple(keys),
        served_name=args.name,
        adapters=tuple(name for name, _ in adapter_pairs(args.adapters)),
        adapter_folder=args.adapter_folder,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=(*LOOPBACK, *args.allowed_host) if args.allowed_host else None,
        end_on_failure=True,
        limits=limits,
    )


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from ..run import Server

    config = server_config(args)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(asctime)s %(name)s: %(message)s"
    )
    if config.hosts is None and not config.api_keys:
        sys.stderr.write(
            f"fastgen serve: warning: anybody who reaches {config.host} may ask; give --api-key-file\n"
        )
    spec = engine_spec(args.path, args, max_waiting=args.max_queued)
    say_ready = partial(_say_ready, config.served_name or Path(args.path).resolve().name)
    if args.replicas > 1:
        _replicated(spec, config, args.replicas).run(say_ready)
        return 0
    try:
        with spec.loaded() as engine:
            Server(engine, config).run(say_ready)
    except EngineError as error:
        if spec.tensor_parallel > 1:
            _leave_collectives(error)
        raise
    return 0


def _leave_collectives(error: EngineError) -> None:
    """End at once where a GPU may still wait for a rank that has ended."""
    import torch

    from ...ranks.processes import leave

    if torch.cuda.is_initialized():
        sys.stderr.write(f"fastgen serve: error: {error}\n")
        leave(2)


def _replicated(spec: EngineSpec, config: ServerConfig, replicas: int) -> ReplicaServer:
    import torch

    from ...ranks.places import check_devices
    from ..replicas import ReplicaServer

    device = spec.config.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_processes = replicas * spec.tensor_parallel
    gpus = 0
    if device.type == "cuda":
        check_devices(device, num_processes)
        gpus = spec.tensor_parallel
    return ReplicaServer(replace(spec, processes_here=num_processes), config, replicas=replicas, gpus=gpus)


def _say_ready(name: str, url: str) -> None:
    sys.stdout.write(f"serving {name} on {url} (chat page; API: {url}/v1)\n")
    sys.stdout.flush()

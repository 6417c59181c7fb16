"""The server as a Ray Serve application: two replicas on a Ray of this machine; without Ray, an error that says so."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch
from engine_lab import TOKENIZER, expected, tiny_llama
from fastgen import CachePolicy, ConfigError, EngineConfig, SchedulePolicy
from fastgen.serve.ray import application


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray\[serve\]'"):
        application("model", EngineConfig())


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setattr(sys.modules["ray"], "serve", None, raising=False)
    with pytest.raises(ConfigError, match=r"num_gpus=...\): expected 4 or more for tensor_parallel=4, got 2"):
        application("model", EngineConfig(), num_gpus=2, tensor_parallel=4)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize(("replicas", "ranks"), [(2, 1), (1, 2)])
def test_on_ray(tmp_path: Path, replicas: int, ranks: int) -> None:
    """Tokens as of one engine; and a replica whose rank has died is replaced."""
    import ray
    from ray import serve

    tiny_llama().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = EngineConfig(
            cache=CachePolicy(max_bytes=2**22),
            schedule=SchedulePolicy(token_budget=64),
            device=torch.device("cpu"),
        )
        made = application(str(tmp_path), config, num_replicas=replicas, tensor_parallel=ranks, num_cpus=1)
        serve.run(made, route_prefix="/")
        ids = TOKENIZER.encode("Once upon a time")
        text = TOKENIZER.decode(expected(tuple(ids), 12), skip_special_tokens=True)
        assert asked(port) == text
        if ranks > 1:
            os.kill(found_rank(), signal.SIGKILL)
            with pytest.raises(urllib.error.HTTPError, match="50"):
                asked(port)
            assert once_more(port, within_s=90) == text
    finally:
        serve.shutdown()
        ray.shutdown()


def asked(port: int) -> str:
    """The answer to a question."""
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def once_more(port: int, within_s: float) -> str:
    """The answer, as soon as there is one."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return asked(port)
        time.sleep(1.0)
    return asked(port)


def found_rank() -> int:
    """The process that shares the engine of a replica."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            begun_by = Path("/proc", parent, "cmdline").read_bytes()
            if b"ServeReplica" in begun_by and b"spawn_main" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("no replica has a second rank")

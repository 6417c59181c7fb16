"""The server as a Ray Serve application: two replicas on a Ray of this machine; without Ray, an error that says so."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from engine_lab import TOKENIZER, expected, tiny_llama
from fastgen import CachePolicy, ConfigError, EngineConfig, SchedulePolicy
from fastgen.serve.ray import application


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray\[serve\]'"):
        application("model", EngineConfig())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_two_replicas_on_ray(tmp_path: Path) -> None:
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
        serve.run(application(str(tmp_path), config, num_replicas=2), route_prefix="/")
        asked = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
        ids = TOKENIZER.encode("Once upon a time")
        assert text == TOKENIZER.decode(expected(tuple(ids), 12), skip_special_tokens=True)
    finally:
        serve.shutdown()
        ray.shutdown()

"""Adapters in a folder are models of the server, loaded when they are first asked for."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_lab import TOKENIZER, tiny_llama
from fake_engine import FakeEngine
from fastgen.config import CachePolicy, EngineConfig
from fastgen.errors import ConfigError
from fastgen.llm import build_engine
from fastgen.serve import Server, ServerConfig
from fastgen.serve.adapter_names import AdapterNames
from server_lab import Served

peft = pytest.importorskip("peft")
MODEL = tiny_llama(seed=3)


def make_adapter(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", r=4)
    wrapped = peft.get_peft_model(copy.deepcopy(MODEL), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    wrapped.save_pretrained(folder)


def engine():
    config = EngineConfig(cache=CachePolicy(max_bytes=2**22), device=torch.device("cpu"))
    return build_engine(MODEL, config, tokenizer=TOKENIZER)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    make_adapter(tmp_path / "one", 1)
    (tmp_path / "notes").mkdir()
    server = Server(engine(), ServerConfig(port=0, served_name="base", adapter_folder=str(tmp_path)))
    with server.background() as url:
        yield Served(url, server, None)  # type: ignore[arg-type]


def names(served: Served) -> list[str]:
    return [each["id"] for each in served.get("/v1/models").json["data"]]


def made(served: Served, model: str) -> str:
    reply = served.complete(model=model, max_tokens=12, temperature=0)
    assert reply.status == 200, reply.body
    text: str = reply.json["choices"][0]["text"]
    return text


def test_one_that_comes_while_the_server_runs(served: Served, tmp_path: Path) -> None:
    assert names(served) == ["base", "one"]
    assert served.complete(model="two", max_tokens=1).status == 404
    make_adapter(tmp_path / "two", 2)
    assert names(served) == ["base", "one", "two"]
    assert served.get("/v1/models/two").json["parent"] == "base"
    texts = {name: made(served, name) for name in ("base", "one", "two")}
    assert len(set(texts.values())) == 3
    direct = engine()
    direct.load_adapter("two", str(tmp_path / "two"))
    with Server(direct, ServerConfig(port=0, served_name="base", adapters=("two",))).background() as url:
        assert made(Served(url, None, None), "two") == texts["two"]  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "two")
    assert served.complete(model="two", max_tokens=1).status == 404
    assert made(served, "one") == texts["one"]


def test_one_that_is_replaced(served: Served, tmp_path: Path) -> None:
    before = made(served, "one")
    shutil.rmtree(tmp_path / "one")
    assert served.complete(model="one", max_tokens=1).status == 404
    make_adapter(tmp_path / "one", 4)
    after = made(served, "one")
    assert after != before
    assert made(served, "one") == after


def test_names_that_no_client_could_be_told(served: Served, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "one", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert names(served) == ["base", "one"]
    assert served.complete(model="\ud800", max_tokens=1).status in (400, 404)


def test_many_that_ask_for_it_first(served: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: made(served, "one"), range(8)))) == 1


def test_a_damaged_one_is_named_and_harms_nobody(served: Served, tmp_path: Path) -> None:
    make_adapter(tmp_path / "bad", 2)
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        reply = served.complete(model="bad", max_tokens=1)
        assert reply.status == 500
        assert reply.error["code"] == "adapter_failed"
        assert "adapter_model.safetensors" in reply.error["message"]
    made(served, "one")
    weights.write_bytes(whole)
    made(served, "bad")


@pytest.mark.parametrize(
    "name", ["../one", "one/../one", "one/", "./one", "notes", "", "one\0", "adapter_config.json"]
)
def test_a_name_is_no_path(served: Served, name: str) -> None:
    reply = served.complete(model=name, max_tokens=1)
    assert reply.status == 404
    assert "expected one of base, one" in reply.error["message"]


def test_what_a_server_refuses_at_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a directory, got .*nowhere"):
        AdapterNames((), str(tmp_path / "nowhere"))
    (tmp_path / "legal").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "legal" / file).write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="got 'legal' in"):
        AdapterNames(("legal",), str(tmp_path))
    with pytest.raises(ConfigError, match="got 'legal', which is the model's"):
        Server(FakeEngine(), ServerConfig(port=0, served_name="legal", adapter_folder=str(tmp_path)))


def test_a_folder_that_goes_leaves_what_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    found = AdapterNames(("a",), str(tmp_path / "loras"))
    (tmp_path / "loras").rmdir()
    assert found.all() == ["a"]
    assert not found.knows("b")

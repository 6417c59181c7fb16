"""LoRA adapters, loaded into a model that runs and mixed in one batch, equal PEFT's merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_lab import engine_of, tiny_llama
from fastgen.adapters import Adapters
from fastgen.engine import Engine
from fastgen.errors import ModelError, RequestError
from fastgen.request import SamplingParams
from fastgen.weights import load_model
from model_lab import _GQA, Driver, engine_config, make_model, prompts, random_model, reference_logits

peft = pytest.importorskip("peft")


def _train(model: Any, folder: Path, seed: int, targets: list[str], **options: Any) -> Any:
    """An adapter with random matrices, saved; returns the merged model."""
    import copy

    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


_CASES: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt-neox": ["query_key_value", "dense_h_to_4h"],
    "falcon-new": ["query_key_value", "dense"],
    "qwen2-moe": ["q_proj", "shared_expert.down_proj"],
    "stablelm": ["q_proj", "down_proj"],
}


@pytest.mark.parametrize("name", _CASES)
def test_mixed_batch_equals_merged_models(name: str, tmp_path: Path) -> None:
    model = random_model("stablelm", _GQA) if name == "stablelm" else make_model(name)
    options = {"fan_in_fan_out": True} if name == "gpt2" else {}
    merged = {
        None: model,
        "a": _train(model, tmp_path / "a", 1, _CASES[name], r=4, lora_alpha=8, **options),
        "b": _train(
            model, tmp_path / "b", 2, _CASES[name][:1], r=3, lora_alpha=5, use_rslora=True, **options
        ),
    }
    loaded = load_model(model, engine_config())
    adapters = Adapters(loaded)
    adapters.load("a", tmp_path / "a")
    adapters.load("b", tmp_path / "b")
    driver = Driver(loaded)
    texts = prompts(5, 11, 7, 9)
    chosen = ["b", None, "a", "b"]
    sequences = [driver.add(text, adapter=each) for text, each in zip(texts, chosen, strict=True)]
    driver.forward([(each, each.num_tokens - 2) for each in sequences])
    logits = driver.forward([(each, 2) for each in sequences])
    for row, text, each in zip(logits, texts, chosen, strict=True):
        wanted = reference_logits(merged[each], text)[-1]
        torch.testing.assert_close(row, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        if each is not None:
            assert (row - reference_logits(model, text)[-1]).abs().max() > 0.05 * wanted.abs().max()


def test_alpha_and_rank_of_single_layers(tmp_path: Path) -> None:
    model = make_model("llama")
    # The first pattern that matches counts.
    alphas = {"layers.1.self_attn.q_proj": 32, "q_proj": 2}
    options = {"alpha_pattern": alphas, "rank_pattern": {"v_proj": 2}}
    merged = _train(model, tmp_path, 1, ["q_proj", "v_proj"], r=4, lora_alpha=8, **options)
    loaded = load_model(model, engine_config())
    Adapters(loaded).load("a", tmp_path)
    driver = Driver(loaded)
    (text,) = prompts(8)
    (row,) = driver.forward([(driver.add(text, adapter="a"), 8)])
    torch.testing.assert_close(row, reference_logits(merged, text)[-1], rtol=1e-3, atol=1e-3)


def test_unload_and_reload(tmp_path: Path) -> None:
    model = make_model("llama")
    _train(model, tmp_path, 1, ["q_proj"])
    loaded = load_model(model, engine_config())
    adapters = Adapters(loaded)
    adapters.load("a", tmp_path)
    with pytest.raises(RequestError, match="new name"):
        adapters.load("a", tmp_path)
    adapters.unload("a")
    assert not adapters.names
    assert not any(linear.adapters for linear, _ in loaded.linears)
    with pytest.raises(RequestError, match="'a'"):
        adapters.unload("a")
    adapters.load("a", tmp_path)


def test_a_name_given_anew_finds_nothing_of_the_adapter_before(tmp_path: Path) -> None:
    prompt_ids, params = list(range(2, 42)), SamplingParams(max_tokens=8, temperature=0.0)

    def tokens(engine: Engine, adapter: str) -> list[int]:
        engine.add("r", prompt_ids, params, adapter=adapter)
        with pytest.raises(RequestError, match="no request that uses it"):
            engine.unload_adapter(adapter)
        found: list[int] = []
        while engine.has_work:
            found += [token for output in engine.step() for token in output.new_token_ids]
        return found

    engine, other = engine_of(), engine_of()
    for number, name in enumerate(("first", "second")):
        _train(tiny_llama(), tmp_path / name, number, ["q_proj", "v_proj", "down_proj"])
    engine.load_adapter("one", str(tmp_path / "first"))
    before = tokens(engine, "one")
    engine.unload_adapter("one")
    with pytest.raises(RequestError, match=r"expected one of \[\], got 'one'"):
        engine.unload_adapter("one")
    engine.load_adapter("one", str(tmp_path / "second"))
    other.load_adapter("two", str(tmp_path / "second"))
    assert tokens(engine, "one") == tokens(other, "two") != before


def test_faults_name_the_cause(tmp_path: Path) -> None:
    model = make_model("llama")
    adapters = Adapters(load_model(model, engine_config()))
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        adapters.load("a", tmp_path)
    _train(model, tmp_path / "head", 1, ["q_proj", "lm_head"])
    with pytest.raises(ModelError, match="lm_head"):
        adapters.load("a", tmp_path / "head")
    _train(make_model("llama", hidden_size=32), tmp_path / "other", 1, ["q_proj"])
    with pytest.raises(ModelError, match=r"q_proj.*64 inputs, got.*32"):
        adapters.load("a", tmp_path / "other")
    _train(model, tmp_path / "cut", 1, ["q_proj"])
    path = tmp_path / "cut" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        adapters.load("a", tmp_path / "cut")
    _train(model, tmp_path / "dora", 1, ["q_proj"])
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ModelError, match="use_dora"):
        adapters.load("a", tmp_path / "dora")
    changes = [
        {"alora_invocation_tokens": [1, 2]},
        *({"init_lora_weights": each} for each in ("pissa", "OLoRA")),
    ]
    for change in changes:  # PEFT applies these to a part of the text, or to another base
        (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=next(iter(change))):
            adapters.load("a", tmp_path / "dora")
    assert not adapters.names

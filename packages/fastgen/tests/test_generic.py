"""Families without a map of their own run as transformers' modules over the paged cache, with the same numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgen.config import Weights
from fastgen.errors import ConfigError, ModelError
from fastgen.weights import load_model
from model_lab import (
    _GQA,
    VOCAB,
    Driver,
    engine_config,
    prompts,
    random_model,
    reference_greedy,
    reference_logits,
    save,
)

_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("stablelm", _GQA),
    "cohere": ("cohere", {**_GQA, "logit_scale": 0.5}),
    "cohere2": ("cohere2", {**_GQA, **_WINDOWS}),
    "olmo2": ("olmo2", _GQA),
    "smollm3": ("smollm3", {**_GQA, "no_rope_layers": [1, 0]}),
    "granite": ("granite", {**_GQA, "logits_scaling": 2.0, "residual_multiplier": 0.7}),
    "starcoder2": ("starcoder2", _GQA),
}


@pytest.mark.parametrize("name", _MODELS)
def test_same_logits_and_tokens(name: str, tmp_path: Path) -> None:
    model = random_model(*_MODELS[name])
    loaded = load_model(save(model, tmp_path), engine_config())
    assert type(loaded.decoder).__name__ == "GenericDecoder"
    driver = Driver(loaded)
    texts = prompts(3, 17, 40)
    sequences = [driver.add(text, 64) for text in texts]
    driver.prefill(sequences, random.Random(3))
    for row, text in zip(driver.forward([(each, 1) for each in sequences]), texts, strict=True):
        wanted = reference_logits(model, text)[-1]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=2e-4 * float(wanted.abs().max()))
    again = Driver(loaded)
    made = again.greedy([again.add(text, 64) for text in texts], 64)
    assert made == [reference_greedy(model, text, 64) for text in texts]


def test_module_is_shared_and_unchanged() -> None:
    model = random_model(*_MODELS["stablelm"])
    before, (text,) = dict(model.named_modules()), prompts(12)
    wanted = reference_logits(model, text)
    loaded = load_model(model, engine_config())
    assert dict(model.named_modules()) == before
    torch.testing.assert_close(reference_logits(model, text), wanted, rtol=0, atol=0)
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    ours = {tensor.data_ptr() for tensor in loaded.decoder.state_dict().values()}  # type: ignore[attr-defined]
    assert ours <= shared | {0}
    driver = Driver(loaded)
    (row,) = driver.forward([(driver.add(text), len(text))])
    torch.testing.assert_close(row, wanted[-1], rtol=1e-4, atol=1e-4)


def test_hidden_states() -> None:
    model = random_model(*_MODELS["olmo2"])
    driver = Driver(load_model(model, engine_config()))
    (text,) = prompts(9)
    seen = driver.hidden(driver.add(text))
    wanted = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [Weights.INT8, Weights.INT4])
def test_quantized(weights: Weights) -> None:
    model = random_model(*_MODELS["stablelm"])
    driver = Driver(load_model(model, engine_config(weights=weights)))
    (text,) = prompts(30)
    (row,) = driver.forward([(driver.add(text), len(text))])
    wanted = reference_logits(model, text)[-1]
    off = float((row - wanted).norm() / wanted.norm())
    assert 1e-5 < off < (0.05 if weights is Weights.INT8 else 0.4)


def test_what_cannot_work_is_refused() -> None:
    mamba = random_model("mamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1})
    with pytest.raises(ModelError, match="layers with a state"):
        load_model(mamba, engine_config())
    sinks = random_model(
        "gpt_oss", {**_GQA, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    )
    with pytest.raises(ModelError, match="s_aux"):
        load_model(sinks, engine_config())
    mpt = random_model("mpt", {"vocab_size": VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 1})
    with pytest.raises(ModelError, match="not supported"):
        load_model(mpt, engine_config())
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    dynamic = random_model("olmo2", {**_GQA, **scaled})
    load_model(dynamic, engine_config())
    with pytest.raises(ModelError, match="max_model_len=256"):
        load_model(dynamic, engine_config(max_model_len=257))
    with pytest.raises(ConfigError, match="batch_invariant"):
        load_model(random_model(*_MODELS["olmo2"]), engine_config(batch_invariant=True))

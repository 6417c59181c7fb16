"""int8 and int4 weights and an int8 cache: close to the dense model, and smaller."""

from __future__ import annotations

import pytest
import torch
from fastgen.config import Weights
from fastgen.errors import ModelError
from fastgen.weights import LoadedModel, load_model
from model_lab import Driver, engine_config, make_model, prompts, reference_logits

_TEXTS = prompts(5, 40, 23)


def _errors(loaded: LoadedModel, model: object, cache_dtype: torch.dtype | None = None) -> list[float]:
    driver = Driver(loaded, cache_dtype)
    sequences = [driver.add(text) for text in _TEXTS]
    driver.forward([(each, each.num_tokens - 1) for each in sequences])
    rows = driver.forward([(each, 1) for each in sequences])
    wanted = [reference_logits(model, text)[-1] for text in _TEXTS]
    return [float((row - each).norm() / each.norm()) for row, each in zip(rows, wanted, strict=True)]


def _weight_bytes(loaded: LoadedModel) -> int:
    return sum(tensor.nbytes for tensor in loaded.decoder.state_dict().values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "mixtral"])
def test_weights(name: str) -> None:
    model = make_model(name)
    dense = load_model(model, engine_config())
    int8 = load_model(model, engine_config(weights=Weights.INT8))
    int4 = load_model(model, engine_config(weights=Weights.INT4))
    assert all(0 < error < 0.05 for error in _errors(int8, model))
    if name != "mixtral":  # of a mixture some tokens go to other experts
        assert all(0 < error < 0.6 for error in _errors(int4, model))
    assert max(_errors(int4, model)) > max(_errors(int8, model))
    assert _weight_bytes(int4) < _weight_bytes(int8) < 0.6 * _weight_bytes(dense)


def test_int4_groups_have_to_fit() -> None:
    with pytest.raises(ModelError, match="multiple of 32 inputs, got a layer with 72"):
        load_model(make_model("llama", intermediate_size=72), engine_config(weights=Weights.INT4))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_int8_cache(name: str) -> None:
    model = make_model(name)
    loaded = load_model(model, engine_config())
    assert all(0 < error < 0.05 for error in _errors(loaded, model, torch.int8))
    layout, dense = loaded.decoder.cache_layout(torch.int8), loaded.decoder.cache_layout(None)
    assert layout.token_bytes < 0.4 * dense.token_bytes

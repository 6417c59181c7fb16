"""In batch-invariant mode a sequence's logits are the same bits alone, in company, and however its prompt is cut."""

from __future__ import annotations

import random

import accel_kernels
import pytest
import torch
from fastgen.config import Weights
from fastgen.errors import ConfigError
from fastgen.linear import has_native_linear, native_rows
from fastgen.weights import LoadedModel, load_model
from model_lab import Driver, engine_config, make_model, prompts

needs_kernels = pytest.mark.skipif(
    not has_native_linear("cpu", torch.float32), reason="accel-kernels' compiled ops are not installed"
)
# a gated and a plain activation, soft caps, LayerNorm, experts with a shared one
_MODELS = ("llama", "gemma2", "phi", "bloom", "qwen2-moe")


def _decoded(loaded: LoadedModel, text: list[int], companions: list[list[int]], seed: int) -> torch.Tensor:
    """Logits at the last five positions, prefilled in random chunks among others that run at random."""
    driver = Driver(loaded)
    chosen = random.Random(seed)
    own, *others = [driver.add(each) for each in [text, *companions]]
    rows = []
    while own.num_uncomputed:
        left = own.num_uncomputed - 5
        count = chosen.randint(1, left) if left > 0 else 1
        beside = [each for each in others if each.num_uncomputed and chosen.random() < 0.7]
        parts = [(own, count), *((each, chosen.randint(1, each.num_uncomputed)) for each in beside)]
        chosen.shuffle(parts)
        logits = driver.forward(parts)
        if left <= 0:
            rows.append(logits[[each for each, _ in parts].index(own)])
    return torch.stack(rows)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _MODELS)
def test_same_bits(name: str, dtype: torch.dtype) -> None:
    # a width at which torch's vector loops leave a rest
    changes = {} if name in ("bloom",) else {"intermediate_size": 90}
    loaded = load_model(make_model(name, **changes), engine_config(dtype=dtype, batch_invariant=True))
    (text,) = prompts(50)
    alone = _decoded(loaded, text, [], 0)
    for seed in range(1, 5):
        company = prompts(*[random.Random(seed).randint(1, 60) for _ in range(10)], seed=seed)
        assert torch.equal(_decoded(loaded, text, company, seed), alone)


@needs_kernels
@pytest.mark.parametrize("weights", [Weights.INT8, Weights.INT4])
def test_same_bits_quantized(weights: Weights) -> None:
    loaded = load_model(make_model("llama"), engine_config(weights=weights, batch_invariant=True))
    (text,) = prompts(50)
    alone = _decoded(loaded, text, [], 0)
    assert torch.equal(_decoded(loaded, text, prompts(60, 33, 8, seed=1), 1), alone)


def _forget() -> None:
    has_native_linear.cache_clear()
    native_rows.cache_clear()


def test_refused_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*args: object, **options: object) -> None:
        raise accel_kernels.BackendUnavailableError("not built")

    _forget()
    monkeypatch.setattr(accel_kernels, "linear", unavailable)
    try:
        with pytest.raises(ConfigError, match="compiled ops"):
            load_model(make_model("llama"), engine_config(batch_invariant=True))
    finally:
        _forget()


@needs_kernels
def test_not_the_same_bits_without() -> None:
    """What the tests above would miss if it were always so."""
    loaded = load_model(make_model("gpt2"), engine_config())
    (text,) = prompts(50)
    alone = _decoded(loaded, text, [], 0)
    crowds = (_decoded(loaded, text, prompts(60, 33, 58, 47, seed=seed), seed) for seed in range(1, 5))
    assert not all(torch.equal(each, alone) for each in crowds)

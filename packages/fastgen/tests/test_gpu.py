"""On a CUDA device: tokens are those of transformers on the CPU, as graphs, through swaps; experts in one product."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_lab import engine_of, expected, prompts, run, tiny_llama, tokens
from fastgen import SamplingParams
from fastgen.engine import Engine
from fastgen.linear import LinearPolicy
from fastgen.models.moe import MoeLayer
from fastgen.models.spec import Experts, Mlp
from fastgen.parallel import TensorParallel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
JOBS = {
    f"r{number}": (ids, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    for number, ids in enumerate(prompts(12))
}


def on_device(**changes: object) -> Engine:
    model = copy.deepcopy(tiny_llama()).to("cuda")
    return engine_of(model=model, device=torch.device("cuda"), **changes)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize(
    "changes",
    [
        {"replay": False},
        {"replay": True},
        {"blocks": 18, "sequences": 8},
        {"blocks": 18, "sequences": 8, "swap_blocks": 64},
        {"budget": 9, "sequences": 4, "prefix": False},
    ],
    ids=["step by step", "as graphs", "preempted", "swapped", "small forwards"],
)
def test_greedy_tokens_are_those_of_transformers(changes: dict[str, object]) -> None:
    engine = on_device(**changes)
    found = run(engine, JOBS, at_once=5)
    assert {name: tokens(outputs) for name, outputs in found.items()} == {
        name: expected(tuple(ids), params.max_tokens) for name, (ids, params) in JOBS.items()
    }
    if changes.get("blocks") == 18:
        assert engine.stats().preempted_total > 0


def test_sampled_tokens_do_not_depend_on_graphs() -> None:
    jobs = {
        name: (ids, SamplingParams(max_tokens=16, temperature=1.0, seed=7, ignore_eos=True))
        for name, (ids, _) in JOBS.items()
    }
    plain, again = (run(on_device(replay=replay), jobs, at_once=3) for replay in (False, True))
    assert {name: tokens(each) for name, each in plain.items()} == {
        name: tokens(each) for name, each in again.items()
    }


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_tokens"), [(8, 2, 30), (8, 2, 1), (4, 4, 5), (64, 1, 9)]
)
def test_experts_in_one_product(num_experts: int, top_k: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    layers = [
        MoeLayer(
            Experts(num_experts, top_k, Mlp(32, "silu")),
            64,
            LinearPolicy(torch.bfloat16, torch.device(device)),
            TensorParallel(),
        )
        for device in ("cpu", "cuda")
    ]
    for one, other in zip(*(_linears(layer) for layer in layers), strict=True):
        weight = torch.randn(one.shard.shape, dtype=torch.bfloat16) * 0.2
        one.load(weight, None)
        other.load(weight.cuda(), None)
    host, device = layers
    device.finish()
    assert device.grouped
    x = torch.randn(num_tokens, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(device(x.cuda(), {}).cpu(), host(x, {}), rtol=2e-2, atol=4e-2)


def _linears(layer: MoeLayer) -> list[object]:
    return [layer.router, *(part for expert in layer.experts for part in (expert.up, expert.down))]

"""The optimizers against the papers' equations for all ranks in one process: 1 to 4 ranks, odd lengths."""

from __future__ import annotations

from typing import Any

import comm_compress as cc
import pytest
import torch
from comm_compress.optimizers.intervals import Intervals
from papers_1bit import Options, PaperOneBitAdam, PaperOneBitLamb, PaperZeroOneAdam
from steps_lab import SHAPES, flat, gradient, layers_of, make_params, rate, set_gradients
from zero_core.testing import run_ranks

STEPS, FREEZE = 24, 9
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "l2": {"weight_decay": 0.1, "decoupled": False},
    "floor": {"floor": 0.5},
    "layers": {"scale_layers": True},
    "uncorrected": {"bias_correction": False},
}
INTERVALS = {"var_freeze_step": 10, "var_update_scaler": 2, "local_step_scaler": 4, "local_step_clipper": 4}


def build(kind: str, params: Any, case: dict[str, Any], bucket_bytes: int, **more: Any) -> Any:
    options = dict(case)
    compression = cc.Compression(
        bucket_bytes=bucket_bytes,
        variance_floor=options.pop("floor", 0.0),
        scale_layers=options.pop("scale_layers", False),
    )
    if "decoupled" in options:
        options["decoupled_weight_decay"] = options.pop("decoupled")
    common = {"lr": 0.05, "betas": (0.9, 0.95), "compression": compression, **options, **more}
    if kind == "0/1 Adam":
        return cc.ZeroOneAdam(params, **common, **INTERVALS)
    return (cc.OneBitAdam if kind == "1-bit Adam" else cc.OneBitLamb)(params, freeze_step=FREEZE, **common)


def train(rank: int, kind: str, cases: dict[str, Any], bucket_bytes: int, shapes: Any) -> dict[str, Any]:
    found = {}
    for name, case in cases.items():
        params = make_params(shapes)
        optimizer = build(kind, params, case, bucket_bytes)
        history = []
        for step in range(1, STEPS + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            set_gradients(params, rank, step)
            optimizer.step()
            history.append(flat(params))
        found[name] = history
    return found


def simulate(kind: str, world: int, case: dict[str, Any], bucket_bytes: int, shapes: Any) -> list[Any]:
    """By step: by rank, the parameters."""
    layers = layers_of(shapes)
    whole = [slice(0, layers[-1].stop)] if layers else []
    buckets = layers if bucket_bytes < 1000 else whole  # too few for any two: a bucket a layer
    options = Options(**case)
    x = flat(make_params(shapes))
    kinds: Any = {
        "1-bit Adam": PaperOneBitAdam,
        "1-bit LAMB": PaperOneBitLamb,
        "0/1 Adam": PaperZeroOneAdam,
    }
    paper = kinds[kind](x, world, layers, buckets, options)
    intervals, history = Intervals(**INTERVALS), []
    exact, syncs = set(intervals.variance_steps(STEPS)), set(intervals.sync_steps(STEPS))
    for step in range(1, STEPS + 1):
        if kind == "0/1 Adam":
            grads = [gradient(own, rank, step) for rank, own in enumerate(paper.xs)]
            paper.step(grads, rate(step), exact=step in exact, sync=step in syncs)
            history.append([own.clone() for own in paper.xs])
        else:
            paper.step([gradient(paper.x, rank, step) for rank in range(world)], rate(step), FREEZE)
            history.append([paper.x.clone()] * world)
    return history


def compare(kind: str, world: int, cases: dict[str, Any], bucket_bytes: int, shapes: Any) -> None:
    ranks = run_ranks(train, world, kind, cases, bucket_bytes, shapes)
    for name, case in cases.items():
        paper = simulate(kind, world, case, bucket_bytes, shapes)
        for step in range(STEPS):
            for rank in range(world):
                torch.testing.assert_close(
                    ranks[rank][name][step],
                    paper[step][rank],
                    rtol=2e-5,
                    atol=2e-5,
                    msg=lambda text, at=f"{kind} {name} rank {rank} step {step + 1}": f"{at}: {text}",
                )


@pytest.mark.parametrize("kind", ["1-bit Adam", "1-bit LAMB", "0/1 Adam"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_equations(kind: str, world: int) -> None:
    cases = {n: c for n, c in CASES.items() if not (kind == "1-bit LAMB" and n == "l2")}
    compare(kind, world, cases, 1 << 20, SHAPES)


@pytest.mark.parametrize("kind", ["1-bit Adam", "1-bit LAMB", "0/1 Adam"])
def test_with_a_bucket_a_parameter(kind: str) -> None:
    compare(kind, 3, {"plain": {}, "decay": CASES["decay"]}, 4, SHAPES)


@pytest.mark.parametrize("kind", ["1-bit Adam", "1-bit LAMB", "0/1 Adam"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_small_odd_length(kind: str, world: int) -> None:
    for length in (1, 3, 5, 9, 17, 33):
        compare(kind, world, {"plain": {}}, 1 << 20, [(length,)])

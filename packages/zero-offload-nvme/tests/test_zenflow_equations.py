"""ZenFlow computes what its equations say, on one rank or several: held against a dense simulation of them."""

from __future__ import annotations

import functools

import pytest
import torch
import zero_core as zero
from dense_zenflow import DenseZenFlow
from stored_models import Net, batch, build, loss_of, stores
from zero_core.testing import run_ranks
from zero_offload_nvme import ZenFlow

STEPS, RATIO, LR, CLIP, RANKS = 18, 0.2, 2e-3, 0.5, 2


def adamw(params):
    return torch.optim.AdamW(params, lr=LR)


def small_net() -> Net:
    """Its logits begin near zero, so that 18 steps of fp32 stay comparable."""
    net = Net()
    with torch.no_grad():
        net.embed.weight.mul_(0.1)
    return net


@functools.cache
def simulated(window: int, every: int, overlap: bool, late_step: str = "window"):
    """Parameters after each step, and how many elements changed form."""
    torch.manual_seed(0)
    net = small_net()
    params = {name: p for name, p in net.named_parameters() if not name.endswith("unused")}
    dense = DenseZenFlow(
        params, lr=LR, ratio=RATIO, every=every, window=window, overlap=overlap, late_step=late_step
    )
    seen = []
    for step in range(STEPS):
        net.zero_grad()
        for rank in range(RANKS):
            (loss_of(net, batch(step, rank)) / RANKS).backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
        assert norm > CLIP
        dense.step({name: p.grad for name, p in params.items()})
        seen.append({name: p.detach().clone() for name, p in params.items()})
    return seen, dense.num_changed


def sharded(rank: int, world: int, stage: int, kind: str, what: str, policy: ZenFlow, folder: str):
    model, opt = build(
        stores(kind, what, stage, folder), stage, world=world, make=adamw, zenflow=policy, net=small_net
    )
    seen = []
    for step in range(STEPS):
        if world == 1:  # the batches of both ranks
            for each in range(RANKS):
                (loss_of(model, batch(step, each)) / RANKS).backward()
        else:
            loss_of(model, batch(step, rank)).backward()
        zero.clip_grad_norm(opt, CLIP)
        opt.step()
        opt.zero_grad()
        seen.append({name: p.clone() for name, p in zero.full_state_dict(model).items()})
    opt.close()
    return seen


def farthest(found, expected) -> float:
    """The largest difference at any step, relative to the largest change of that parameter in training."""
    worst = 0.0
    for name, first in expected[0].items():
        moved = max(float((last[name] - first).abs().max()) for last in expected[1:])
        for ours, theirs in zip(found, expected, strict=True):
            worst = max(worst, float((ours[name] - theirs[name]).abs().max()) / moved)
    return worst


ONE, TWO = (1, 2, "host", "optimizer"), (2, 2, "host", "all")
STAGE_3, STAGE_1 = (2, 3, "nvme", "all"), (2, 1, "nvme", "all")


@pytest.mark.parametrize(
    ("window", "every", "overlap", "late_step", "cases"),
    [
        (3, 6, True, "window", [ONE, TWO, STAGE_3, STAGE_1]),
        (3, 6, False, "window", [TWO, STAGE_3]),
        (4, 1, True, "window", [TWO, STAGE_3]),
        (4, 1, False, "one", [ONE, STAGE_1]),
        (2, 100, True, "one", [ONE, TWO]),
        (1, 4, True, "window", [TWO, STAGE_3]),
    ],
)
def test_as_the_equations_say(
    tmp_path, window: int, every: int, overlap: bool, late_step: str, cases: list
) -> None:
    expected, num_changed = simulated(window, every, overlap, late_step)
    assert every == 100 or num_changed > 2000
    policy = ZenFlow(
        topk_ratio=RATIO,
        update_interval=window,
        select_strategy="step",
        select_interval=every,
        overlap_step=overlap,
        late_step=late_step,
    )
    for world, stage, kind, what in cases:
        found = run_ranks(sharded, world, world, stage, kind, what, policy, str(tmp_path))[0]
        assert farthest(found, expected) < 5e-3, (world, stage, kind)  # what is told apart below is over 0.05


def test_a_late_step_for_a_window_goes_further_than_one_step() -> None:
    window, one = (simulated(3, 100, True, late_step)[0] for late_step in ("window", "one"))
    assert farthest(window, one) > 0.05  # and so the comparison above tells them apart


def test_one_window_of_staleness_is_all_that_overlap_adds() -> None:
    late, _ = simulated(3, 100, True)
    prompt, _ = simulated(3, 100, False)
    assert farthest(late, prompt) > 0.05  # and so the comparison above tells them apart

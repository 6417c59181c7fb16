"""Where nothing is late, ZenFlow is the exact step, bit for bit."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from stored_models import build, stores, train
from zero_core.testing import run_ranks
from zero_offload_nvme import ZenFlow

POLICIES = {
    "all at once": ZenFlow(topk_ratio=1.0),
    "windows of one step": ZenFlow(topk_ratio=0.1, update_interval=1, overlap_step=False),
    "chosen anew at every step": ZenFlow(
        topk_ratio=0.1, update_interval=1, overlap_step=False, select_strategy="step", select_interval=1
    ),
    "warming up": ZenFlow(full_warm_up_rounds=5),
}


def rank_of(rank: int, cases, stage: int, dtype: torch.dtype, folder: str):
    found = {}
    for policy in (None, *POLICIES):
        for kind, what in cases if policy else cases[:1]:
            zenflow = None if policy is None else POLICIES[policy]
            model, opt = build(stores(kind, what, stage, folder), stage, dtype, zenflow=zenflow)
            losses = train(model, opt, rank, range(5), accumulate=2)
            found[policy, kind, what] = losses, zero.full_state_dict(model)
            opt.close()
    return found


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(1, torch.bfloat16), (2, torch.float32), (3, torch.float32), (3, torch.bfloat16)],
)
def test_bit_for_bit(tmp_path, stage: int, dtype: torch.dtype) -> None:
    cases = [("host", "all"), ("nvme", "optimizer" if dtype == torch.float32 else "all")]
    found = run_ranks(rank_of, 2, cases, stage, dtype, str(tmp_path))[0]
    losses, expected = found[None, "host", "all"]
    assert losses[-1] != losses[0]
    for case, (own, state) in found.items():
        assert own == losses, case
        assert all(torch.equal(state[name], expected[name]) for name in expected), case


def test_a_window_of_more_steps_is_not_the_exact_step() -> None:
    """The tests above are not about a policy that does nothing."""
    found = run_ranks(late, 1)[0]
    assert found[0] != found[1]


def late(rank: int):
    found = []
    for policy in (None, ZenFlow(topk_ratio=0.1, update_interval=2)):
        model, opt = build(stores("host", "all", 2, ""), 2, world=1, zenflow=policy)
        found.append(train(model, opt, rank, range(5)))
    return found

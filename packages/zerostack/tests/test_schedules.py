"""Schedules against DeepSpeed's measured rates (0.19.8, CPU) and against the documented formulas."""

from __future__ import annotations

import math

import pytest
import torch
from zerostack import schedules


def rates(kind, steps, optimizer=None, **params):
    """Rate and momentum used by each of `steps` optimizer steps."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = optimizer([parameter]) if optimizer else torch.optim.Adam([parameter], lr=0.01)
    schedule = getattr(schedules, kind)(optimizer, **params)
    used = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        used.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        optimizer.step()
        schedule.step()
    return used


WARMUP = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 5}
DEEPSPEED = [
    (
        "WarmupLR",
        {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 5},
        "0.001 0.001 0.004876089 0.0071434558 0.008752178 0.01 0.01",
    ),
    ("WarmupLR", {"warmup_num_steps": 5}, "0 0 0.0043067656 0.0068260619 0.0086135312 0.01"),
    (
        "WarmupLR",
        {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 5, "warmup_type": "linear"},
        "0.001 0.001 0.0028 0.0046 0.0064 0.0082 0.01 0.01",
    ),
    (
        "WarmupDecayLR",
        {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 5, "total_num_steps": 12},
        "0.001 0.001 0.004876089 0.0071434558 0.008752178 0.01 0.01 0.0087142857 "
        "0.0074285714 0.0061428571 0.0048571429 0.0035714286 0.0022857143 0.001",
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 12, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.05, "warmup_num_steps": 4},
        "0 0.001 0.0055 0.0081323313 0.01 0.0096384278 0.0086087572 0.0070677463 "
        "0.00525 0.0034322537 0.0018912428 0.0008615722 0.0005 0.0005",
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 12, "warmup_num_steps": 4, "warmup_type": "linear"},
        "0 0 0.0025 0.005 0.0075 0.0096194357 0.0085356804 0.0069137258 "
        "0.0050005 0.0030872742 0.0014653196 0.0003815643 1e-06 1e-06",
    ),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.0},
        "0.001 0.0016666667 0.0023333333 0.003 0.0036666667 0.0043333333 0.005",
    ),
    (
        "LRRangeTest",
        {
            "lr_range_test_min_lr": 0.001,
            "lr_range_test_step_size": 3,
            "lr_range_test_step_rate": 2.0,
            "lr_range_test_staircase": True,
        },
        "0.001 0.001 0.001 0.003 0.003 0.003 0.005 0.005 0.005 0.007",
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.001,
            "cycle_max_lr": 0.01,
            "decay_lr_rate": 0.5,
            "cycle_first_step_size": 4,
            "cycle_second_step_size": 6,
            "decay_step_size": 2,
        },
        "0.001 0.00325 0.0055 0.00775 0.01 0.0085 0.007 0.0055 "
        "0.004 0.0025 0.001 0.0008 0.0006666667 0.0005714286 0.0005",
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.001,
            "cycle_max_lr": 0.01,
            "cycle_first_step_size": 4,
            "cycle_first_stair_count": 2,
        },
        "0.001 0.001 0.0055 0.0055 0.01 0.0055 0.0055 0.001 0.001 0.001",
    ),
]


@pytest.mark.parametrize(("kind", "params", "expected"), DEEPSPEED)
def test_rates_are_those_of_deepspeed(kind, params, expected):
    expected = [float(rate) for rate in expected.split()]
    assert [lr for lr, _ in rates(kind, len(expected), **params)] == pytest.approx(expected, abs=1e-10)


def test_one_cycle_momentum_runs_the_other_way_and_decays():
    used = rates(
        "OneCycle",
        16,
        cycle_min_lr=0.001,
        cycle_max_lr=0.01,
        cycle_first_step_size=4,
        cycle_second_step_size=6,
        decay_step_size=2,
        decay_mom_rate=0.1,
    )
    momenta = [momentum for _, momentum in used]
    assert momenta[:5] == pytest.approx([0.9, 0.875, 0.85, 0.825, 0.8])
    assert momenta[5:11] == pytest.approx([0.8 + 0.1 * k / 6 for k in range(1, 7)])
    assert momenta[11:13] == pytest.approx([0.945, 0.99])
    assert momenta[13:] == [0.999] * 3  # the formula would pass 1


def test_one_cycle_keeps_the_second_beta_and_cycles_sgd_momentum():
    parameter = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.5, 0.95))
    schedules.OneCycle(adam, 0.001, 0.01)
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
    used = rates(
        "OneCycle",
        5,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.5),
        cycle_min_lr=0.001,
        cycle_max_lr=0.01,
        cycle_first_step_size=4,
    )
    assert used[4][1] == pytest.approx(0.8)


def test_one_cycle_says_when_there_is_no_momentum(caplog):
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedules.OneCycle(torch.optim.SGD([parameter], lr=0.01), 0.001, 0.01)
    assert "SGD has no momentum" in caplog.text


@pytest.mark.parametrize("warmup", [2, 7, 100])
@pytest.mark.parametrize("step", [1, 2, 50, 99, 250])
def test_log_warmup_follows_its_formula(warmup, step):
    used = rates("WarmupLR", step + 1, warmup_min_lr=0.0, warmup_max_lr=1.0, warmup_num_steps=warmup)
    expected = min(1.0, math.log(step) / math.log(warmup)) if step < warmup + 1 else 1.0
    assert used[step][0] == pytest.approx(expected)


def test_rates_may_differ_by_group_and_must_match_their_number():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = torch.optim.SGD(groups)
    schedule = schedules.LRRangeTest(optimizer, lr_range_test_min_lr=[0.1, 0.3])
    assert schedule.get_last_lr() == [0.1, 0.3]
    with pytest.raises(ValueError, match="expected one rate or 2"):
        schedules.LRRangeTest(optimizer, lr_range_test_min_lr=[0.1, 0.2, 0.3])


@pytest.mark.parametrize(("kind", "params", "expected"), DEEPSPEED)
def test_a_schedule_resumes_from_its_state(kind, params, expected):
    def fresh():
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        return optimizer, getattr(schedules, kind)(optimizer, **params)

    optimizer, schedule = fresh()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    state = schedule.state_dict()
    resumed_optimizer, resumed = fresh()
    resumed.load_state_dict(state)
    resumed_optimizer.step()
    resumed.step()
    assert resumed_optimizer.param_groups[0]["lr"] == pytest.approx(float(expected.split()[5]), abs=1e-10)

"""fp16: scaling changes nothing where nothing overflows; an overflow on one rank skips the step on all, by name."""

from __future__ import annotations

import logging

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, relative_error, seeded


def scaled_and_not(rank: int, world_size: int, stage: int) -> float:
    states = []
    for scaler in (None, zero.LossScaler(2.0**10, dynamic=False)):
        model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage)
        opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), scaler=scaler)
        for ids in batches(rank, 3):
            loss = loss_of(model, ids)
            (scaler.scale(loss) if scaler else loss).backward()
            norm = zero.clip_grad_norm(opt, 0.5)
            assert 0.5 < norm.item() < 50
            opt.step()
            opt.zero_grad()
        states.append(zero.full_state_dict(model))
    return relative_error(*states)


@pytest.mark.parametrize("stage", [0, 3])
def test_power_of_two_scale_changes_no_bit_in_fp32(stage: int) -> None:
    assert max(run_ranks(scaled_and_not, 2, 2, stage)) <= 1e-7


def overflow_on_one_rank(rank: int, world_size: int, stage: int):
    scaler = zero.LossScaler(2.0**8, growth_interval=2, hysteresis=2)
    precision = zero.Precision(compute=torch.float16)
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage, precision=precision)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), scaler=scaler)
    log = []
    for step, ids in enumerate(batches(rank, 6)):
        before = zero.full_state_dict(model)
        loss = scaler.scale(loss_of(model, ids))
        if step in (1, 2) and rank == world_size - 1:
            loss = loss + model.blocks[1].up(torch.full((1, 19), 6e4, dtype=torch.float16)).sum() * 1e4
        loss.backward()
        opt.step()
        moved = relative_error(zero.full_state_dict(model), before)
        log.append((opt.last_step_skipped, scaler.value, moved > 0))
        report = opt.overflow_report
        if report is not None:
            assert report.parameter.startswith("blocks.1.up")
            assert report.module == "blocks.1.up"
            assert report.step == step + 1
            assert "blocks.1.up" in str(report)
        opt.zero_grad()
    return log


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_overflow_skips_on_all_ranks_and_adapts_the_scale(stage: int) -> None:
    logs = run_ranks(overflow_on_one_rank, 2, 2, stage)
    assert logs[0] == logs[1]
    assert logs[0] == [
        (False, 256.0, True),
        (True, 256.0, False),  # hysteresis tolerates one
        (True, 128.0, False),
        (False, 128.0, True),
        (False, 256.0, True),  # two finite steps
        (False, 256.0, True),
    ]


REPORT = zero.OverflowReport(7, 1, "a.weight", "a", 4.0, (1.0, 2.5))


def test_scaler_arithmetic() -> None:
    scaler = zero.LossScaler(8.0, growth_interval=1, min_scale=4.0)
    scaler.update(REPORT)
    assert scaler.value == 4.0
    with pytest.raises(OverflowError, match=r"smallest scale, 4; step 7: .*'a.weight'.*before: 1, 2.5"):
        scaler.update(REPORT)
    scaler.update(None)
    assert scaler.value == 8.0
    other = zero.LossScaler(2.0)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
    static = zero.LossScaler(8.0, dynamic=False)
    static.update(REPORT)
    assert static.value == 8.0
    assert zero.LossScaler(0.5, dynamic=False).value == 0.5, "min_scale bounds what changes"


def test_at_the_smallest_scale_it_does_as_told(caplog: pytest.LogCaptureFixture) -> None:
    skipping = zero.LossScaler(4.0, min_scale=4.0, at_minimum="skip")
    skipping.update(REPORT)
    assert "gradients overflow at the smallest scale" in caplog.text
    assert skipping.value == 4.0
    saved: list[zero.OverflowReport] = []
    saving = zero.LossScaler(4.0, min_scale=4.0, at_minimum=saved.append)
    with pytest.raises(OverflowError):
        saving.update(REPORT)
    assert saved == [REPORT]


def peaks_before(rank: int, stage: int):
    scaler = zero.LossScaler(2.0**4, history=3)
    model = zero.shard(seeded(Net), dp_mesh(2), stage=stage)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.0), scaler=scaler)
    peaks = []
    for step, ids in enumerate(batches(0, 5)):  # alike on both ranks, so that the mean is each one's own
        loss = scaler.scale(loss_of(model, ids)) * (2.0**step)
        if step == 4 and rank == 1:
            loss = loss + model.blocks[1].up.weight.sum() * torch.inf if stage < 3 else loss * torch.inf
        loss.backward()
        opt.step()
        if step < 4:
            names = [n for n, p in model.named_parameters() if n.startswith("blocks.1.") and p.numel()]
            peaks.append(max(float(zero.get_full(model, n, what="grad").abs().max()) for n in names))
        opt.zero_grad()
    return opt.overflow_report, peaks


@pytest.mark.parametrize("stage", [0, 2])
def test_a_report_shows_the_gradients_of_the_steps_before(stage: int) -> None:
    for report, peaks in run_ranks(peaks_before, 2, stage):
        assert report.module == "blocks.1.up"
        assert report.step == 5
        assert report.history == pytest.approx(peaks[1:])


def not_finite_without_scaler(rank: int, clip: bool):
    model = zero.shard(seeded(Net), dp_mesh(2), stage=3, precision=zero.Precision(compute=torch.bfloat16))
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    reports = []
    for step, ids in enumerate(batches(rank, 3)):
        loss = loss_of(model, ids)
        (loss * torch.nan if step == 1 and rank == 1 else loss).backward()
        if clip:
            zero.clip_grad_norm(opt, 1.0)
        opt.step()
        opt.zero_grad()
        reports.append(opt.overflow_report)
    return reports, opt.last_step_skipped


def test_without_a_scaler_it_is_named_and_goes_on() -> None:
    for reports, skipped in run_ranks(not_finite_without_scaler, 2, True):
        assert reports[0] is None
        assert (reports[1].step, reports[1].rank, reports[1].skipped) == (2, 0, False)
        assert "without a loss scaler" in str(reports[1])
        assert reports[2] is not None
        assert not skipped
    for reports, _ in run_ranks(not_finite_without_scaler, 2, False):
        assert reports == [None] * 3, "nobody asked for the norm"


def announced(rank: int) -> list[str]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("zero_core")
    handler = Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16())
    zero.shard(model, dp_mesh(2), stage=2, precision=zero.Precision(reduce=torch.float32))
    logger.removeHandler(handler)
    return lines


def test_five_dtypes_are_said_once() -> None:
    first, second = run_ranks(announced, 2)
    assert second == []
    same = "param {0}, compute {0}, reduce float32, accumulate float32, master float32"
    assert first[1:] == [f"{t} parameters: {same.format(t)}" for t in ("float32", "bfloat16")]
    assert first[0].startswith("stage 2 over 2 ranks: ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"init_scale": 0.0},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.5},
        {"hysteresis": 0},
        {"min_scale": 2.0**20},
    ],
)
def test_scaler_refuses(wrong: dict) -> None:
    with pytest.raises(zero.ZeroConfigError, match=next(iter(wrong))):
        zero.LossScaler(**wrong)

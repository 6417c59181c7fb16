"""Any elementwise torch optimizer, with groups, schedulers and state, built before or after sharding."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop
from zero_core.steppers import FusedStepper, TorchStepper
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, plain_copy, relative_error, seeded

CASES = {
    "adamw": (AdamW, {"lr": 1e-3, "weight_decay": 0.1}, FusedStepper),
    "adam-l2": (Adam, {"lr": 1e-3, "weight_decay": 0.1}, FusedStepper),
    "adam-amsgrad": (Adam, {"lr": 1e-3, "amsgrad": True}, TorchStepper),
    "adamw-maximize": (AdamW, {"lr": 1e-3, "maximize": True}, TorchStepper),
    "sgd": (SGD, {"lr": 0.05}, FusedStepper),
    "sgd-nesterov": (
        SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        FusedStepper,
    ),
    "sgd-dampening": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}, FusedStepper),
    "adagrad": (Adagrad, {"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.1}, FusedStepper),
    "rmsprop": (RMSprop, {"lr": 1e-3, "momentum": 0.5}, TorchStepper),
    "nadam": (NAdam, {"lr": 1e-3}, TorchStepper),
    "radam": (RAdam, {"lr": 1e-3}, TorchStepper),
    "adamax": (Adamax, {"lr": 1e-3}, TorchStepper),
    "adadelta": (Adadelta, {}, TorchStepper),
    "rprop": (Rprop, {"lr": 1e-4}, TorchStepper),
}


def groups(model) -> list[dict]:
    """Two groups that interleave within every unit."""
    decay = [p for n, p in model.named_parameters() if n.endswith("weight")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    return [{"params": decay}, {"params": rest, "lr": 2e-3, "weight_decay": 0.0}]


def every_case(rank: int, world_size: int, stage: int, order: str) -> dict[str, float]:
    mesh = dp_mesh(world_size)
    errors = {}
    for name, (cls, options, stepper) in CASES.items():
        start = seeded(Net)
        plain = plain_copy(start)
        inner = cls(groups(plain), **options)
        before = cls(groups(start), **options) if order == "before" else None
        model = zero.shard(start, mesh, stage=stage)
        opt = zero.ShardedOptimizer(model, before or cls(groups(model), **options))
        assert type(opt._stepper) is stepper, name
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (opt, inner)]
        for index, ids in enumerate(batches(rank, 4)):
            loss_of(model, ids).backward()
            opt.step()
            opt.zero_grad()
            for r in range(world_size):
                (loss_of(plain, list(batches(r, index + 1))[index]) / world_size).backward()
            inner.step()
            inner.zero_grad()
            for schedule in schedules:
                schedule.step()
            assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in inner.param_groups]
        errors[name] = relative_error(zero.full_state_dict(model), plain.state_dict())
    return errors


@pytest.mark.parametrize(
    ("stage", "order"), [(0, "after"), (1, "before"), (2, "after"), (3, "before"), (3, "after")]
)
def test_equal_to_the_unsharded_optimizer(stage: int, order: str) -> None:
    for errors in run_ranks(every_case, 2, 2, stage, order):
        assert len(errors) == len(CASES)
        assert not {name: error for name, error in errors.items() if not error <= 3e-6}


def takes_over_state(rank: int, world_size: int) -> float:
    """An optimizer that has already stepped keeps its moments and step counts."""
    start = seeded(Net)
    plain = plain_copy(start)
    inner, stepped = AdamW(plain.parameters(), lr=1e-3), AdamW(start.parameters(), lr=1e-3)
    for model, optimizer in ((plain, inner), (start, stepped)):
        for ids in batches(0, 2):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    model = zero.shard(start, dp_mesh(world_size), stage=3)
    opt = zero.ShardedOptimizer(model, stepped)
    for ids in batches(1, 2):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        loss_of(plain, ids).backward()
        inner.step()
        inner.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


def test_state_built_before_sharding_is_kept() -> None:
    assert max(run_ranks(takes_over_state, 2, 2)) <= 2e-6


def refusals(rank: int, world_size: int) -> None:
    mesh = dp_mesh(world_size)
    model = zero.shard(seeded(Net), mesh, stage=1)
    stranger = torch.nn.Linear(3, 4)
    with pytest.raises(
        zero.ZeroConfigError,
        match=r"2 parameter\(s\) of the optimizer, of shapes .*\(4, 3\).* not the model's",
    ):
        zero.ShardedOptimizer(model, SGD([*model.parameters(), *stranger.parameters()], lr=0.1))
    with pytest.raises(zero.ZeroStateError, match="Linear is not part of a sharded model"):
        zero.ShardedOptimizer(stranger, SGD(stranger.parameters(), lr=0.1))
    with pytest.raises(zero.ZeroConfigError, match="sharded already"):
        zero.shard(model, mesh, stage=1)
    with pytest.raises(zero.ZeroConfigError, match="stage: expected 0, 1, 2 or 3, got 4"):
        zero.shard(stranger, mesh, stage=4)
    with pytest.raises(zero.ZeroConfigError, match="expected a DeviceMesh or a ProcessGroup, got str"):
        zero.shard(stranger, "cpu", stage=1)
    assert type(stranger.weight) is torch.nn.Parameter
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    with pytest.raises(zero.ZeroConfigError, match="max_norm > 0"):
        zero.clip_grad_norm(opt, 0.0)


def test_what_cannot_work_is_refused_before_anything_changes() -> None:
    run_ranks(refusals, 1, 1)


def without_effect(rank: int, world_size: int) -> None:
    mesh = dp_mesh(world_size)
    late, ahead = zero.Overlap(publish_late=True), zero.Overlap(prefetch_bytes=1)
    for stage, argument, message in [
        (0, {"overlap": late}, r"Overlap\(publish_late=True\): at stage 0"),
        (3, {"overlap": late}, r"Overlap\(publish_late=True\): at stage 3 it is for units that stay whole"),
        (0, {"overlap": ahead}, r"Overlap\(prefetch_bytes=...\): at stage 0"),
        (2, {"overlap": ahead}, r"Overlap\(prefetch_bytes=...\): at stage 2"),
        (3, {"init_module": print}, "init_module: nothing of the model is on the meta device"),
    ]:
        model = seeded(Net)
        with pytest.raises(zero.ZeroConfigError, match=message):
            zero.shard(model, mesh, stage=stage, **argument)
        zero.shard(model, mesh, stage=stage)  # nothing was changed
    for name, value in (("whole_bytes", 1 << 20), ("overlap", zero.Overlap())):
        with (
            pytest.raises(zero.ZeroConfigError, match=rf"sharded_init\({name}=...\): at stage 2"),
            zero.sharded_init(mesh, stage=2, **{name: value}),
        ):
            pass


def test_what_would_have_no_effect_is_refused() -> None:
    run_ranks(without_effect, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zero.Precision(compute=torch.int8), "compute=...): expected one of torch.float32"),
        (lambda: zero.Precision(compute=torch.float32, param=torch.bfloat16), "torch.autocast"),
        (lambda: zero.Overlap(reduce_bytes=-1), "reduce_bytes=...): expected a number of bytes >= 0, got -1"),
        (lambda: zero.Overlap(timeout_s=0), "timeout_s=...): expected seconds > 0"),
        (lambda: zero.Overlap(enabled="no"), "enabled=...): expected a bool, got 'no'"),
        (lambda: zero.Overlap(enabled=False, reduce_bytes=1), "leave reduce_bytes out"),
        (lambda: zero.Overlap(enabled=False, prefetch_bytes=1), "leave prefetch_bytes out"),
        (
            lambda: zero.Stores(optimizer_ratio=0.5),
            "Stores(optimizer_ratio=...): it says which optimizer state",
        ),
        (lambda: zero.Stores(keep_first=True), "Stores(keep_first=...): it says which optimizer state"),
    ],
)
def test_policies_validate_themselves(make, message: str) -> None:
    with pytest.raises(zero.ZeroConfigError) as info:
        make()
    assert message in str(info.value)


def autocast_and_wide(rank: int, world_size: int, stage: int) -> tuple[float, float]:
    """fp32 parameters under bf16 autocast; and bf16 gradients that travel and add up in fp32."""
    mesh = dp_mesh(world_size)
    start = seeded(Net)
    plain = plain_copy(start)
    model = zero.shard(
        start, mesh, stage=stage, precision=zero.Precision(compute=torch.bfloat16, param=torch.float32)
    )
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.05))
    inner = SGD(plain.parameters(), lr=0.05)
    for index, ids in enumerate(batches(rank, 3)):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        for r in range(world_size):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(plain, list(batches(r, index + 1))[index])
            (loss / world_size).backward()
        inner.step()
        inner.zero_grad()
    autocast = relative_error(zero.full_state_dict(model), plain.state_dict())

    wide = zero.Precision(compute=torch.bfloat16, reduce=torch.float32, accumulate=torch.float32)
    model = zero.shard(seeded(Net), mesh, stage=stage, precision=wide)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.05))
    plain = seeded(Net).to(torch.bfloat16)
    total: dict[str, torch.Tensor] = {}
    for index, ids in enumerate(batches(rank, 4)):
        loss_of(model, ids).backward()
        for r in range(world_size):
            loss_of(plain, list(batches(r, index + 1))[index]).backward()
            for name, param in plain.named_parameters():
                total[name] = total.get(name, 0) + param.grad.float() / world_size
            plain.zero_grad()
    expected = torch.stack([g.norm() for g in total.values()]).norm()
    return autocast, abs(float(zero.grad_norm(opt) / expected) - 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast_and_wide_accumulation(stage: int) -> None:
    for autocast, norm in run_ranks(autocast_and_wide, 2, 2, stage):
        assert autocast <= 1e-5
        assert norm <= 1e-5  # bf16 sums would be off by 1e-3


def with_names(rank: int, world_size: int, stage: int) -> None:
    """Names stay beside the parameters that this rank has parts of."""
    model = seeded(Net)
    model.blocks[0].requires_grad_(False)
    model.norm.requires_grad_(False)
    later = [pair for pair in model.named_parameters() if pair[0].startswith("norm")]
    inner = AdamW([pair for pair in model.named_parameters() if not pair[0].startswith("norm")], lr=1e-3)
    model = zero.shard(model, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, inner)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="with/without names"):
        opt.add_param_group({"params": [param for _, param in later]})
    opt.add_param_group({"params": later, "lr": 1e-2})
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    names = {id(slot.master): slot.name for slots in opt.slots.values() for slot in slots}
    assert any(name.startswith("blocks.0") for name in names.values())
    assert any(name.startswith("norm") for name in names.values())
    for group in inner.param_groups:
        assert group["param_names"] == [names[id(param)] for param in group["params"]]
    opt.load_state_dict(opt.state_dict())
    assert [group["param_names"] for group in opt.param_groups] == [
        [names[id(param)] for param in group["params"]] for group in inner.param_groups
    ]


@pytest.mark.parametrize("stage", [0, 2])
def test_optimizers_built_on_named_parameters(stage: int) -> None:
    run_ranks(with_names, 2, 2, stage)

"""What people do to models and optimizers in plain torch works here too, or is an error: never a silent difference."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import zero_core as zero
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from zero_core.params import Residency
from zero_core.testing import RankFailedError, run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, plain_copy, relative_error, seeded

STAGES = [0, 1, 2, 3]
BF16 = zero.Precision(compute=torch.bfloat16)


def stack(bias: bool = False) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64, bias=bias) for _ in range(4)))


def units_of_one_parameter(rank: int, world_size: int, stage: int) -> bool:
    start = seeded(stack)
    expected = {name: value.clone() for name, value in start.state_dict().items()}
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    return all(torch.equal(value, expected[name]) for name, value in zero.full_state_dict(model).items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_dict_never_takes_one_layer_for_another(stage: int) -> None:
    # A freed unit's memory goes to the next one: the same address, other values.
    assert all(run_ranks(units_of_one_parameter, 2, 2, stage))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.norm(x).square().mean()


def resume(rank: int, world_size: int, stage: int) -> tuple[float, list[float], bool]:
    mesh = dp_mesh(world_size)

    def build(lr: float):
        model = zero.shard(seeded(Norm), mesh, stage=stage, precision=BF16)
        return model, zero.ShardedOptimizer(model, AdamW(model.parameters(), lr=lr))

    def train(model, opt, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            torch.manual_seed(step)
            model(torch.randn(2, 32)).backward()
            opt.step()
            opt.zero_grad()

    model, opt = build(0.125)
    train(model, opt, 0, 2)
    held = {index: len(slots) for index, slots in opt.slots.items()}
    state, weights = opt.state_dict(), zero.full_state_dict(model)
    fresh, again = build(1.0)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (again, again.inner)]
    zero.load_full_state_dict(fresh, weights)
    again.load_state_dict(state)
    rates = [again.param_groups[0]["lr"], again.inner.param_groups[0]["lr"]]
    train(model, opt, 2, 2)
    train(fresh, again, 2, 2)
    for scheduler in schedulers:
        scheduler.step()
    rates.append(again.param_groups[0]["lr"])
    error = relative_error(zero.full_state_dict(fresh), zero.full_state_dict(model))
    return error, rates, len(held) < len(zero.sharded(model).units)


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_resumes_where_ranks_hold_no_part_of_a_unit(stage: int) -> None:
    results = run_ranks(resume, 4, 4, stage)
    for error, rates, _ in results:
        assert error == 0
        assert rates[:2] == [0.125, 0.125], (
            "hyperparameters come from the state, for every holder of the groups"
        )
        assert rates[2] != 0.125, "and schedulers still reach them"
    assert stage == 0 or any(without for _, _, without in results), "every rank had a part of every unit"


def stale_norms(rank: int, world_size: int) -> None:
    model = zero.shard(seeded(stack), dp_mesh(world_size), stage=2)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=1.0))
    x = torch.randn(3, 64)
    model(x).sum().backward()
    first = zero.grad_norm(opt).item()
    model.zero_grad()
    (model(x).sum() * 100).backward()
    assert zero.grad_norm(opt).item() == pytest.approx(100 * first, rel=1e-5)
    zero.clip_grad_norm(opt, 1.0)
    (model(x).sum() * 100).backward()  # after the call: the clip is of what is stepped
    before = zero.full_state_dict(model)
    opt.step()
    moved = sum((zero.full_state_dict(model)[name] - value).square().sum() for name, value in before.items())
    assert moved.sqrt().item() == pytest.approx(1.0, rel=1e-4)


def test_norm_and_clip_are_of_the_gradients_that_are_stepped() -> None:
    run_ranks(stale_norms, 2, 2)


def edits(rank: int, world_size: int, stage: int) -> tuple[float, float]:
    model = zero.shard(seeded(stack), dp_mesh(world_size), stage=stage, precision=BF16)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.0))
    ones = {name: torch.ones_like(value) for name, value in zero.full_state_dict(model).items()}
    found = []
    for edit in (
        lambda: model.load_state_dict(ones),
        lambda: [p.clamp_(max=0.5) for p in model.parameters()],
    ):
        with torch.no_grad():
            edit()
        model(torch.randn(2, 64)).sum().backward()
        opt.step()
        opt.zero_grad()
        found.append(float(max(value.max() for value in zero.full_state_dict(model).values())))
    return found[0], found[1]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_values_written_by_plain_torch_survive_the_step(stage: int) -> None:
    assert run_ranks(edits, 2, 2, stage) == [(1.0, 0.5)] * 2


def refusals(rank: int, world_size: int) -> None:
    mesh = dp_mesh(world_size)
    model = zero.shard(seeded(stack), mesh, stage=1)
    scaler = zero.LossScaler(8.0)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1, momentum=0.9), scaler=scaler)
    with pytest.raises(zero.ZeroConfigError, match=r"\(2,\).* not the model's"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    other = zero.shard(seeded(stack), mesh, stage=1)
    with pytest.raises(zero.ZeroConfigError, match="LossScaler: it belongs to another optimizer"):
        zero.ShardedOptimizer(other, SGD(other.parameters(), lr=0.1), scaler=scaler)
    model(torch.ones(1, 64)).sum().backward()
    opt.param_groups[0]["maximize"] = True
    with pytest.raises(zero.ZeroStateError, match=r"now ask for other options .*; build a new one"):
        opt.step()
    model.double()
    with pytest.raises(
        zero.ZeroStateError, match=r"'0\.weight' no longer lies in its unit's buffer.*before shard"
    ):
        model(torch.ones(1, 64, dtype=torch.float64))


def test_what_would_have_no_effect_is_refused() -> None:
    run_ranks(refusals, 1, 1)


def forgotten_state(rank: int, world_size: int) -> float:
    mesh = dp_mesh(world_size)
    results = []
    for warm in (False, True):
        model = zero.shard(seeded(stack), mesh, stage=2)
        opt = zero.ShardedOptimizer(model, AdamW(model.parameters(), lr=1e-2))
        start = opt.state_dict()
        weights = zero.full_state_dict(model)
        if warm:
            (model(torch.ones(1, 64)).sum() * 1e3).backward()
            opt.step()
            opt.zero_grad()
            zero.load_full_state_dict(model, weights)
            opt.load_state_dict(start)
        model(torch.ones(1, 64)).sum().backward()
        opt.step()
        results.append(zero.full_state_dict(model))
    return relative_error(*results)


def test_a_state_from_before_the_first_step_brings_no_old_moments() -> None:
    assert max(run_ranks(forgotten_state, 2, 2)) == 0


class Auxiliary(nn.Module):
    """A block that keeps an auxiliary loss, which no output leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.linspace(-1, 1, 8))
        self.aux = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aux = (self.inner(x) * self.gate).square().mean() + (x * self.gate).square().mean()
        return torch.tanh(self.inner(x))


class WithAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Auxiliary() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def auxiliary_losses(rank: int, world_size: int, stage: int) -> float:
    start = seeded(WithAuxiliary)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    inner = SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(4, 8)
        for each, optimizer in ((model, opt), (plain, inner)):
            each(x)
            sum(block.aux for block in each.blocks).backward()
            optimizer.step()
            optimizer.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_kept_on_a_block_trains(stage: int) -> None:
    assert max(run_ranks(auxiliary_losses, 2, 2, stage)) <= 2e-6


def with_create_graph(rank: int, world_size: int, stage: int) -> float:
    start = seeded(Net)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    inner = SGD(plain.parameters(), lr=0.1)
    ids = next(iter(batches(0, 1)))
    loss_of(model, ids).backward(create_graph=True)
    loss_of(plain, ids).backward()
    opt.step()
    inner.step()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_backward_may_create_a_graph(stage: int) -> None:
    assert max(run_ranks(with_create_graph, 2, 2, stage)) <= 2e-6


def twice_under_reentrance(rank: int, world_size: int, stage: int) -> float:
    start = seeded(stack)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage, units=nn.Linear)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    inner = SGD(plain.parameters(), lr=0.1)
    for each, optimizer in ((model, opt), (plain, inner)):
        torch.manual_seed(1)
        x = torch.randn(2, 64, requires_grad=True)
        for block in [each[0], each[0], each[1]]:
            x = checkpoint(block, x, use_reentrant=True)
        each[3](each[2](x)).sum().backward()
        optimizer.step()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_after_the_reduction_is_an_error_where_none_could_follow(stage: int) -> None:
    with pytest.raises(RankFailedError, match=r"a gradient came after the reduction .* use_reentrant=False"):
        run_ranks(twice_under_reentrance, 2, 2, stage)


def test_a_gradient_after_the_reduction_is_reduced_too() -> None:
    assert max(run_ranks(twice_under_reentrance, 2, 2, 3)) <= 2e-6


class Adapted(nn.Module):
    """Frozen layers with adapters under reentrant checkpoints, and a frozen head: no gradient comes between regions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64).requires_grad_(False) for _ in range(3))
        self.adapters = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.detach().requires_grad_()
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            x = checkpoint(lambda x, layer=layer, adapter=adapter: adapter(layer(x)), x, use_reentrant=True)
        return {"logits": self.head(x)}


def adapters_under_reentrance(rank: int, world_size: int, stage: int) -> tuple[float, int]:
    start = seeded(Adapted)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage, units=nn.Linear)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    inner = SGD([param for param in plain.parameters() if param.requires_grad], lr=0.1)
    ends: list[None] = []
    zero.sharded(model).reducer.listeners.append(lambda unit: ends.append(None) if unit is None else None)
    torch.manual_seed(1)
    for _ in range(2):
        x = torch.randn(2, 64)
        for each, optimizer in ((model, opt), (plain, inner)):
            each(x)["logits"].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict()), len(ends)


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_under_reentrant_checkpoints_are_one_pass(stage: int) -> None:
    for error, num_passes in run_ranks(adapters_under_reentrance, 2, 2, stage):
        assert error <= 2e-6
        assert num_passes == 2


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise FloatingPointError("overflow")


def raised_in_backward(rank: int, world_size: int, stage: int, zeroed: bool) -> float:
    start = seeded(stack)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage, units=nn.Linear)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    inner = SGD(plain.parameters(), lr=0.1)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(FloatingPointError):  # two of four layers have their gradients by then
        model[3](model[2](_Fails.apply(model[1](model[0](x))))).sum().backward()
    if zeroed:
        opt.zero_grad()
    else:  # what came before stays, as in plain torch
        with pytest.raises(FloatingPointError):
            plain[3](plain[2](_Fails.apply(plain[1](plain[0](x))))).sum().backward()
    for each, optimizer in ((model, opt), (plain, inner)):  # and not through the model's own forward
        each[3](each[2](each[1](each[0](x)))).sum().backward()
        optimizer.step()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_after_one_that_raised(stage: int, zeroed: bool) -> None:
    assert max(run_ranks(raised_in_backward, 2, 2, stage, zeroed)) <= 2e-6


def failed_gather(rank: int, world_size: int) -> None:
    model = zero.shard(seeded(stack), dp_mesh(world_size), stage=3)
    state = zero.sharded(model)

    def fail(*args, **kwargs):
        raise RuntimeError("connection reset")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.wire.collectives, "all_gather", fail)
        with pytest.raises(zero.CollectiveError, match="connection reset"):
            model(torch.ones(1, 64))
    with pytest.raises(zero.CollectiveError, match="connection reset"):  # and not a KeyError
        model(torch.ones(1, 64))
    assert all(unit.residency is Residency.SHARDED for unit in state.units)


def test_after_a_failed_gather_every_call_says_so() -> None:
    run_ranks(failed_gather, 1, 1)


def interrupted(rank: int, world_size: int) -> float:
    start = seeded(Net)
    plain = plain_copy(start)
    precision = zero.Precision(param=torch.float32, compute=torch.bfloat16)
    model = zero.shard(start, dp_mesh(world_size), stage=3, precision=precision)
    ids = next(iter(batches(0, 1)))
    loss_of(model, ids)  # records the order of use

    def press(*_):
        raise KeyboardInterrupt

    hook = model.blocks[1].down.register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    hook.remove()
    model(ids)
    assert not torch.is_autocast_enabled("cpu"), "autocast outlives the forward that was interrupted"
    assert zero.sharded(model).gatherer._entries == []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(plain, ids)
    with torch.no_grad():
        return abs(float(loss_of(model, ids) - expected))


def test_ctrl_c_in_forward_leaves_a_usable_model() -> None:
    assert run_ranks(interrupted, 1, 1) == [0.0]


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.ones(64)
        self.register_buffer("first", weight)
        self.register_buffer("mask", torch.ones(1, 8).expand(4, 8))
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight * self.first).sum() * self.mask.sum()


def odd_buffers(rank: int, world_size: int) -> None:
    mesh = dp_mesh(world_size)
    with zero.sharded_init(mesh, stage=3, whole_bytes=0):
        model = Expanded()
    assert model.first.sum() == 64, "the buffer lost the memory that the parameter gave back"
    model = zero.shard(model, mesh, stage=3)
    assert {"first", "mask"} <= zero.sharded_state(model).keys()
    model(torch.ones(64)).backward()


def test_expanded_and_shared_buffers() -> None:
    run_ranks(odd_buffers, 2, 2)


def dropped(rank: int, world_size: int, stage: int) -> list[str]:
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, AdamW(model.parameters(), lr=1e-3))
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    opt.zero_grad()
    state = zero.sharded(model)
    parts = {
        "model": model,
        "sharded": state,
        "reducer": state.reducer,
        "unit": state.units[0],
        "optimizer": opt,
    }
    left = {name: weakref.ref(part) for name, part in parts.items()}
    del model, opt, state, parts
    gc.collect()
    return [name for name, part in left.items() if part() is not None]


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_is_dropped_is_gone(stage: int) -> None:
    assert run_ranks(dropped, 2, 2, stage) == [[], []]


def saved_edits(rank: int, world_size: int, stage: int) -> None:
    """What was written by hand since the last step is in a checkpoint, masters and all; training goes on from it."""

    def build():
        model = zero.shard(seeded(stack), dp_mesh(world_size), stage=stage, precision=BF16)
        return model, zero.ShardedOptimizer(model, AdamW(model.parameters(), lr=1e-3))

    def step(model, opt, number: int) -> None:
        torch.manual_seed(100 * number + rank)
        model(torch.randn(2, 64)).square().mean().backward()
        opt.step()
        opt.zero_grad()

    model, opt = build()
    step(model, opt, 0)
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-0.02, 0.02)
    own = copy.deepcopy(opt.state_dict())
    parts = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    scalars, edited = zero.optimizer_scalars(opt), zero.full_state_dict(model)
    found = []
    for way in ("sharded", "own"):
        other, its = build()
        if way == "sharded":
            zero.load_sharded_state(other, its, parts)
            zero.load_optimizer_scalars(its, scalars)
        else:
            zero.load_full_state_dict(other, edited)
            its.load_state_dict(own)
        assert all(torch.equal(value, edited[name]) for name, value in zero.full_state_dict(other).items()), (
            way
        )
        found.append((other, its))
    for each, optimizer in ((model, opt), *found):
        step(each, optimizer, 1)
    expected = zero.full_state_dict(model)
    for each, _ in found:
        assert all(torch.equal(value, expected[name]) for name, value in zero.full_state_dict(each).items())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_values_written_by_plain_torch_are_in_a_checkpoint(stage: int) -> None:
    run_ranks(saved_edits, 2, 2, stage)


class Shaped(nn.Module):
    """Returns more than tensors, as functions do that others wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        return self.inner(x), x.shape, range(3), slice(1), np.float32(1.0), np.ones(2), {"a", 1}


class ManyShaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shaped() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return x.square().mean()


def whole_after_forward(rank: int) -> int:
    model = zero.shard(seeded(ManyShaped), dp_mesh(2), stage=3)
    loss = model(torch.randn(3, 32))
    count = sum(unit.residency is Residency.GATHERED for unit in zero.sharded(model).units)
    loss.backward()
    return count


def test_shapes_in_an_output_keep_no_unit_whole() -> None:
    assert max(run_ranks(whole_after_forward, 2)) <= 1


def refused_and_tried_again(rank: int, world_size: int) -> None:
    """A refusal leaves the torch optimizer as it was."""
    model = seeded(stack).requires_grad_(False)
    inner = AdamW(model.parameters(), lr=0.1)
    model = zero.shard(model, dp_mesh(world_size), stage=1)
    with pytest.raises(zero.ZeroConfigError, match="every parameter of the optimizer is frozen"):
        zero.ShardedOptimizer(model, inner)
    assert [id(p) for p in inner.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    model.requires_grad_(True)
    scaler = zero.LossScaler(8.0)
    kept = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1), scaler=scaler)
    with pytest.raises(zero.ZeroConfigError, match="belongs to another optimizer"):
        zero.ShardedOptimizer(model, inner, scaler=scaler)
    zero.ShardedOptimizer(model, inner)
    with pytest.raises(zero.ZeroConfigError, match=r"not the model's|no parameters on this rank"):
        zero.ShardedOptimizer(model, inner)
    assert kept.scaler is scaler


def test_a_refusal_changes_nothing() -> None:
    run_ranks(refused_and_tried_again, 2, 2)


def schedulers_on_the_wrapped(rank: int, world_size: int) -> None:
    """Built on the torch optimizer before and after it was wrapped; its own `step` raises by hand."""
    for build, whole in ((AdamW, False), (torch.optim.Rprop, False), (SGD, True)):
        model = zero.shard(seeded(stack), dp_mesh(world_size), stage=2)
        inner = build(model.parameters(), lr=1.0)
        before = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
        opt = zero.ShardedOptimizer(model, inner, whole_tensors=whole)
        schedulers = [before, *(torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (inner, opt))]
        for _ in range(2):
            model(torch.ones(1, 64)).sum().backward()
            values = zero.full_state_dict(model)
            with pytest.raises(zero.ZeroStateError, match=r"call step\(\) and zero_grad\(\) of the Sharded"):
                inner.step()
            assert all(torch.equal(values[name], now) for name, now in zero.full_state_dict(model).items())
            opt.step()
            assert not torch.equal(values["0.weight"], zero.full_state_dict(model)["0.weight"])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for scheduler in schedulers:
                    scheduler.step()
            opt.zero_grad()
        assert inner.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 0.5**6


def test_schedulers_step_the_wrapped_optimizer_and_nobody_else_does() -> None:
    run_ranks(schedulers_on_the_wrapped, 2, 2)

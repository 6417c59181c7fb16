"""Optimizers that look at whole tensors equal themselves on plain parameters, at every stage; state is sharded."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import zero_core as zero
from torch import nn
from torch.optim import Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, plain_copy, relative_error, seeded

STAGES = [0, 1, 2, 3]


class Lamb(Optimizer):
    """You et al., Large batch optimization for deep learning (2020), algorithm 2: Adam with one rate a parameter."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                m = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                v = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                m_hat, v_hat = m / (1 - beta1 ** state["step"]), v / (1 - beta2 ** state["step"])
                update = m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p
                size, length = p.norm(), update.norm()
                ratio = float(size / length) if size > 0 and length > 0 else 1.0
                p.add_(update, alpha=-group["lr"] * ratio)


class Orthogonal(Optimizer):
    """Momentum, with the singular values of the update drawn towards one: a matrix optimizer from elsewhere."""

    def __init__(self, params, lr=1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    x = momentum.mul_(0.9).add_(p.grad)
                    x = x / (x.norm() + 1e-8)
                    for _ in range(4):
                        x = 1.5 * x - 0.5 * x @ x.t() @ x
                    p.add_(x, alpha=-group["lr"])


Build = Callable[[nn.Module], list[tuple[Optimizer, bool | None]]]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups that interleave within every unit (without empty parameters: Adafactor divides by their size)."""
    decay = [p for n, p in model.named_parameters() if n.endswith("weight")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("weight") and p.numel()]
    return [{"params": decay}, {"params": rest, "lr": 2e-3, "weight_decay": 0.0}]


def matrices_and_rest(cls: type[Optimizer], asked: bool | None, **options: Any) -> Build:
    def build(model: nn.Module) -> list[tuple[Optimizer, bool | None]]:
        rest = [p for p in model.parameters() if p.dim() != 2]
        matrices = [p for p in model.parameters() if p.dim() == 2 and p.numel()]
        return [(cls(matrices, **options), asked), (AdamW(rest, lr=1e-3), None)]

    return build


CASES: dict[str, Build] = {
    "lamb": lambda model: [(Lamb(groups(model), lr=1e-2, weight_decay=0.1), True)],
    "adafactor": lambda model: [(Adafactor(groups(model), lr=1e-2, weight_decay=0.1), None)],
    "adafactor-foreach": lambda model: [(Adafactor(groups(model), lr=1e-2, foreach=True), None)],
    "orthogonal": matrices_and_rest(Orthogonal, True, lr=1e-2),
    "adamw-whole": lambda model: [(AdamW(groups(model), lr=1e-3, weight_decay=0.1), True)],
}
if hasattr(torch.optim, "Muon"):
    CASES["muon"] = matrices_and_rest(torch.optim.Muon, None, lr=1e-2)
TOLERANCE = {"muon": 2e-3}
"""It iterates in bfloat16, where processors multiply differently: a gradient's last bit may become one of those."""


def wrap(model: nn.Module, build: Build, **kwargs: Any) -> list[zero.ShardedOptimizer]:
    return [
        zero.ShardedOptimizer(model, inner, whole_tensors=asked, **kwargs) for inner, asked in build(model)
    ]


def averaged_gradients(plain: nn.Module, micro_batches: Iterable[list[torch.Tensor]]) -> None:
    """Each parameter's gradient as DDP has it: summed in rank order, once a micro-batch, times 1/N."""
    total: dict[nn.Parameter, torch.Tensor] = {}
    for of_ranks in micro_batches:
        mean: dict[nn.Parameter, torch.Tensor] = {}
        for ids in of_ranks:
            plain.zero_grad()
            loss_of(plain, ids).backward()
            for param in plain.parameters():
                if param.grad is not None:
                    mean[param] = mean.get(param, 0) + param.grad.float()
        for param, grad in mean.items():
            grad = (grad * (1 / len(of_ranks))).to(param.dtype)
            total[param] = total[param] + grad if param in total else grad
    for param in plain.parameters():
        param.grad = total.get(param)


def batches_of_ranks(world_size: int, count: int) -> list[list[torch.Tensor]]:
    return [list(of_ranks) for of_ranks in zip(*(batches(r, count) for r in range(world_size)), strict=True)]


def five_steps(rank: int, world_size: int, stage: int) -> dict[str, float]:
    mesh = dp_mesh(world_size)
    errors = {}
    for name, build in CASES.items():
        start = seeded(lambda: Net(unused=True))
        plain = plain_copy(start)
        inners = [inner for inner, _ in build(plain)]
        model = zero.shard(start, mesh, stage=stage)
        opts = wrap(model, build)
        schedules = [ExponentialLR(each, 0.8) for each in (*opts, *inners)]
        for of_ranks in batches_of_ranks(world_size, 5):
            loss_of(model, of_ranks[rank]).backward()
            averaged_gradients(plain, [of_ranks])
            for each in (*opts, *inners):
                each.step()
                each.zero_grad()
            for schedule in schedules:
                schedule.step()
        before = seeded(lambda: Net(unused=True)).state_dict()
        found = zero.full_state_dict(model)
        assert torch.equal(found["blocks.1.unused"], before["blocks.1.unused"]), "no rank used it"
        assert not torch.equal(found["blocks.1.up.weight"], before["blocks.1.up.weight"])
        errors[name] = relative_error(found, plain.state_dict())
    return errors


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_equal_to_the_unsharded_optimizer(stage: int, world_size: int) -> None:
    for errors in run_ranks(five_steps, world_size, world_size, stage):
        assert len(errors) == len(CASES)
        assert not {name: error for name, error in errors.items() if not error <= TOLERANCE.get(name, 1e-6)}


def slices_would_differ(rank: int, world_size: int) -> float:
    start = seeded(Net)
    plain = plain_copy(start)
    inner = Lamb(plain.parameters(), weight_decay=0.1)
    model = zero.shard(start, dp_mesh(world_size), stage=1)
    opt = zero.ShardedOptimizer(model, Lamb(model.parameters(), weight_decay=0.1))
    of_ranks = batches_of_ranks(world_size, 1)[0]
    loss_of(model, of_ranks[rank]).backward()
    averaged_gradients(plain, [of_ranks])
    opt.step()
    inner.step()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


def test_slices_of_such_an_optimizer_would_differ() -> None:
    assert min(run_ranks(slices_would_differ, 2, 2)) > 1e-4, "the tests above show nothing"


def everything_else(rank: int, world_size: int, stage: int) -> float:
    """Accumulation with and without communication, clipping, a loss scale, an overflow, frozen parameters."""
    mesh = dp_mesh(world_size)
    start = seeded(Net)
    start.blocks[0].requires_grad_(False)
    plain = plain_copy(start)
    inner = Lamb(groups(plain), weight_decay=0.1)
    scaler = zero.LossScaler(2.0**10)
    built = Lamb(groups(start), weight_decay=0.1)  # before sharding
    model = zero.shard(start, mesh, stage=stage)
    opt = zero.ShardedOptimizer(model, built, scaler=scaler, whole_tensors=True)
    steps = batches_of_ranks(world_size, 8)
    for step in range(4):
        micro_batches = steps[2 * step : 2 * step + 2]
        if step == 2:
            (scaler.scale(loss_of(model, micro_batches[0][rank])) * torch.inf).backward()
            before = zero.full_state_dict(model)
            opt.step()
            opt.zero_grad()
            assert opt.last_step_skipped
            assert relative_error(zero.full_state_dict(model), before) == 0
            scaler.value *= 2
        with zero.no_sync(model) if step % 2 else nullcontext():
            scaler.scale(loss_of(model, micro_batches[0][rank])).backward()
        scaler.scale(loss_of(model, micro_batches[1][rank])).backward()
        norm = zero.clip_grad_norm(opt, 0.5)
        opt.step()
        opt.zero_grad()
        averaged_gradients(plain, micro_batches)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert expected > 0.5, "nothing was clipped"
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        inner.step()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_with_accumulation_clipping_scaling_overflow_and_frozen_parameters(stage: int) -> None:
    assert max(run_ranks(everything_else, 2, 2, stage)) <= 2e-6


class Mixed(nn.Module):
    """bf16 and fp32 parameters in one block, and one that only some ranks use."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.norm = nn.LayerNorm(12)
        self.sometimes = nn.Parameter(torch.ones(5, 3))
        self.blocks.to(torch.bfloat16)

    def forward(self, x: torch.Tensor, sometimes: bool) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x.bfloat16()).float().tanh()
        x = self.norm(x)
        return x.square().mean() + (self.sometimes.square().mean() * x.mean() if sometimes else 0)


def mixed_dtypes(rank: int, world_size: int, stage: int) -> float:
    start = seeded(Mixed)
    plain = plain_copy(start)
    masters = {n: nn.Parameter(p.detach().float()) for n, p in plain.named_parameters()}
    inner = Lamb(masters.values(), weight_decay=0.1)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, Lamb(model.parameters(), weight_decay=0.1), whole_tensors=True)
    for step in range(5):
        torch.manual_seed(step)
        inputs = torch.randn(world_size, 4, 12)
        model(inputs[rank], rank == 1 and step != 2).backward()
        opt.step()
        opt.zero_grad()
        mean: dict[str, torch.Tensor] = {}
        for r in range(world_size):
            plain.zero_grad()
            plain(inputs[r], r == 1 and step != 2).backward()
            for name, param in plain.named_parameters():
                if param.grad is not None:
                    mean[name] = mean.get(name, 0) + param.grad.float()
        for name, param in plain.named_parameters():
            grad = mean.get(name)
            masters[name].grad = None if grad is None else (grad * (1 / world_size)).to(param.dtype).float()
        inner.step()
        with torch.no_grad():
            for name, param in plain.named_parameters():
                param.copy_(masters[name])
    held = {
        name.split(".", 1)[1].removesuffix(".master"): shard
        for name, shard in zero.sharded_state(model, opt).items()
        if name.endswith(".master")
    }
    assert stage > 0 or held, "no master is separate"
    for name, shard in held.items():
        start_at = shard.offsets[0]
        want = masters[name].detach().view(-1)[start_at : start_at + shard.local.numel()]
        torch.testing.assert_close(shard.local, want, rtol=1e-6, atol=1e-7)
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_mixed_dtypes_with_wide_masters_and_parameters_that_one_rank_uses(stage: int) -> None:
    assert max(run_ranks(mixed_dtypes, 2, 2, stage)) <= 1e-6


WIDTH, DEPTH = 96, 10


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class Measured(Lamb):
    """Notes what lives while the owned parameters are whole."""

    seen = 0

    def step(self, closure=None) -> None:
        super().step()
        Measured.seen = live_bytes()


def memory(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> dict[str, float]:
    mesh = dp_mesh(world_size)
    before = live_bytes()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
    model = zero.shard(model, mesh, stage=stage, precision=zero.Precision(compute=dtype))
    opt = zero.ShardedOptimizer(model, Measured(model.parameters()), whole_tensors=True)
    for _ in range(2):
        model(torch.randn(2, WIDTH)).float().sum().backward()
        opt.step()
        rest = live_bytes() - before
        opt.zero_grad()
    state = sum(
        value.nbytes for s in opt.inner.state.values() for value in s.values() if torch.is_tensor(value)
    )
    owned = sum(math.prod(each.slot.shape) for each in opt.whole)
    return {
        "state": state, "owned": owned, "rest": rest, "step": Measured.seen - before, "P": WIDTH * WIDTH * DEPTH
    }  # fmt: skip


@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.bfloat16)])
def test_memory_follows_the_formula(stage: int, dtype: torch.dtype) -> None:
    n = 2
    found = run_ranks(memory, n, n, stage, dtype)
    p = found[0]["P"]
    assert sum(each["owned"] for each in found) == p
    for each in found:
        assert each["state"] == 8 * each["owned"]
        assert each["owned"] <= p / n + WIDTH * WIDTH
        slices = {1: 8 * p, 2: 2 * p + 6 * p / n, 3: 6 * p / n}[stage]  # parameters, gradients, masters
        assert each["rest"] == pytest.approx(slices + each["state"], rel=0.04)
        assert each["step"] == pytest.approx(slices + each["state"] + 8 * each["owned"], rel=0.04)


def train(
    model: nn.Module, opts: list[zero.ShardedOptimizer], rank: int, first: int, steps: int
) -> list[float]:
    losses = []
    for ids in list(batches(rank, first + steps))[first:]:
        loss = loss_of(model, ids)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
    return losses


def whole_where_it_can_be(shard: zero.Shard) -> torch.Tensor:
    """As a saver keeps it: what a rank has whole goes in its shape."""
    local = shard.local.clone()
    return local.view(shard.global_shape) if local.numel() == math.prod(shard.global_shape) else local


def resume(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    precision = zero.Precision(compute=dtype)
    for name in ("lamb", "adafactor"):

        def sharded_net(seed: int, build: Build = CASES[name]):
            model = zero.shard(seeded(Net, seed), dp_mesh(world_size), stage=stage, precision=precision)
            return model, wrap(model, build)

        model, opts = sharded_net(0)
        train(model, opts, rank, 0, 3)
        described = zero.sharded_state(model, opts[0])
        saved = {key: whole_where_it_can_be(shard) for key, shard in described.items()}
        scalars = zero.optimizer_scalars(opts[0])
        assert scalars.keys() == {owned.name for owned in opts[0].whole}
        if name == "adafactor" and "optimizer.blocks.0.up.weight.row_var" in described:
            assert described["optimizer.blocks.0.up.weight.row_var"].global_shape == (58, 1)
        kept = copy.deepcopy(opts[0].state_dict())
        weights = zero.full_state_dict(model)
        expected = train(model, opts, rank, 3, 2)

        other, others = sharded_net(5)
        zero.load_sharded_state(other, others[0], saved)
        zero.load_optimizer_scalars(others[0], scalars)
        assert train(other, others, rank, 3, 2) == expected
        zero.load_sharded_state(other, others[0], saved)  # over state that exists
        zero.load_optimizer_scalars(others[0], scalars)
        assert train(other, others, rank, 3, 2) == expected

        third, thirds = sharded_net(6)
        zero.load_full_state_dict(third, weights)
        thirds[0].load_state_dict(kept)
        assert train(third, thirds, rank, 3, 2) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_resumes_bit_for_bit(stage: int, dtype: torch.dtype) -> None:
    run_ranks(resume, 2, 2, stage, dtype)


def leave(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=2)
    opts = wrap(model, CASES["adafactor"])
    train(model, opts, 0, 0, 3)
    described = zero.sharded_state(model, opts[0])
    state = {
        name: (shard.global_shape, shard.local.numpy().copy())
        for name, shard in described.items()
        if name.startswith("optimizer.")
    }
    scalars = zero.optimizer_scalars(opts[0])
    weights = {name: value.numpy().copy() for name, value in zero.full_state_dict(model).items()}
    train(model, opts, 0, 3, 2)
    return (
        state | {"scalars": scalars},
        weights,
        {name: value.numpy().copy() for name, value in zero.full_state_dict(model).items()},
    )


def arrive(rank: int, world_size: int, states: list[dict[str, Any]], weights: dict[str, np.ndarray]):
    model = zero.shard(seeded(Net, 3), dp_mesh(world_size), stage=3)
    opts = wrap(model, CASES["adafactor"])
    zero.load_full_state_dict(model, {name: torch.from_numpy(value) for name, value in weights.items()})
    merged = {k: v for state in states for k, v in state.items() if k != "scalars"}
    scalars = {k: v for state in states for k, v in state["scalars"].items()}
    mine = {owned.name for owned in opts[0].whole}
    given = {
        name: torch.from_numpy(values).view(shape)
        for name, (shape, values) in merged.items()
        if name.removeprefix("optimizer.").rpartition(".")[0] in mine
    }
    zero.load_sharded_state(model, opts[0], given, strict=False)
    zero.load_optimizer_scalars(opts[0], scalars)
    train(model, opts, 0, 3, 2)
    return {name: value.numpy().copy() for name, value in zero.full_state_dict(model).items()}


def test_resumes_on_another_number_of_ranks_at_another_stage() -> None:
    left = run_ranks(leave, 2, 2)
    for found in run_ranks(arrive, 3, 3, [state for state, _, _ in left], left[0][1]):
        as_tensors = [{n: torch.from_numpy(v) for n, v in each.items()} for each in (found, left[0][2])]
        assert relative_error(*as_tensors) <= 1e-6


def takes_over_state(rank: int, world_size: int, stage: int) -> float:
    """An optimizer that has already stepped keeps its factors and step counts."""
    start = seeded(Net)
    plain = plain_copy(start)
    inner, stepped = Adafactor(groups(plain)), Adafactor(groups(start))
    for model, optimizer in ((plain, inner), (start, stepped)):
        for ids in batches(0, 2):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, stepped)
    for ids in batches(1, 2):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        loss_of(plain, ids).backward()
        inner.step()
        inner.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", [0, 3])
def test_state_built_before_sharding_is_kept(stage: int) -> None:
    assert max(run_ranks(takes_over_state, 2, 2, stage)) <= 2e-6


class CountsItself(Lamb):
    """Keeps a step count in its groups, as some do: one call of `step` a step, on ranks that own nothing too."""

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        super().step()


def few_parameters(rank: int, world_size: int) -> tuple[int, int, float]:
    start = seeded(lambda: nn.Linear(33, 7))
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=3)
    opt = zero.ShardedOptimizer(model, CountsItself(model.parameters()), whole_tensors=True)
    inner = Lamb(plain.parameters())
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(4, 33)
        for each, optimizer in ((model, opt), (plain, inner)):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for owned in opt.whole:
        assert owned.master.shape in {(7, 33), (7,)}
        assert owned.master.isnan().all(), "between steps there are no values, and no others in their place"
    return len(opt.whole), opt.param_groups[0]["count"], relative_error(
        zero.full_state_dict(model), plain.state_dict()
    )  # fmt: skip


def test_more_ranks_than_parameters() -> None:
    found = run_ranks(few_parameters, 4, 4)
    assert [owned for owned, _, _ in found] == [1, 1, 0, 0]
    assert [count for _, count, _ in found] == [3] * 4
    assert max(error for _, _, error in found) <= 1e-6


def refusals(rank: int, world_size: int) -> None:
    mesh = dp_mesh(world_size)
    model = zero.shard(seeded(Net), mesh, stage=1)
    params = list(model.parameters())
    with pytest.raises(zero.ZeroConfigError, match="LBFGS looks at all parameters at once"):
        zero.ShardedOptimizer(model, torch.optim.LBFGS(params))
    with pytest.raises(zero.ZeroConfigError, match="SparseAdam needs sparse gradients"):
        zero.ShardedOptimizer(model, torch.optim.SparseAdam(params))
    with pytest.raises(zero.ZeroConfigError, match="Adafactor updates whole tensors"):
        zero.ShardedOptimizer(model, Adafactor(params), whole_tensors=False)
    with pytest.raises(zero.ZeroConfigError, match="a stepper gets slices"):
        zero.ShardedOptimizer(model, Lamb(params), whole_tensors=True, stepper=object())
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    whole = zero.ShardedOptimizer(model, Lamb(params), whole_tensors=True)
    other = zero.shard(seeded(Net), mesh, stage=1)
    slices = zero.ShardedOptimizer(other, Lamb(other.parameters()))
    with pytest.raises(zero.ZeroConfigError, match="build this one with whole_tensors=True"):
        slices.load_state_dict(whole.state_dict())


def test_what_cannot_work_is_refused() -> None:
    run_ranks(refusals, 1, 1)

"""State dicts of optimizers: whatever was frozen, parameters get their own state; what does not fit is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
from torch import nn
from torch.optim import SGD, AdamW
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, seeded

BF16 = zero.Precision(compute=torch.bfloat16)


def stack() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))


def built(stage: int, world_size: int, *, frozen: bool, whole: bool = False):
    model = seeded(stack)
    model[0].requires_grad_(not frozen)
    model = zero.shard(model, dp_mesh(world_size), stage=stage, precision=BF16)
    inner = AdamW(model.parameters(), lr=1e-2)
    return model, zero.ShardedOptimizer(model, inner, whole_tensors=whole)


def train(model: nn.Module, opt: zero.ShardedOptimizer, rank: int, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(10 * step + rank)
        model(torch.randn(2, 64)).square().mean().backward()
        zero.clip_grad_norm(opt, 1e-3)
        opt.step()
        opt.zero_grad()


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = zero.full_state_dict(one), zero.full_state_dict(other)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def resume_after_an_unfreeze(rank: int, world_size: int, stage: int, whole: bool) -> None:
    model, opt = built(stage, world_size, frozen=True, whole=whole)
    train(model, opt, rank, 0, 2)
    asleep = copy.deepcopy((zero.full_state_dict(model), opt.state_dict()))
    model[0].requires_grad_(True)
    train(model, opt, rank, 2, 2)
    awake = copy.deepcopy((zero.full_state_dict(model), opt.state_dict()))
    moments = {
        name: zero.get_full(model, name, optimizer=opt, what="exp_avg")
        for name in (f"{layer}.weight" for layer in range(4))
    }
    train(model, opt, rank, 4, 2)

    for frozen in (False, True):
        fresh, again = built(stage, world_size, frozen=frozen, whole=whole)
        if frozen:
            zero.load_full_state_dict(fresh, awake[0])
            with pytest.raises(
                zero.ZeroConfigError, match=r"'0\.weight' frozen here, but not where .* unfreeze before"
            ):
                again.load_state_dict(awake[1])
            fresh[0].requires_grad_(True)
        zero.load_full_state_dict(fresh, awake[0])
        again.load_state_dict(awake[1])
        for name, expected in moments.items():
            assert torch.equal(zero.get_full(fresh, name, optimizer=again, what="exp_avg"), expected), name
        train(fresh, again, rank, 4, 2)
        assert same(fresh, model)

    for frozen in (False, True):  # saved before it woke
        fresh, again = built(stage, world_size, frozen=frozen, whole=whole)
        zero.load_full_state_dict(fresh, asleep[0])
        again.load_state_dict(asleep[1])
        fresh[0].requires_grad_(True)
        train(fresh, again, rank, 2, 4)
        assert same(fresh, model)


@pytest.mark.parametrize(("stage", "whole"), [(0, False), (1, False), (3, False), (0, True), (2, True)])
def test_state_finds_its_parameters_whenever_they_were_unfrozen(stage: int, whole: bool) -> None:
    run_ranks(resume_after_an_unfreeze, 2, 2, stage, whole)


def one_by_one(rank: int, world_size: int) -> list[str]:
    model = seeded(stack)
    model[:3].requires_grad_(False)
    model = zero.shard(model, dp_mesh(world_size), stage=2)
    opt = zero.ShardedOptimizer(model, AdamW(model.parameters(), lr=1e-2), whole_tensors=True)
    for layer in (2, 1, 0):
        model[layer].requires_grad_(True)
        train(model, opt, rank, layer, 1)
    return [owned.name for owned in opt.whole]


def test_layers_that_wake_one_by_one_are_shared_out() -> None:
    owned = run_ranks(one_by_one, 2, 2)
    assert sorted(len(names) for names in owned) == [2, 2]
    assert sorted(owned[0] + owned[1]) == [f"{layer}.weight" for layer in range(4)]


def exchanged(rank: int, told: dict) -> list[dict]:
    """Every rank's state dict, as if all had read each other's files."""
    everyone: list[dict] = [{}, {}]
    torch.distributed.all_gather_object(everyone, told)
    return everyone


def another_ranks_state(rank: int, world_size: int, stage: int) -> None:
    model, opt = built(stage, world_size, frozen=False)
    train(model, opt, rank, 0, 1)
    earlier = copy.deepcopy(opt.state_dict())
    train(model, opt, rank, 1, 1)
    states = exchanged(rank, copy.deepcopy(opt.state_dict()))
    before, kept = zero.full_state_dict(model), copy.deepcopy(opt.state_dict())
    refused = {
        "first": (
            states[0],
            r"expected the state of rank 1 of 2 at stage \d, got that of rank 0 of 2 at stage \d",
        ),
        "torch's": (AdamW(stack().parameters()).state_dict(), r"got entries \['param_groups', 'state'\]"),
        "nothing": (None, "got NoneType"),
        "damaged": (states[rank] | {"masters": {}}, "the masters of '.* are not in the state"),
        "one rank's": (states[rank] if rank else {}, r"got entries \[\].*\(rank 0 of 2\)"),
        "earlier": (earlier if rank else states[0], "the first of step 2, rank 1 of step 1"),
    }
    if stage == 0:
        opt.load_state_dict(states[0])  # every rank has all
        del refused["first"]
    for given, message in refused.values():
        with pytest.raises(zero.ZeroConfigError, match=message):
            opt.load_state_dict(given)
    after = zero.full_state_dict(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    now = opt.state_dict()
    assert now["num_steps"] == 2
    for number, state in kept["inner"]["state"].items():
        assert torch.equal(state["exp_avg"], now["inner"]["state"][number]["exp_avg"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_not_this_ranks_is_refused_on_every_rank(stage: int) -> None:
    run_ranks(another_ranks_state, 2, 2, stage)


def another_layout(rank: int, world_size: int) -> None:
    model, opt = built(2, world_size, frozen=False)
    saved = opt.state_dict()
    others = {
        "at stage 3, got that of rank . of 2 at stage 2": zero.shard(seeded(stack), dp_mesh(2), stage=3),
        "the units or shapes are others": zero.shard(
            seeded(lambda: nn.Sequential(*(nn.Linear(64, 128, bias=False) for _ in range(4)))),
            dp_mesh(2),
            stage=2,
        ),
    }
    for message, other in others.items():
        fresh = zero.ShardedOptimizer(other, AdamW(other.parameters(), lr=1e-2))
        with pytest.raises(zero.ZeroConfigError, match=message):
            fresh.load_state_dict(saved)
    for parameters, message in (
        (
            list(model[:2].parameters()),
            r"group 0: .* alone has '2\.weight', '3\.weight', this optimizer alone nothing",
        ),
        ([{"params": model[:2].parameters()}, {"params": model[2:].parameters()}], "expected 2 groups"),
    ):
        fresh = zero.ShardedOptimizer(model, AdamW(parameters, lr=1e-2))
        with pytest.raises(zero.ZeroConfigError, match=message):
            fresh.load_state_dict(saved)


def test_the_state_of_another_layout_says_what_differs() -> None:
    run_ranks(another_layout, 2, 2)


class Shared(nn.Module):
    """One unit, whose two parameters have an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(48))
        self.two = nn.Parameter(torch.ones(80))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.one.sum() + self.two.square().sum()) * x


def of_its_own_parameters(rank: int, world_size: int, stage: int) -> None:
    model = zero.shard(Shared(), dp_mesh(world_size), stage=stage)
    opts = [zero.ShardedOptimizer(model, SGD([p], lr=0.1, momentum=0.9)) for p in (model.one, model.two)]
    assert len(zero.sharded(model).units) == 1
    kept = copy.deepcopy(opts[0].state_dict())
    assert kept["masters"].keys() <= {"one"}
    model(torch.ones(())).backward()
    for opt in opts:
        opt.step()
    before = zero.full_state_dict(model)
    opts[0].load_state_dict(kept)
    after = zero.full_state_dict(model)
    assert torch.equal(after["one"], torch.ones(48))
    assert torch.equal(after["two"], before["two"])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_load_writes_the_parameters_of_its_optimizer_alone(stage: int) -> None:
    run_ranks(of_its_own_parameters, 2, 2, stage)

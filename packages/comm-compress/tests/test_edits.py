"""What something else writes to parameters counts: it is stepped from, saved, and never undone by a master."""

from __future__ import annotations

from typing import Any

import comm_compress as cc
import pytest
import torch
from optimizer_models import BUILD, SMALL, Net, loss_of, same, values
from zero_core.testing import run_ranks

ALONE_AFTER = 11
"""Steps after which ZeroOneAdam, as `BUILD` makes it, has stepped alone once."""


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Net, Any]:
    model = Net(dtype)
    return model, BUILD[kind](model.parameters(), compression=SMALL)


def train(model: Net, optimizer: Any, rank: int, first: int, last: int) -> None:
    for step in range(first, last + 1):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def write(model: Net) -> None:
    with torch.no_grad():
        model.first.weight.fill_(0.5)


def edit(rank: int, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model, optimizer = make(kind, dtype)
    done = 0
    for step in (4, 12):
        train(model, optimizer, rank, done + 1, step - 1)
        if kind == "ZeroOneAdam":
            optimizer.synchronize()
        write(model)
        train(model, optimizer, rank, step, step)
        assert (model.first.weight - 0.5).abs().max() < 0.3
        assert not (model.first.weight == 0.5).all()
        done = step
    train(model, optimizer, rank, done + 1, 14)
    if kind == "ZeroOneAdam":
        optimizer.synchronize()
    return values(model)


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_are_stepped_from(kind: str, dtype: torch.dtype) -> None:
    one, other = run_ranks(edit, 2, kind, dtype)
    assert same(one, other)


def other_memory(rank: int, shard: bool, dtype: torch.dtype) -> None:
    """Memory that parameters are given is seen; what is written through `.data`, once `take_values` says so."""
    param = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = cc.OneBitAdam([param], lr=1e-3, shard=shard)

    def step() -> None:
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.nn.utils.vector_to_parameters(torch.full((4,), 7.0, dtype=dtype), [param])
    step()
    assert (param.detach() - 7.0).abs().max() < 0.1
    param.data.fill_(5.0)
    optimizer.take_values()
    step()
    assert (param.detach() - 5.0).abs().max() < 0.1


@pytest.mark.parametrize(("shard", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_parameters_that_are_given_other_memory(shard: bool, dtype: torch.dtype) -> None:
    run_ranks(other_memory, 2, shard, dtype)


def save_edited(rank: int) -> None:
    """A state that is saved right after an edit knows of it."""
    for saved_as_ranges in (False, True):
        model, optimizer = make("OneBitAdam", torch.bfloat16)
        train(model, optimizer, rank, 1, 7)
        write(model)
        other, resumed = make("OneBitAdam", torch.bfloat16)
        other.load_state_dict(values(model))
        if saved_as_ranges:
            room = resumed.sharded_room(optimizer.scalars())
            for name, shard in optimizer.sharded_state().items():
                room[name].local.copy_(shard.local)
            resumed.load_sharded_state(optimizer.scalars(), room)
        else:
            resumed.load_state_dict(optimizer.state_dict())
        train(other, resumed, rank, 8, 8)
        train(model, optimizer, rank, 8, 8)
        assert (other.first.weight - 0.5).abs().max() < 0.3
        assert same(values(other), values(model))


def test_edits_are_saved() -> None:
    run_ranks(save_edited, 2)


def edit_apart(rank: int, dtype: torch.dtype) -> None:
    """Where each rank has values of its own, an edit would keep them apart for ever."""
    model, optimizer = make("ZeroOneAdam", dtype)
    train(model, optimizer, rank, 1, ALONE_AFTER)
    assert optimizer.steps_since_sync == 1
    before = values(model)
    write(model)
    refused = pytest.raises(
        cc.CompressStateError, match=r"'param.\d+' was written while each rank .* call synchronize"
    )
    with refused:
        optimizer.state_dict()
    with refused:
        optimizer.synchronize()
    with pytest.raises(cc.CompressStateError, match=r"take_values: .* call synchronize"):
        optimizer.take_values()
    with refused, optimizer.shared_values():
        pass
    loss_of(model, rank, ALONE_AFTER + 1).backward()
    with refused:
        optimizer.step()
    assert optimizer.num_steps == ALONE_AFTER
    model.load_state_dict(before)  # what it showed: no edit
    optimizer.synchronize()
    write(model)
    train(model, optimizer, rank, ALONE_AFTER + 1, ALONE_AFTER + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_of_ranks_that_are_apart_are_refused(dtype: torch.dtype) -> None:
    run_ranks(edit_apart, 2, dtype)


def optimizer_first(rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Whether a model is loaded before its optimizer or after makes no difference."""
    model, optimizer = make("ZeroOneAdam", dtype)
    train(model, optimizer, rank, 1, ALONE_AFTER)
    parameters, state = values(model), optimizer.state_dict()
    other, resumed = make("ZeroOneAdam", dtype)
    resumed.load_state_dict(state)
    other.load_state_dict(parameters)
    train(other, resumed, rank, ALONE_AFTER + 1, 20)
    train(model, optimizer, rank, ALONE_AFTER + 1, 20)
    assert same(values(other), values(model))
    resumed.synchronize()
    return values(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_may_be_loaded_after_its_optimizer(dtype: torch.dtype) -> None:
    one, other = run_ranks(optimizer_first, 2, dtype)
    assert same(one, other)

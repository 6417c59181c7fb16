"""Parameters are the same bits on every rank, whatever the ranks' gradients are: missing, or not finite on one."""

from __future__ import annotations

from typing import Any

import comm_compress as cc
import pytest
import torch
from comm_compress.optimizers.rounds import Travel
from optimizer_models import BUILD, SMALL, Net, loss_of, same, values
from zero_core.testing import run_ranks

STEPS = 26
BAD = (3, 9, 15, 17)


def shared(optimizer: Any, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What all ranks have in common."""
    if isinstance(optimizer, cc.ZeroOneAdam):
        with optimizer.shared_values():
            return values(model)
    return values(model)


def train(
    rank: int, world: int, kind: str, dtype: torch.dtype, more: dict[str, Any]
) -> tuple[list[Any], list[bool], list[bool], list[bool]]:
    model = Net(dtype)
    optimizer = BUILD[kind](
        [{"params": [p for n, p in model.named_parameters() if "side" not in n]},
         {"params": list(model.side.parameters()), "lr": 2e-3, "weight_decay": 0.01}],
        weight_decay=0.1, compression=SMALL, **more,
    )  # fmt: skip
    history, skipped, moved, alone = [], [], [], []
    for step in range(1, STEPS + 1):
        before = values(model)
        used = step % 4 != 3 and rank != world - 1  # the last rank never, the others mostly
        loss_of(model, rank, step, side=used).backward()
        if step in BAD and rank == step % world:
            with torch.no_grad():
                model.last.weight.grad[0, 0] = float("nan") if step == 9 else float("inf")
        alone.append(optimizer.travel() is Travel.NOTHING)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.last_step_skipped)
        moved.append(not torch.equal(before["side.weight"], model.side.weight))
        assert all(torch.isfinite(param).all() for param in model.parameters())
        history.append(shared(optimizer, model))
    if isinstance(optimizer, cc.ZeroOneAdam):
        optimizer.synchronize()
    history.append(values(model))
    return history, skipped, moved, alone


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    world = 3
    ranks = run_ranks(train, world, world, kind, dtype, {})
    first = ranks[0][0]
    for history, skipped, _, _ in ranks:
        assert all(same(one, other) for one, other in zip(history, first, strict=True))
        assert skipped == ranks[0][1]
    assert not same(first[0], first[-1])
    skipped, moved, alone = ranks[0][1:]
    # Where ranks talk to each other they skip together; where they do not, one leaves its gradient out.
    assert skipped == [step in BAD and not alone[step - 1] for step in range(1, STEPS + 1)]
    if kind != "ZeroOneAdam":
        assert not any(alone)
        # What no rank has a gradient of stays as it is, momentum or not; what one has moves on all.
        assert moved == [step % 4 != 3 and step not in BAD for step in range(1, STEPS + 1)]
    else:
        assert {alone[step - 1] for step in BAD} == {True, False}


@pytest.mark.parametrize("kind", ["OneBitAdam", "OneBitLamb"])
def test_sharded_warm_up_is_the_same(kind: str) -> None:
    whole = run_ranks(train, 2, 2, kind, torch.float32, {})
    parts = run_ranks(train, 2, 2, kind, torch.float32, {"shard": True})
    for (history, skipped, moved, _), (other, other_skipped, other_moved, _) in zip(
        whole, parts, strict=True
    ):
        assert (skipped, moved) == (other_skipped, other_moved)
        for one, two in zip(history, other, strict=True):
            for name in one:
                torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert all(same(a, b) for a, b in zip(parts[0][0], parts[1][0], strict=True))


def skip_changes_nothing(rank: int, kind: str) -> None:
    model = Net()
    optimizer = BUILD[kind](model.parameters(), compression=SMALL)
    for step in range(1, 16):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step not in (3, 11):
            continue
        before, state = values(model), optimizer.state_dict()
        kept = {
            i: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for i, s in state["state"].items()
        }
        loss_of(model, rank, step).backward()
        if rank == 1:
            model.first.bias.grad[2] = float("inf")
        optimizer.step()
        optimizer.zero_grad()
        if kind == "ZeroOneAdam" and not optimizer.last_step_skipped:
            continue  # this rank stepped alone
        assert optimizer.last_step_skipped
        assert same(before, values(model))
        for index, tensors in kept.items():
            now = optimizer.state_dict()["state"][index]
            assert all(torch.equal(tensors[key], now[key]) for key in tensors)


@pytest.mark.parametrize("kind", list(BUILD))
def test_a_skipped_step_leaves_momenta_and_residuals(kind: str) -> None:
    run_ranks(skip_changes_nothing, 2, kind)


def narrow(rank: int, kind: str, more: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A gradient that is finite where it was made, and an infinity on the wire."""
    narrowed = cc.Compression(bucket_bytes=600, reduce_dtype=torch.float16)
    model = Net()
    optimizer = BUILD[kind](model.parameters(), compression=narrowed, **more)
    for step in range(1, 9):
        loss_of(model, rank, step).backward()
        before, num_steps = values(model), optimizer.num_steps
        if step == 2 and rank == 1:
            model.first.bias.grad[2] = 3e5  # float16 ends at 65504
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step_skipped == (step == 2)
        assert same(before, values(model)) == (step == 2)
        assert optimizer.num_steps - num_steps == (step != 2)
    return values(model)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("OneBitAdam", {}), ("OneBitAdam", {"shard": True}), ("OneBitLamb", {}), ("ZeroOneAdam", {})],
)
def test_what_overflows_on_the_wire_alone_is_skipped(kind: str, more: dict[str, Any]) -> None:
    one, other = run_ranks(narrow, 2, kind, more)
    assert same(one, other)
    assert all(torch.isfinite(value).all() for value in one.values())


def seeded_apart(rank: int) -> str:
    torch.manual_seed(rank)
    model = torch.nn.Linear(4, 4)
    optimizer = cc.OneBitAdam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(cc.CompressStateError) as refused:
        optimizer.step()
    return str(refused.value)


def test_ranks_that_begin_apart_are_told() -> None:
    for text in run_ranks(seeded_apart, 2):
        assert "expected the same parameters on every rank before the first step" in text


def die(rank: int) -> str:
    model = Net()
    optimizer = cc.OneBitAdam(
        model.parameters(), freeze_step=2, compression=cc.Compression(timeout_s=2.0, bucket_bytes=600)
    )
    for step in range(1, 5):
        if step == 4 and rank == 1:
            return ""
        loss_of(model, rank, step).backward()
        if step == 4:
            with pytest.raises(RuntimeError) as failure:
                optimizer.step()
            return str(failure.value)
        optimizer.step()
        optimizer.zero_grad()
    return ""


def test_a_rank_that_is_gone_is_an_error_not_a_hang() -> None:
    text = run_ranks(die, 2)[0]
    assert "verdict on gradients" in text
    assert "step 4" in text

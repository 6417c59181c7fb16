"""The optimizers on a model of zero-core: the steps of a plain loop, with its precision, loss scale and state."""

from __future__ import annotations

import copy
from typing import Any

import comm_compress as cc
import pytest
import torch
import zero_core as zero
from optimizer_models import BUILD, SMALL, Net, loss_of, same, values
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks

STEPS = 16


def mesh() -> Any:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",))


def on_zero(kind: str, *, precision: Any = None, scaler: Any = None, **more: Any) -> tuple[Net, Any]:
    model = Net()
    inner = BUILD[kind](model.parameters(), **{"compression": SMALL, **more})
    model = zero.shard(model, mesh(), stage=0, collectives=cc.LocalGradients, precision=precision)
    return model, cc.ZeroCompressedOptimizer(model, inner, scaler=scaler)


def beside_plain(rank: int, kind: str, clip: bool) -> None:
    plain = Net()
    reference = BUILD[kind](plain.parameters(), compression=SMALL)
    reference.agrees_always = True
    model, optimizer = on_zero(kind)
    for step in range(1, STEPS + 1):
        for one, its in ((plain, reference), (model, optimizer)):
            loss_of(one, rank, step, side=step % 4 != 0).backward()
            loss_of(one, rank, step + 100, side=False).backward()
            if clip:
                norm = its.clip_grad_norm(1.0)
            its.step()
            its.zero_grad()
            if clip and its is reference:
                expected = norm
        if clip:
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        for name, value in values(plain).items():
            torch.testing.assert_close(values(model)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize("clip", [False, True])
def test_the_same_steps(kind: str, clip: bool) -> None:
    run_ranks(beside_plain, 2, kind, clip)


def mixed(rank: int, kind: str, dtype: torch.dtype) -> tuple[list[Any], list[bool], list[float]]:
    scaler = zero.LossScaler(2.0**8) if dtype == torch.float16 else None
    precision = zero.Precision(compute=dtype, accumulate=torch.float32)
    model, optimizer = on_zero(kind, precision=precision, scaler=scaler, weight_decay=0.1)
    assert optimizer.inner.compression.reduce_dtype == torch.float32
    history, skipped, scales = [], [], []
    for step in range(1, STEPS + 1):
        loss = loss_of(model, rank, step)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if step in (3, 11) and rank == 1:
            next(iter(optimizer._lanes)).shard.value[0] = float("inf")
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.last_step_skipped)
        scales.append(1.0 if scaler is None else scaler.value)
        with optimizer.shared_values():
            history.append(values(model))
    assert {value.dtype for value in history[0].values()} == {dtype}
    masters = zero.sharded_state(model, optimizer)
    assert masters["optimizer.first.weight.master"].dtype == torch.float32
    return history, skipped, scales


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_overflow_on_one_rank(kind: str, dtype: torch.dtype) -> None:
    ranks = run_ranks(mixed, 2, kind, dtype)
    for history, skipped, scales in ranks:
        assert skipped == [
            step in (3, 11) for step in range(1, STEPS + 1)
        ]  # on both, with a scaler or without
        assert scales == ranks[0][2]
        assert all(same(one, other) for one, other in zip(history, ranks[0][0], strict=True))
    if dtype == torch.float16:
        assert ranks[0][2][-1] == 2.0**6  # the scale has backed off twice, on both


def resume(rank: int, kind: str, dtype: torch.dtype, more: dict[str, Any]) -> None:
    precision = zero.Precision(compute=dtype)
    model, optimizer = on_zero(kind, precision=precision, **more)
    saved = {}
    for step in range(1, STEPS + 1):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (3, 9, 14):
            with optimizer.shared_values():
                described = zero.sharded_state(model, optimizer)
                parameters = {name: shard.local.clone() for name, shard in described.items()}
                state = {name: shard.local.clone() for name, shard in optimizer.compressed_state().items()}
            saved[step] = parameters, state, optimizer.compressed_scalars()
            assert all(shard.global_shape for name, shard in described.items() if name.endswith("weight"))
    for step, (parameters, state, scalars) in saved.items():
        other, resumed = on_zero(kind, precision=precision, **more)
        zero.load_sharded_state(other, resumed, parameters)
        room = resumed.compressed_room(scalars)
        assert room.keys() == state.keys()
        for name, shard in room.items():
            shard.local.copy_(state[name])
        resumed.load_compressed(scalars, room)
        for later in range(step + 1, STEPS + 1):
            loss_of(other, rank, later).backward()
            resumed.step()
            resumed.zero_grad()
        assert same(values(other), values(model)), step


@pytest.mark.parametrize("kind", list(BUILD))
def test_resume_is_bit_for_bit(kind: str) -> None:
    run_ranks(resume, 2, kind, torch.float32, {})
    run_ranks(resume, 2, kind, torch.bfloat16, {})
    if kind != "ZeroOneAdam":
        run_ranks(resume, 2, kind, torch.bfloat16, {"shard": True})


def refuse(rank: int) -> None:
    model = Net()
    inner = cc.OneBitAdam(model.parameters())
    model = zero.shard(model, mesh(), stage=1)
    with pytest.raises(
        cc.CompressConfigError, match=r"stage 1 with PlainCollectives; shard it with .*LocalGradients"
    ):
        cc.ZeroCompressedOptimizer(model, inner)
    model = Net()
    model = zero.shard(model, mesh(), stage=0, collectives=cc.LocalGradients)
    with pytest.raises(
        cc.CompressConfigError, match="expected OneBitAdam, ZeroOneAdam or OneBitLamb, got AdamW"
    ):
        cc.ZeroCompressedOptimizer(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    used = cc.OneBitAdam(model.parameters())
    loss_of(model, rank, 1).backward()
    used.step()
    with pytest.raises(cc.CompressConfigError, match="one that has been used"):
        cc.ZeroCompressedOptimizer(model, used)


def test_refusals() -> None:
    run_ranks(refuse, 1)


def edit(rank: int) -> None:
    model, optimizer = on_zero("ZeroOneAdam")
    for step in range(1, 12):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.inner.steps_since_sync == 0 and step > 6:
            with torch.no_grad():
                model.first.weight.fill_(0.5)
            loss_of(model, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            with optimizer.shared_values():
                assert (model.first.weight - 0.5).abs().max() < 0.1
            break
    while optimizer.inner.steps_since_sync == 0:
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.first.weight.fill_(0.5)
    loss_of(model, rank, step).backward()
    with pytest.raises(cc.CompressStateError, match=r"call optimizer.inner.synchronize\(\) before it"):
        optimizer.step()


def test_edits_of_parameters() -> None:
    run_ranks(edit, 2)


def plain_resume(rank: int) -> None:
    """Parameters first, then the optimizer's state, of a step between synchronizations."""
    model, optimizer = on_zero("ZeroOneAdam")
    for step in range(1, 15):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.inner.steps_since_sync > 0
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed = on_zero("ZeroOneAdam")
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert same(values(other), values(model))
    for each, opt in ((model, optimizer), (other, resumed)):
        for step in range(15, 20):
            loss_of(each, rank, step).backward()
            opt.step()
            opt.zero_grad()
    assert same(values(other), values(model))


def test_parameters_loaded_before_the_state_belong_to_it() -> None:
    run_ranks(plain_resume, 2)

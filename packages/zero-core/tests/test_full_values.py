"""Full values in and out: state dicts, streams and edits under plain names, at every stage."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, relative_error, seeded


def sharded_net(world_size: int, stage: int, seed: int = 0, **kwargs):
    model = zero.shard(seeded(lambda: Net(unused=True), seed), dp_mesh(world_size), stage=stage, **kwargs)
    return model, zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(model, opt, rank: int, steps: int, skip: int = 0) -> list[float]:
    losses = []
    for ids in list(batches(rank, skip + steps))[skip:]:
        loss = loss_of(model, ids)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def round_trip(rank: int, world_size: int, stage: int) -> None:
    expected = {n: v.clone() for n, v in seeded(lambda: Net(unused=True)).state_dict().items()}
    model, _ = sharded_net(world_size, stage)
    found = zero.full_state_dict(model)
    assert list(found) == list(expected)
    assert relative_error(found, expected) == 0
    assert found["embed.weight"] is found["head.weight"]
    assert all(v.is_contiguous() for v in found.values())
    alone = zero.full_state_dict(model, rank0_only=True)
    assert (len(alone) == len(expected)) is (rank == 0)
    part = zero.full_state_dict(model.blocks[1])
    assert relative_error(part, {n: expected[f"blocks.1.{n}"] for n in part}) == 0
    assert list(part) == list(model.blocks[1].state_dict()) if stage < 3 else True
    order = [name for name, _ in zero.stream_full(model)]
    assert sorted(order) == sorted(expected)

    other = {n: v + 1 for n, v in expected.items()}
    zero.load_full_state_dict(model, other if rank == 0 else None)
    assert relative_error(zero.full_state_dict(model), other) == 0

    broken = dict(other)
    broken["blocks.0.up.bias"] = torch.zeros(3)
    broken["stray"] = broken.pop("norm.bias")
    with pytest.raises(
        zero.ZeroConfigError, match=r"missing: norm\.bias; unexpected: stray; 'blocks\.0\.up\.bias'"
    ):
        zero.load_full_state_dict(model, broken if rank == 0 else None)
    assert relative_error(zero.full_state_dict(model), other) == 0
    zero.load_full_state_dict(
        model, {"norm.bias": torch.full((19,), 5.0)} if rank == 0 else None, strict=False
    )
    assert zero.full_state_dict(model)["norm.bias"].tolist() == [5.0] * 19


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_dict_round_trip(stage: int) -> None:
    run_ranks(round_trip, 3, 3, stage)


class Scaled(nn.Linear):
    """A layer with state that is no tensor."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(2))
        self.amax: object = {"history": torch.zeros(3), "name": "new"}

    def get_extra_state(self) -> object:
        return self.amax

    def set_extra_state(self, state: object) -> None:
        self.amax = state


def extra_state(rank: int, world_size: int, stage: int) -> None:
    plain = seeded(lambda: nn.Sequential(Scaled(), nn.Linear(4, 4), Scaled()))
    model = zero.shard(copy.deepcopy(plain), dp_mesh(world_size), stage=stage)
    assert list(zero.full_state_dict(model)) == list(plain.state_dict())
    with torch.no_grad():
        plain[0].weight.fill_(2.0)
    plain[0].amax = {"history": torch.arange(3), "name": "known"}
    zero.load_full_state_dict(model, plain.state_dict() if rank == 0 else None)
    assert model[0].amax["name"] == "known"
    assert model[0].amax["history"].tolist() == [0, 1, 2]
    found = zero.full_state_dict(model)
    plain.load_state_dict(found)
    assert plain[0].amax == found["0._extra_state"]
    assert list(zero.full_state_dict(model[2])) == list(plain[2].state_dict())

    given = plain.state_dict()
    del given["2._extra_state"]
    with pytest.raises(zero.ZeroConfigError, match=r"missing: 2\._extra_state"):
        zero.load_full_state_dict(model, given if rank == 0 else None)
    zero.load_full_state_dict(model, given if rank == 0 else None, strict=False)
    given = plain.state_dict() | {"0._extra_state": lambda: None, "1.bias": torch.full((4,), 7.0)}
    with pytest.raises(zero.ZeroConfigError, match=r"0\._extra_state.* cannot be sent"):
        zero.load_full_state_dict(model, given if rank == 0 else None)
    assert not (zero.full_state_dict(model)["1.bias"] == 7).any()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_extra_state_is_in_the_state_dict_and_comes_back(stage: int) -> None:
    run_ranks(extra_state, 2, 2, stage)


def ranks_start_from_the_first_ranks_values(rank: int, world_size: int, stage: int) -> float:
    model, _ = sharded_net(world_size, stage, seed=rank)
    return relative_error(zero.full_state_dict(model), seeded(lambda: Net(unused=True)).state_dict())


@pytest.mark.parametrize("stage", [1, 3])
def test_first_ranks_values_win(stage: int) -> None:
    assert run_ranks(ranks_start_from_the_first_ranks_values, 2, 2, stage) == [0.0, 0.0]


def edits(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    model, opt = sharded_net(world_size, stage, precision=zero.Precision(compute=dtype))
    train(model, opt, rank, 2)
    with zero.materialized(model.blocks[0]), torch.no_grad():
        assert model.blocks[0].up.weight.abs().sum() > 0
        if stage == 3:
            with pytest.raises(zero.ReleasedParameterError):
                model.blocks[1].up.weight.sum()
    with (
        pytest.raises(zero.ZeroStateError, match="pass write=True"),
        zero.materialized(model),
        torch.no_grad(),
    ):
        model.norm.weight.zero_()
    with zero.materialized(model, write=True), torch.no_grad():
        for param in model.parameters():
            param.fill_(0.25)
        expected = model(next(iter(batches(0, 1)))).clone()
    found = zero.full_state_dict(model)
    assert all((v == 0.25).all() for n, v in found.items() if n != "bias")
    assert torch.equal(model(next(iter(batches(0, 1)))), expected)
    train(model, opt, rank, 1)  # masters followed: one small step from 0.25, not back to the old values
    moved = zero.full_state_dict(model)["blocks.0.up.weight"].float()
    assert 0 < (moved - 0.25).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_materialized_reads_and_writes(stage: int, dtype: torch.dtype) -> None:
    run_ranks(edits, 2, 2, stage, dtype)


def masters_of(opt) -> dict[str, torch.Tensor]:
    return {slot.name: slot.master.detach().clone() for slots in opt.slots.values() for slot in slots}


def edit_beside(rank: int, world_size: int, stage: int) -> None:
    """An edit of one parameter rounds no other's master, whichever way it is made."""
    model, opt = sharded_net(world_size, stage, precision=zero.Precision(compute=torch.bfloat16))
    train(model, opt, rank, 2)
    before = masters_of(opt)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in before.values()), (
        "masters hold no more digits"
    )
    with zero.materialized(model, write=True), torch.no_grad():
        model.blocks[0].up.weight.data.fill_(0.5)  # counts no version
    if stage < 3:
        with torch.no_grad():
            model.blocks[1].up.bias.fill_(0.25)
        for lane in opt._lanes:
            lane.unit.take_edits()
    changed = {n for n, v in masters_of(opt).items() if not torch.equal(v, before[n])}
    assert changed <= {"blocks.0.up.weight"} | ({"blocks.1.up.bias"} if stage < 3 else set())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_edit_leaves_the_digits_of_other_masters_alone(stage: int) -> None:
    run_ranks(edit_beside, 2, 2, stage)


def two_optimizers(rank: int, world_size: int, stage: int) -> None:
    """Masters of the part that an optimizer's state does not describe follow the parameters that are loaded."""
    mesh = dp_mesh(world_size)
    model = zero.shard(
        seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))),
        mesh,
        stage=stage,
        units=lambda name, module: isinstance(module, nn.Linear),
        precision=zero.Precision(compute=torch.bfloat16),
    )
    first, second = (
        zero.ShardedOptimizer(model, torch.optim.SGD(part.parameters(), lr=0.1)) for part in model
    )
    values = {
        name: torch.full_like(shard.local, 0.5) for name, shard in zero.sharded_state(model, first).items()
    }
    zero.load_sharded_state(model, first, values)
    for opt in (first, second):
        assert all((master == 0.5).all() for master in masters_of(opt).values())
    assert all((value == 0.5).all() for value in zero.full_state_dict(model).values())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_masters_that_are_not_loaded_follow_the_parameters(stage: int) -> None:
    run_ranks(two_optimizers, 2, 2, stage)


def resume(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    """Descriptions and scalars carry a run over to a new model and optimizer, exactly."""
    precision = zero.Precision(compute=dtype)
    model, opt = sharded_net(world_size, stage, precision=precision)
    train(model, opt, rank, 3)
    described = zero.sharded_state(model, opt)
    total: dict[str, int] = {}
    for name, shard in described.items():
        assert shard.local.dim() == 1
        assert shard.offsets[0] + shard.local.numel() <= max(1, torch.Size(shard.global_shape).numel())
        total[name] = shard.local.numel()
    saved = {name: shard.local.clone() for name, shard in described.items()}
    scalars = zero.optimizer_scalars(opt)
    kept = copy.deepcopy(opt.state_dict())
    expected = train(model, opt, rank, 2, skip=3)

    other, other_opt = sharded_net(world_size, stage, seed=5, precision=precision)
    zero.load_sharded_state(other, other_opt, saved)
    zero.load_optimizer_scalars(other_opt, scalars)
    assert train(other, other_opt, rank, 2, skip=3) == expected

    third, third_opt = sharded_net(world_size, stage, seed=6, precision=precision)
    third_opt.load_state_dict(kept)
    if dtype == torch.float32:
        zero.load_sharded_state(
            third, None, {n: v for n, v in saved.items() if not n.startswith("optimizer.")}
        )
    assert train(third, third_opt, rank, 2, skip=3) == expected

    with pytest.raises(zero.ZeroConfigError, match=r"missing 'optimizer\..*'|missing '"):
        zero.load_sharded_state(other, other_opt, {n: v for i, (n, v) in enumerate(saved.items()) if i})
    with pytest.raises(zero.ZeroConfigError, match=r"expected [0-9]+ elements, got"):
        zero.load_sharded_state(
            other,
            other_opt,
            {n: v.repeat(2)[: v.numel() + 1] for n, v in saved.items() if v.numel()},
            strict=False,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sharded_state_resumes_bit_for_bit(stage: int, dtype: torch.dtype) -> None:
    run_ranks(resume, 2, 2, stage, dtype)


def one_rank_is_given_wrong_tensors(rank: int, world_size: int, stage: int) -> None:
    model, opt = sharded_net(world_size, stage, overlap=zero.Overlap(timeout_s=20))
    train(model, opt, rank, 1)
    saved = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    train(model, opt, rank, 1, skip=1)
    before = zero.full_state_dict(model)
    wrong = next(name for name, values in saved.items() if values.numel())
    given = saved | {wrong: torch.zeros(saved[wrong].numel() + 1)} if rank == 1 else saved
    with pytest.raises(zero.ZeroConfigError, match=rf"'{wrong}': expected .*\(rank 1 of 2\)"):
        zero.load_sharded_state(model, opt, given)
    after = zero.full_state_dict(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    zero.load_sharded_state(model, opt, saved)
    assert any(not torch.equal(v, before[n]) for n, v in zero.full_state_dict(model).items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_one_rank_cannot_load_no_rank_loads(stage: int) -> None:
    run_ranks(one_rank_is_given_wrong_tensors, 2, 2, stage)


def released(rank: int, world_size: int) -> None:
    model, opt = sharded_net(world_size, 3)
    weight = model.blocks[1].up.weight
    assert weight.shape == (58, 19)
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert weight.requires_grad
    assert weight.numel() == 58 * 19
    assert isinstance(weight, nn.Parameter)
    assert "sharded" in repr(weight)
    assert "Linear" in repr(model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Net(unused=True).parameters())
    assert torch.zeros_like(weight).shape == weight.shape
    for like in (weight.new_zeros(2), weight.new_empty(2), weight.new_full((2,), 1), weight.new_ones(2)):
        assert type(like) is torch.Tensor
        assert (like.shape, like.dtype) == ((2,), weight.dtype)
    assert weight.new_tensor([1, 2]).tolist() == [1.0, 2.0]
    touches = [
        lambda: weight.sum(),
        lambda: weight + 1,
        lambda: torch.ones(2, 58) @ weight,
        lambda: weight[0],
        lambda: weight.data,
        lambda: weight.detach(),
        lambda: weight.tolist(),
        lambda: weight.numpy(),
        lambda: weight.clone(),
        lambda: nn.init.zeros_(weight),
        lambda: nn.functional.linear(torch.ones(1, 19), weight),
        lambda: torch.stack([weight, weight]),
        lambda: copy.deepcopy(weight),
        lambda: pickle.dumps(weight),
        lambda: weight.to("cpu", torch.float16),
        lambda: model.blocks[1].state_dict(),
        lambda: model.half(),
        lambda: bool((weight == 0).all()),
    ]
    for touch in touches:
        with pytest.raises(
            zero.ReleasedParameterError, match=r"'blocks\.1\.up\.weight'|'embed\.weight'|'blocks\.1\."
        ) as info:
            touch()
        assert "materialized" in str(info.value)
    with pytest.raises(zero.ZeroError, match="full_state_dict"):
        copy.deepcopy(model)
    train(model, opt, rank, 1)


def test_released_parameter_tells_the_truth_and_refuses_the_rest() -> None:
    run_ranks(released, 1, 1)


def as_numpy(rank: int, world_size: int) -> None:
    expected = {n: v.clone() for n, v in seeded(lambda: Net(unused=True)).state_dict().items()}
    model, _ = sharded_net(world_size, 3)
    specs = zero.full_specs(model)
    assert list(specs) == list(zero.full_state_dict(model))
    for _ in range(2):
        arrays = {name: tensor.numpy() for name, tensor in zero.stream_full(model)}
        assert {n: (torch.from_numpy(a).dtype, a.shape) for n, a in arrays.items()} == specs
    with zero.materialized(model):
        kept = {name: param.detach().numpy() for name, param in model.named_parameters()}
    for name, array in kept.items():  # an array keeps its memory, whatever becomes of the parameter
        assert torch.equal(torch.from_numpy(array), expected[name])
    assert relative_error(zero.full_state_dict(model), expected) == 0


def test_numpy_arrays_of_whole_parameters_outlive_them() -> None:
    run_ranks(as_numpy, 2, 2)

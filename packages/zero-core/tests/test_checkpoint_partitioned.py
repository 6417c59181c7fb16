"""Inputs that are identical on the ranks of a group: each rank keeps 1/N, gathers it in backward, computes the same."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from checkpoint_models import MATMULS, WIDTH, Layer, Layers, LiveBytes, gradients, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from zero_core.collectives import PlainCollectives
from zero_core.testing import run_ranks

COMBINATIONS = {
    "alone": {},
    "verified": {"verify": True},
    "host": {"host": True},
    "host, bounded": {"host": True, "host_bytes": 4096},
    "contiguous": {"contiguous_bytes": 1 << 14},
    "save_ops": {"saves": True},
    "contiguous, save_ops": {"contiguous_bytes": 1 << 14, "saves": True},
}


def make_policy(settings: dict, **more) -> zero.CheckpointPolicy:
    settings = {"min_bytes": 1, "partition": dist.group.WORLD, **settings, **more}
    if settings.pop("saves", False):
        settings["save_ops"] = MATMULS
    return zero.CheckpointPolicy(**settings)


def equal_to_none(rank: int, world_size: int) -> dict[str, bool]:
    torch.manual_seed(1)
    model, found = Layers(), {}
    x = torch.randn(5, WIDTH, requires_grad=True)  # 120 elements: 40 a rank, or 60
    mask = torch.rand(5, 2 * WIDTH)
    expected = gradients(model, lambda: model(x, mask), x)
    for name, settings in COMBINATIONS.items():
        with zero.checkpoint_modules(model, Layer, make_policy(settings)):
            found[name] = all(same(gradients(model, lambda: model(x, mask), x), expected) for _ in range(2))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_equal_to_the_last_bit(world_size: int) -> None:
    for found in run_ranks(equal_to_none, world_size, world_size):
        assert found == dict.fromkeys(COMBINATIONS, True)


def kept_bytes(rank: int, world_size: int, rows: int) -> tuple[int, int, int, int]:
    """Bytes that live between forward and backward: partitioned, whole; elements on the wire; how many gathers."""
    torch.manual_seed(1)
    model = Layers(4)
    x = torch.randn(rows, WIDTH)
    live = []
    sent: list[int] = []
    gather = PlainCollectives.all_gather

    def counted(self, shard, out, *, tag):
        sent.append(shard.numel())
        return gather(self, shard, out, tag=tag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainCollectives, "all_gather", counted)
        for policy in (zero.CheckpointPolicy(min_bytes=1, partition=dist.group.WORLD), None):
            with zero.checkpoint_modules(model, Layer, policy), LiveBytes() as counter:
                out = model(x).sum()
                live.append(counter.now - 4)
                assert not sent or policy is None, "nothing travels in forward"
                out.backward()
    return live[0], live[1], sum(sent), len(sent)


@pytest.mark.parametrize(("world_size", "rows"), [(2, 8), (3, 5), (4, 7)])
def test_each_rank_keeps_its_share(world_size: int, rows: int) -> None:
    share = -(-rows * WIDTH // world_size)
    for partitioned, whole, sent, gathers in run_ranks(kept_bytes, world_size, world_size, rows):
        assert whole == 4 * rows * WIDTH * 4
        assert partitioned == 4 * share * 4
        assert partitioned <= whole / world_size + 4 * 4
        assert (sent, gathers) == (4 * share, 4), "one gather for each checkpoint"


def unequal(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = Layers()
    x = torch.randn(4, WIDTH)
    with zero.checkpoint_modules(model, Layer, make_policy({"verify": True})):
        model(x).sum().backward()
        with torch.no_grad():
            model.first.bias[0] += 1e-3 * (rank == 2)
        with pytest.raises(
            zero.ZeroStateError,
            match=rf"inputs of 'layers\.0' that are identical on the 3 ranks.*on rank\(s\) 2 than.*this is rank {rank}",
        ):
            model(x)


def test_ranks_that_hold_other_values_are_named() -> None:
    run_ranks(unequal, 3, 3)


def permuted(rank: int, world_size: int) -> None:
    """Ranks hold the same numbers, in another order."""
    torch.manual_seed(0)
    model = Layers()
    x = torch.randn(7, WIDTH)
    others = [x.flip(0), x.flip(1), x.roll(1, 1), x.view(-1).roll(1).view_as(x), x[[1, 0, *range(2, 7)]]]
    with zero.checkpoint_modules(model, Layer, make_policy({"verify": True})):
        for other in others:
            with pytest.raises(zero.ZeroStateError, match=r"on rank\(s\) 1 than"):
                model.layers[0](other if rank == 1 else x)
        model.layers[0](x)


def test_the_same_values_in_another_order_are_not_the_same() -> None:
    run_ranks(permuted, 2, 2)


def absent(rank: int, world_size: int) -> str:
    torch.manual_seed(0)
    model = Layers()
    with zero.checkpoint_modules(model, Layer, make_policy({}, timeout_s=1.0)):
        model(torch.randn(4, WIDTH)).sum().backward()
        loss = model(torch.randn(4, WIDTH)).sum()
        if rank == 1:
            time.sleep(2.5)
            return ""
        with pytest.raises(zero.CollectiveError) as caught:
            loss.backward()
    return str(caught.value)


def test_a_rank_that_does_not_come_is_an_error_within_the_deadline() -> None:
    message = run_ranks(absent, 2, 2)[0]
    assert "gather of kept inputs of 'layers.2'" in message
    assert "within 1 s" in message


def tensor_parallel(rank: int, world_size: int) -> bool:
    """The case it is for: ranks hold parts of the weights and compute with the same inputs, beside ZeRO over "dp"."""
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(
        zero.ZeroConfigError, match=r"one dimension, got dimensions \('dp', 'tp'\); pass mesh"
    ):
        zero.CheckpointPolicy(partition=mesh)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    results = []
    for policy in (None, zero.CheckpointPolicy(min_bytes=1, partition=mesh["tp"], verify=True)):
        torch.manual_seed(0)
        model = Layers()
        for layer in model.layers:
            layer.drop.p = 0.0
            parallelize_module(layer, mesh["tp"], plan)
        handle = zero.checkpoint_modules(model, Layer, policy) if policy else None
        torch.manual_seed(mesh.get_local_rank("dp"))
        x = torch.randn(4, WIDTH)
        model(x).square().sum().backward()
        results.append([param.grad for param in model.parameters()])
        if handle:
            handle.close()
    local = [[grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads] for grads in results]
    return same(*local)


def test_under_tensor_parallelism() -> None:
    assert all(run_ranks(tensor_parallel, 4, 4))


def alone(rank: int, world_size: int) -> None:
    policy = zero.CheckpointPolicy(partition=dist.group.WORLD)
    assert policy.keeper.holder is None


def test_a_group_of_one_keeps_inputs_as_they_are() -> None:
    run_ranks(alone, 1, 1)

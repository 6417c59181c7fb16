"""Training under ZenFlow goes on from a checkpoint exactly, and from a flushed one with any optimizer on any ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
from stored_models import build, stores, train
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, ZenFlow

POLICY = {"topk_ratio": 0.1, "update_interval": 3, "select_strategy": "step", "select_interval": 6}
KINDS = [("host", "optimizer"), ("nvme", "all")]


def flat_parts(state):
    """What a checkpoint keeps of a rank: copies of parts of flattened tensors."""
    return {
        name: (shard.global_shape, shard.offsets[0], shard.local.clone()) for name, shard in state.items()
    }


def whole(ranks):
    """Tensors from all ranks' parts."""
    found = {}
    for parts in ranks:
        for name, (shape, start, local) in parts.items():
            flat = found.setdefault(name, torch.zeros(torch.Size(shape).numel(), dtype=local.dtype))
            flat[start : start + local.numel()] = local
    return found


def begun(rank: int, stage: int, dtype, kind, overlap: bool, steps: int, flush: bool, folder: str):
    """Train for some steps, save, train on; with `flush`, save what a plain optimizer could load."""
    policy = ZenFlow(overlap_step=overlap, **POLICY)
    model, opt = build(stores(*kind, stage, folder), stage, dtype, zenflow=policy)
    train(model, opt, rank, range(steps))
    if flush:
        opt.flush()
    parts, scalars = flat_parts(zero.sharded_state(model, opt)), zero.optimizer_scalars(opt)
    own = copy.deepcopy(opt.state_dict())
    losses = train(model, opt, rank, range(steps, steps + 8))
    opt.close()
    return parts, scalars, own, losses, zero.full_state_dict(model)


def resumed(
    rank: int, stage: int, dtype, kind, overlap, steps: int, tensors, scalars, own, world, folder: str
):
    """Go on from described tensors of any ranks, or from this rank's own state dict."""
    policy = None if overlap is None else ZenFlow(overlap_step=overlap, **POLICY)
    model, opt = build(stores(*kind, stage, folder), stage, dtype, world, zenflow=policy)
    if own is None:
        parts = {
            name: (slot, shard.offsets[0], shard.local.numel())
            for name, shard in zero.sharded_state(model, opt).items()
            for slot in [name]
        }
        places = {slot.name: slot.place for slots in opt.slots.values() for slot in slots}
        given = {name: tensors[name][start : start + numel] for name, (_, start, numel) in parts.items()}
        for name, flat in tensors.items():
            key = name.removeprefix("optimizer.").rpartition(".")[0]
            if name.startswith("optimizer.") and key in places:
                place = places[key]
                given[name] = flat[place.param_start : place.param_start + place.numel]
        zero.load_sharded_state(model, opt, given)
        zero.load_optimizer_scalars(opt, scalars)
    else:
        train(model, opt, rank, range(2))  # what is loaded takes the place of what is under way
        opt.load_state_dict(own[rank])
    losses = train(model, opt, rank, range(steps, steps + 8))
    state = zero.full_state_dict(model)
    if overlap is not None:
        opt.close()
    return losses, state


PLAIN, LOW, SHARDS = (
    (2, torch.float32, KINDS[0]),
    (2, torch.bfloat16, KINDS[1]),
    (3, torch.bfloat16, KINDS[1]),
)


@pytest.mark.parametrize(
    ("place", "steps", "overlap"),  # 4: inside a window; 6: between two, where channels are about to be chosen
    [
        (PLAIN, 4, True), (LOW, 4, True), (SHARDS, 4, True), (PLAIN, 6, True), (SHARDS, 6, True),
        (PLAIN, 6, False), (LOW, 4, False),
    ],
)  # fmt: skip
def test_exact_on_the_same_ranks(tmp_path, place, steps: int, overlap: bool) -> None:
    case = (*place, overlap, steps)
    ranks = run_ranks(begun, 2, *case, False, str(tmp_path))
    tensors = whole([parts for parts, *_ in ranks])
    scalars = {name: of for _, found, *_ in ranks for name, of in found.items()}
    own = [state for _, _, state, *_ in ranks]
    for by in (None, own):
        found = run_ranks(resumed, 2, *case, tensors, scalars, by, 2, str(tmp_path))
        for (losses, state), (*_, expected_losses, expected) in zip(found, ranks, strict=True):
            assert losses == expected_losses, by is None
            assert all(torch.equal(state[name], expected[name]) for name in expected), by is None


def test_what_waits_is_carried_to_other_ranks(tmp_path) -> None:
    """Not promised, but so by construction: all that waits is described element by element."""
    case = (2, torch.float32, KINDS[0], True, 4)
    ranks = run_ranks(begun, 2, *case, False, str(tmp_path))
    tensors = whole([parts for parts, *_ in ranks])
    scalars = {name: of for _, found, *_ in ranks for name, of in found.items()}
    assert "optimizer.blocks.1.up.weight.zenflow_sum" in tensors
    for world in (1, 4):
        found = run_ranks(resumed, world, *case, tensors, scalars, None, world, str(tmp_path))
        assert all(state.keys() == found[0][1].keys() for _, state in found)


@pytest.mark.parametrize(("overlap", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_flushed_state_is_a_plain_optimizers(tmp_path, overlap: bool, dtype) -> None:
    case = (2, dtype, KINDS[0], overlap, 7)
    ranks = run_ranks(begun, 2, *case, True, str(tmp_path))
    tensors = whole([parts for parts, *_ in ranks])
    scalars = {name: of for _, found, *_ in ranks for name, of in found.items()}
    assert not any("zenflow" in name for name in tensors)
    assert not any("zenflow" in key for of in scalars.values() for key in of)
    for kind, into, world in (
        (("host", "optimizer"), None, 1),
        (("nvme", "all"), None, 2),
        (("host", "all"), True, 3),
    ):
        found = run_ranks(
            resumed, world, 3, dtype, kind, into, 7, tensors, scalars, None, world, str(tmp_path)
        )
        assert all(torch.isfinite(torch.tensor(losses)).all() for losses, _ in found)
    exact = run_ranks(
        resumed, 2, 2, dtype, ("host", "optimizer"), None, 7, tensors, scalars, None, 2, str(tmp_path)
    )
    nvme = run_ranks(resumed, 2, 3, dtype, ("nvme", "all"), None, 7, tensors, scalars, None, 2, str(tmp_path))
    assert exact[0][0] == nvme[0][0]


def flushes(rank: int, dtype):
    """Flushing at the end of a window gives what no overlap gives; flushing twice is flushing once."""
    found = []
    for overlap in (False, True):
        policy = ZenFlow(overlap_step=overlap, **POLICY)
        model, opt = build(stores("host", "all", 2, ""), 2, dtype, zenflow=policy)
        opt.flush()  # nothing waits yet
        train(model, opt, rank, range(3))
        before = zero.full_state_dict(model)
        opt.flush()
        after = zero.full_state_dict(model)
        opt.flush()
        assert all(torch.equal(after[k], each) for k, each in zero.full_state_dict(model).items())
        found.append((before, after))
        opt.close()
    (sync_before, sync_after), (late_before, late_after) = found
    assert all(torch.equal(sync_before[k], sync_after[k]) for k in sync_after)
    assert all(torch.equal(late_after[k], sync_after[k]) for k in sync_after)
    assert not all(torch.equal(late_before[k], late_after[k]) for k in late_after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flush_applies_what_waits(dtype) -> None:
    run_ranks(flushes, 2, dtype)


def without_any(rank: int):
    """A matrix so small that the second rank holds padding alone."""
    net = lambda: torch.nn.Linear(4, 3, bias=False)  # noqa: E731
    policy = ZenFlow(topk_ratio=0.4, update_interval=3, full_warm_up_rounds=2)

    def go_on(model, opt, steps):
        for step in steps:
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        return zero.full_state_dict(model)["weight"].clone()

    expected, again = (
        build(zero.Stores(optimizer=HostStore()), 2, zenflow=policy, net=net) for _ in range(2)
    )
    assert bool(expected[1].slots.get(0)) == (rank == 0)
    go_on(*expected, range(4))  # inside a window
    shared = expected[1].state_dict() if rank == 0 else None  # only whoever has something saves it
    mine = shared if rank == 0 else again[1].state_dict() | {"num_steps": 4}
    again[1].load_state_dict(copy.deepcopy(mine))
    found = [go_on(*each, range(4, 12)) for each in (expected, again)]
    for _, opt in (expected, again):
        opt.close()
    return found


def test_a_rank_that_holds_nothing_hears_how_far_training_has_come() -> None:
    for expected, found in run_ranks(without_any, 2):
        assert torch.equal(found, expected)

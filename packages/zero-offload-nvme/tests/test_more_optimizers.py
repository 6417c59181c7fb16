"""One optimizer after another on a model, two at once, groups added on the way: bit for bit as without a store."""

from __future__ import annotations

import gc

import pytest
import torch
import zero_core as zero
from stored_models import AllUsed, build, stores, train
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, NvmeStore, OffloadedOptimizer, ZenFlow

OVERLAPS = ["exact", "speculative"]


def make(model, params, store, overlap: str = "exact", **options):
    inner = torch.optim.AdamW(params, **{"lr": 1e-2, **options})
    if store is None:
        return zero.ShardedOptimizer(model, inner)
    return OffloadedOptimizer(model, inner, window_bytes=1 << 16, overlap=overlap)


def one_after_another(rank: int, kind: str, overlap: str, stage: int, closes: bool, folder: str):
    store = stores(kind, "all", stage, folder)
    model, opt = build(store, stage, torch.bfloat16, overlap=overlap)
    losses = train(model, opt, rank, range(3), clip=None)
    if closes:
        opt.close()
    used = 0 if store is None else store.used_bytes
    kept = opt if kind == "host" else None  # alive or gone
    del opt
    for phase in (1, 2):
        following = make(model, model.parameters(), store, overlap, lr=3e-3)
        losses += train(model, following, rank, range(3 * phase, 3 * phase + 3), clip=None)
        if closes:
            following.close()
        del following
        gc.collect()
    if closes and store is not None:
        assert store.used_bytes == used  # the same place for the states of each
    del kept
    return losses, zero.full_state_dict(model)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("closes", [True, False])
def test_one_after_another(tmp_path, stage: int, overlap: str, closes: bool) -> None:
    expected = run_ranks(one_after_another, 2, "none", "exact", stage, False, str(tmp_path))[0]
    for kind in ("host", "nvme"):
        found = run_ranks(one_after_another, 2, kind, overlap, stage, closes, str(tmp_path))[0]
        assert found[0] == expected[0], kind
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1]), kind


def inner_handed_on(rank: int, folder: str) -> None:
    """The torch optimizer goes on in another `OffloadedOptimizer`, with all that it remembers."""
    states = []
    for handed in (False, True):
        model, opt = build(HostStore(), 2, window_bytes=1 << 16, net=AllUsed)
        train(model, opt, rank, range(3))
        saved = opt.state_dict()
        if handed:
            saved = {**saved, "inner": torch.load(_bytes(saved["inner"]))}
            opt.close()
            opt = make(model, model.parameters(), True)
            opt.load_state_dict(saved)
        train(model, opt, rank, range(3, 6))
        states.append(zero.full_state_dict(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _bytes(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_the_state_of_the_first_may_go_on_in_the_second(tmp_path) -> None:
    run_ranks(inner_handed_on, 2, str(tmp_path))


def as_without_a_store(train_so, overlap: str, folder: str) -> None:
    """Losses and parameters, whatever the states rest in."""
    losses, expected = run_ranks(train_so, 2, "none", "exact", folder)[0]
    for kind in ("host", "nvme"):
        found, state = run_ranks(train_so, 2, kind, overlap, folder)[0]
        assert found == losses, kind
        assert all(torch.equal(state[name], expected[name]) for name in expected), kind


def side_by_side(rank: int, kind: str, overlap: str, folder: str):
    store = stores(kind, "all", 2, folder)
    torch.manual_seed(0)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model = zero.shard(AllUsed(), mesh, stage=2, store=store)
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    opts = [make(model, weights, store, overlap), make(model, rest, store, overlap, lr=1e-3)]
    losses = []
    for step in range(5):
        losses += train(model, opts[0], rank, range(step, step + 1), clip=None)
        losses += train(model, opts[1], rank, range(10 + step, 11 + step), clip=None)
        for opt in opts:
            opt.zero_grad()
    return losses, zero.full_state_dict(model)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_two_side_by_side_in_the_same_units(tmp_path, overlap: str) -> None:
    as_without_a_store(side_by_side, overlap, str(tmp_path))


def group_added(rank: int, kind: str, overlap: str, folder: str):
    store = stores(kind, "all", 2, folder)
    torch.manual_seed(0)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model = zero.shard(AllUsed(), mesh, stage=2, store=store)
    first = [p for name, p in model.named_parameters() if not name.startswith("blocks.1")]
    opt = make(model, first, store, overlap)
    losses = train(model, opt, rank, range(3))
    added = [p for name, p in model.named_parameters() if name.startswith("blocks.1")]
    opt.add_param_group({"params": added, "lr": 1e-3, "weight_decay": 0.2})
    losses += train(model, opt, rank, range(3, 6))
    return losses, zero.full_state_dict(model)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_group_that_is_added(tmp_path, overlap: str) -> None:
    as_without_a_store(group_added, overlap, str(tmp_path))


def group_added_late(rank: int) -> None:
    """ZenFlow takes it in; and one that asks for what no kernel does is told so before the step changes anything."""
    torch.manual_seed(0)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    model = zero.shard(AllUsed(), mesh, stage=2, store=HostStore())
    params = dict(model.named_parameters())
    first = [p for name, p in params.items() if name != "blocks.1.up.weight"]
    inner = torch.optim.AdamW(first, lr=1e-2)
    with OffloadedOptimizer(
        model, inner, overlap="zenflow", zenflow=ZenFlow(topk_ratio=0.2, update_interval=2)
    ) as opt:
        train(model, opt, rank, range(3))
        before = params["blocks.1.up.weight"].detach().clone()
        opt.add_param_group({"params": params["blocks.1.up.weight"]})
        train(model, opt, rank, range(3, 8))
        opt.flush()
        assert not torch.equal(params["blocks.1.up.weight"], before)
    model = zero.shard(AllUsed(), mesh, stage=2, store=HostStore())
    params = dict(model.named_parameters())
    opt = make(model, [params["embed.weight"]], True)
    train(model, opt, rank, range(1))
    opt.add_param_group({"params": params["blocks.1.up.weight"], "amsgrad": True})
    with pytest.raises(zero.ZeroStateError, match="amsgrad"):
        train(model, opt, rank, range(1))


def test_zenflow_takes_a_group_in_and_options_without_a_kernel_are_refused() -> None:
    run_ranks(group_added_late, 1)


def hooks(rank: int, folder: str) -> None:
    """A plain optimizer elsewhere in the process must not make hooks of this one run twice."""
    plain, its = build(None, 2, world=1)
    train(plain, its, rank, range(1))
    for overlap in ("exact", "speculative"):
        model, opt = build(HostStore(), 2, world=1, overlap=overlap)
        calls: list[str] = []
        opt.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        opt.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        train(model, opt, rank, range(2))
        assert calls == ["before", "after"] * 2, overlap
        opt.close()


def test_step_hooks_run_once(tmp_path) -> None:
    run_ranks(hooks, 1, str(tmp_path))


def warmed_up(rank: int) -> None:
    """A checkpoint of the warm-up goes on with what is left of it."""
    policy = ZenFlow(topk_ratio=0.1, update_interval=2, full_warm_up_rounds=5)
    results = []
    for saves_at in (None, 3):
        model, opt = build(HostStore(), 2, world=1, zenflow=policy)
        train(model, opt, rank, range(3))
        if saves_at is not None:
            described = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
            scalars = zero.optimizer_scalars(opt)
            opt.close()
            model, opt = build(HostStore(), 2, world=1, zenflow=policy)
            zero.load_sharded_state(model, opt, described)
            zero.load_optimizer_scalars(opt, scalars)
        losses = train(model, opt, rank, range(3, 12))
        results.append((losses, zero.full_state_dict(model)))
        opt.close()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


def test_a_warm_up_is_resumed() -> None:
    run_ranks(warmed_up, 1)


def loaded_into_place(rank: int, folder: str) -> None:
    """State that a checkpoint brings goes to the store at once, and not by way of memory at the next step."""
    model, opt = build(HostStore(), 3, world=1)
    train(model, opt, rank, range(2))
    described = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    scalars = zero.optimizer_scalars(opt)
    store = NvmeStore(folder)
    other, its = build(store, 3, world=1)
    before = store.used_bytes
    zero.load_sharded_state(other, its, described)
    zero.load_optimizer_scalars(its, scalars)
    moments = sum(2 * 4 * slot.master.numel() for slots in its.slots.values() for slot in slots)
    assert store.used_bytes - before >= moments
    for slots in its.slots.values():
        for slot in slots:
            assert bool(its.inner.state[slot.master]) == (not slot.name.endswith("unused"))
            for name in its.inner.state[slot.master].keys() & {"exp_avg", "exp_avg_sq"}:
                flat = its.unit_of(slot).stored_states[name]
                assert its.inner.state[slot.master][name].data_ptr() == flat[slot.place.start :].data_ptr()
    assert train(other, its, rank, range(2, 4)) == train(model, opt, rank, range(2, 4))
    store.close()


def test_loaded_state_rests_in_the_store_at_once(tmp_path) -> None:
    run_ranks(loaded_into_place, 1, str(tmp_path))


def edited_and_saved(rank: int) -> None:
    """What was written by hand is in the masters that a checkpoint has, of chosen channels too."""
    policy = ZenFlow(topk_ratio=0.3, update_interval=2, overlap_step=False)
    model, opt = build(HostStore(), 2, torch.bfloat16, world=1, zenflow=policy)
    train(model, opt, rank, range(5))
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-0.02, 0.02)
    described = zero.sharded_state(model, opt)
    masters = [name for name in described if name.endswith(".master")]
    assert masters
    for name in masters:
        value = described[name.removeprefix("optimizer.").removesuffix(".master")].local
        assert torch.equal(described[name].local.to(torch.bfloat16), value), name
    opt.close()


def test_edits_are_in_a_checkpoint_of_zenflow() -> None:
    run_ranks(edited_and_saved, 1)

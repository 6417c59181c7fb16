"""Whatever rests wherever: bit for bit the parameters of the same stage without a store."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import zero_core as zero
import zero_offload_nvme as off
from stored_models import Net, batch, build, loss_of, stores, train
from zero_core.testing import run_ranks

WHATS = {
    1: ["optimizer"],
    2: ["optimizer", "grads", "all"],
    3: ["optimizer", "params", "params+optimizer", "all"],
}


def rank_of(rank: int, cases, stage: int, dtype: torch.dtype, accumulate: int, backwards: int, folder: str):
    found = {}
    for kind, what in cases:
        model, opt = build(stores(kind, what, stage, folder), stage, dtype)
        losses = train(model, opt, rank, range(5), accumulate=accumulate, backwards=backwards)
        found[kind, what] = losses, zero.full_state_dict(model)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("accumulate", "backwards"), [(1, 1), (4, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bit_for_bit(tmp_path, stage: int, accumulate: int, backwards: int, dtype: torch.dtype) -> None:
    cases = [("none", "all"), *((kind, what) for kind in ("host", "nvme") for what in WHATS[stage])]
    found = run_ranks(rank_of, 2, cases, stage, dtype, accumulate, backwards, str(tmp_path))[0]
    losses, expected = found["none", "all"]
    assert losses[-1] != losses[0]
    for case, (own, state) in found.items():
        assert own == losses, case
        assert all(torch.equal(state[name], expected[name]) for name in expected), case


def other_optimizers(rank: int, folder: str) -> None:
    makes = {
        "adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1),
        "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, initial_accumulator_value=0.1),
        "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
        "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    }
    for name, make in makes.items():
        states = []
        for kind in ("none", "host", "nvme"):
            model, opt = build(stores(kind, "all", 3, folder), 3, torch.bfloat16, make=make)
            train(model, opt, rank, range(3))
            states.append(zero.full_state_dict(model))
        for state in states[1:]:
            assert all(torch.equal(state[key], states[0][key]) for key in state), name


def test_other_optimizers(tmp_path) -> None:
    run_ranks(other_optimizers, 2, str(tmp_path))


def own_optimizers(rank: int, folder: str, stage: int) -> None:
    """In place of torch's, with the same bits, and its state goes on in the other."""
    pairs = {
        "adamw": (off.CPUAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        "adam": (off.CPUAdam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
        "adagrad": (
            off.CPUAdagrad,
            torch.optim.Adagrad,
            {"lr": 1e-2, "initial_accumulator_value": 0.125, "lr_decay": 0.1},  # torch begins in bf16
        ),
        "lion": (off.CPULion, off.CPULion, {"lr": 1e-3, "weight_decay": 0.1}),  # torch has none
    }
    for name, (ours, theirs, options) in pairs.items():
        states = []
        for kind, first, second in (("none", theirs, theirs), ("host", ours, theirs), ("nvme", theirs, ours)):
            store = stores(kind, "all", stage, folder)
            model, opt = build(store, stage, torch.bfloat16, make=partial(first, **options))
            train(model, opt, rank, range(3))
            described, scalars = zero.sharded_state(model, opt), zero.optimizer_scalars(opt)
            described = {key: shard.local.clone() for key, shard in described.items()}
            store = stores(kind, "all", stage, folder)
            model, opt = build(store, stage, torch.bfloat16, make=partial(second, **options))
            zero.load_sharded_state(model, opt, described)
            zero.load_optimizer_scalars(opt, scalars)
            train(model, opt, rank, range(3, 5))
            states.append(zero.full_state_dict(model))
        for state in states[1:]:
            assert all(torch.equal(state[key], states[0][key]) for key in state), name


def lion_by_hand(rank: int, folder: str) -> None:
    """Of one rank, Lion's update as its paper has it, in plain torch."""
    model, opt = build(
        stores("nvme", "all", 3, folder), 3, world=1, make=partial(off.CPULion, lr=1e-3, weight_decay=0.1)
    )
    torch.manual_seed(0)
    plain = Net()
    moments = {param: torch.zeros_like(param) for param in plain.parameters()}
    for step in range(4):
        loss_of(plain, batch(step, rank)).backward()
        with torch.no_grad():
            for param, moment in moments.items():
                if param.grad is not None:
                    update = torch.sign(0.9 * moment + 0.1 * param.grad)
                    param.sub_(1e-3 * (update + 0.1 * param))
                    moment.mul_(0.99).add_(param.grad, alpha=0.01)
        plain.zero_grad()
    train(model, opt, rank, range(4), clip=None)
    found = zero.full_state_dict(model)
    off_by = torch.cat(
        [(found[name] - param.detach()).abs().flatten() for name, param in plain.named_parameters()]
    )
    # Where an average is all but zero its sign is chance, and a parameter two rates off.
    assert float((off_by > 1e-6).float().mean()) < 0.005
    assert float(off_by.max()) < 8.1e-3


def test_lion_in_a_store_is_its_papers(tmp_path) -> None:
    run_ranks(lion_by_hand, 1, str(tmp_path))


@pytest.mark.parametrize("stage", [1, 3])
def test_own_optimizers_step_stores(tmp_path, stage: int) -> None:
    run_ranks(own_optimizers, 2, str(tmp_path), stage)


def ratio(rank: int, folder: str) -> None:
    states, sizes = [], []
    for part in (0.0, 0.4, 1.0):
        store = stores("nvme", "all", 2, folder)
        model, opt = build(zero.Stores(optimizer=store, optimizer_ratio=part), 2, torch.bfloat16)
        train(model, opt, rank, range(3))
        states.append(zero.full_state_dict(model))
        sizes.append(store.used_bytes)
    assert sizes[0] == 0
    assert 0 < sizes[1] < 0.6 * sizes[2]
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_part_of_the_state_may_stay(tmp_path) -> None:
    run_ranks(ratio, 2, str(tmp_path))


def saved_and_loaded(rank: int, folder: str) -> None:
    """States on a drive are described, loaded and read by name as any others."""
    model, opt = build(stores("nvme", "all", 3, folder), 3, torch.bfloat16)
    train(model, opt, rank, range(3))
    described = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    scalars, own = zero.optimizer_scalars(opt), opt.state_dict()
    own = {**own, "inner": torch.load(_bytes(own["inner"]))}
    momentum = zero.get_full(model, "blocks.1.up.weight", what="exp_avg", optimizer=opt)
    rest = train(model, opt, rank, range(3, 5))
    expected = zero.full_state_dict(model)
    for kind in ("none", "host", "nvme"):
        other, its = build(stores(kind, "all", 3, folder), 3, torch.bfloat16)
        zero.load_sharded_state(other, its, described)
        zero.load_optimizer_scalars(its, scalars)
        assert torch.equal(
            zero.get_full(other, "blocks.1.up.weight", what="exp_avg", optimizer=its), momentum
        )
        assert train(other, its, rank, range(3, 5)) == rest, kind
        state = zero.full_state_dict(other)
        assert all(torch.equal(state[key], expected[key]) for key in state), kind


def _bytes(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_state_on_a_drive_is_like_any_other(tmp_path) -> None:
    run_ranks(saved_and_loaded, 2, str(tmp_path))

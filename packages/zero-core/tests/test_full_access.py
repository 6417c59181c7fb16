"""Any full tensor of one parameter, read and changed by name: equal to plain torch's, or an error on every rank."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from torch.optim import SGD, Adafactor, AdamW
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, plain_copy, seeded

STAGES = [0, 1, 2, 3]
BF16 = zero.Precision(compute=torch.bfloat16)


def unused_net() -> nn.Module:
    return Net(unused=True)


def backward(model: nn.Module, plain: nn.Module, rank: int, world_size: int, index: int) -> None:
    """One micro-batch a rank on the sharded model, and all ranks' mean on the plain one."""
    loss_of(model, list(batches(rank, index + 1))[index]).backward()
    for r in range(world_size):
        (loss_of(plain, list(batches(r, index + 1))[index]) / world_size).backward()


def reads(rank: int, world_size: int, stage: int) -> None:
    start = seeded(unused_net)
    plain = plain_copy(start)
    inner = AdamW(plain.parameters(), lr=1e-3)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, AdamW(model.parameters(), lr=1e-3))
    for index in range(2):
        backward(model, plain, rank, world_size, index)
        for each in (opt, inner):
            each.step()
            each.zero_grad()
    with zero.no_sync(model):
        backward(model, plain, rank, world_size, 2)
    backward(model, plain, rank, world_size, 3)
    for name, param in plain.named_parameters(remove_duplicate=False):
        wanted = {"param": param, "master": param}
        if param.grad is not None and param.numel():
            wanted |= {"grad": param.grad, **inner.state[param]}
        for what, want in wanted.items():
            found = zero.get_full(model, name, optimizer=opt, what=what)
            assert found.shape == want.shape, (name, what)
            assert found.dtype == want.dtype
            assert found.is_contiguous()
            torch.testing.assert_close(found, want.detach(), rtol=2e-5, atol=2e-6)
    assert torch.equal(zero.get_full(model, "head.weight"), zero.get_full(model, "embed.weight")), "tied"
    part = zero.get_full(model.blocks[1], "up.weight")
    assert torch.equal(part, zero.get_full(model, "blocks.1.up.weight"))
    part.zero_()
    assert zero.get_full(model, "blocks.1.up.weight").any(), "a copy, not the parameter"
    with pytest.raises(zero.ZeroStateError, match=r"'blocks\.0\.unused'.*no backward has used it"):
        zero.get_full(model, "blocks.0.unused", what="grad")
    with pytest.raises(zero.ZeroStateError, match="the first step makes it"):
        zero.get_full(model, "blocks.0.unused", optimizer=opt, what="exp_avg")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_reads_what_plain_torch_has(stage: int, world_size: int) -> None:
    run_ranks(reads, world_size, world_size, stage)


def writes(rank: int, world_size: int, stage: int) -> None:
    """The same changes to a plain run: both go on alike."""
    start = seeded(unused_net)
    plain = plain_copy(start)
    inner = AdamW(plain.parameters(), lr=1e-3)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, AdamW(model.parameters(), lr=1e-3))
    params = dict(plain.named_parameters(remove_duplicate=False))
    backward(model, plain, rank, world_size, 0)
    for each in (opt, inner):
        each.step()
        each.zero_grad()
    names = ["head.weight", "blocks.1.up.weight", "blocks.2.scale", "blocks.0.turned", "blocks.1.nothing"]
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(index)
        value = torch.rand(params[name].shape, generator=generator)
        with torch.no_grad():
            params[name].copy_(value)
        zero.set_full(model, name, value.double() if rank == 0 else None)
        if not value.numel():
            continue
        for what in ("exp_avg", "exp_avg_sq"):
            inner.state[params[name]][what].copy_(value / 100)
            zero.set_full(model, name, value / 100 if rank == 0 else None, optimizer=opt, what=what)
        inner.state[params[name]]["step"].fill_(7)
        zero.set_full(model, name, torch.tensor(7.0), optimizer=opt, what="step")
    for name, value in params.items():
        found = zero.get_full(model, name)
        torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=1e-6)
    for index in (1, 2):
        backward(model, plain, rank, world_size, index)
        for name in ("head.weight", "blocks.1.down.bias", "blocks.1.unused"):
            want = torch.full(params[name].shape, 3.0)
            params[name].grad = want.clone()
            before = zero.grad_norm(opt)
            zero.set_full(model, name, want, what="grad")
            assert torch.equal(zero.get_full(model, name, what="grad"), want)
            assert zero.grad_norm(opt) != before, "the norm is of the gradients that are there now"
        assert float(zero.clip_grad_norm(opt, 1.0)) == pytest.approx(
            float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0)), rel=1e-5
        )
        for each in (opt, inner):
            each.step()
            each.zero_grad()
    for name, value in params.items():
        torch.testing.assert_close(zero.get_full(model, name), value.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_changes_count_as_in_plain_torch(stage: int) -> None:
    run_ranks(writes, 2, 2, stage)


def masters(rank: int, world_size: int, stage: int) -> None:
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage, precision=BF16)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.0))
    name, beside = "blocks.1.up.weight", "blocks.1.down.weight"
    other = zero.get_full(model, beside, optimizer=opt, what="master")
    fine = torch.linspace(0.3, 0.7, 58 * 19).view(58, 19)
    assert not torch.equal(fine, fine.bfloat16().float())
    zero.set_full(model, name, fine, optimizer=opt, what="master")
    assert torch.equal(zero.get_full(model, name, optimizer=opt, what="master"), fine)
    assert torch.equal(zero.get_full(model, name), fine.bfloat16())
    ids = next(iter(batches(rank, 1)))
    loss_of(model, ids).backward()
    assert zero.get_full(model, name, what="grad").dtype == torch.bfloat16
    opt.step()
    assert torch.equal(zero.get_full(model, name, optimizer=opt, what="master"), fine), "rounded by the way"
    zero.set_full(model, name, fine + 1)
    assert torch.equal(zero.get_full(model, name), (fine + 1).bfloat16())
    assert torch.equal(
        zero.get_full(model, name, optimizer=opt, what="master"), (fine + 1).bfloat16().float()
    )
    assert torch.equal(zero.get_full(model, beside, optimizer=opt, what="master"), other)
    with zero.materialized(model.blocks[1]):
        assert torch.equal(model.blocks[1].up.weight, (fine + 1).bfloat16())
        zero.set_full(model, name, fine)
        assert torch.equal(model.blocks[1].up.weight, fine.bfloat16()), "what is held whole follows"


@pytest.mark.parametrize("stage", STAGES)
def test_parameter_and_master_follow_each_other(stage: int) -> None:
    run_ranks(masters, 2, 2, stage)


def whole_state(rank: int, world_size: int, stage: int) -> None:
    """State that one rank owns whole, in a shape of its own."""
    start = seeded(Net)
    plain = plain_copy(start)
    inner = Adafactor([p for p in plain.parameters() if p.numel()])
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, Adafactor([p for p in model.parameters() if p.numel()]))
    backward(model, plain, rank, world_size, 0)
    opt.step()
    inner.step()
    state = inner.state[plain.blocks[0].up.weight]
    for what in ("row_var", "col_var", "step"):
        found = zero.get_full(model, "blocks.0.up.weight", optimizer=opt, what=what)
        torch.testing.assert_close(found, state[what], rtol=1e-5, atol=1e-12)
    new = torch.rand(58, 1)
    torch.distributed.broadcast(new, 0)
    zero.set_full(model, "blocks.0.up.weight", new, optimizer=opt, what="row_var")
    assert torch.equal(zero.get_full(model, "blocks.0.up.weight", optimizer=opt, what="row_var"), new)
    with pytest.raises(
        zero.ZeroConfigError, match=r"expected shape \(58, 1\) from the first rank, got \(58,\)"
    ):
        zero.set_full(model, "blocks.0.up.weight", torch.ones(58), optimizer=opt, what="row_var")


@pytest.mark.parametrize("stage", [0, 3])
def test_state_of_whole_tensors(stage: int) -> None:
    run_ranks(whole_state, 2, 2, stage)


def refusals(rank: int, world_size: int, stage: int) -> None:
    start = seeded(unused_net)
    start.blocks[2].requires_grad_(False)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    rest = [p for n, p in model.named_parameters() if n != "norm.bias"]
    opt = zero.ShardedOptimizer(model, AdamW(rest, lr=1e-3))
    name, right = "blocks.0.up.weight", torch.ones(58, 19)

    def refused(error: type[Exception], message: str, given=right, name: str = name, **kwargs) -> None:
        before = zero.full_state_dict(model)
        with pytest.raises(error, match=message):
            zero.set_full(model, name, given, **kwargs)
        if given is right:
            with pytest.raises(error, match=message.replace("set_full", "get_full")):
                zero.get_full(model, name, **kwargs)
        after = zero.full_state_dict(model)
        assert all(torch.equal(after[key], value) for key, value in before.items())

    config, state = zero.ZeroConfigError, zero.ZeroStateError
    refused(
        config,
        r"no parameter 'block\.0\.up\.weight'; nearest: blocks\.0\.up\.weight",
        name="block.0.up.weight",
    )
    refused(config, r"no parameter '#'; there is blocks\.", name="#")
    refused(
        config, r"expected shape \(58, 19\) from the first rank, got \(19, 58\)", given=torch.ones(19, 58)
    )
    refused(config, "from the first rank, got None", given=None)
    refused(config, "'exp_avg' of 'blocks.0.up.weight' is the optimizer's: pass optimizer=", what="exp_avg")
    refused(
        config, "'blocks.2.up.weight' is frozen: it has no 'grad'", name="blocks.2.up.weight", what="grad"
    )
    refused(config, "does not step 'norm.bias'", name="norm.bias", what="master", optimizer=opt)
    refused(state, "there is no gradient", what="grad")
    refused(state, "the first step makes it", what="exp_avg", optimizer=opt)
    refused(
        config,
        r"no parameter 'blocks\.9\.up\.weight'.*\(rank 1 of 2\)",
        name=name if rank == 0 else "blocks.9.up.weight",
    )
    refused(config, r"different things: the first for .*up\.weight", name=f"blocks.{rank}.up.weight")
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    refused(config, r"has no 'exp_avgs'; nearest: exp_avg", what="exp_avgs", optimizer=opt)
    stranger = zero.shard(seeded(lambda: nn.Linear(3, 4)), dp_mesh(world_size), stage=stage)
    foreign = zero.ShardedOptimizer(stranger, SGD(stranger.parameters(), lr=0.1))
    refused(config, "does not step", what="master", optimizer=foreign)
    zero.set_full(model, name, right)
    assert torch.equal(zero.get_full(model, name), right)


@pytest.mark.parametrize("stage", [1, 3])
def test_errors_are_every_ranks_and_change_nothing(stage: int) -> None:
    run_ranks(refusals, 2, 2, stage)

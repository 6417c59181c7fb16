"""Frozen weights: quantized on the wire, or at rest too; whatever trains is left alone."""

from __future__ import annotations

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from comm_compress.wire import BlockFormat
from compress_lab import batch, build, loss_of, through, train
from zero_core.testing import run_ranks


def frozen_but_head() -> torch.nn.Module:
    model = build()
    for name, param in model.named_parameters():
        param.requires_grad_("head" in name or "norm" in name)
    return model


def sharded(collectives, store=None, **more):
    model = zero.shard(
        frozen_but_head(), dist.group.WORLD, stage=3, collectives=collectives, store=store, **more
    )
    trainable = [param for param in model.parameters() if param.requires_grad]
    return model, zero.ShardedOptimizer(model, torch.optim.AdamW(trainable, lr=1e-2))


def on_the_wire(rank: int) -> None:
    """`frozen="int8"` alone: exactly what is trained travels as it is; hpZ gathers the rest from far once, ever."""
    made = cc.QuantizedCollectives(
        weights=None, grads=None, frozen="int8", node_size=1, secondary=True, min_bytes=0
    )
    model, opt = sharded(made)
    units = zero.sharded(model).units
    assert {unit.trainable: unit.approximate for unit in units} == {True: False, False: True}
    train(model, opt, rank, range(2))
    before = cc.traffic(made).line("gather")
    train(model, opt, rank, range(2, 5))
    after = cc.traffic(made).line("gather")
    trainable = [unit for unit in units if unit.trainable]
    assert after.calls - before.calls == 3 * len(trainable), "frozen units are not gathered from far again"
    assert after.sent.total - before.sent.total == sum(
        3 * unit.layout.shard_numel * unit.dtype.itemsize for unit in trainable
    )
    state = zero.full_state_dict(model)
    for name, param in frozen_but_head().named_parameters():
        assert torch.equal(state[name], param) != param.requires_grad, name


def test_frozen_on_the_wire() -> None:
    run_ranks(on_the_wire, 2)


def at_rest(rank: int, world: int, dtype) -> None:
    store = cc.QuantizedStore("int8")
    made = cc.QuantizedCollectives(weights=None, grads=None, frozen=None) if world > 1 else None
    precision = zero.Precision(compute=dtype)
    model, opt = sharded(made, zero.Stores(frozen=store), precision=precision)
    units = [unit for unit in zero.sharded(model).units if not unit.trainable]
    numel = sum(unit.layout.shard_numel for unit in units)
    assert store.nbytes == sum(BlockFormat(8).message_bytes(unit.layout.shard_numel) for unit in units)
    assert numel < store.nbytes < 1.05 * numel + 8 * len(units)

    expected = {}
    low = dtype or torch.float32
    for unit in units:
        flat = torch.zeros(unit.layout.numel, dtype=low)
        params = dict(frozen_but_head().named_parameters())
        for slot in unit.layout.slots:
            flat[slot.offset : slot.stop] = params[slot.name].detach().to(low).reshape(-1)
        flat = torch.cat([through(part, BlockFormat(8), low) for part in flat.view(world, -1)])
        for slot in unit.layout.slots:
            expected[slot.name] = flat[slot.offset : slot.stop].view(slot.shape).clone()
    for _ in range(2):
        state = zero.full_state_dict(model)
        for name, value in expected.items():
            assert torch.equal(state[name], value), name
            assert torch.equal(zero.get_full(model, name), value), name
        described = zero.sharded_state(model, opt)
        zero.load_sharded_state(model, opt, {name: shard.local.clone() for name, shard in described.items()})
        train(model, opt, rank, range(2))

    name = "embed.weight"
    changed = torch.linspace(-1, 1, expected[name].numel(), dtype=low).view_as(expected[name])
    zero.set_full(model, name, changed)
    torch.testing.assert_close(zero.get_full(model, name), changed, rtol=0, atol=0.01)
    others = {key: value for key, value in expected.items() if key != name}
    state = zero.full_state_dict(model)
    for key, value in others.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0.02)
    with zero.materialized(model, write=True), torch.no_grad():
        model.embed.weight.fill_(0.25)
    assert torch.equal(zero.get_full(model, name), torch.full_like(changed, 0.25))

    for param in model.parameters():  # thaw: what has been kept is what training starts from
        param.requires_grad_(True)
    start = zero.full_state_dict(model)
    loss_of(model, batch(rank, 0)).backward()
    opt.add_param_group({"params": [p for p in model.parameters() if id(p) not in _known(opt)]})
    opt.step()
    after = zero.full_state_dict(model)
    assert store.nbytes == 0
    moved = (after["blocks.0.up.weight"] - start["blocks.0.up.weight"]).abs().max()
    assert 0 < float(moved) < 0.02


def _known(opt: zero.ShardedOptimizer) -> set[int]:
    model_params = {}
    for unit_index, slots in opt._claimed.items():
        unit = opt._sharded.units[unit_index]
        model_params |= {id(unit.params[index]): None for index in slots}
    return set(model_params)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2])
def test_frozen_at_rest(world: int, dtype) -> None:
    run_ranks(at_rest, world, world, dtype)


def test_store_by_itself() -> None:
    store = cc.QuantizedStore("int4", 32)
    values = torch.randn(1000)
    store.put("a", values).wait()
    back = through(values, BlockFormat(4, 32))
    assert torch.equal(store.view("a"), back)
    out = torch.empty(10, dtype=torch.bfloat16)
    store.fetch("a", out, 100).wait()
    assert torch.equal(out, back[100:110].bfloat16())
    store.put("a", torch.zeros(32), 64).wait()
    assert torch.equal(store.view("a")[64:96], torch.zeros(32))
    torch.testing.assert_close(store.view("a")[96:], back[96:], rtol=1e-5, atol=1e-6)
    assert store.nbytes == BlockFormat(4, 32).message_bytes(1000)
    store.release("a")
    assert store.nbytes == 0
    with pytest.raises(cc.CompressStateError, match="nothing is kept under 'a'"):
        store.view("a")
    with pytest.raises(cc.CompressConfigError, match=r"expected fp32, bf16 or fp16, got torch\.int64"):
        store.put("b", torch.zeros(3, dtype=torch.int64))
    with pytest.raises(cc.CompressConfigError, match="bits: expected"):
        cc.QuantizedStore(None)  # type: ignore[arg-type]  # refused
    with pytest.raises(zero.ZeroConfigError, match="only frozen parameters may rest there"):
        zero.Stores.of(store, 3)

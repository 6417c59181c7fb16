"""LoRA by the PEFT library on a frozen base, at every stage: trained, saved, merged, with other dtypes beside it."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
from torch import nn
from transformers_models import FAMILIES, batch_of, require_transformers
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh

require_transformers()
peft = pytest.importorskip("peft", reason="pip install peft")


def with_lora(dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    torch.manual_seed(0)
    base = FAMILIES["llama"].build().to(dtype)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, init_lora_weights=False, **more
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=True)
    for name, param in model.named_parameters():  # small adapters, so that the base still matters
        if "lora_" in name:
            param.data.mul_(0.3)
    return model


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float(((found[n] - v).abs() / (v.abs() + 0.01)).max()) for n, v in expected.items())


def train(rank: int, world_size: int, stage: int, save: bool) -> tuple[float, bool, int, int]:
    plain = with_lora(modules_to_save=["lm_head"] if save else None)
    model = zero.shard(copy.deepcopy(plain), dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    inner = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for step in range(4):
        model(**batch_of("llama", rank, step)).loss.backward()
        opt.step()
        opt.zero_grad()
        for r in range(world_size):
            (plain(**batch_of("llama", r, step)).loss / world_size).backward()
        inner.step()
        inner.zero_grad()
    found = zero.full_state_dict(model)
    moved = {n for n, p in plain.named_parameters() if not torch.equal(found[n], before[n])}
    state = sum(
        shard.local.numel() for name, shard in zero.sharded_state(model, opt).items() if "optimizer." in name
    )
    trainable = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    wanted = {n for n, p in plain.named_parameters() if p.requires_grad}
    return apart(found, plain.state_dict()), moved == wanted, state, trainable


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lora_trains_and_the_base_rests(stage: int, save: bool) -> None:
    world_size = 2
    for error, only_adapters_moved, state, trainable in run_ranks(train, world_size, world_size, stage, save):
        assert error <= 1e-4, "Adam makes much of rounding where gradients are small"
        assert only_adapters_moved
        assert state <= 2.3 * trainable / (world_size if stage else 1), "state of what is frozen"


def mixed(rank: int, world_size: int, stage: int) -> tuple[set[str], float]:
    """fp32 adapters on a bf16 base."""
    plain = with_lora(torch.bfloat16)
    model = zero.shard(copy.deepcopy(plain), dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        model(**batch_of("llama", rank, step)).loss.backward()
        opt.step()
        opt.zero_grad()
        for r in range(world_size):
            (plain(**batch_of("llama", r, step)).loss / world_size).backward()
        inner.step()
        inner.zero_grad()
    found = zero.full_state_dict(model)
    dtypes = {f"{'adapter' if 'lora_' in n else 'base'} {v.dtype}" for n, v in found.items()}
    return dtypes, apart(
        {n: v.float() for n, v in found.items()}, {n: v.float() for n, v in plain.state_dict().items()}
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_keep_their_dtype(stage: int) -> None:
    for dtypes, error in run_ranks(mixed, 2, 2, stage):
        assert dtypes == {"adapter torch.float32", "base torch.bfloat16"}
        assert error <= 2e-3


def merge(rank: int, world_size: int) -> tuple[float, float, int]:
    """Merge and unmerge layer by layer: one layer is whole at a time."""
    plain = with_lora()
    model = zero.shard(copy.deepcopy(plain), dp_mesh(world_size), stage=3)
    units = zero.sharded(model).units
    start = zero.full_state_dict(model)
    most = 0

    def each_layer(change) -> None:
        nonlocal most
        for layer in model.base_model.model.model.layers:
            with zero.materialized(layer, write=True):
                most = max(most, sum(unit.full.untyped_storage().nbytes() > 0 for unit in units))
                for module in layer.modules():
                    if isinstance(module, peft.tuners.lora.LoraLayer):
                        change(module)

    each_layer(lambda module: module.merge())
    plain.merge_adapter()
    merged = apart(zero.full_state_dict(model), plain.state_dict())
    assert apart(zero.full_state_dict(model), start) > 0.1, "nothing was merged"
    with torch.no_grad():
        ours, theirs = (m(**batch_of("llama", 0, 0)).loss for m in (model, plain))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    each_layer(lambda module: module.unmerge())
    return merged, apart(zero.full_state_dict(model), start), most


def test_merging_takes_one_layer_at_a_time() -> None:
    for merged, unmerged, most in run_ranks(merge, 2, 2):
        assert merged <= 1e-5
        assert unmerged <= 1e-4
        assert most <= 2, "the frozen and the trainable unit of one layer"

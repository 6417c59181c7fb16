"""ZeRO++ by DeepSpeed's keys: what comm-compress does by itself, with offload and checkpoints, and what is refused."""

from __future__ import annotations

import math

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
import zerostack
from torch import nn
from zero_core.testing import run_ranks
from zerostack import ConfigError
from zerostack_models import batch, config, train

WIDTH, CLASSES = 64, 11  # large enough that nothing is too small to be compressed


class Wide(nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(400, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
                                     for _ in range(2)])  # fmt: skip
        self.head = nn.Linear(WIDTH, CLASSES)
        self.embed.requires_grad_(not frozen)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, dims=1).flatten())


EVERYTHING = {"zero_quantized_weights": True, "zero_quantized_gradients": True, "zero_hpz_partition_size": 2}


def made(section, frozen=False, **more):
    raw = config(section["stage"], **more) | {"zero_optimization": section}
    return zerostack.initialize(model=Wide(frozen), config=raw)[0]


def same_as_by_hand(rank, keys, options, stage):
    engine = made({"stage": stage, **keys})
    losses = train(engine, rank, range(4))
    by_hand = cc.QuantizedCollectives(**options)
    model = zero.shard(Wide(), dist.group.WORLD, stage=stage, collectives=by_hand)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))
    expected = []
    for step in range(4):
        loss = model(batch(step, rank))
        loss.backward()
        zero.clip_grad_norm(opt, 0.5)
        opt.step()
        opt.zero_grad()
        expected.append(float(loss))
    assert losses == pytest.approx(expected, rel=1e-6)
    assert losses != train(made({"stage": stage}), rank, range(4)) or options.get("weights") == options.get(
        "grads"
    )
    traffic, other = cc.traffic(engine.collectives), cc.traffic(by_hand)
    assert [(line.kind, line.calls, line.sent) for line in traffic.lines] == [
        (line.kind, line.calls, line.sent) for line in other.lines
    ]
    return traffic.line("gather").ratio, traffic.line("reduce").ratio, traffic.line("gather_again").calls


CASES = {
    "everything": (EVERYTHING, {"node_size": 2, "secondary": True}),
    "weights": ({"zero_quantized_weights": True}, {"grads": None}),
    "gradients": ({"zero_quantized_gradients": True}, {"weights": None}),
    "partition": (
        {"zero_hpz_partition_size": 2},
        {"weights": None, "grads": None, "node_size": 2, "secondary": True},
    ),
    "loco": (
        {"zero_quantized_gradients": True, "zeropp_loco_param": {"err_beta": 0.5, "reset_T": 3}},
        {"weights": None, "loco": cc.LoCoPolicy(beta=0.5, reset_steps=3)},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_comm_compress_does_by_itself(case):
    keys, options = CASES[case]
    for gather, reduce, again in run_ranks(same_as_by_hand, 4, keys, options, 3):
        assert (gather > 3) == (options.get("weights", "int8") is not None)
        assert (reduce > 3) == (options.get("grads", "int4") is not None)
        assert (again > 0) == ("secondary" in options)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_keep_weights_whole(stage):
    keys = {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    for gather, reduce, _ in run_ranks(same_as_by_hand, 2, keys, {}, stage):
        assert gather > 3
        assert reduce > 3


def decided(rank):
    """The first passes decide; what has been decided is in the table."""
    keys = {
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
        "zero_quantized_if_faster": True,
    }
    engine = made({"stage": 3, **keys})
    assert all(math.isfinite(loss) for loss in train(engine, rank, range(20)))
    table = str(cc.traffic(engine.collectives))
    return [line for line in table.splitlines() if line.startswith(("gather: ", "reduce: "))]


def test_a_policy_that_decides():
    first, second = run_ranks(decided, 2)
    assert first == second
    assert len(first) == 2, first
    assert all("travel" in line for line in first), first


def everywhere(rank, folder, root):
    """Offload, low precision, accumulation, recompute and checkpoints change nothing about it."""
    more = {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}
    plain = train(made({"stage": 3, **EVERYTHING}, **more), rank, range(6))
    for device in ("cpu", "nvme"):
        where = {"device": device, **({"nvme_path": folder} if device == "nvme" else {})}
        section = {"stage": 3, **EVERYTHING, "offload_param": where, "offload_optimizer": where}
        engine = made(section, **more)
        assert train(engine, rank, range(6)) == plain, device
        assert cc.traffic(engine.collectives).line("gather_again").calls
        engine.save_checkpoint(root, tag=device)
        expected = train(engine, rank, range(6, 10))
        other = made(section, **more)
        train(other, rank, range(20, 22))
        other.load_checkpoint(root, tag=device)
        assert train(other, rank, range(6, 10)) == expected, "loaded shards must be seen"
    late = {"stage": 2, "zero_quantized_weights": True, "zero_quantized_gradients": True,
            "offload_optimizer": {"device": "cpu"}}  # fmt: skip
    want = train(made({**late, "offload_optimizer": None}, **more), rank, range(6))
    assert train(made(late, **more), rank, range(6)) == want
    speculative = {**late, "offload_optimizer": {"device": "cpu", "super_offload": True}}
    assert train(made(speculative, **more), rank, range(6)) == want


def test_with_offload_accumulation_and_checkpoints(tmp_path):
    run_ranks(everywhere, 4, str(tmp_path / "drive"), str(tmp_path / "checkpoints"), timeout_s=240)


def with_zenflow(rank, stage):
    keys = {**EVERYTHING, "zero_hpz_partition_size": 2 if stage == 3 else 1}
    section = {
        "stage": stage,
        "offload_optimizer": {"device": "cpu"},
        "zenflow": {"topk_ratio": 0.2, "update_interval": 2, "select_strategy": "step", "select_interval": 2,
                    "overlap_step": True},
    }  # fmt: skip
    plain = train(made(section), rank, range(6))
    engine = made({**section, **keys})
    found = train(engine, rank, range(6))
    engine.optimizer.flush()
    state = zero.full_state_dict(engine.module)
    assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())
    return found, plain


@pytest.mark.parametrize("stage", [2, 3])
def test_with_zenflow(stage):
    for found, plain in run_ranks(with_zenflow, 4, stage):
        assert found != plain
        assert found == pytest.approx(plain, rel=0.1)


def frozen(rank):
    keys = {"zero_quantized_nontrainable_weights": True}
    plain = made({"stage": 3}, frozen=True)
    engine = made({"stage": 3, **keys}, frozen=True)
    units = [unit for unit in zero.sharded(engine.module).units if not unit.trainable]
    assert units
    kept = [unit.stores.frozen.nbytes for unit in units]
    numel = sum(unit.layout.shard_numel for unit in units)
    assert numel <= kept[0] < 1.05 * numel
    losses, expected = train(engine, rank, range(4)), train(plain, rank, range(4))
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.05)
    found, exact = zero.full_state_dict(engine.module)["embed.weight"], Wide().embed.weight
    assert 0 < float((found - exact).abs().max()) <= float(exact.abs().max()) / 254 * 1.01
    ratio = cc.traffic(engine.collectives).line("gather").ratio
    both = made({"stage": 3, **keys, **EVERYTHING}, frozen=True)
    train(both, rank, range(2))
    return ratio


def test_frozen_weights_rest_and_travel_quantized():
    for ratio in run_ranks(frozen, 2):
        assert 1 < ratio < 4


def replicas(rank):
    """With MiCS: shards within two ranks, where gathers stay; reductions inside are quantized."""
    section = {
        "stage": 3,
        "mics_shard_size": 2,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }
    engine = made(section)
    losses = train(engine, rank, range(4))
    assert losses == pytest.approx(train(made({"stage": 3}), rank, range(4)), rel=0.05)
    with pytest.raises(
        ConfigError, match="expected a divisor of the 2 ranks that share one set of shards, got 4"
    ):
        made({**section, "zero_hpz_partition_size": 4})
    return cc.traffic(engine.collectives).line("reduce").ratio


def test_with_replicas():
    for ratio in run_ranks(replicas, 4):
        assert ratio > 3


REFUSED = [
    ({"stage": 0, "zero_quantized_weights": True}, "zero_quantized_weights: needs stage 1 or above, got stage 0"),
    ({"stage": 2, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size: needs stage 3 or above, got stage 2"),
    ({"stage": 2, "zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights: needs stage 3"),
    ({"stage": 3, "zeropp_loco_param": {}}, "zeropp_loco_param: it is about quantized gradients"),
    ({"stage": 3, "zero_quantized_if_faster": True}, "zero_quantized_if_faster: it is about quantized weights"),
    ({"stage": 3, "zero_hpz_partition_size": 3}, "expected a divisor of the 1 ranks that share one set of shards"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_refusals(solo, section, message):
    model = Wide()
    before = [param.data_ptr() for param in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        zerostack.initialize(model=model, config=config(section["stage"]) | {"zero_optimization": section})
    assert [param.data_ptr() for param in model.parameters()] == before


def test_switched_off_means_off(solo):
    engine = made(
        {"stage": 3, "zero_quantized_weights": False, "zero_hpz_partition_size": 1, "zeropp_loco_param": None}
    )
    assert engine.collectives is None


def on_uneven_machines(rank):
    """Two ranks on one machine, and one on each of two others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2" if rank < 2 else "1")
        engine = made({"stage": 2, "zero_quantized_gradients": True})
        return train(engine, rank, range(3))


def test_ranks_agree_on_nodes_where_machines_are_uneven():
    for losses in run_ranks(on_uneven_machines, 4):
        assert all(math.isfinite(loss) for loss in losses)

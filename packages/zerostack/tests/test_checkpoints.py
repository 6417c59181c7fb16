"""What an engine's checkpoint holds besides tensors: the loader's position, no frozen base; and DeepSpeed's own."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
import zerostack
from torch import nn
from torch.utils.data import Dataset
from zero_core.testing import run_ranks
from zerostack_models import CLASSES, Small, config

DEEPSPEED = Path(__file__).parents[2] / "ckpt-universal" / "tests" / "data"
SAMPLES, GLOBAL_BATCH = 60, 12


class Numbered(Dataset):
    """Each sample knows its number."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, number):
        generator = torch.Generator().manual_seed(number)
        return torch.cat(
            [torch.tensor([number % CLASSES]), torch.randint(CLASSES, (5,), generator=generator)]
        )


def build(stage=2, seed=0):
    raw = config(stage, micro=GLOBAL_BATCH // dist.get_world_size())
    engine, _, loader, _ = zerostack.initialize(model=Small(seed), training_data=Numbered(), config=raw)
    return engine, loader


def epochs(loader):
    while True:
        yield from loader


def train(engine, batches, steps):
    """The mean loss over all ranks of each step."""
    losses = []
    for batch in itertools.islice(batches, steps):
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def run_rank(rank, root):
    engine, loader = build()
    batches = epochs(loader)
    train(engine, batches, 7)  # to the middle of the second epoch of five batches
    engine.save_checkpoint(root)
    return train(engine, batches, 6)


def resume_rank(rank, root, stage):
    engine, loader = build(stage, seed=9)
    engine.load_checkpoint(root)
    return train(engine, epochs(loader), 6)


def test_another_number_of_ranks_goes_on_after_the_very_samples_seen(tmp_path):
    expected = run_ranks(run_rank, 2, tmp_path)[0]
    for world, stage in [(1, 0), (2, 3), (3, 2), (4, 3)]:
        assert run_ranks(resume_rank, world, tmp_path, stage)[0] == pytest.approx(expected, rel=1e-6)


class Layer(nn.Module):
    """A large frozen base and a small adapter."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(128, 128).requires_grad_(False)
        self.down, self.up = nn.Linear(128, 4, bias=False), nn.Linear(4, 128, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Layer() for _ in range(4)))

    def forward(self, x):
        return self.layers(x).square().mean()


def adapter_rank(rank, root):
    engine = zerostack.initialize(model=Adapted(), config=config(3))[0]
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 128)))
        engine.step()
    engine.save_checkpoint(root / "whole")
    path = engine.save_checkpoint(root / "adapter", exclude_frozen_parameters=True)
    dist.barrier()
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    size = sum(os.path.getsize(path / name) for name in os.listdir(path) if name.startswith("data"))
    assert size <= 1.1 * 3 * 4 * trained, "the adapter and AdamW's two moments"
    again = zerostack.initialize(model=Adapted(), config=config(3))[0]
    again.load_checkpoint(root / "adapter")
    a, b = (zero.full_state_dict(each.module) for each in (engine, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert again.global_steps == 2


def test_a_checkpoint_of_adapters_is_as_small_as_they_are(tmp_path):
    run_ranks(adapter_rank, 2, tmp_path)


class Theirs(nn.Module):
    """The model of the checkpoints that DeepSpeed wrote."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 13)
        self.b = nn.Linear(13, 5, bias=False)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.register_buffer("buf", torch.zeros(3))

    def forward(self, x):
        return self.frozen(self.b(torch.relu(self.a(x)))).float().square().mean()


def deepspeed_rank(rank, root):
    for stage in (1, 3):
        raw = config(
            stage, bf16={"enabled": True}, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
        )
        raw["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01}}
        engine = zerostack.initialize(model=Theirs(), config=raw)[0]
        engine.load_checkpoint(root)
        expected = ckpt.read_tree(root, only="*")
        assert engine.global_steps == 3
        assert engine.lr_scheduler.last_epoch == 3
        for name, shard in zero.sharded_state(engine.module, engine.optimizer).items():
            saved = expected[name if name.startswith("optimizer.") else f"model.{name}"]
            start = shard.offsets[0]
            assert torch.equal(shard.local, saved.reshape(-1)[start : start + shard.local.numel()]), name
        assert {each["step"] for each in zero.optimizer_scalars(engine.optimizer).values()} == {3.0}
        engine.backward(engine(torch.ones(2, 7)))
        engine.step()
        assert engine.global_steps == 4


@pytest.mark.parametrize("which", ["stage2-bf16", "stage3-bf16", "universal"])
def test_an_engine_goes_on_from_what_deepspeed_wrote(tmp_path, which):
    ckpt.convert(DEEPSPEED / f"deepspeed-{which}", tmp_path, to="step")
    run_ranks(deepspeed_rank, 2, tmp_path)


def test_a_model_of_someone_else_is_loaded_alone(tmp_path, solo):
    ckpt.save(tmp_path, {"model": dict(Small(seed=4).state_dict())}, step=0)
    engine = zerostack.initialize(model=Small(), config=config(1))[0]
    with pytest.raises(zerostack.CheckpointError, match=r"no engine saved it.*load_module_only=True"):
        engine.load_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path, load_module_only=True)
    found = zero.full_state_dict(engine.module)
    assert all(torch.equal(found[name], tensor) for name, tensor in Small(seed=4).state_dict().items())

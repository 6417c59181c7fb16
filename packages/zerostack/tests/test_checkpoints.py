"""What an engine's checkpoint holds besides tensors: the loader's position, no frozen base; and DeepSpeed's own."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
import zerostack
import zerostack_models
from ckpt_universal.interchange.unpickle import load_tensors
from torch import nn
from torch.utils.data import Dataset
from zero_core.testing import run_ranks
from zerostack.loader import EpochLoader
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


def skips_by_hand(rank, root):
    """DeepSpeed's loop after a resume: a loader at its beginning, whose batches are skipped up to the step."""
    engine, loader = build()
    batches = epochs(loader)
    train(engine, batches, 2)
    engine.save_checkpoint(root)
    expected = train(engine, batches, 3)
    again, its = build(seed=9)
    again.load_checkpoint(root, load_loader_states=False)
    assert train(again, itertools.islice(its, again.global_steps, None), 3) == expected
    again.load_checkpoint(root)
    assert train(again, epochs(its), 3) == expected


def test_a_loop_may_skip_what_was_seen_itself(tmp_path):
    run_ranks(skips_by_hand, 2, tmp_path)


def test_where_the_loader_goes_on_is_said(tmp_path, solo, caplog):
    engine, loader = build()
    train(engine, epochs(loader), 7)
    engine.save_checkpoint(tmp_path)
    caplog.set_level("INFO", logger="zerostack")
    engine.load_checkpoint(tmp_path, load_loader_states=False)
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert "the loader" not in caplog.text
    engine.load_checkpoint(tmp_path)
    assert "the loader goes on at sample 24 of epoch 2" in caplog.text


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
        assert engine.load_checkpoint(root)[1] == {"mine": 5}
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


class DynamicLossScaler:
    """As DeepSpeed's, to a pickle."""

    def __init__(self):
        self.cur_scale, self.dynamic = 512.0, True


def with_a_loss_scale(folder, monkeypatch):
    """A copy of what DeepSpeed wrote, as it would be of a run in fp16."""
    name = "deepspeed.runtime.fp16.loss_scaler"
    for above in itertools.accumulate(name.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, above, ModuleType(above))
    sys.modules[name].DynamicLossScaler = DynamicLossScaler
    monkeypatch.setattr(DynamicLossScaler, "__module__", name)
    shutil.copytree(DEEPSPEED / "deepspeed-stage2-bf16", folder)
    for file in folder.glob("*/*_states.pt"):
        content = load_tensors(file)
        if "optimizer_state_dict" in content:
            state = content["optimizer_state_dict"]
            for key in ("zero_stage", "param_slice_mappings"):  # of classes that are not here
                del state[key]
            state |= {"dynamic_loss_scale": True, "loss_scaler": DynamicLossScaler()}
        else:
            content |= {"epoch": 4, "notes": [1, {"best": None}], "curve": torch.ones(3)}
        torch.save(content, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)  # what was read still lies in the old one


def test_what_deepspeed_learned_of_scales_and_was_given_comes_along(tmp_path, solo, monkeypatch):
    with_a_loss_scale(tmp_path / "theirs", monkeypatch)
    _, left_out = ckpt.convert(tmp_path / "theirs", tmp_path / "run", to="step")
    assert left_out == [
        "'curve' of the client's state: a Tensor, which is no number, text or container of them"
    ]
    engine = zerostack.initialize(model=Theirs(), config=config(1, fp16={"enabled": True}))[0]
    assert engine.loss_scale != 512.0
    _, client_state = engine.load_checkpoint(tmp_path / "run")
    assert engine.loss_scale == 512.0
    assert client_state == {"mine": 5, "epoch": 4, "notes": [1, {"best": None}]}


def test_a_model_of_someone_else_is_loaded_alone(tmp_path, solo):
    ckpt.save(tmp_path, {"model": dict(Small(seed=4).state_dict())}, step=0)
    engine = zerostack.initialize(model=Small(), config=config(1))[0]
    with pytest.raises(zerostack.CheckpointError, match=r"no engine saved it.*load_module_only=True"):
        engine.load_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path, load_module_only=True)
    found = zero.full_state_dict(engine.module)
    assert all(torch.equal(found[name], tensor) for name, tensor in Small(seed=4).state_dict().items())


class Noisy(nn.Module):
    """Draws from torch's own generator in forward, as dropout does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.drop = Small(), nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, tokens):
        return self.inner(tokens) * self.drop(self.gain).mean()


def noisy(rank, root):
    raw = config(2, micro=6)
    made = [zerostack.initialize(model=Noisy(), training_data=Numbered(), config=raw) for _ in range(2)]
    (engine, _, loader, _), (again, _, its, _) = made
    torch.manual_seed(5 + rank)
    batches = epochs(loader)
    train(engine, batches, 3)
    engine.save_checkpoint(root)
    expected = train(engine, batches, 4)
    torch.manual_seed(99)
    again.load_checkpoint(root)
    assert train(again, epochs(its), 4) == expected


def test_a_loader_leaves_the_models_random_numbers_alone(tmp_path):
    run_ranks(noisy, 2, tmp_path)


def test_positions_that_ranks_do_not_divide(caplog):
    data = list(range(60))

    def loader(rank, world):
        return EpochLoader(data, batch_size=4, rank=rank, world=world, seed=1, collate_fn=list)

    seen = []
    for rank in range(4):
        each = loader(rank, 4)
        batches = iter(each)
        seen += [sample for _ in range(3) for sample in next(batches)]
    position = each.state_dict()
    assert position == {"epoch": 1, "samples": 48}
    for world in (1, 2, 3):
        rest = []
        for rank in range(world):
            other = loader(rank, world)
            other.load_state_dict(position)
            batches = iter(other)
            rest += next(batches)
            assert other.state_dict()["samples"] == 48 + 4 * world
            rest += [sample for batch in batches for sample in batch]
        assert sorted([*seen, *rest]) == data
    assert not caplog.records
    loader(0, 7).load_state_dict(position)
    assert "6 of 48 samples" in caplog.text


def rolled_back(rank, root):
    """To before the first step, and to before a part of the model had moved: as it was then, moments and counts too."""
    first = zerostack.initialize(model=Small(), config=config(2))[0]
    first.save_checkpoint(root, tag="start")
    expected = train_on(first, rank, range(4))
    first.load_checkpoint(root, tag="start")
    assert first.global_steps == 0
    assert train_on(first, rank, range(4)) == expected


def train_on(engine, rank, steps):
    return [float(loss) for loss in zerostack_models.train(engine, rank, steps)]


def test_rolling_back_to_before_the_first_step(tmp_path):
    run_ranks(rolled_back, 2, tmp_path)


def without_moments(rank, root):
    raw = config(1, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
    raw["gradient_clipping"] = 0.0
    engine = zerostack.initialize(model=Theirs(), config=raw)[0]
    engine.load_checkpoint(root)
    assert engine.global_steps == 3
    assert zero.optimizer_scalars(engine.optimizer) == {
        name: {} for name in zero.optimizer_scalars(engine.optimizer)
    }
    before = zero.full_state_dict(engine.module)
    engine.backward(engine(torch.ones(2, 7)))
    engine.step()
    after = zero.full_state_dict(engine.module)
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    assert moved <= 0.0105, "a first step of Adam is lr long"


def test_a_state_that_was_left_out_begins_anew(tmp_path):
    """DeepSpeed without ZeRO: its optimizer's state has no names, and is not taken over."""
    source = DEEPSPEED / "deepspeed-stage1-fp32"
    folder = tmp_path / "theirs" / "global_step3"
    folder.mkdir(parents=True)
    (model,) = source.glob("*/mp_rank_00_model_states.pt")
    (folder / model.name).write_bytes(model.read_bytes())
    (tmp_path / "theirs" / "latest").write_text("global_step3")
    ckpt.convert(tmp_path / "theirs", tmp_path / "run", to="step")
    run_ranks(without_moments, 2, tmp_path / "run")


def test_tags_that_are_numbers_and_directories_that_are_urls(tmp_path, solo):
    engine, *_ = build()
    path = engine.save_checkpoint(tmp_path, 5)
    assert path.name == "5"
    assert engine.load_checkpoint(tmp_path, 5)[0] is not None
    for call in (engine.save_checkpoint, engine.load_checkpoint, engine.save_16bit_model):
        with pytest.raises(
            zerostack.ConfigError, match="expected a directory that all ranks see, got 'memory://run'"
        ):
            call("memory://run")
    assert not Path("memory:").exists()

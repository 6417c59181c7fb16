"""Offload by DeepSpeed's keys: the losses of the engine without it, checkpoints, errors before anything moves."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
import zero_core as zero
import zero_offload_nvme as off
import zerostack
from zero_core.testing import run_ranks
from zerostack import CheckpointError, ConfigError
from zerostack.auto import Surroundings
from zerostack.checkpoint import fit, loading
from zerostack.offload import stores
from zerostack.resolve import effective
from zerostack.schema import Config
from zerostack_models import Small, batch, config, train


def made(stage, *, param=None, optimizer=None, aio=None, **more):
    zero_section = {"stage": stage}
    if param:
        zero_section["offload_param"] = param
    if optimizer:
        zero_section["offload_optimizer"] = optimizer
    raw = config(stage, **more) | {"zero_optimization": zero_section}
    if aio:
        raw["aio"] = aio
    torch.manual_seed(0)
    return zerostack.initialize(model=Small(), config=raw)[0]


def places(folder):
    disk = {"device": "nvme", "nvme_path": folder, "pin_memory": True, "buffer_count": 5}
    return {
        "cpu": {"device": "cpu", "pin_memory": True, "ratio": 1.0},
        "half": {**disk, "ratio": 0.5},
        "nvme": disk,
    }


def same_losses(rank, folder, stage, low):
    more = {"bf16": {"enabled": True}} if low else {}
    plain = train(made(stage, **more), rank, range(5))
    for name, where in places(folder).items():
        assert train(made(stage, optimizer=where, **more), rank, range(5)) == plain, name
        if stage == 3:
            params = {key: value for key, value in where.items() if key != "ratio"}
            aio = {"block_size": 65536, "queue_depth": 4, "thread_count": 2, "overlap_events": True}
            both = made(3, optimizer=where, param=params, aio=aio, **more)
            assert train(both, rank, range(5)) == plain, name
            assert train(made(3, param=params, **more), rank, range(5)) == plain, name


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_losses_of_the_engine_without_it(tmp_path, stage, low):
    run_ranks(same_losses, 2, str(tmp_path), stage, low)


def host_optimizers(rank):
    """As a script has them that makes DeepSpeed's CPU Adam itself."""
    for ours, theirs in ((off.CPUAdamW, torch.optim.AdamW), (off.CPUAdam, torch.optim.Adam)):
        found = []
        for make in (ours, theirs):
            raw = {key: value for key, value in config(2).items() if key != "optimizer"}
            raw["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
            torch.manual_seed(0)
            model = Small()
            optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1)
            engine = zerostack.initialize(model=model, optimizer=optimizer, config=raw)[0]
            found.append(train(engine, rank, range(4)))
        assert found[0] == found[1]


def test_optimizers_of_the_host_are_taken_as_torchs():
    run_ranks(host_optimizers, 2)


def resumed(rank, folder, root):
    disk = places(folder)["nvme"]
    offloaded = {"optimizer": disk, "param": disk, "bf16": {"enabled": True}}
    engine = made(3, **offloaded)
    train(engine, rank, range(3))
    engine.save_checkpoint(root)
    expected = train(engine, rank, range(3, 6))
    for settings in (offloaded, {"bf16": {"enabled": True}}):
        other = made(3, **settings)
        other.load_checkpoint(root)
        assert train(other, rank, range(3, 6)) == expected


def test_a_checkpoint_of_states_on_a_drive(tmp_path):
    run_ranks(resumed, 2, str(tmp_path / "drive"), str(tmp_path / "checkpoints"))


def in_parts(rank, folder, root):
    """Not more than so many bytes of states are read at once; what is damaged is found before anything changes."""
    disk = places(folder)["nvme"]
    settings = {"optimizer": disk, "bf16": {"enabled": True}}
    engine = made(3, **settings)
    train(engine, rank, range(3))
    engine.save_checkpoint(root, tag="whole")
    expected = train(engine, rank, range(3, 6))

    read, sizes = loading._read, []

    def counted(*args):
        found = read(*args)
        sizes.append(
            sum(shard.local.nbytes for name, shard in found.items() if name.startswith("optimizer."))
        )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "PART_BYTES", limit := 4_000)
        patch.setattr(loading, "_read", counted)
        other = made(3, **settings)
        before = {name: value.clone() for name, value in zero.full_state_dict(other.module).items()}
        other.load_checkpoint(root, tag="whole")
        assert len(sizes) > 8, sizes
        assert max(sizes) <= limit, sizes
        assert train(other, rank, range(3, 6)) == expected

        # The last of the states, by name: all others have been read by then.
        other = made(3, **settings)
        last = max(ckpt.describe(Path(root) / "whole").tensors)
        assert last.startswith("optimizer.")
        if rank == 0:
            damage(Path(root) / "whole", last)
        torch.distributed.barrier()
        with pytest.raises(CheckpointError):
            other.load_checkpoint(root, tag="whole")
        after = zero.full_state_dict(other.module)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert other.global_steps == 0
        assert train(other, rank, range(2)) == train(made(3, **settings), rank, range(2))


def damage(step, name):
    """Flip a bit of a tensor."""
    value = ckpt.read_tree(step, only=name)[name].contiguous().view(-1).view(torch.uint8)
    wanted = value[:64].numpy().tobytes()
    assert any(wanted)
    for path in sorted(step.glob("data-*")):
        data = bytearray(path.read_bytes())
        at = data.find(wanted)
        if at >= 0:
            data[at] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError(f"{name} was not found")


def test_states_on_a_drive_are_read_in_parts(tmp_path):
    run_ranks(in_parts, 2, str(tmp_path / "drive"), str(tmp_path / "checkpoints"))


def refusals(rank, folder):
    disk = places(folder)["nvme"]
    low = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    for stage, more, message in (
        (0, {"optimizer": disk}, "offload_optimizer: needs stage 1"),
        (2, {"param": disk}, "offload_param: needs stage 3"),
        (3, {"param": {"device": "nvme"}}, "nvme_path is missing"),
        (1, {"optimizer": {"device": "disk"}}, "device"),
        (
            1,
            {"optimizer": {"device": "none", "super_offload": True}},
            "super_offload: no optimizer state is offloaded",
        ),
        (
            1,
            {"optimizer": {"device": "cpu", "super_offload": True, "ratio": 0.0}},
            "super_offload: no optimizer state",
        ),
        (
            1,
            {"optimizer": {"device": "cpu", "super_offload": True, "ratio": 1e-9}},
            "1e-09 of .* trainable elements is less than any whole unit",
        ),
        (
            1,
            {"optimizer": {"device": "cpu"}, "bf16": low},
            "kernels step fp32 masters, and these are bfloat16",
        ),
        (1, {"optimizer": disk, "aio": {"queue_depth": 5000}}, r"aio\.queue_depth: expected at most 4096"),
        (1, {"optimizer": {"device": "cpu", "ratio": 2.0}}, "ratio"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(stage, **more)
    model = Small()
    offload = {"device": "cpu", "super_offload": True, "ratio": 1e-9}
    with pytest.raises(ConfigError, match="less than any whole unit"):
        zerostack.initialize(
            model=model,
            config=config(1) | {"zero_optimization": {"stage": 1, "offload_optimizer": offload}},
        )
    for optimizer in (
        lambda params: torch.optim.Adafactor(params),
        lambda params: torch.optim.RMSprop(params),
    ):
        raw = config(1) | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
        del raw["optimizer"]
        with pytest.raises(ConfigError, match="offload_optimizer"):
            zerostack.initialize(model=model, optimizer=optimizer, config=raw)
    zerostack.initialize(model=model, config=config(1))  # nothing has happened to it


def test_pin_memory_is_each_sections_own():
    for first, second in ((True, False), (False, True), (False, False)):
        sections = {
            "offload_optimizer": {"device": "cpu", "pin_memory": first},
            "offload_param": {"device": "cpu", "pin_memory": second},
        }
        found = stores(Config.model_validate({"zero_optimization": {"stage": 3, **sections}}))
        device = torch.accelerator.is_available()
        assert (found.optimizer.pin, found.params.pin) == (first and device, second and device)
        assert (found.optimizer is found.params) == (first == second)


def test_a_section_that_names_no_device_means_the_host():
    around = Surroundings(world=2)
    section = {"stage": 3, "offload_optimizer": {"ratio": 0.5}, "offload_param": {"pin_memory": False}}
    found = effective({"train_batch_size": 2, "zero_optimization": section}, around).config.zero_optimization
    assert (found.offload_optimizer.device, found.offload_param.device) == ("cpu", "cpu")
    for nothing in (None, False, {}):
        section = {"stage": 3, "offload_optimizer": nothing}
        found = effective({"train_batch_size": 2, "zero_optimization": section}, around).config
        assert found.zero_optimization.offload_optimizer.device == "none"


def test_what_is_said_of_an_offload_that_is_off_is_listed():
    off = {"device": "none", "ratio": 0.5, "nvme_path": "/local_nvme", "buffer_count": 4}
    section = {"stage": 3, "offload_optimizer": off, "offload_param": {"device": "none", "nvme_path": None}}
    found = effective({"train_batch_size": 2, "zero_optimization": section}, Surroundings(world=2))
    for name in ("ratio", "nvme_path", "buffer_count"):
        path = f"zero_optimization.offload_optimizer.{name}"
        assert found.findings.no_effect[path] == 'offload_optimizer.device is "none"'
    assert "zero_optimization.offload_param.nvme_path" not in found.findings.no_effect


def test_what_cannot_be_is_refused_before_anything_moves(tmp_path):
    run_ranks(refusals, 1, str(tmp_path))


def steps_early(rank, stage):
    """Speculation: the same losses, really early."""
    for more in ({}, {"gradient_clipping": 0.0}, {"fp16": {"enabled": True, "initial_scale_power": 4}}):
        more = {"gradient_accumulation_steps": 2, "gradient_clipping": 1e3, **more}
        plain = train(made(stage, **more), rank, range(8))
        for where in ({"super_offload": True}, {"super_offload": True, "ratio": 0.7}, {}):
            engine = made(stage, optimizer={"device": "cpu", **where}, **more)
            assert train(engine, rank, range(8)) == plain, (where, more)
            assert bool(engine.parts.optimizer.early_steps.committed) == bool(where), (where, more)


@pytest.mark.parametrize("stage", [1, 3])
def test_steps_that_begin_during_backward(stage):
    run_ranks(steps_early, 2, stage)


def promised(rank):
    """The last of two micro-batches inside `last_backward`: the same losses, and the step begins in it."""
    losses = []
    for where in (None, {"device": "cpu"}):
        engine = made(2, optimizer=where, gradient_clipping=0.0, gradient_accumulation_steps=2)
        for step in range(8):
            loss = engine(batch(step, rank))
            last = where is not None and engine.is_gradient_accumulation_boundary()
            with engine.parts.optimizer.last_backward() if last else nullcontext():
                engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    assert losses[:8] == losses[8:]
    assert engine.parts.optimizer.early_steps.committed


def test_the_last_backward_of_an_update():
    run_ranks(promised, 2)

"""`zerostack explain` refuses what `initialize` refuses, with the same words."""

from __future__ import annotations

import json

import pytest
import torch
import zerostack
from zerostack import ConfigError
from zerostack.cli.main import main
from zerostack_models import Small, config

CPU = {"device": "cpu"}
SGD = {"optimizer": {"type": "SGD", "params": {}}}


def zero_section(stage, **more):
    return {"zero_optimization": {"stage": stage, **more}}


@pytest.mark.usefixtures("solo")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zero_section(0, offload_optimizer=CPU), "offload_optimizer: needs stage 1"),
        (zero_section(3, offload_param={"device": "nvme"}), "nvme_path is missing"),
        (zero_section(2, zenflow={}), "all optimizer state rests on the device"),
        (zero_section(2, zenflow={}, offload_optimizer=CPU) | SGD, "or AdamW, got SGD"),
        (zero_section(0, zero_quantized_weights=True), "zero_quantized_weights: needs stage 1"),
        (zero_section(3, zero_hpz_partition_size=3), "expected a divisor of the 1 ranks"),
        (zero_section(3, mics_shard_size=2), "mics_shard_size: expected a divisor of the 1 ranks, got 2"),
        (zero_section(2) | {"optimizer": {"type": "OneBitAdam", "params": {}}}, "needs every gradient"),
        ({"optimizer": {"type": "OneBitLamb", "params": {"min_coeff": 20.0}}}, "0 < min_coeff <= max_coeff"),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": [0.1], "cycle_max_lr": [0.1, 0.2]}}},
            "expected one rate or",
        ),
    ],
)  # fmt: skip
def test_both_refuse(capsys, tmp_path, change, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(1) | change))
    assert main(["explain", str(path), "--world", "1"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match=message):
        zerostack.initialize(model=Small(), config=path)


def test_what_the_program_brings_is_not_asked_of_the_file(capsys, tmp_path):
    path = tmp_path / "ds.json"
    raw = config(3) | zero_section(3, offload_optimizer=CPU, mics_shard_size=2)
    del raw["optimizer"]
    path.write_text(json.dumps(raw))
    assert main(["explain", str(path), "--world", "4"]) == 0
    assert "zero_optimization.mics_shard_size" in capsys.readouterr().out


@pytest.mark.usefixtures("solo")
def test_an_optimizer_that_no_kernel_steps_is_not_offloaded():
    model = Small()
    raw = config(1) | zero_section(1, offload_optimizer=CPU)
    del raw["optimizer"]
    with pytest.raises(ConfigError, match="RMSprop: expected one of AdamW"):
        zerostack.initialize(
            model=model, optimizer=torch.optim.RMSprop(model.parameters(), lr=0.1), config=raw
        )


@pytest.mark.usefixtures("solo")
def test_lion_is_offloaded(capsys, tmp_path):
    raw = config(1) | zero_section(2, offload_optimizer=CPU) | {"dump_state": True}
    raw["optimizer"] = {"type": "Lion", "params": {"lr": 1e-3}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(raw))
    assert main(["explain", str(path), "--world", "2", "--params", "1M"]) == 0
    engine, *_ = zerostack.initialize(model=Small(), config=path)
    before = [param.detach().clone() for param in engine.module.parameters()]
    engine.backward(engine(torch.zeros(1, 3, dtype=torch.int64)).square().mean())
    engine.step()
    assert any(
        not torch.equal(one, param) for one, param in zip(before, engine.module.parameters(), strict=True)
    )

"""Names and numbers that cannot be are refused, and nothing is written."""

from __future__ import annotations

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal.cli import main as command
from safetensors.torch import save_file


@pytest.fixture
def source(tmp_path):
    save_file({"w": torch.ones(2), "model.w": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("to", ["step", "safetensors", "dcp"])
def test_two_tensors_of_one_name_are_refused_by_name(source, tmp_path, to):
    with pytest.raises(ckpt.ConfigError, match=r"'model\.w' and 'w' would both be called 'x\.w'"):
        ckpt.convert(source, tmp_path / "out", to=to, strip="model.", prefix="x.")
    assert not (tmp_path / "out").exists()
    written, _ = ckpt.convert(source, tmp_path / "out", to=to, only="model.*", strip="model.")
    assert written


@pytest.mark.parametrize("step", [-5, -1, 2**63, 18446744073709551616])
def test_steps_that_no_step_can_have_are_refused(source, tmp_path, capsys, step):
    out = tmp_path / "run"
    with pytest.raises(ckpt.ConfigError, match=f"step: expected a number .*, got {step}"):
        ckpt.convert(source, out, to="step", step=step)
    assert command(["convert", str(source), str(out), "--to", "step", "--step", str(step)]) == 2
    assert f"got {step}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("step", [0, 2**63 - 1])
def test_the_first_and_the_last_step_can_be_written_and_read(source, tmp_path, step):
    ckpt.convert(source, tmp_path / "run", to="step", step=step)
    assert ckpt.describe(tmp_path / "run").step == step

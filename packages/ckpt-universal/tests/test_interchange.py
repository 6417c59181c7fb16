"""Other formats: the same values on both sides, little memory, and nothing that a file says is run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ckpt_universal.boxes import whole_box
from ckpt_universal.cli import main as command
from ckpt_universal.interchange.convert import open_source
from ckpt_universal.interchange.unpickle import load_tensors
from safetensors.torch import load_file, save_file

DATA = Path(__file__).with_name("data")
CANARY = Path(tempfile.gettempdir(), f"ckpt-universal-was-run-{os.getpid()}")
STAGES = ["stage1-fp32", "stage2-bf16", "stage3-bf16"]


def a_state():
    generator = torch.Generator().manual_seed(0)
    model = {
        "embed": torch.randn(50, 16, generator=generator),
        "scale": torch.tensor(2.5),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "ids": torch.arange(9),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
    }
    return {
        "model": model,
        "optimizer": {"embed.exp_avg": torch.randn(50, 16, generator=generator)},
        "step": 3,
    }


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype is tensor.dtype, name
        assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize("max_file_bytes", [10**9, 2000])
def test_safetensors_there_and_back(tmp_path, max_file_bytes):
    state = a_state()
    ckpt.save(tmp_path / "run", state, step=3)
    out = ckpt.export_safetensors(tmp_path / "run", tmp_path / "hf", max_file_bytes=max_file_bytes)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (max_file_bytes == 2000)
    assert (out / "model.safetensors.index.json").exists() == (len(files) > 1)
    found = {}
    for file in files:
        found |= load_file(file)
    same(state["model"], found)
    ckpt.convert(out, tmp_path / "back", to="step", prefix="model.")
    into = {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}}
    ckpt.load(tmp_path / "back", into=into, only="*")
    same(state["model"], into["model"])


def test_transformers_reads_what_is_exported(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    ckpt.save(tmp_path / "run", {"model": dict(model.named_parameters())}, step=0)
    out = ckpt.export_safetensors(tmp_path / "run", tmp_path / "hf", max_file_bytes=20_000)
    config.save_pretrained(out)
    again = transformers.GPT2LMHeadModel.from_pretrained(out)
    same(dict(model.named_parameters()), dict(again.named_parameters()))


def test_casting_on_the_way(tmp_path):
    state = a_state()
    ckpt.save(tmp_path / "run", state, step=3)
    out = ckpt.export_safetensors(tmp_path / "run", tmp_path / "hf", dtype=torch.bfloat16)
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["embed"], state["model"]["embed"].bfloat16())
    assert torch.equal(found["ids"], state["model"]["ids"])


def test_a_directory_that_is_there_is_not_touched(tmp_path):
    ckpt.save(tmp_path / "run", a_state(), step=3)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").write_text("x")
    for convert in (
        lambda: ckpt.export_safetensors(tmp_path / "run", tmp_path / "hf"),
        lambda: ckpt.convert(tmp_path / "run", tmp_path / "hf", to="dcp"),
    ):
        with pytest.raises(ckpt.ConfigError, match="is there already"):
            convert()
    with pytest.raises(ckpt.ConfigError, match="no tensor to write"):
        ckpt.export_safetensors(tmp_path / "run", tmp_path / "other", only="nothing.*")
    assert not (tmp_path / "other").exists()


def test_dcp_there_and_back(tmp_path):
    state = a_state()
    ckpt.save(tmp_path / "run", state, step=3)
    ckpt.convert(tmp_path / "run", tmp_path / "dcp", to="dcp")
    into = {
        **{f"model.{name}": torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "optimizer.embed.exp_avg": torch.zeros(50, 16),
        "step": 0,
    }
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    same(
        {f"model.{n}": t for n, t in state["model"].items()},
        {n: into[n] for n in into if n.startswith("model")},
    )
    assert into["step"] == 3
    assert ckpt.convert(tmp_path / "dcp", tmp_path / "back", to="step")[1] == []
    found = ckpt.read_tree(tmp_path / "back", only="*")
    same(
        {f"model.{n}": t for n, t in state["model"].items()},
        {n: found[n] for n in found if n.startswith("model")},
    )
    assert ckpt.describe(tmp_path / "back").values["step"] == 3


def test_what_torch_wrote_with_dcp_is_read(tmp_path):
    state = {"model": a_state()["model"], "epoch": 4, "note": "x"}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    ckpt.convert(tmp_path / "dcp", tmp_path / "run", to="step", step=9)
    found = ckpt.describe(tmp_path / "run")
    assert found.step == 9
    assert (found.values["epoch"], found.values["note"]) == (4, "x")
    into = {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}}
    ckpt.load(tmp_path / "run", into=into, only="model.*")
    same(state["model"], into["model"])


@pytest.mark.parametrize("stage", STAGES)
def test_what_deepspeed_wrote_is_read_as_deepspeed_reads_it(tmp_path, stage):
    folder = DATA / f"deepspeed-{stage}"
    ckpt.convert(folder, tmp_path / "run", to="step")
    found = ckpt.read_tree(tmp_path / "run", only="*")
    for name, expected in load_file(DATA / f"expected-{stage}.safetensors").items():
        own = found.get(f"optimizer.{name}.master", found[f"model.{name}"])
        assert torch.equal(own.float(), expected), name
        if "bf16" in stage and name != "buf":
            assert found[f"model.{name}"].dtype is torch.bfloat16
            assert torch.equal(found[f"model.{name}"], expected.bfloat16())
    assert found["optimizer.a.weight.exp_avg_sq"].shape == (13, 7)
    facts = ckpt.describe(tmp_path / "run").values["deepspeed"]
    assert facts["global_steps"] == 3
    assert facts["client_state"] == {"mine": 5}
    assert "cur_scale" not in facts, "its scaler did not adapt"
    assert facts["scalars"]["a.bias"] == {"step": 3.0}


def test_stages_2_and_3_and_the_universal_form_hold_the_same():
    """Three layouts of one training run: every part must have been put where it belongs."""
    two, three, universal = (
        open_source(DATA / f"deepspeed-{which}") for which in ("stage2-bf16", "stage3-bf16", "universal")
    )
    assert two.tensors.keys() == three.tensors.keys() == universal.tensors.keys()
    for name, described in two.tensors.items():
        box = whole_box(described.shape)
        values = [source.read(name, box) for source in (two, three, universal)]
        assert torch.equal(values[0], values[1]), name
        assert torch.equal(values[1], values[2]), name


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


class Strange:
    pass


@pytest.mark.parametrize(("thing", "name"), [(Evil(), "posix.system"), (Strange(), "Strange")])
def test_other_classes_are_refused_by_name_and_nothing_runs(tmp_path, thing, name):
    CANARY.unlink(missing_ok=True)
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.ones(2)}, "thing": thing}, file)
    with pytest.raises(
        ckpt.CheckpointError, match=rf"{name}, and only tensors and plain containers are read"
    ):
        ckpt.convert(tmp_path, tmp_path / "run", to="step")
    assert not CANARY.exists()

    folder = tmp_path / "dcp"
    dcp.save({"w": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    (folder / ".metadata").write_bytes(pickle.dumps(thing))
    with pytest.raises(ckpt.CheckpointError, match=name):
        ckpt.convert(folder, tmp_path / "run", to="step")
    assert not CANARY.exists()


def test_damaged_files_of_others_are_errors(tmp_path):
    file = tmp_path / "mp_rank_00_model_states.pt"
    buffer = io.BytesIO()
    torch.save({"module": {"w": torch.ones(2)}}, buffer)
    for data in (
        b"",
        b"PK",
        buffer.getvalue()[:-30],
        buffer.getvalue()[: len(buffer.getvalue()) // 2],
        b"x" * 500,
    ):
        file.write_bytes(data)
        with pytest.raises(ckpt.CheckpointError, match="mp_rank_00_model_states"):
            load_tensors(file)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ckpt.CheckpointError, match=r"model\.safetensors"):
        open_source(hf)
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../x.safetensors"}}')
    with pytest.raises(ckpt.CheckpointError, match="no name of a file beside it"):
        open_source(hf)


def test_missing_ranks_are_noticed(tmp_path):
    shutil.copytree(DATA / "deepspeed-stage3-bf16", tmp_path / "ds")
    next((tmp_path / "ds").glob("*/*rank_0_*model_states.pt")).unlink()
    with pytest.raises(ckpt.CheckpointError, match=r"files of ranks \[1\]; some are missing"):
        open_source(tmp_path / "ds")


MEASURE = """
import resource, sys
import ckpt_universal as ckpt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ckpt.export_safetensors(sys.argv[1], sys.argv[2], max_file_bytes=10**8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_an_export_needs_little_memory_whatever_the_size(tmp_path):
    save_file({"big": torch.zeros(100, 1_000_000)}, tmp_path / "big.safetensors")  # 400 MB
    ckpt.convert(tmp_path / "big.safetensors", tmp_path / "run", to="step", prefix="model.")
    (tmp_path / "big.safetensors").unlink()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path / "hf")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 250, "MiB"


def test_the_command(tmp_path, capsys):
    state = a_state()
    ckpt.save(tmp_path / "run", state, step=3)
    assert command(["inspect", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "model.embed" in out
    assert "step = 3" in out
    assert command(["verify", str(tmp_path / "run"), "--all"]) == 0
    assert "all as written" in capsys.readouterr().out
    assert command(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "float16"]) == 0
    assert load_file(tmp_path / "hf" / "model.safetensors")["embed"].dtype is torch.float16
    assert (
        command(["convert", str(tmp_path / "hf"), str(tmp_path / "two"), "--to", "step", "--compress", "3"])
        == 0
    )
    capsys.readouterr()
    assert command(["diff", str(tmp_path / "run"), str(tmp_path / "run")]) == 0
    assert command(["diff", str(tmp_path / "run"), str(tmp_path / "two")]) == 1
    assert "only in the first" in capsys.readouterr().out
    ckpt.save(tmp_path / "run", state, step=4)
    assert command(["prune", str(tmp_path / "run"), "--keep-last", "1", "--partial"]) == 0
    assert capsys.readouterr().out == "removed step-000000003\n"
    assert command(["inspect", str(tmp_path / "run"), "--steps"]) == 0
    assert capsys.readouterr().out == "step-000000004\n"
    data = next((tmp_path / "run" / "step-000000004").glob("data-*"))
    data.write_bytes(data.read_bytes()[:-1])
    assert command(["verify", str(tmp_path / "run")]) == 1
    assert data.name in capsys.readouterr().out
    assert command(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "no committed checkpoint" in capsys.readouterr().err


def test_dcp_takes_lists_and_says_what_it_does_not(tmp_path):
    state = {"model": {"w": torch.ones(3)}, "groups": [{"lr": 0.1, "betas": [0.9, 0.99]}], "raw": b"xyz"}
    ckpt.save(tmp_path / "run", state, step=1)
    _, left_out = ckpt.convert(tmp_path / "run", tmp_path / "dcp", to="dcp")
    assert [line.partition(":")[0] for line in left_out] == ["raw"]
    into = {"groups.0.betas.1": 0.0}
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert into["groups.0.betas.1"] == 0.99


@pytest.mark.parametrize(
    ("to", "options", "expected"),
    [
        ("safetensors", {}, ["3 values beside tensors, which the format has no place for"]),
        ("dcp", {"only": "model.*"}, ["3 values beside tensors: they go with all tensors"]),
        ("step", {"strip": "model."}, ["3 values beside tensors: they go with all tensors"]),
        ("step", {"prefix": "a."}, ["3 values beside tensors: they go with all tensors"]),
        ("step", {"dtype": torch.float16}, []),
    ],
)
def test_a_conversion_says_that_it_leaves_values_out(tmp_path, to, options, expected):
    ckpt.save(tmp_path / "run", {"model": {"w": torch.ones(3)}, "lr": 0.1, "betas": [0.9, 0.99]}, step=1)
    _, left_out = ckpt.convert(tmp_path / "run", tmp_path / "out", to=to, **options)
    assert len(left_out) == len(expected)
    assert all(line.startswith(start) for line, start in zip(left_out, expected, strict=True))

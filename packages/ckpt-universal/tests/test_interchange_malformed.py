"""Files of others that hold other things than they should are errors that name the file, never tracebacks."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ckpt_universal.boxes import whole_box
from ckpt_universal.cli import main as command
from ckpt_universal.interchange import deepspeed, unpickle
from ckpt_universal.interchange.convert import open_source
from safetensors.torch import save_file

DATA = Path(__file__).with_name("data")


def refused(path, file, capsys):
    """Whatever is converted from `path` ends with an error that names the file."""
    assert command(["convert", str(path), str(path / "out"), "--to", "step"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ckpt-universal: "), said
    assert file in said, said
    return said


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", "3", "", '{"weight_map": {"a": 1}}', '{"weight_map": 1}', "\xff"]
)
def test_an_index_of_safetensors(tmp_path, capsys, text):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    refused(tmp_path, "model.safetensors.index.json", capsys)


@pytest.mark.parametrize("content", [{}, [1], 3, None, {"module": 3}, {"module": [1]}, torch.ones(2)])
def test_a_model_file_of_deepspeed(tmp_path, capsys, content):
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    refused(tmp_path, "mp_rank_00_model_states.pt", capsys)


def test_what_is_no_tensor_in_a_module_is_left_out(tmp_path):
    torch.save({"module": {"w": torch.ones(2), "n": 3}}, tmp_path / "mp_rank_00_model_states.pt")
    source = open_source(tmp_path)
    assert list(source.tensors) == ["model.w"]
    assert source.left_out == [
        f"{tmp_path}/mp_rank_00_model_states.pt: 'n' of the module is no tensor, but of type int"
    ]


@pytest.mark.parametrize("which", ["stage2-bf16", "stage3-bf16"])
@pytest.mark.parametrize("key", ["optimizer_state_dict", "inner"])
@pytest.mark.parametrize("content", [None, 3, [], {}, {"state": 3}, "x"])
def test_an_optimizer_file_of_deepspeed(monkeypatch, which, key, content):
    """The first rank's file holds something else; that is an error, at the latest when its tensors are read."""
    spoiled = []

    def load(file):
        found = unpickle.load_tensors(file)
        if not (re.search(r"zero_pp_rank_0_.*optim_states", file.name)):
            return found
        spoiled.append(file)
        if key == "optimizer_state_dict":
            return {**found, key: content}
        optim = found["optimizer_state_dict"]
        inner = "base_optimizer_state" if "base_optimizer_state" in optim else "optimizer_state_dict"
        return {**found, "optimizer_state_dict": {**optim, inner: content}}

    monkeypatch.setattr(deepspeed, "load_tensors", load)
    with pytest.raises(ckpt.CheckpointError, match=str(DATA)):
        read_all(DATA / f"deepspeed-{which}")
    assert spoiled


def read_all(path):
    source = open_source(path)
    for name, described in source.tensors.items():
        source.read(name, whole_box(described.shape))


def spoil(described, how):
    entry, chunk = described.state_dict_metadata["w"], described.state_dict_metadata["w"].chunks[0]
    place = next(iter(described.storage_data.values()))
    match how:
        case "names":
            described.state_dict_metadata = 3
        case "places":
            described.storage_data = [1]
        case "no places":
            described.storage_data = None
        case "size":
            entry.size = "ab"
        case "negative":
            entry.size = torch.Size([2, -3])
        case "properties":
            entry.properties = None
        case "chunks":
            entry.chunks = 3
        case "a chunk":
            entry.chunks = [None]
        case "outside":
            chunk.sizes = torch.Size([2, 30])
        case "dims":
            chunk.sizes = torch.Size([6])
        case "path":
            place.relative_path = 3
        case "offset":
            place.offset = "x"
        case "length":
            place.length = None


WAYS = [
    "names", "places", "no places", "size", "negative", "properties", "chunks", "a chunk", "outside", "dims", "path",
    "offset", "length",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_metadata_of_torch(tmp_path, capsys, how):
    dcp.save({"w": torch.ones(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    described = pickle.loads((tmp_path / ".metadata").read_bytes())
    spoil(described, how)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(described))
    refused(tmp_path, str(tmp_path), capsys)


@pytest.mark.parametrize("size", ["nan", "inf", "-inf", "-1", "0", "1e-12"])
def test_sizes_of_files(tmp_path, capsys, size):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    words = ["convert", str(tmp_path), str(tmp_path / "out"), "--to", "safetensors", f"--max-file-gb={size}"]
    assert command(words) == 2
    assert "--max-file-gb: expected a number > 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ckpt.ConfigError, match="max_file_bytes"):
        ckpt.convert(tmp_path, tmp_path / "out", to="safetensors", max_file_bytes=0)


@pytest.mark.parametrize("hours", ["nan", "inf", "-1"])
def test_hours(tmp_path, capsys, hours):
    ckpt.save(tmp_path, {"w": torch.ones(2)}, step=1)
    assert command(["prune", str(tmp_path), "--partial", f"--older-than-h={hours}"]) == 2
    assert "--older-than-h: expected hours >= 0" in capsys.readouterr().err


def test_a_reader_that_ends_early_is_no_traceback(tmp_path):
    ckpt.save(tmp_path, {f"w{n}": torch.ones(1) for n in range(3000)}, step=1)
    done = subprocess.Popen(
        [sys.executable, "-m", "ckpt_universal", "inspect", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert done.stdout is not None
    assert done.stderr is not None
    done.stdout.close()
    said = done.stderr.read().decode()
    assert (done.wait(), said) == (141, "")


def tied(file, found):
    """As DeepSpeed writes a parameter of two names at stage 3: without elements, and a note whose it is."""
    if "model_states" in file.name:
        module = {**found["module"], "also.a": torch.empty(0), "lost": torch.empty(0)}
        return {**found, "module": module, "shared_params": {"also.a": "a.weight"}}
    return found


def test_a_name_that_shares_anothers_parameter(monkeypatch):
    load = unpickle.load_tensors
    monkeypatch.setattr(deepspeed, "load_tensors", lambda file: tied(file, load(file)))
    source = open_source(DATA / "deepspeed-stage3-bf16")
    names = ("model.a.weight", "model.also.a")
    one, other = (source.read(name, whole_box(source.tensors[name].shape)) for name in names)
    assert torch.equal(one, other)
    assert one.numel()
    assert "model.lost" not in source.tensors
    assert any("'lost'" in line for line in source.left_out)

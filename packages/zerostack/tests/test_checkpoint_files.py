"""A checkpoint is whole or it is not there; damage is named; values come back as they went in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from zerostack.checkpoint import Range, open_checkpoint, save, tensor_file
from zerostack.checkpoint.values import check_json
from zerostack.errors import CheckpointError


@dataclass
class Whole:
    """A tensor that this rank holds completely."""

    tensor: torch.Tensor
    offsets: tuple[int, ...] = (0,)

    @property
    def global_shape(self):
        return tuple(self.tensor.shape)

    @property
    def dtype(self):
        return self.tensor.dtype

    @property
    def local(self):
        return self.tensor.reshape(-1)


TENSORS = {
    "weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "half": torch.linspace(-1, 1, 7).to(torch.bfloat16),
    "steps": torch.tensor(12),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 3),
}


def write(root, group, tag="step1", values=None, **options):
    shards = {name: Whole(tensor) for name, tensor in TENSORS.items()}
    return save(root, tag, shards, values or {"n": 1}, group=group, piece_bytes=32, **options)


def read(root, group, tag=None):
    reader = open_checkpoint(root, tag, group)
    wanted = {name: Range.of(Whole(tensor)) for name, tensor in TENSORS.items()}
    return reader, reader.read(wanted)


def test_tensors_and_values_come_back(tmp_path, solo):
    values = {"text": "é", "none": None, "list": [1, 2.5, True, {"a": []}], "big": 2**60, "inf": float("inf")}
    path = write(tmp_path, solo, values=values, per_rank={"rng": torch.get_rng_state()})
    reader, found = read(tmp_path, solo)
    assert path == tmp_path / "step1"
    assert (tmp_path / "latest").read_text() == "step1\n"
    assert reader.index.values == values
    assert torch.equal(reader.own()["rng"], torch.get_rng_state())
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor.reshape(-1)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step1"]


def test_files_are_plain_safetensors(tmp_path, solo):
    path = write(tmp_path, solo)
    plain = safetensors.torch.load_file(path / "rank-00000.safetensors")
    assert torch.equal(plain["half@0"], TENSORS["half"])
    assert len([key for key in plain if key.startswith("weight@")]) == 3  # pieces of 32 bytes


def test_a_range_reads_only_the_pieces_that_touch_it(tmp_path, solo, monkeypatch):
    write(tmp_path, solo)
    reader = open_checkpoint(tmp_path, None, solo)
    keys = []
    original = tensor_file.TensorFile.read
    monkeypatch.setattr(
        tensor_file.TensorFile, "read", lambda self, key, *a: keys.append(key) or original(self, key, *a)
    )
    found = reader.read({"weight": Range((4, 6), torch.float64, 9, 15)})
    assert keys == ["weight@8"]
    assert found["weight"].tolist() == [9, 10, 11, 12, 13, 14]
    assert found["weight"].dtype == torch.float64


def test_missing_and_misshapen_tensors_are_all_named(tmp_path, solo):
    write(tmp_path, solo)
    reader = open_checkpoint(tmp_path, None, solo)
    wanted = {"weight": Range((6, 4), torch.float32, 0, 24), "absent": Range((2,), torch.float32, 0, 2)}
    with pytest.raises(CheckpointError) as error:
        reader.read(wanted)
    assert "'weight' has shape (4, 6), expected (6, 4)" in str(error.value)
    assert "'absent' is missing" in str(error.value)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def test_a_flipped_bit_names_file_and_tensor(tmp_path, solo):
    path = write(tmp_path, solo) / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 5)
    with pytest.raises(
        CheckpointError, match=r"rank-00000\.safetensors: tensor 'weight', elements 16 to 24 is damaged"
    ):
        read(tmp_path, solo)


def test_a_damaged_header_a_cut_and_a_missing_file_are_named(tmp_path, solo):
    path = write(tmp_path, solo) / "rank-00000.safetensors"
    original = path.read_bytes()
    flip(path, 8)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: cannot read"):
        read(tmp_path, solo)
    path.write_bytes(original[:-1])
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes, got \d+: cut off"):
        read(tmp_path, solo)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing; restore the file, or load another tag"):
        read(tmp_path, solo)


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_index_is_never_believed(position, bit, tmp_path_factory):
    from zerostack.checkpoint.index import Index

    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    index = Index(world=1, files={"f": 3}, tensors={}, per_rank=({},), values={"step": 7})
    index.write(folder)
    path = folder / "index.json"
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data))
    with suppress(CheckpointError):
        assert Index.read(folder) == index  # white space and the version may change harmlessly


def test_absent_checkpoints(tmp_path, solo):
    assert open_checkpoint(tmp_path, None, solo) is None
    write(tmp_path, solo, tag="a")
    write(tmp_path, solo, tag="b", point_latest=False)
    with pytest.raises(CheckpointError, match=r"c: no such checkpoint; present: a, b"):
        open_checkpoint(tmp_path, "c", solo)
    (tmp_path / "latest").write_text("gone\n")
    with pytest.raises(
        CheckpointError, match=r"gone: no such checkpoint \(named by .*latest\); present: a, b"
    ):
        open_checkpoint(tmp_path, None, solo)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint: it has no index"):
        open_checkpoint(tmp_path, "empty", solo)


@pytest.mark.parametrize("tag", ["", ".hidden", "a/b", "..", "latest"])
def test_tags_are_plain_names(tmp_path, solo, tag):
    with pytest.raises(CheckpointError, match="expected a plain directory name"):
        write(tmp_path, solo, tag=tag)
    assert list(tmp_path.iterdir()) == []


def test_an_older_checkpoint_of_the_same_tag_is_replaced(tmp_path, solo):
    write(tmp_path, solo, values={"n": 1})
    write(tmp_path, solo, values={"n": 2})
    assert read(tmp_path, solo)[0].index.values == {"n": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step1"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": (1, 2)}}, r"^a\.b: a tuple would come back as a list; pass list"),
        ({"a": [torch.zeros(1)]}, r"^a\[0\]: a tensor is not a small value"),
        ({"a": {1: 2}}, r"^a: a key must be a str, got 1 \(int\)"),
        ({"a": object()}, r"^a: expected str, int"),
        ({"a": torch.float32}, r"^a: expected str, int"),
    ],
)
def test_values_that_would_change_are_refused_with_their_path(tmp_path, solo, value, message):
    with pytest.raises(TypeError, match=message):
        write(tmp_path, solo, values=value)
    assert list(tmp_path.iterdir()) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
def test_what_is_accepted_survives_json(value):
    check_json(value, "value")
    assert json.loads(json.dumps(value)) == value


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, solo, monkeypatch):
    write(tmp_path, solo, values={"n": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, solo, tag="step2")
    monkeypatch.undo()
    assert read(tmp_path, solo)[0].index.values == {"n": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step1"]


def test_a_kill_while_writing_leaves_no_checkpoint_and_the_next_save_clears_up(tmp_path, solo):
    write(tmp_path, solo, tag="before")
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch.distributed as dist
        import test_checkpoint_files as here
        from zerostack.checkpoint import files
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        files.sync_directory = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        here.write(here.Path({str(tmp_path)!r}), dist.group.WORLD, tag="after")
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left[0].startswith(".after.tmp-")
    assert left[1:] == ["before", "latest"]
    assert read(tmp_path, solo)[0].path.name == "before"
    write(tmp_path, solo, tag="after")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after", "before", "latest"]

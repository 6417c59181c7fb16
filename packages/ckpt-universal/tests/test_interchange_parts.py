"""Tensors pass through part by part: what is held does not grow with them, and every value is where it was."""

from __future__ import annotations

import subprocess
import sys

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ckpt_universal.boxes import Box, cut, whole_box
from ckpt_universal.interchange import dcp as our_dcp
from ckpt_universal.interchange.convert import open_source
from ckpt_universal.interchange.deepspeed import _slice
from ckpt_universal.interchange.torch_records import find_stored
from ckpt_universal.values import DTYPES

MEASURE = """
import resource, sys
import ckpt_universal as ckpt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ckpt.convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """One tensor of 400 MB: as a step, and as torch writes it, in one piece."""
    path = tmp_path_factory.mktemp("big")
    state = {"model.big": torch.zeros(100, 1_000_000)}
    dcp.save(state, checkpoint_id=path / "dcp", no_dist=True)
    ckpt.save(path / "step", state, step=1)
    yield path
    for file in path.rglob("*"):
        if file.is_file():
            file.unlink()


@pytest.mark.parametrize(("source", "to"), [("step", "dcp"), ("dcp", "step"), ("dcp", "safetensors")])
def test_a_conversion_holds_parts_of_a_tensor(big, tmp_path, source, to):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big / source), str(tmp_path / "out"), to],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 250, "MiB"
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            file.unlink()


def a_state():
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(0, 2, (7, 5), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        if name not in ("complex32", "float8_e8m0fnu")
    }
    base = torch.randn(8, 6, generator=generator)
    return state | {
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "turned": base.t(),
        "parameter": torch.nn.Parameter(base.clone()),
        "deep": torch.randn(3, 4, 5, generator=generator),
    }


def raw(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("most", [1, 4, 7, 1000])
def test_any_part_of_what_torch_wrote_is_the_part_of_the_whole(tmp_path, most):
    state = a_state()
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    source = open_source(tmp_path)
    for name, tensor in state.items():
        parts = list(cut(whole_box(tensor.shape), most))
        for part in [*parts, *reversed(parts)]:
            ranges = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
            found = source.read(name, part)
            assert found.dtype is tensor.dtype
            assert torch.equal(raw(found), raw(tensor.detach()[ranges])), (name, part)
    deep = state["deep"]
    assert torch.equal(source.read("deep", Box((1, 1, 2), (2, 2, 2))), deep[1:3, 1:3, 2:4])


def test_plain_tensors_are_found_in_their_files(tmp_path):
    """Or all that was tested would be torch's reader."""
    dcp.save({"w": torch.arange(6.0), "f": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    source = open_source(tmp_path)
    for name in ("w", "f"):
        place = source._places[our_dcp._Index(name, torch.Size([0]))]
        stored = find_stored(tmp_path / place.relative_path, place.offset, place.length)
        assert stored is not None
        assert stored.numel == source.tensors[name].shape[0]
    stored = find_stored(tmp_path / place.relative_path, place.offset, place.length // 2)
    assert stored is None


def test_torch_reads_what_was_written_in_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(our_dcp, "PART_BYTES", 64)
    state = {name: tensor.detach().contiguous() for name, tensor in a_state().items()}
    ckpt.save(tmp_path / "run", state, step=1)
    ckpt.convert(tmp_path / "run", tmp_path / "dcp", to="dcp")
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, tensor in state.items():
        assert torch.equal(raw(into[name]), raw(tensor)), name
    assert len(open_source(tmp_path / "dcp")._chunks["deep"]) > 1


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 3), (2, 5), (3, 3), (4, 20), (9, 10)])
def test_a_slice_of_tensors_one_after_another(start, stop):
    groups = list(torch.arange(10).split([3, 0, 4, 3]))
    found = torch.full((max(0, min(stop, 10) - start),), -1)
    for at, piece in _slice(groups, start, stop):
        found[at : at + len(piece)] = piece
    assert torch.equal(found, torch.arange(10)[start:stop])

"""Damaged checkpoints: a clear error that names file and tensor; never other values than were saved."""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal.index import Marker
from ckpt_universal.local_store import LocalDirectory
from ckpt_universal.reader import check_sizes
from ckpt_universal.steps import find_step

PATTERN = {"a.weight": (700, 100), "b.weight": (3000,), "c": (5, 5)}


def a_state(fill=None):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) if fill is None else torch.full(shape, fill)
        for name, shape in PATTERN.items()
    }


def saved(root, **policy):
    path = ckpt.save(root, a_state(), step=1, policy=ckpt.SavePolicy(**policy))
    names = os.listdir(path)
    return {
        kind: os.path.join(path, next(n for n in names if n.startswith(kind)))
        for kind in ("data", "index", "COMMIT")
    }


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << random.Random(at).randrange(8))]))


@pytest.mark.parametrize("compress", [None, 3])
def test_every_flipped_bit_is_noticed(tmp_path, compress):
    files = saved(tmp_path, compress=compress)
    size = os.path.getsize(files["data"])
    draw = random.Random(1)
    for at in [0, size - 1, *(draw.randrange(size) for _ in range(25))]:
        flip(files["data"], at)
        report = ckpt.verify(tmp_path)
        assert not report.ok
        assert files["data"] in report.problems[0]
        state = a_state(fill=0.0)
        with pytest.raises(ckpt.CorruptError, match=re.escape(files["data"])):
            ckpt.load(tmp_path, into=state)
        flip(files["data"], at)
    assert ckpt.verify(tmp_path).ok


def test_the_error_names_the_tensor(tmp_path):
    files = saved(tmp_path)
    flip(files["data"], 1000)
    with pytest.raises(
        ckpt.CorruptError, match=r"bytes 0 to 65536 are not what was written; .* parts of 'a\.weight'"
    ):
        ckpt.load(tmp_path, into=a_state(fill=0.0))
    flip(files["data"], 1000)
    flip(files["data"], 700 * 400 + 100)
    (problem,) = ckpt.verify(tmp_path).problems
    assert "'a.weight', 'b.weight', 'c'" in problem
    state = {"c": torch.zeros(5, 5)}
    with pytest.raises(ckpt.CorruptError, match="parts of 'c'"):
        ckpt.load(tmp_path, into=state, strict=False)


@pytest.mark.parametrize("kind", ["data", "index"])
def test_missing_and_truncated_files(tmp_path, kind):
    files = saved(tmp_path)
    path = Path(files[kind])
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ckpt.CorruptError, match=os.path.basename(files[kind])):
        ckpt.load(tmp_path, into=a_state(fill=0.0))
    assert not ckpt.verify(tmp_path).ok
    os.unlink(files[kind])
    with pytest.raises(ckpt.CorruptError, match=rf"{os.path.basename(files[kind])}: missing"):
        ckpt.load(tmp_path, into=a_state(fill=0.0))
    assert not ckpt.verify(tmp_path).ok


def test_another_index_is_not_taken(tmp_path):
    files = saved(tmp_path)
    flip(files["index"], 40)
    with pytest.raises(ckpt.CorruptError, match="not the index that was committed"):
        ckpt.load(tmp_path, into=a_state(fill=0.0))


@pytest.mark.parametrize("text", ["", "garbage", "ckpt-universal 1 index-0.msgpack 5 0"])
def test_a_damaged_marker_is_an_error_and_latest_falls_back(tmp_path, text, caplog):
    saved(tmp_path)
    ckpt.save(tmp_path, a_state(fill=2.0), step=2)
    (tmp_path / "step-000000002" / "COMMIT").write_text(text)
    with pytest.raises(ckpt.CorruptError, match="not a commit marker"):
        ckpt.load(tmp_path / "step-000000002", into=a_state(fill=0.0))
    state = a_state(fill=0.0)
    assert ckpt.load(tmp_path, into=state).step == 1
    assert "taking step-000000001 instead" in caplog.text
    assert torch.equal(state["c"], a_state()["c"])


def test_a_lying_index_is_refused_by_every_reader(tmp_path):
    files = saved(tmp_path, chunk_bytes=16 << 10)
    step = find_step(LocalDirectory(tmp_path))
    index = step.index()
    honest = index.tensors["a.weight"]
    assert len(honest.chunks) > 2
    twice = (
        *honest.chunks[:-2],
        replace(honest.chunks[-3], offset=honest.chunks[-2].offset),
        honest.chunks[-1],
    )
    lying = {**index.tensors, "a.weight": replace(honest, chunks=twice)}
    packed = replace(index, tensors=lying).pack()
    Path(files["index"]).write_bytes(packed)
    Path(files["COMMIT"]).write_bytes(Marker.of(step.marker.index, packed).text())
    for read in (
        lambda: ckpt.load(tmp_path, into=a_state(fill=0.0)),
        lambda: ckpt.read_tree(tmp_path),
        lambda: ckpt.describe(tmp_path),
    ):
        with pytest.raises(ckpt.CorruptError, match=r"'a\.weight': chunks overlap"):
            read()
    assert "chunks overlap" in ckpt.verify(tmp_path).problems[0]


def test_room_is_justified_by_the_files(tmp_path):
    files = saved(tmp_path)
    step = find_step(LocalDirectory(tmp_path))
    check_sizes(step.directory, step.index())
    with open(files["data"], "ab") as file:
        file.write(b"x")
    with pytest.raises(
        ckpt.CorruptError, match=rf"{os.path.basename(files['data'])}: \d+ bytes long, expected"
    ):
        check_sizes(step.directory, step.index())
    os.unlink(files["data"])
    with pytest.raises(ckpt.CorruptError, match="missing"):
        check_sizes(step.directory, step.index())


@pytest.mark.parametrize("length", ["1" * 18, "1" * 24, "\u00b2"])
def test_a_marker_with_a_lying_length(tmp_path, length):
    files = saved(tmp_path)
    words = Path(files["COMMIT"]).read_text().split()
    words[3] = length
    Path(files["COMMIT"]).write_text(" ".join(words))
    with pytest.raises(ckpt.CheckpointError, match=r"not the index that was|no committed checkpoint"):
        ckpt.read_tree(tmp_path)
    with pytest.raises(ckpt.CorruptError, match=r"not the index that was|not a commit marker"):
        ckpt.load(os.path.dirname(files["COMMIT"]), into=a_state(fill=0.0))


def test_verify_counts(tmp_path):
    saved(tmp_path)
    report = ckpt.verify(tmp_path)
    assert report.ok
    assert report.num_tensors == 3
    assert report.num_bytes >= sum(t.numel() * 4 for t in a_state().values())
    assert list(ckpt.diff(tmp_path, tmp_path)) == []


def test_differences(tmp_path):
    one, two = a_state(), a_state()
    two["c"] = two["c"].clone()
    two["c"][2, 2] += 0.5
    del two["b.weight"]
    ckpt.save(tmp_path / "one", {**one, "lr": 0.1}, step=1)
    ckpt.save(tmp_path / "two", {**two, "lr": 0.2, "d": torch.ones(1)}, step=1)
    lines = list(ckpt.diff(tmp_path / "one", tmp_path / "two"))
    assert "! c: 1 of 25 elements differ, by 0.5 at most" in lines
    assert "< b.weight: only in the first" in lines
    assert "> d: only in the second" in lines
    assert "! lr: 0.1 and 0.2" in lines
    assert len(lines) == 4

"""Reads and writes from where tensors lie: the same bytes at any address, and nothing copied that need not be."""

from __future__ import annotations

import mmap
from pathlib import Path

import ckpt_universal as ckpt
import numpy as np
import pytest
import torch
from ckpt_universal import vectors, writer
from ckpt_universal.pages import page_checksums
from ckpt_universal.vectors import Vector, address_of, lay_out, skip
from hypothesis import given, settings
from hypothesis import strategies as st

ALIGN = 4096


@st.composite
def a_range(draw):
    """A range of a file, and parts of it that lie in memory at addresses of their own."""
    align = draw(st.sampled_from([1, ALIGN]))
    gaps = draw(st.lists(st.integers(0, 9000), min_size=1, max_size=5))
    sizes = draw(st.lists(st.integers(1, 300_000), min_size=len(gaps), max_size=len(gaps)))
    congruent = draw(st.lists(st.booleans(), min_size=len(gaps), max_size=len(gaps)))
    parts, at = [], 0
    for gap, size, same in zip(gaps, sizes, congruent, strict=True):
        at += gap
        memory = memoryview(mmap.mmap(-1, size + 2 * ALIGN))
        start = at % ALIGN if same else (at + 64) % ALIGN
        data = memory[start : start + size]
        data[:] = np.random.default_rng(at).integers(0, 256, size, dtype=np.uint8).tobytes()
        parts.append((at, data))
        at += size
    nbytes = -(-(at + draw(st.integers(0, 5000))) // align) * align
    return align, nbytes, parts


@settings(deadline=None, max_examples=60)
@given(a_range())
def test_a_range_is_covered_once_and_in_order(case):
    align, nbytes, parts = case
    buffer = memoryview(mmap.mmap(-1, nbytes + ALIGN))
    vector = lay_out(buffer, nbytes, parts, align)
    for at, data in vector.bounced:
        buffer[at : at + len(data)] = data
    expected = bytearray(nbytes)
    for at, data in parts:
        expected[at : at + len(data)] = data
    assert b"".join(vector.views) == expected
    assert all(address_of(view) % align == 0 and len(view) % align == 0 for view in vector.views)
    bounced = {at for at, _ in vector.bounced}
    for at, data in parts:
        can = (address_of(data) - at) % align == 0 and len(data) >= vectors.DIRECT_BYTES + 2 * align
        assert not (can and at in bounced and dict(vector.bounced)[at] is data)
    whole = [expected[at : at + 4096] for at in range(0, nbytes, 4096)]
    assert page_checksums(vector.views, 4096) == page_checksums([memoryview(b"".join(whole))], 4096)
    middle = nbytes // 3
    assert b"".join(skip(vector.views, middle)) == expected[middle:]


def at_address(values: torch.Tensor, residue: int) -> torch.Tensor:
    """The same values at an address of that residue modulo a page."""
    itemsize = values.element_size()
    room = torch.empty(values.numel() * itemsize + 2 * ALIGN, dtype=torch.uint8)
    start = (residue - room.data_ptr()) % ALIGN
    moved = room[start : start + values.numel() * itemsize].view(values.dtype).view(values.shape)
    return moved.copy_(values)


@pytest.mark.parametrize("saved_at", [0, 64, 8, 4032])
@pytest.mark.parametrize("loaded_at", [0, 64, 8])
def test_any_address_to_any_other(tmp_path: Path, saved_at: int, loaded_at: int) -> None:
    torch.manual_seed(saved_at + loaded_at)
    values = {
        "large": torch.randn(1_300_001),
        "small": torch.randn(7),
        "low": torch.randn(1000, 701).bfloat16(),
        "turned": torch.randn(600, 700).t(),
        "ints": torch.randint(0, 9, (300_000,)),
    }
    state = {n: v if n == "turned" else at_address(v, saved_at) for n, v in values.items()}
    ckpt.save(tmp_path, state, step=0, policy=ckpt.SavePolicy(chunk_bytes=3 << 20))
    into = {name: at_address(torch.zeros_like(v), loaded_at) for name, v in values.items()}
    into["turned"] = torch.zeros(600, 700).t()
    versions = {name: tensor._version for name, tensor in into.items()}
    ckpt.load(tmp_path, into=into)
    for name, expected in values.items():
        assert torch.equal(into[name], expected), name
        assert into[name]._version > versions[name], f"{name}: changed, and nobody can tell"
    ckpt.verify(tmp_path)


def test_where_memory_and_file_agree_nothing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []

    def counting(*args) -> Vector:
        vector = lay_out(*args)
        copied.extend(len(data) for _, data in vector.bounced)
        return vector

    monkeypatch.setattr(writer, "lay_out", counting)
    large = at_address(torch.randn(5_000_000), 64)
    ckpt.save(tmp_path, {"large": large}, step=0)
    into = at_address(torch.zeros_like(large), 64)
    ckpt.load(tmp_path, into={"large": into})
    assert torch.equal(into, large)
    assert sum(copied) <= 8 * ALIGN


def test_two_who_want_the_same_bytes(tmp_path: Path) -> None:
    large = torch.randn(1_000_000)
    ckpt.save(tmp_path, {"a": large}, step=0)
    into = {"a": torch.zeros_like(large), "b": torch.zeros_like(large), "c": torch.zeros(1_000_000).double()}
    ckpt.load(tmp_path, into=into, rename=lambda name: "a")
    assert torch.equal(into["a"], large)
    assert torch.equal(into["b"], large)
    assert torch.equal(into["c"], large.double())

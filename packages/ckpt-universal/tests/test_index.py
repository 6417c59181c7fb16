"""The index: what was written comes back; any other bytes are an error, and cheap."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, product

import msgpack
import pytest
from ckpt_universal.boxes import Box, covers_once
from ckpt_universal.errors import CheckpointError, ConfigError, CorruptError
from ckpt_universal.index import (
    ChunkRecord,
    FileRecord,
    Index,
    Marker,
    TensorRecord,
    parse_marker,
    unpack_index,
)
from ckpt_universal.values import PerRankValues, TensorRef, pack
from hypothesis import given
from hypothesis import strategies as st

TOKEN = "0123456789abcdef"


def fixed() -> Index:
    return Index(
        step=7,
        created_s=1.5,
        world=2,
        page_bytes=65536,
        files=(
            FileRecord(f"data-{TOKEN}-00000.bin", 1024, 5),
            FileRecord(f"data-{TOKEN}-00001.bin", 2048, 6),
        ),
        tensors={
            "w": TensorRecord(
                (4, 8),
                "float32",
                (
                    ChunkRecord(0, 0, 64, 0, Box((0, 0), (2, 8))),
                    ChunkRecord(1, 64, 30, 2, Box((2, 0), (2, 8))),  # compressed: of any length
                ),
            ),
            "s": TensorRecord((), "int64", (ChunkRecord(1, 128, 8, 0, Box((), ())),)),
            "none": TensorRecord((0, 3), "bfloat16", ()),
        },
        values={"w": TensorRef("w"), "lr": 0.1},
    )


def test_it_comes_back():
    assert unpack_index(fixed().pack(), "x") == fixed()


def deep(levels: int) -> list:
    node: list = []
    for _ in range(levels):
        node = [node]
    return node


def content() -> dict:
    return msgpack.unpackb(fixed().pack(), strict_map_key=False)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", "does not say that it is one"),
        (["files", 0, 0], "../../etc/passwd", "not the name of a file"),
        (["files", 0, 0], "/etc/passwd", "not the name of a file"),
        (["files", 0, 1], 10, "ends behind the data"),
        (["tensors", "w", 0], "object", "which this torch lacks"),
        (["tensors", "w", 1], [2**20, 2**20], "chunks hold 32 of"),
        (["tensors", "w", 2, 0, 0], 9, "tuple index out of range"),
        (["tensors", "w", 2, 0, 1], -1, "expected a number >= 0"),
        (["tensors", "w", 2, 0, 3], 7, "unknown codec"),
        (["tensors", "w", 2, 0, 4], [3, 0], "is not within"),
        (["tensors", "w", 2, 0, 5], [2, 8, 1], "is not within|length"),
        (["page_bytes"], 1, "page_bytes is 1"),
        (["values"], b"\xc1", "not a value"),
        (["step"], "x", "expected a number"),
        (["tensors"], [], "not an index"),
        (["tensors", "w", 1], [2**40, 2**40], "no tensor of shape"),
        (["tensors", "none", 1], [2**63, 0], "no tensor of shape"),
        (["tensors", "none", 1], [2**62, 2**62, 0], "no tensor of shape"),
        (["tensors", "none", 1], [2**62, 0], "no tensor of shape"),  # of elements, and of bytes too many
        (["tensors", "w", 2, 1], [0, 0, 64, 0, [0, 0], [2, 8]], "chunks overlap"),
        (["tensors", "w", 2, 1], [0, 64, 64, 0, [1, 0], [2, 8]], "chunks overlap"),
        (["tensors", "w", 2, 1, 1], 120, "two chunks lie at byte 128 of"),
        (["tensors", "w"], ["float32", [2**40], [[0, 0, 12, 1, [0], [2**40]]]], "no 12 bytes can decompress"),
        (["values"], pack({"a": TensorRef("w"), "b": [TensorRef("w")]}, ""), "two places .* tensor 'w'"),
        (["values"], pack({"a": TensorRef("z")}, ""), "a tensor 'z' that there is not"),
        (["values"], pack({TensorRef("w"): 1}, ""), "'w' cannot be a key"),
        (
            ["values"],
            pack(PerRankValues((TensorRef("w"),)), ""),
            "'w' cannot be a key, in a set, or one rank's",
        ),
        (["values"], pack(PerRankValues(()), ""), "none at all"),
        (["values"], msgpack.packb(deep(100)), "nested deeper"),
    ],
)
def test_contradictions_are_refused(path, value, message):
    changed = content()
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(CorruptError, match=message):
        unpack_index(msgpack.packb(changed), "x")


@pytest.mark.parametrize("values", [{"a": TensorRef("w"), "b": TensorRef("w")}, {"a": TensorRef("z")}])
def test_what_would_be_refused_is_not_written(values):
    with pytest.raises(ConfigError, match=r"tensor '[wz]'"):
        replace(fixed(), values=values).pack()


@pytest.mark.parametrize(
    ("shape", "grid"), [((100_000,), (100_000,)), ((1000, 100), (1000, 100)), ((64, 64, 32), (50, 50, 30))]
)
def test_a_hundred_thousand_chunks_are_checked_quickly(shape, grid):
    sizes = [[whole // n + (at < whole % n) for at in range(n)] for whole, n in zip(shape, grid, strict=True)]
    starts = [list(accumulate(each, initial=0)) for each in sizes]
    boxes = [
        Box(
            tuple(s[i] for s, i in zip(starts, at, strict=True)),
            tuple(n[i] for n, i in zip(sizes, at, strict=True)),
        )
        for at in product(*map(range, grid))
    ]
    before = time.process_time()
    assert covers_once(shape, boxes)
    boxes[-1] = replace(boxes[-1], start=(0,) * len(shape))
    assert not covers_once(shape, boxes)
    assert time.process_time() - before < 10  # a hundredth of what comparing all pairs takes


def test_later_versions_say_so():
    with pytest.raises(CheckpointError, match=r"version 99 .* reads up to 1; update it"):
        unpack_index(msgpack.packb(content() | {"version": 99}), "x")
    with pytest.raises(CheckpointError, match="version 2"):
        parse_marker(f"ckpt-universal 2 index-{TOKEN}.msgpack 5 {'0' * 16}".encode(), "x")


@pytest.mark.parametrize("number", ["\u00b2", "1" * 19, "1" * 5000, "-1", "+1", "1_0", "\u0661"])
def test_numbers_of_a_marker_are_short_and_decimal(number):
    for version, nbytes in (("1", number), (number, "5")):
        with pytest.raises(CorruptError, match="not a commit marker"):
            parse_marker(f"ckpt-universal {version} index-{TOKEN}.msgpack {nbytes} {'0' * 16}".encode(), "x")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(raw):
    with pytest.raises(CheckpointError):
        unpack_index(raw, "x")
    with pytest.raises(CheckpointError):
        parse_marker(raw, "x")


@given(st.data())
def test_changed_bytes_are_an_index_or_an_error(data):
    raw = bytearray(fixed().pack())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CheckpointError):
        unpack_index(bytes(raw), "x")


@pytest.mark.parametrize(
    "header", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_a_lying_header_allocates_nothing(header):
    for raw in (header, header + b"\x00" * 100, b"\x81\xa6format" + header):
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            unpack_index(raw, "x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 << 20


def test_the_marker_comes_back():
    marker = Marker.of(f"index-{TOKEN}.msgpack", b"abc")
    assert parse_marker(marker.text(), "x") == marker
    assert marker.token == TOKEN
    for wrong in ("index-../../x", "index.msgpack", f"index-{TOKEN}.msgpack/.."):
        with pytest.raises(CorruptError, match="not a commit marker"):
            parse_marker(f"ckpt-universal 1 {wrong} 5 {'0' * 16}".encode(), "x")


def test_a_tensor_of_as_many_dims_as_torch_has_comes_back():
    tensor = TensorRecord((1,) * 64, "uint8", (ChunkRecord(0, 0, 1, 0, Box((0,) * 64, (1,) * 64)),))
    index = replace(fixed(), tensors={"t": tensor}, values=TensorRef("t"))
    assert unpack_index(index.pack(), "x") == index

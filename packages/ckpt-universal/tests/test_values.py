"""Small values: typed, and nothing but what is listed."""

from __future__ import annotations

import enum
from collections import Counter
from contextlib import suppress

import msgpack
import numpy as np
import pytest
import torch
from ckpt_universal.errors import CheckpointError, ConfigError
from ckpt_universal.merge import merge_values
from ckpt_universal.values import PerRankValues, TensorRef, pack, unpack
from hypothesis import given
from hypothesis import strategies as st

numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
others = st.complex_numbers(allow_nan=False) | st.sampled_from([torch.float32, torch.bfloat16, torch.bool])
keys = st.text() | st.integers() | st.booleans()
trees = st.recursive(
    numbers | others,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@given(trees)
def test_every_value_comes_back_with_its_type(value):
    def same(a, b):
        if type(a) is not type(b):
            return False
        if isinstance(a, dict):
            return (
                list(a) == list(b)
                and all(type(x) is type(y) for x, y in zip(a, b, strict=True))
                and all(same(a[k], b[k]) for k in a)
            )
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    assert same(unpack(pack(value, "x"), "x"), value)


def test_what_is_special():
    assert unpack(pack({3, 1, 2}, "x"), "x") == {1, 2, 3}
    assert unpack(pack(2**200, "x"), "x") == 2**200
    assert unpack(pack(TensorRef("a.b"), "x"), "x") == TensorRef("a.b")
    assert unpack(pack(np.float64(0.5), "x"), "x") == 0.5
    assert unpack(pack(np.int32(7), "x"), "x") == 7
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    (found,) = unpack(pack(PerRankValues((tensor,)), "x"), "x").values
    assert torch.equal(found, tensor)
    assert found.dtype is tensor.dtype

    class Phase(str, enum.Enum):
        WARM = "warm"

    assert unpack(pack(Phase.WARM, "x"), "x") == "warm"


def test_sets_within_sets_and_keys():
    for value in (
        {frozenset({1, 2}): 3, (frozenset({"a"}), 1): 4},
        {frozenset({frozenset({1}), frozenset()}), (1, (frozenset({2}),))},
        Counter({frozenset({"x"}): 2}),
    ):
        found = unpack(pack(value, "x"), "x")
        assert found == value
        assert type(found) is type(value)
    # In one order, whatever order they were made in.
    some = [frozenset({f"{at}", f"{at + 1}"}) for at in range(20)]
    assert pack(frozenset(some), "x") == pack(set(some[7:] + some[:7]), "x")


@pytest.mark.parametrize("key", [torch.ones(1), (1, torch.ones(1)), PerRankValues((1,))])
def test_keys_that_would_not_come_back(key):
    for value in ({key: 1}, {key}):
        with pytest.raises(ConfigError, match=r"x\.(key|element): .* as a key or in a set cannot be stored"):
            pack(value, "x")


@pytest.mark.parametrize(
    "value", [object(), torch.nn.Linear(2, 2), lambda: 0, torch.device("cpu"), {"a": [object()]}]
)
def test_what_has_no_type_is_refused_by_path(value):
    with pytest.raises(ConfigError, match=r"state\.x.*cannot be stored \(nothing is pickled\)"):
        pack({"x": value}, "state")


def test_cycles_end():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(ConfigError, match="is it a cycle"):
        pack(cycle, "state")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_error(raw):
    with suppress(CheckpointError):
        unpack(raw, "x")


@given(trees, st.data())
def test_a_changed_byte_is_a_value_or_an_error(value, data):
    raw = bytearray(pack(value, "x"))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(CheckpointError):
        unpack(bytes(raw), "x")


def test_nested_extensions_do_not_overflow_the_stack():
    raw = msgpack.packb(1)
    for _ in range(2000):
        raw = msgpack.packb(msgpack.ExtType(3, msgpack.packb([msgpack.ExtType(3, raw)])))
    with pytest.raises(CheckpointError, match="nested deeper"):
        unpack(raw, "x")


def test_ranks_trees_become_one():
    first = {"a": 1, "layers": {"0": 5}, "r": PerRankValues((3,)), "groups": [{"lr": 1.0}]}
    second = {"a": 1, "layers": {"1": 6}, "r": PerRankValues((4,)), "groups": [{"lr": 1.0}, {"lr": 2.0}]}
    merged = merge_values([first, second])
    assert merged == {
        "a": 1,
        "layers": {"0": 5, "1": 6},
        "r": PerRankValues((3, 4)),
        "groups": [{"lr": 1.0}, {"lr": 2.0}],
    }
    with pytest.raises(
        ConfigError, match=r"opt\.lr: ranks have different values: 0\.1 on rank 0, 0\.2 on rank 1"
    ):
        merge_values([{"opt": {"lr": 0.1}}, {"opt": {"lr": 0.2}}])

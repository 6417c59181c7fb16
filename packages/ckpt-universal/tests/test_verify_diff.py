"""`diff` finds every difference of values, also of what it does not show."""

from __future__ import annotations

import re

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal.cli import main as command

LONG = list(range(100))
BIG = torch.zeros(2000)


def lines_of(tmp_path, one, other):
    for name, value in (("one", one), ("other", other)):
        ckpt.save(tmp_path / name, {"w": torch.ones(2), "x": value, "same": [1, "a"]}, step=1)
    lines = list(ckpt.diff(tmp_path / "one", tmp_path / "other"))
    assert command(["diff", str(tmp_path / "one"), str(tmp_path / "other")]) == int(bool(lines))
    return lines


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (1, 2, "! x: 1 and 2"),
        (1, True, "! x: 1 and True"),
        (LONG, [*LONG[:-1], 7], "! x: .* in both, and what is not shown of it differs"),
        ("a" * 200 + "b", "a" * 200 + "c", "! x: .* in both, and what is not shown of it differs"),
        (ckpt.PerRank(1), ckpt.PerRank(2), "! x: one value for each of 1 .* in both, and what is not shown"),
        (ckpt.PerRank(BIG), ckpt.PerRank(BIG + 1), "! x: one value for each of 1 .* in both, and what"),
        ([{"a": 1}], [{"a": 2}], r"! x\.0\.a: 1 and 2"),
        ([{"a": 1}], [{"a": 1}, {"b": 1}], r"! x\.1\.b: nothing and 1"),
        ({"a": {}}, {}, "! the values are equal, and the dictionaries and lists that hold them differ"),
        ({1: 2}, {"1": 2}, "! the values are equal, and the dictionaries and lists that hold them differ"),
        (
            [{"a": 1}],
            ({"a": 1},),
            "! the values are equal, and the dictionaries and lists that hold them differ",
        ),
    ],
)
def test_steps_that_differ_are_said_to(tmp_path, one, other, expected):
    lines = lines_of(tmp_path, one, other)
    assert len(lines) == 1
    assert re.match(expected, lines[0]), lines


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG, list(LONG)),
        ({"a": 1, "b": {1: 2, "1": 3}}, {"b": {"1": 3, 1: 2}, "a": 1}),
        (float("nan"), float("nan")),
        ({3, 1}, {1, 3}),
        (ckpt.PerRank(BIG), ckpt.PerRank(BIG.clone())),
    ],
)
def test_equal_ones_are_not(tmp_path, one, other):
    assert lines_of(tmp_path, one, other) == []

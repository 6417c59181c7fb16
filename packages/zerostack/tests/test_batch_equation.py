"""The batch equation is solved when it can be and quoted when it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zerostack.batch import solve
from zerostack.errors import ConfigError

small = st.integers(1, 64)


@given(micro=small, accumulation=small, world=small, missing=st.sampled_from([None, 0, 1, 2]))
def test_any_two_give_the_third(micro, accumulation, world, missing):
    numbers = [micro * accumulation * world, micro, accumulation]
    given_numbers = [None if place == missing else number for place, number in enumerate(numbers)]
    batch = solve(*given_numbers, world)
    assert [batch.train, batch.micro, batch.accumulation] == numbers
    assert len(batch.sources) == (0 if missing is None else 1)


@given(train=small, micro=small, accumulation=small, world=small)
def test_an_inconsistent_triple_is_quoted(train, micro, accumulation, world):
    if train == micro * accumulation * world:
        return
    with pytest.raises(ConfigError) as error:
        solve(train, micro, accumulation, world)
    product = micro * accumulation * world
    assert f"!= train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {accumulation}" in str(
        error.value
    )
    assert f"ranks {world} = {product};" in str(error.value)


@pytest.mark.parametrize(
    ("given_numbers", "world", "expected"),
    [((32, None, None), 4, (32, 8, 1)), ((None, 3, None), 4, (12, 3, 1)), ((1, None, None), 1, (1, 1, 1))],
)
def test_one_number_is_enough(given_numbers, world, expected):
    batch = solve(*given_numbers, world)
    assert (batch.train, batch.micro, batch.accumulation) == expected
    assert batch.sources["gradient_accumulation_steps"] == "default"


@pytest.mark.parametrize(
    ("given_numbers", "world", "message"),
    [
        ((None, None, None), 1, "give train_batch_size or"),
        ((None, None, 4), 1, "give train_batch_size or"),
        (
            (3, None, 1),
            2,
            "train_batch_size 3 is not a multiple of gradient_accumulation_steps 1 x ranks 2 = 2",
        ),
        (
            (7, 2, None),
            2,
            "train_batch_size 7 is not a multiple of train_micro_batch_size_per_gpu 2 x ranks 2",
        ),
        ((1, None, None), 2, "train_batch_size 1 is not a multiple of"),
        ((2, 4, None), 1, "train_batch_size 2 is not a multiple of"),
    ],
)
def test_what_cannot_be_solved_says_why(given_numbers, world, message):
    with pytest.raises(ConfigError, match=message):
        solve(*given_numbers, world)

"""Prompts beside decodes: nineteen forwards of twenty are in time, and prompts get what time there is."""

from __future__ import annotations

import random

import pytest
from engine_lab import engine_of, expected, prompts, run, tokens
from fastgen import SamplingParams, SchedulePolicy
from fastgen.errors import ConfigError
from fastgen.pace import LATEST, Pace
from hypothesis import given, settings
from hypothesis import strategies as st


def forwards(pace: Pace, alone: float, token: float, noise: float, count: int) -> list[tuple[int, float]]:
    """Tokens and seconds of so many, on a machine that needs `alone` and something for each token."""
    chance = random.Random(0)
    found = []
    for _ in range(count):
        tokens = pace.prompt_tokens
        seconds = (alone + token * tokens) * (1 + noise * chance.gauss(0, 1))
        pace.took(tokens, seconds)
        found.append((tokens, seconds))
    return found


@settings(max_examples=30, deadline=None)
@given(
    alone=st.floats(1e-3, 0.1),
    room=st.floats(10, 400),  # tokens that fit
    part=st.floats(0.2, 0.9),  # of a forward's time that is the decodes'
    noise=st.floats(0, 0.05),
)
def test_few_are_late_and_most_of_the_time_is_used(
    alone: float, room: float, part: float, noise: float
) -> None:
    gap = alone / part
    token = (gap - alone) / room
    settled = forwards(Pace(gap, 4096), alone, token, noise, 3000)[1500:]
    assert sum(seconds > gap for _, seconds in settled) <= 0.06 * len(settled)
    fitting = (gap * (1 - 2 * noise) - alone) / token
    assert sum(tokens for tokens, _ in settled) >= 0.6 * fitting * len(settled)


@settings(max_examples=30, deadline=None)
@given(
    alone=st.floats(1e-3, 0.1),
    least=st.floats(
        0.3, 3.0
    ),  # of a forward's time: what one token of a prompt takes more, and no token less
    noise=st.floats(0, 0.05),
)
def test_where_one_token_is_too_many_few_forwards_have_any(alone: float, least: float, noise: float) -> None:
    """As after a long prompt, all of which a token has to look at."""
    gap, chance, pace = 1.25 * alone, random.Random(1), Pace(1.25 * alone, 4096)
    found = []
    for _ in range(3000):
        tokens = pace.prompt_tokens
        seconds = alone * (1 + (least + 0.02 * tokens) * bool(tokens)) * (1 + noise * chance.gauss(0, 1))
        pace.took(tokens, seconds)
        found.append((tokens, seconds))
    settled = found[1000:]
    assert sum(seconds > gap for _, seconds in settled) <= 0.055 * len(settled)
    assert sum(seconds > 1.1 * LATEST * gap for _, seconds in settled) <= 0.01 * len(settled)
    most = (LATEST * gap / alone * (1 - 2 * noise) - 1 - least) / 0.02
    assert sum(tokens for tokens, _ in settled) >= 0.4 * most / 33 * len(settled)


def test_it_follows_a_machine_that_slows_down_and_recovers() -> None:
    pace = Pace(0.01, 512)
    sizes = []
    for token in (1e-4, 1e-3, 1e-4):
        settled = [
            tokens for tokens, seconds in forwards(pace, 0.004, token, 0.02, 600)[-100:] if seconds <= 0.01
        ]
        sizes.append(sum(settled) / len(settled))
    assert sizes[1] <= 6 < 30 <= sizes[0]
    assert sizes[2] >= 30


def test_a_short_prompt_is_through_at_once() -> None:
    pace = Pace(0.01, 512)
    for _ in range(50):
        pace.took(0, 0.008)
    assert pace.prompt_tokens == 8
    pace.took(8, 0.015)
    assert pace.prompt_tokens == 1


def test_prompts_get_on_where_decodes_alone_are_late() -> None:
    """What is asked for cannot be had: a little more than what there is without prompts takes its place."""
    found = forwards(Pace(1e-9, 512), 1.0, 0.2, 0.0, 500)
    assert sum(seconds > 1.1 for _, seconds in found[50:]) <= 0.05 * 450
    assert sum(tokens for tokens, _ in found) >= 8 * (500 / 33)
    assert forwards(Pace(1e9, 512), 1.0, 1.0, 0.0, 200)[-1][0] == 512


def test_the_end_of_a_prompt_teaches_nothing() -> None:
    pace = Pace(1.0, 512)
    forwards(pace, 0.0, 0.02, 0.0, 100)
    before = pace._fits
    for _ in range(100):
        pace.took(1, 0.01)
        pace.took(0, 0.5)
    assert pace._fits == before > 30


def test_sizes_are_few() -> None:
    sizes = {tokens for tokens, _ in forwards(Pace(1.0, 512), 0.0, 1e-9, 0.0, 500)}
    assert sizes <= {0, 1, 2, 3, 4, 5, 6, 7, *(m << e for m in (4, 5, 6, 7) for e in range(1, 8))}


def test_an_engine_with_a_gap_gives_the_same_tokens() -> None:
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    jobs = {str(at): (ids, greedy) for at, ids in enumerate(prompts(8, seed=6))}
    engine = engine_of(schedule=SchedulePolicy(token_budget=64, max_sequences=32, gap_s=1e-6))
    assert engine.prompt_tokens == 8
    found = run(engine, jobs, at_once=2)
    assert all(tokens(found[name]) == expected(tuple(ids), 20) for name, (ids, _) in jobs.items())


def test_a_gap_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="gap_s"):
        SchedulePolicy(gap_s=0.0)

"""When the variance has settled, and 0/1 Adam's two schedules: pure functions against the papers' formulas."""

from __future__ import annotations

import itertools

import pytest
from comm_compress import CompressConfigError
from comm_compress.optimizers.intervals import Intervals
from comm_compress.optimizers.warmup import FreezeRule, VarianceWatch
from comm_compress.wire_1bit import run_volume
from hypothesis import given
from hypothesis import strategies as st

BERT = (
    Intervals(  # the published run: BERT, 152 000 steps, warm-up of the rate 12 500, rate halved every 32 678
        var_freeze_step=12_500, var_update_scaler=16, local_step_scaler=32_678, local_step_clipper=16
    )
)


# -- freezing ---------------------------------------------------------------------------------------------------


def frozen_at(norms: list[float], beta2: float = 0.99, rates: list[float] | None = None) -> int | None:
    watch = VarianceWatch(FreezeRule(), beta2)
    for step, norm in enumerate(norms, 1):
        rate = 1.0 if rates is None else rates[step - 1]
        if watch.is_due(step) and watch.observe(norm, [rate]):
            return step
    return None


def test_it_freezes_when_the_variance_has_not_changed_for_a_window() -> None:
    assert frozen_at([1.0] * 300) == 110  # the first look that has another 100 steps before it
    falling = [10.0 * 0.97**step for step in range(200)]
    assert frozen_at(falling) is None
    assert frozen_at(falling + [falling[-1]] * 300) == 300
    assert frozen_at([1.0 * 1.05**step for step in range(200)]) is None  # growing is not settled either
    assert frozen_at([0.0] * 300) is None


def test_the_threshold_is_the_papers() -> None:
    def ratio_after_a_window(ratio: float) -> list[float]:
        return [1.0] * 10 + [0.5] * 99 + [ratio] * 2

    assert frozen_at(ratio_after_a_window(0.961)) == 110
    assert frozen_at(ratio_after_a_window(0.959)) is None
    assert frozen_at(ratio_after_a_window(1 / 0.961)) == 110


def test_it_does_not_freeze_while_a_rate_rises() -> None:
    rates = [min(1.0, step / 250) for step in range(1, 501)]
    assert frozen_at([1.0] * 500, rates=rates) == 350


def test_what_it_has_seen_survives() -> None:
    watch = VarianceWatch(FreezeRule(), 0.99)
    for _ in range(10):
        assert not watch.observe(1.0, [0.1])
    other = VarianceWatch(FreezeRule(), 0.99)
    other.load(watch.state())
    assert other.observe(1.0, [0.1])
    assert (watch.window_steps, watch.stride) == (100, 10)


def test_a_given_step_asks_for_no_looks() -> None:
    watch = VarianceWatch(FreezeRule(freeze_step=10), 0.999)
    assert not any(watch.is_due(step) for step in range(1, 3000))


@pytest.mark.parametrize(
    "bad", [{"freeze_step": 0}, {"freeze_step": 1.5}, {"freeze_step": True}, {"threshold": 0.0}]
)
def test_rules_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(CompressConfigError, match="freeze"):
        FreezeRule(**bad)  # type: ignore[arg-type]


# -- 0/1 Adam ---------------------------------------------------------------------------------------------------

policies = st.builds(
    Intervals,
    var_freeze_step=st.integers(1, 300),
    var_update_scaler=st.integers(1, 20),
    local_step_scaler=st.integers(1, 200),
    local_step_clipper=st.integers(1, 32),
)


@given(policies)
def test_variance_steps_follow_the_exponential_rule(policy: Intervals) -> None:
    steps = list(policy.variance_steps(400))
    assert steps[0] == 1
    assert steps[-1] <= policy.var_freeze_step
    for number, (now, after) in enumerate(itertools.pairwise(steps)):
        assert after - now == 2 ** (number // policy.var_update_scaler)
    next_step = steps[-1] + 2 ** ((len(steps) - 1) // policy.var_update_scaler)
    assert next_step > policy.var_freeze_step  # none is missing


@given(policies)
def test_syncs_are_never_further_apart_than_the_policy_says(policy: Intervals) -> None:
    exact, syncs = set(policy.variance_steps(400)), set(policy.sync_steps(400))
    assert not exact & syncs
    met = sorted(exact | syncs)
    assert met[: policy.var_freeze_step] == list(range(1, min(policy.var_freeze_step, 400) + 1))
    for now, after in itertools.pairwise(met):
        assert after - now <= policy.local_step_clipper
        if after > policy.var_freeze_step:
            doublings = (after - policy.var_freeze_step) // policy.local_step_scaler
            assert after - now <= 2**doublings


def test_distances_double_as_the_rate_halves() -> None:
    distances = [BERT.sync_distance(12_500 + half * 32_678) for half in range(7)]
    assert distances == [1, 2, 4, 8, 16, 16, 16]
    assert BERT.sync_distance(12_499) == 1


def test_the_published_run_sends_26_times_less() -> None:
    """0/1 Adam's BERT-Large run against Adam in 16 bits; and its ratios to 1-bit Adam, as the abstract has them."""
    steps, buckets = 152_000, [4 << 20] * 80
    ours = run_volume(
        buckets,
        16,
        2,
        num_steps=steps,
        exact_steps=BERT.variance_steps(steps),
        sync_steps=BERT.sync_steps(steps),
    )
    assert ours.ratio > 26
    one_bit = run_volume(
        buckets, 16, 2, num_steps=steps, exact_steps=range(23_000), sync_steps=range(23_000, steps)
    )
    assert 1 - ours.sent_bytes / one_bit.sent_bytes > 0.84  # "up to 87 % of data volume"
    assert 1 - ours.rounds / one_bit.rounds > 0.5  # "54 % of communication rounds"


@pytest.mark.parametrize(
    "name", ["var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_policies_out_of_range(name: str, value: float) -> None:
    with pytest.raises(CompressConfigError, match=f"{name}: expected a whole number >= 1, got {value}"):
        Intervals(**{name: value})  # type: ignore[arg-type]

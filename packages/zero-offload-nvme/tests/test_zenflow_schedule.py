"""When channels are chosen and windows end: as the policy says, and never in the middle of a window."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from zero_offload_nvme import ZenFlow
from zero_offload_nvme.zenflow_schedule import (
    Progress,
    Selection,
    ends_window,
    is_ripe,
    is_stale,
    is_warming_up,
    selection,
)


@st.composite
def policies(draw):
    strategy = draw(st.sampled_from(["auto", "step", "epoch"]))
    options = {"select_strategy": strategy, "full_warm_up_rounds": draw(st.integers(0, 5))}
    if strategy == "step":
        options["select_interval"] = draw(st.integers(1, 9))
    if strategy == "epoch":
        options |= {
            "steps_per_epoch": draw(st.integers(1, 9)),
            "select_interval": draw(st.sampled_from(["auto", 1, 2])),
        }
    if draw(st.booleans()):
        return ZenFlow(update_interval=draw(st.integers(1, 6)), **options)
    return ZenFlow(update_interval="auto", max_update_interval=draw(st.integers(1, 6)), **options)


def walk(policy: ZenFlow, outcomes):
    """What each step does: (exact, selection, ends, gradients held before)."""
    progress, done = Progress(), []
    for ripe, stale in outcomes:
        if is_warming_up(policy, progress):
            done.append(("exact", None, False, progress.num_held))
            progress = progress.stepped(exact=True)
            continue
        todo = selection(policy, progress)
        if todo is Selection.ANEW or (todo is Selection.IF_STALE and stale):
            progress = progress.selected()
        ends = ends_window(policy, progress, is_ripe=ripe and progress.num_held > 0)
        done.append(("split", todo, ends, progress.num_held))
        progress = progress.stepped(ended=ends)
    return done


OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(policies(), OUTCOMES)
def test_every_window_is_whole(policy: ZenFlow, outcomes) -> None:
    done = walk(policy, outcomes)
    exact, split = [d for d in done if d[0] == "exact"], [d for d in done if d[0] == "split"]
    assert len(exact) == min(policy.full_warm_up_rounds, len(done))
    assert done[: len(exact)] == exact
    longest = policy.max_update_interval if policy.update_interval == "auto" else policy.update_interval
    for before, after in pairwise(split):
        assert after[3] == (0 if before[2] else before[3] + 1)
    assert all(held < longest for *_, held in split)
    if policy.update_interval != "auto":
        assert all(ends == (held + 1 == longest) for _, _, ends, held in split)


@given(policies(), OUTCOMES)
def test_channels_are_chosen_between_windows_at_the_interval(policy: ZenFlow, outcomes) -> None:
    split = [d for d in walk(policy, outcomes) if d[0] == "split"]
    if not split:
        return
    assert split[0][1] is Selection.ANEW
    assert all(held == 0 for _, todo, _, held in split if todo is not Selection.KEEP)
    if policy.select_strategy == "auto":
        assert all((todo is Selection.KEEP) == (held > 0) for _, todo, _, held in split)
        return
    interval = 1 if policy.select_interval == "auto" else policy.select_interval
    interval *= policy.steps_per_epoch or 1
    chosen = [number for number, (_, todo, _, _) in enumerate(split) if todo is Selection.ANEW]
    for earlier, later in pairwise(chosen):
        due = [n for n in range(earlier + interval, len(split)) if split[n][3] == 0]
        assert later == due[0]  # the first step of a window that is old enough


@given(st.floats(0, 1e6), st.integers(1, 1000), st.floats(0, 1e6), st.integers(1, 1000), st.floats(0.01, 10))
def test_ripe_is_a_matter_of_means(
    rest: float, num_rest: int, now: float, num_now: int, ratio: float
) -> None:
    policy = ZenFlow(update_interval="auto", auto_ratio=ratio)
    ripe = is_ripe(policy, rest=(rest, num_rest), chosen=(now, num_now))
    gap = rest / num_rest - ratio * now / num_now
    if abs(gap) > 1e-9 * (rest / num_rest + ratio * now / num_now):
        assert ripe == (gap > 0)
    assert not is_ripe(policy, rest=(0.0, 0.0), chosen=(now, num_now))


def test_stale_is_a_matter_of_shares() -> None:
    policy = ZenFlow(reselect_share=0.5)
    assert is_stale(policy, held=4.9, best=10.0)
    assert not is_stale(policy, held=5.0, best=10.0)
    assert not is_stale(policy, held=0.0, best=0.0)

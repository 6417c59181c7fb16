"""What a forward holds: Dynamic SplitFuse to the token, who gives way, what is refused, and what a step costs."""

from __future__ import annotations

import time

import pytest
from fastgen.config import Schedule, SchedulePolicy
from fastgen.errors import ConfigError, FastgenError, OverloadedError, RequestError
from fastgen.request import FinishReason, Status
from fastgen.scheduler import Scheduler
from fastgen.step_plan import StepPlan
from hypothesis import given
from hypothesis import strategies as st
from scheduler_lab import FakeEngine, make_request, make_scheduler


def parts(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    """What is scheduled: request, first position, tokens, whether it ends the prompt."""
    return [
        (each.sequence.request.id, each.start, each.num_tokens, each.wants_logits) for each in plan.scheduled
    ]


# ---- what a forward holds --------------------------------------------------------------------------------------------


def test_splitfuse_fills_the_budget_exactly() -> None:
    scheduler = make_scheduler(token_budget=16, prefix=False)
    engine = FakeEngine(scheduler)
    for name, length in (("long", 40), ("short", 5), ("tail", 9)):
        scheduler.add(make_request(name, length, max_tokens=3))
    assert [parts(plan) for plan in engine.run()] == [
        [("long", 0, 16, False)],
        [("long", 16, 16, False)],
        [("long", 32, 8, True), ("short", 0, 5, True), ("tail", 0, 3, False)],
        [("long", 40, 1, True), ("short", 5, 1, True), ("tail", 3, 6, True)],
        [("long", 41, 1, True), ("short", 6, 1, True), ("tail", 9, 1, True)],
        [("tail", 10, 1, True)],
    ]


def test_prefill_first_keeps_decodes_waiting() -> None:
    scheduler = make_scheduler(token_budget=16, prefix=False, kind=Schedule.PREFILL_FIRST)
    engine = FakeEngine(scheduler)
    for name, length in (("a", 10), ("b", 6), ("long", 40), ("tail", 3)):
        scheduler.add(make_request(name, length, max_tokens=2))
    assert [parts(plan) for plan in engine.run()] == [
        [("a", 0, 10, True), ("b", 0, 6, True)],
        [("long", 0, 40, True)],  # longer than the budget: alone
        [("tail", 0, 3, True)],
        [("a", 10, 1, True), ("b", 6, 1, True), ("long", 40, 1, True), ("tail", 3, 1, True)],
    ]


def test_prompts_fill_less_than_decodes_may() -> None:
    scheduler = make_scheduler(
        token_budget=32, prompt_fill=8, max_sequences=31, num_blocks=600, max_model_len=400, prefix=False
    )
    engine = FakeEngine(scheduler)
    scheduler.add(make_request("alone", 20, max_tokens=60))
    assert [parts(engine.step()) for _ in range(3)] == [
        [("alone", 0, 8, False)],
        [("alone", 8, 8, False)],
        [("alone", 16, 4, True)],
    ]
    scheduler.add(make_request("long", 100, max_tokens=1))
    assert parts(engine.step()) == [("alone", 20, 1, True), ("long", 0, 7, False)]
    for number in range(29):
        scheduler.add(make_request(f"short {number}", 1, max_tokens=60))
    scheduler.abort("long")
    plans = [engine.step() for _ in range(20)]
    assert max(plan.num_tokens for plan in plans) == 30  # all decode in one forward
    scheduler.add(make_request("late", 40, max_tokens=1))
    assert parts(engine.step())[-1] == ("late", 0, 2, False)  # a quarter, where decodes leave nothing


def test_prompts_that_are_scored_have_no_more_rows_of_logits_than_there_are_places() -> None:
    scheduler = make_scheduler(token_budget=32, max_sequences=5, prefix=False)
    engine = FakeEngine(scheduler)
    for name, asked in (("a", 1), ("b", 0), ("c", None)):
        scheduler.add(make_request(name, 8, max_tokens=2, prompt_logprobs=asked))
    parts = [
        [(each.sequence.request.id, each.num_tokens) for each in engine.step().scheduled] for _ in range(5)
    ]
    assert parts == [
        [("a", 5), ("c", 8)],
        [("c", 1), ("a", 3), ("b", 2)],
        [("a", 1), ("b", 5)],
        [("b", 1)],
        [("b", 1)],
    ]


def test_drafts_come_with_decodes_and_leave_prompts_half() -> None:
    scheduler = make_scheduler(token_budget=16, prefix=False)
    engine = FakeEngine(scheduler)
    first = make_request("first", 4, max_tokens=20)
    scheduler.add(first)
    engine.step()
    first.sequences[0].drafts = list(range(12))
    plan = engine.step()
    assert plan.scheduled[0].drafts == tuple(range(12))
    assert first.sequences[0].drafts == []
    first.sequences[0].drafts = list(range(5))
    scheduler.add(make_request("second", 60))
    room = 20 - first.sequences[0].num_output_tokens - 1
    plan = engine.step()
    assert plan.scheduled[0].drafts == tuple(range(min(5, room)))
    assert plan.num_tokens == 16
    first.sequences[0].drafts = list(range(15))
    scheduler.add(make_request("third", 60))
    plan = engine.step()
    assert len(plan.scheduled[0].drafts) <= 7  # of 15 that are left by the decode
    assert plan.num_tokens == 16


def test_drafts_take_no_more_than_can_become_output() -> None:
    scheduler = make_scheduler()
    engine = FakeEngine(scheduler)
    request = make_request("a", 4, max_tokens=5)
    scheduler.add(request)
    engine.step()
    request.sequences[0].drafts = [0] * 9
    assert len(engine.step().scheduled[0].drafts) == 3  # with the token after them, five in all


def test_drafts_send_nobody_away() -> None:
    scheduler = make_scheduler(num_blocks=4, prefix=False)
    engine = FakeEngine(scheduler)
    requests = [make_request(name, 4, max_tokens=4) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    engine.step()
    for request in requests:
        request.sequences[0].drafts = [0, 0, 0, 0, 0]
    plan = engine.step()
    # Each has two blocks of four, so room for two drafts behind the token, by its max_tokens; nobody loses anything.
    assert [len(each.drafts) for each in plan.scheduled] == [2, 2]
    assert not plan.preempted


# ---- who gives way ---------------------------------------------------------------------------------------------------


def test_the_worst_gives_way_and_comes_back_before_later_equals() -> None:
    scheduler = make_scheduler(num_blocks=8, prefix=False)
    engine = FakeEngine(scheduler)
    for name in ("first", "second"):
        scheduler.add(make_request(name, 12, max_tokens=16))
    plans = [engine.step(), engine.step()]
    scheduler.add(make_request("third", 4, max_tokens=4))
    plans += engine.run()
    away = next(plan for plan in plans if plan.preempted)
    assert [sequence.request.id for sequence in away.preempted] == ["second"]
    begun = list(dict.fromkeys(name for plan in plans[plans.index(away) :] for name, *_ in parts(plan)))
    assert begun == ["first", "second", "third"]
    again = next(each for plan in plans[plans.index(away) :] for each in plan.scheduled if each.start == 0)
    assert again.sequence.request.id == "second"
    assert again.num_tokens > 12, "its output is computed again with its prompt"


def test_swapped_blocks_come_back_and_nothing_is_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=8, prefix=False, num_host_blocks=8)
    engine = FakeEngine(scheduler)
    for name in ("first", "second"):
        scheduler.add(make_request(name, 12, max_tokens=16))
    plans = engine.run()
    computed = [
        sum(n for plan in plans for who, _, n, _ in parts(plan) if who == name)
        for name in ("first", "second")
    ]
    assert computed == [12 + 15, 12 + 15]
    assert engine.counts["swapped out"] == engine.counts["swapped in"] > 0


def test_a_better_priority_sends_worse_ones_away_at_once() -> None:
    scheduler = make_scheduler(num_blocks=10, prefix=False)
    engine = FakeEngine(scheduler)
    for name in ("a", "b"):
        scheduler.add(make_request(name, 13, max_tokens=4, priority=5))
    engine.step()
    scheduler.add(make_request("urgent", 13, max_tokens=4))
    plan = engine.step()
    assert [sequence.request.id for sequence in plan.preempted] == ["b"]
    assert [name for name, *_ in parts(plan)] == ["a", "urgent"]
    engine.run()


def test_nobody_is_sent_away_for_one_who_would_not_fit_anyway() -> None:
    scheduler = make_scheduler(num_blocks=12, prefix=False)
    engine = FakeEngine(scheduler)
    scheduler.add(make_request("best", 20, max_tokens=8, priority=0))
    scheduler.add(make_request("worst", 8, max_tokens=8, priority=9))
    for _ in range(3):
        engine.step()
    scheduler.add(make_request("large", 36, max_tokens=4, priority=5))
    plan = engine.step()
    assert not plan.preempted
    assert {name for name, *_ in parts(plan)} == {"best", "worst"}
    engine.run()


@pytest.mark.parametrize("patience_steps", [0, 20])
def test_waiting_makes_better(patience_steps: int) -> None:
    scheduler = make_scheduler(num_blocks=8, prefix=False, patience_steps=patience_steps, max_sequences=2)
    engine = FakeEngine(scheduler)
    patient = make_request("patient", 8, priority=3)
    for step in range(300):  # of priority 0 there are always some waiting
        if scheduler.stats().waiting < 4:
            scheduler.add(make_request(f"urgent {step}", 8))
        if step == 5:
            scheduler.add(patient)
        engine.step()
        if patient.finished:
            break
    # Three priorities, each worth twenty steps, and those that are before it by then.
    assert patient.finished == bool(patience_steps)
    assert not patience_steps or 60 <= engine.steps - 5 <= 60 + 40


# ---- forks -----------------------------------------------------------------------------------------------------------


def test_forks_share_and_the_last_holder_does_not_copy() -> None:
    scheduler = make_scheduler(prefix=False)
    engine = FakeEngine(scheduler)
    request = make_request("a", 10, n=3)
    scheduler.add(request)
    engine.step()
    first, second, third = (sequence.block_table for sequence in request.sequences)
    assert first == second == third
    assert scheduler.stats().blocks_used == 3
    plan = engine.step()
    assert [source for source, _ in plan.copies] == [first[2]] * 2 or len(plan.copies) == 2
    assert scheduler.stats().blocks_used == 5  # two for all, and a third for each
    assert [sequence.index for sequence in request.sequences] == [0, 1, 2]
    engine.run()


def test_beams_go_together_after_a_preemption() -> None:
    scheduler = make_scheduler(num_blocks=20, prefix=False, token_budget=6)
    engine = FakeEngine(scheduler)
    scheduler.add(make_request("first", 40, max_tokens=36))
    scheduler.add(make_request("beams", 6, max_tokens=20, beam_width=3))
    engine.run()  # checks that beams that take their last token do so all at once
    assert engine.counts["preempted"] >= 3


def test_a_long_beam_search_keeps_only_what_lives() -> None:
    scheduler = make_scheduler(num_blocks=200, max_model_len=400)
    engine = FakeEngine(scheduler)
    request = make_request("a", 10, max_tokens=150, beam_width=4)
    scheduler.add(request)
    while scheduler.has_work:
        engine.step()
        assert len(request.sequences) <= 4
        assert scheduler.has_work is False or scheduler.stats().blocks_used <= 4 * 40
    engine.check_empty()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals_say_the_numbers() -> None:
    scheduler = make_scheduler(
        num_blocks=10, max_model_len=64, max_sequences=4, token_budget=8, max_waiting=2
    )
    for request, message in (
        (make_request("x", []), "at least one token"),
        (make_request("x", 64), "shorter than the model's 64 tokens, got 64"),
        (make_request("x", 30, max_tokens=11), "10 blocks of 4 tokens, got one that may need 11"),
        (
            make_request("x", 17, max_tokens=7, n=4),
            "may need 12: a prompt of 17 tokens and max_tokens=7, 4 times",
        ),
        (make_request("x", 4, n=5), "at most 4 sequences"),
    ):
        with pytest.raises(RequestError, match=message):
            scheduler.add(request)
    assert not scheduler.has_work
    scheduler.add(make_request("x", 30, max_tokens=10))
    with pytest.raises(RequestError, match="'x', which is in use"):
        scheduler.add(make_request("x", 4))
    scheduler.add(make_request("y", 4))
    with pytest.raises(OverloadedError, match="fewer than 2 requests in the queue, got 2"):
        scheduler.add(make_request("z", 4))
    assert scheduler.abort("x")
    assert not scheduler.abort("x")
    scheduler.add(make_request("x", 4))
    FakeEngine(scheduler).run()


def test_many_may_leave_the_queue() -> None:
    scheduler = make_scheduler(num_blocks=20)
    engine = FakeEngine(scheduler)
    for i in range(1000):
        scheduler.add(make_request(str(i), 4, max_tokens=2, priority=i % 3))
    engine.step()
    for i in range(1000):
        if i % 10:
            assert scheduler.abort(str(i))
    assert scheduler.stats().waiting + scheduler.stats().running == 100
    assert len(scheduler._order._heap) <= 200, "requests that left are kept"
    engine.run()
    assert engine.counts["preempted"] == 0


def test_a_budget_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"prompt_fill=\.\.\.\): expected 1 to token_budget=4, got 5"):
        SchedulePolicy(token_budget=4, prompt_fill=5)
    with pytest.raises(ConfigError, match="prompt_fill"):
        SchedulePolicy(prompt_fill=0)
    with pytest.raises(ConfigError, match="token_budget"):
        Scheduler(SchedulePolicy(), 10, 4, max_model_len=64)


def test_wrong_use_is_an_error_and_not_a_hang() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, max_tokens=2)
    scheduler.add(request)
    with pytest.raises(FastgenError, match="running sequence to fork, got one that is waiting"):
        scheduler.fork(request.sequences[0])
    plan = scheduler.schedule()
    with pytest.raises(FastgenError, match="at most 4 computed tokens and 0 drafts"):
        scheduler.commit(plan, [5])
    scheduler.commit(plan, [4])
    with pytest.raises(FastgenError, match="append the token that was chosen"):
        scheduler.schedule()
    scheduler.fork(request.sequences[0])
    with pytest.raises(FastgenError, match="at most 1 sequences of request 'a', got 2"):
        scheduler.schedule()
    assert scheduler.abort("a")
    assert [each.finish_reason for each in request.sequences] == [FinishReason.ABORT] * 2
    assert [each.status for each in request.sequences] == [Status.FINISHED] * 2


# ---- what it costs ---------------------------------------------------------------------------------------------------


def measure_step_us(num_sequences: int, num_waiting: int = 0) -> float:
    """The median time of a step with so many decodes, and so many who find no place, in microseconds."""
    scheduler = make_scheduler(
        num_blocks=num_sequences * 20,
        block_size=16,
        token_budget=num_sequences * 100,
        max_model_len=1024,
        max_sequences=num_sequences,
    )
    for i in range(num_sequences + num_waiting):
        scheduler.add(make_request(str(i), 100, max_tokens=200))
    times = []
    for _ in range(100):
        began = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        for each in plan.scheduled:
            if each.wants_logits:
                each.sequence.token_ids.append(1)
        resumed = time.perf_counter()
        scheduler.commit(plan, [each.num_tokens for each in plan.scheduled])
        if len(plan.scheduled) == num_sequences and plan.num_tokens == num_sequences:
            times.append(middle - began + time.perf_counter() - resumed)
    assert len(times) >= 50
    return sorted(times)[len(times) // 2] * 1e6


def test_a_step_of_256_sequences_costs_under_a_millisecond() -> None:
    cost = min(measure_step_us(256) for _ in range(3))
    print(f"{cost:.0f} us a step of 256 sequences")
    assert cost < 1500, "about 500 us on a server of 2024; a slow machine has three times that"


def test_those_who_wait_cost_nothing() -> None:
    without, beside = (min(measure_step_us(64, count) for _ in range(3)) for count in (0, 5000))
    assert beside < 2.0 * without


def test_cost_grows_no_faster_than_the_sequences() -> None:
    few, many = (min(measure_step_us(count) for _ in range(3)) for count in (64, 448))
    assert many / few < 2.0 * 448 / 64


def test_shared_blocks_of_worse_ones_are_no_room() -> None:
    """Blocks that a better one holds, too, are not free when the worse one has gone: it would go in vain."""
    scheduler = make_scheduler(num_blocks=14)
    engine = FakeEngine(scheduler)
    text = list(range(16))
    scheduler.add(make_request("best", text, max_tokens=8))
    for _ in range(3):
        engine.step()
    scheduler.add(make_request("worst", text, max_tokens=8, priority=9))
    engine.step()
    scheduler.add(make_request("large", 4 * 9, max_tokens=4, priority=5))
    plans = [engine.step() for _ in range(2)]
    assert not any(plan.preempted for plan in plans)
    engine.run()


def test_what_is_found_again_after_a_preemption_is_not_counted() -> None:
    scheduler = make_scheduler(num_blocks=16)
    engine = FakeEngine(scheduler)
    text = list(range(100, 140))
    scheduler.add(make_request("before", text[:8], max_tokens=1))
    engine.run()
    request = make_request("b", text, max_tokens=4, priority=6)
    scheduler.add(request)
    while request.sequences[0].num_computed < 20:
        engine.step()
    assert request.num_cached_tokens == 8
    scheduler.add(make_request("urgent", 40, max_tokens=4))
    plan = engine.step()
    assert [each.request.id for each in plan.preempted] == ["b"]
    engine.run()
    assert request.num_cached_tokens == 8
    assert scheduler.stats().prefix_hit_tokens_total == 8


@given(
    prompt=st.integers(0, 140),
    sequences=st.integers(1, 20),
    num_blocks=st.integers(1, 60),
    block_size=st.integers(1, 8),
)
def test_room_is_what_is_taken(prompt: int, sequences: int, num_blocks: int, block_size: int) -> None:
    def takes(max_tokens: int) -> bool:
        scheduler = make_scheduler(num_blocks, block_size, max_model_len=128)
        try:
            scheduler.add(make_request("a", prompt, max_tokens=max_tokens, n=sequences))
        except RequestError:
            return False
        return True

    room = make_scheduler(num_blocks, block_size, max_model_len=128).room(prompt, sequences)
    assert room == 0 or takes(room)
    assert not takes(room + 1) or prompt + room >= 128

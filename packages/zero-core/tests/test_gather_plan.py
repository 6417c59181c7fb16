"""The plan: prefetch within the budget, in the recorded order, and nothing once the order is left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from zero_core.gather_plan import GatherPlan


def run_pass(plan: GatherPlan, order: list[int]) -> list[list[int]]:
    plan.begin()
    return [plan.use(unit) for unit in order]


def test_first_pass_predicts_nothing_second_follows_it() -> None:
    plan = GatherPlan([10, 10, 10], budget_bytes=20)
    assert run_pass(plan, [0, 1, 2, 2, 1, 0]) == [[]] * 6
    assert run_pass(plan, [0, 1, 2, 2, 1, 0]) == [[1, 2], [2, 0], [1, 0], [1, 0], [0], []]


def test_a_changed_order_is_noticed_and_learned() -> None:
    plan = GatherPlan([10] * 4, budget_bytes=10)
    run_pass(plan, [0, 1, 2])
    assert run_pass(plan, [0, 3, 2]) == [[1], [], []]
    assert run_pass(plan, [0, 3, 2]) == [[3], [2], []]


def test_next_is_keeps_the_unit_at_the_turn() -> None:
    plan = GatherPlan([1, 1], budget_bytes=0)
    run_pass(plan, [0, 1, 1, 0])
    plan.begin()
    plan.use(0)
    assert not plan.next_is(0)
    plan.use(1)
    assert plan.next_is(1)


@given(
    order=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    other=st.lists(st.integers(0, 5), max_size=20),
    sizes=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    budget=st.integers(0, 120),
)
def test_never_beyond_the_budget_and_always_a_prefix_of_what_comes(order, other, sizes, budget) -> None:
    plan = GatherPlan(sizes, budget)
    run_pass(plan, order)
    plan.begin()
    for position, unit in enumerate(other):
        ahead = plan.use(unit)
        assert sum(sizes[u] for u in ahead) <= budget
        assert unit not in ahead
        followed = other[: position + 1] == order[: position + 1]
        assert followed or not ahead
        coming = [u for u in dict.fromkeys(order[position + 1 :]) if u != unit]
        assert ahead == coming[: len(ahead)]

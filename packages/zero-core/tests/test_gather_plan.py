"""The plan: one order of gathers on all ranks whatever each uses, learned, and fetched ahead within the budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_core.gather_plan import Decision, GatherPlan, Kind, Word, decide

Program = list[tuple[Kind, list[int]]]


def life(plan: GatherPlan, program: Program, log: list[int]) -> Iterator[object]:
    """What a rank does, as `gather` does it: yields each gather (a number) and each meeting (a word), in order."""
    segment = Kind.REST

    def pass_over(units: list[int], launched: set[int]) -> Iterator[object]:
        for unit in units:
            if unit not in launched:
                yield unit
            launched.discard(unit)

    launched: set[int] = set()  # sent for ahead
    for kind, uses in [*program, (Kind.REST, [])]:
        yield from pass_over(plan.rest(), launched)
        while True:
            words = yield Word(kind, first=uses[0] if uses else -1, needed=frozenset(plan.needed))
            decision = decide(words)
            if decision.gather is not None:
                plan.add(decision.gather, needed=False)
                yield decision.gather
                continue
            plan.begin(decision.segment, frozenset().union(*(word.needed for word in words)))
            if decision.segment[0] is kind:
                break
            yield from pass_over(plan.rest(), launched)
        segment = kind
        for unit in uses:
            if unit not in launched:
                passed = plan.turn(unit)
                yield from pass_over(plan.rest() if passed is None else passed, launched)
                while passed is None:
                    words = yield Word(segment, want=unit, needed=frozenset(plan.needed))
                    chosen = decide(words).gather
                    plan.add(chosen, needed=chosen == unit)
                    if chosen == unit:
                        break
                    yield chosen
                yield unit
            passed, ahead = plan.use(unit)
            launched.discard(unit)
            yield from pass_over(passed, launched)
            for each in ahead:
                launched.add(each)
                yield each
            log.append(unit)


def _next(each: Iterator[object], answer: object) -> object:
    try:
        return each.send(answer)
    except StopIteration:
        return None


def live(
    programs: list[Program], num_units: int, budget: int, plans: list[GatherPlan] | None = None
) -> list[int]:
    """Run ranks side by side; returns the gathers, which all of them performed."""
    plans = plans or [GatherPlan([1] * num_units, budget) for _ in programs]
    logs: list[list[int]] = [[] for _ in programs]
    lives = [life(*each) for each in zip(plans, programs, logs, strict=True)]
    events = [next(each) for each in lives]
    gathers: list[int] = []
    while True:
        if isinstance(events[0], Word):
            assert all(isinstance(event, Word) for event in events), events
            sizes = {len(event.numbers(plan.num_gathers)) for event, plan in zip(events, plans, strict=True)}
            assert len(sizes) == 1, "words of several sizes"
            answers = [[Word.of(event.numbers(plans[0].num_gathers)) for event in events] for _ in programs]
        else:
            assert len(set(events)) == 1, f"ranks gather {events}"
            gathers.append(events[0])
            answers = [None] * len(programs)
        events = [_next(each, answer) for each, answer in zip(lives, answers, strict=True)]
        if None in events:
            assert set(events) == {None}, "some ranks ended while others wait"
            assert logs == [[unit for _, uses in program for unit in uses] for program in programs]
            return gathers


def step(*uses: int) -> Program:
    return [(Kind.FORWARD, list(uses)), (Kind.BACKWARD, list(reversed(uses)))]


def test_ranks_that_do_the_same_gather_what_they_use_and_nothing_else() -> None:
    plans = [GatherPlan([1] * 3, 1) for _ in range(2)]
    for _ in range(3):
        assert live([step(0, 1, 2)] * 2, 3, 1, plans) == [0, 1, 2, 2, 1, 0]


def test_a_layer_that_one_rank_skips_is_gathered_by_both() -> None:
    plans = [GatherPlan([1] * 3, 1) for _ in range(2)]
    for _ in range(3):
        assert live([step(0, 1, 2), step(0, 2)], 3, 1, plans) == [0, 1, 2, 2, 1, 0]
    assert live([step(0, 2)] * 2, 3, 1, plans) == [0, 1, 2, 2, 1, 0], "not known before it has happened"
    assert live([step(0, 2)] * 2, 3, 1, plans) == [0, 2, 2, 0], "what nobody needs is left out"


def test_who_generates_fewer_tokens_hands_out_shards_until_all_are_done() -> None:
    tokens = [(Kind.EVALUATION, [0, 1])]
    assert live([tokens * 3, tokens], 2, 0) == [0, 1] * 3
    assert live([tokens, [(Kind.FORWARD, [0, 1]), *tokens, *tokens], []], 2, 1) == [0, 1] * 4


def test_fetches_ahead_within_the_budget() -> None:
    plan = GatherPlan([10] * 4, 20)
    plan.begin((Kind.FORWARD, 0))
    for unit in range(4):
        assert plan.turn(unit) is None, "nothing is known yet"
        plan.add(unit, needed=True)
        assert plan.use(unit) == ([], [])
    plan.begin((Kind.FORWARD, 0), set(plan.needed))
    assert plan.turn(0) == []
    assert plan.use(0) == ([], [1, 2])
    assert plan.use(1) == ([], [3])
    assert plan.use(3) == ([2], []), "2 was sent for and is passed over"


def test_next_is_keeps_the_unit_at_the_turn() -> None:
    plans = [GatherPlan([1] * 2, 0)]
    for _ in range(2):
        live([step(0, 1)], 2, 0, plans)
    plan = plans[0]
    plan.begin((Kind.FORWARD, 0))
    plan.use(0)
    assert not plan.next_is(0)
    plan.use(1)
    assert plan.next_is(1)


def test_next_is_looks_past_units_that_are_whole() -> None:
    """The root is used around the last block: in the forward after it, and in the backward before it."""
    root, first, last = range(3)
    plan = GatherPlan([1] * 3, 0)
    for _ in range(2):
        for kind, uses in ((Kind.FORWARD, [root, first, last, root]), (Kind.BACKWARD, [root, last, first])):
            plan.begin((kind, root), plan.needed)
            for unit in uses:
                if plan.turn(unit) is None:
                    plan.add(unit, needed=True)
                plan.use(unit)
    plan.begin((Kind.FORWARD, root), plan.needed)
    for unit in (root, first):
        plan.turn(unit)
        plan.use(unit)
    assert not plan.next_is(first, {root, first}), "the last block comes before it"
    plan.use(last)
    assert not plan.next_is(last), "the root would have to be gathered before it"
    assert plan.next_is(last, {root, last})


def test_ranks_of_which_one_has_a_backward_more_have_parted() -> None:
    words = [Word(Kind.BACKWARD, first=1), Word(Kind.REST), Word(Kind.BACKWARD, first=1)]
    assert decide(words) == Decision(parted=((0, 2), (1,)))
    assert decide([Word(Kind.LOCAL_BACKWARD, first=1), Word(Kind.REST)]).segment == (Kind.LOCAL_BACKWARD, 1)


units = st.lists(st.integers(0, 4), max_size=6)
segment = st.tuples(st.sampled_from([Kind.EVALUATION, Kind.FORWARD, Kind.LOCAL_BACKWARD]), units)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.tuples(st.lists(segment, max_size=3), units), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    budget=st.integers(0, 3),
)
def test_any_lives_go_through_one_order(steps, budget) -> None:
    """Ranks with any segments between their backwards, and any uses in them, never wait for each other in vain."""
    plans = [GatherPlan([1] * 5, budget) for _ in range(3)]
    for ranks in steps:
        live([[*before, (Kind.BACKWARD, uses)] for before, uses in ranks], 5, budget, plans)


@given(st.sets(st.integers(0, 200)), st.sampled_from(Kind), st.integers(-1, 9), st.integers(-1, 9))
def test_words_survive_the_wire(needed, kind, want, first) -> None:
    word = Word(kind, want, first, frozenset(needed))
    assert Word.of(word.numbers(201)) == word
    assert len(word.numbers(201)) == len(Word(kind).numbers(201))


@pytest.mark.parametrize("backward", [False, True])
def test_who_is_behind_comes_first(backward: bool) -> None:
    kind = Kind.BACKWARD if backward else Kind.FORWARD
    words = [Word(kind, want=2), Word(kind, want=1), Word(Kind.REST)]
    assert decide(words).gather == (2 if backward else 1)

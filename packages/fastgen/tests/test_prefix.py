"""Prompts that begin alike share what is computed: what is found, what is not, and what is forgotten first."""

from __future__ import annotations

from fastgen.prefix import chain_hash, root_hash
from hypothesis import given
from hypothesis import strategies as st
from scheduler_lab import FakeEngine, make_request, make_scheduler

PROMPT = list(range(100, 114))  # three blocks of four, and two tokens


def serve(
    engine: FakeEngine, name: str, prompt: list[int], *, max_tokens: int = 1, **settings: object
) -> int:
    """Serve one request, beside others; how many of its prompt's tokens were cached."""
    request = make_request(name, prompt, max_tokens=max_tokens, **settings)
    engine.scheduler.add(request)
    while not request.finished:
        engine.step()
    return request.num_cached_tokens


@given(st.lists(st.integers(0, 2**31), max_size=12), st.lists(st.integers(0, 2**31), max_size=12))
def test_a_chain_stands_for_all_tokens_before(first: list[int], second: list[int]) -> None:
    def chain(tokens: list[int]) -> bytes:
        result = root_hash(1)
        for token in tokens:
            result = chain_hash(result, [token])
        return result

    assert (chain(first) == chain(second)) == (first == second)


def test_keys_begin_other_chains() -> None:
    keys = [(None, None), ("a", None), (None, "a"), ("a", "a"), ("a, 'a'", None), ("None", None)]
    assert len({root_hash(4, *key) for key in keys} | {root_hash(8, None, None)}) == len(keys) + 1


def test_the_longest_beginning_is_found() -> None:
    engine = FakeEngine(make_scheduler())
    assert serve(engine, "a", PROMPT) == 0
    assert serve(engine, "same", PROMPT) == 12
    assert serve(engine, "longer", [*PROMPT, 1, 2, 3]) == 12
    assert serve(engine, "other end", [*PROMPT[:9], 1, 1, 1, 1, 1]) == 8
    assert serve(engine, "other beginning", [1, *PROMPT[1:]]) == 0
    assert serve(engine, "shorter", PROMPT[:7]) == 4
    stats = engine.scheduler.stats()
    assert stats.prefix_hit_tokens_total == 12 + 12 + 8 + 4
    assert stats.prompt_tokens_total == 14 + 14 + 17 + 14 + 14 + 7


def test_the_last_token_is_always_computed() -> None:
    engine = FakeEngine(make_scheduler())
    serve(engine, "a", PROMPT[:12])
    assert serve(engine, "same", PROMPT[:12]) == 8
    assert serve(engine, "one more", PROMPT[:13]) == 12


def test_adapters_and_salts_do_not_share() -> None:
    engine = FakeEngine(make_scheduler())
    serve(engine, "a", PROMPT)
    for i, other in enumerate(({"adapter": "x"}, {"cache_salt": "x"}, {"adapter": "y", "cache_salt": "x"})):
        assert serve(engine, f"first {i}", PROMPT, **other) == 0
        assert serve(engine, f"second {i}", PROMPT, **other) == 12


def test_a_prompt_whose_logprobs_are_wanted_is_computed() -> None:
    engine = FakeEngine(make_scheduler())
    serve(engine, "a", PROMPT)
    assert serve(engine, "b", PROMPT, prompt_logprobs=1) == 0
    assert serve(engine, "c", PROMPT) == 12


def test_without_a_prefix_cache_nothing_is_found_or_kept() -> None:
    engine = FakeEngine(make_scheduler(prefix=False))
    serve(engine, "a", PROMPT)
    assert serve(engine, "b", PROMPT) == 0


def test_the_next_turn_of_a_chat_finds_the_output_of_the_one_before() -> None:
    scheduler = make_scheduler(num_blocks=32, max_model_len=128)
    engine = FakeEngine(scheduler)
    text = PROMPT
    for turn in range(4):
        request = make_request(f"turn {turn}", text, max_tokens=11)
        scheduler.add(request)
        engine.run()
        # All that was computed and fills blocks: not the last token of the turn before, which was never fed.
        assert request.num_cached_tokens == (0 if turn == 0 else (len(text) - 3 - 1) // 4 * 4)
        text = [*request.sequences[0].token_ids, 7, 8, 9]
    assert len(text) == 14 + 4 * 14


def test_new_weights_find_nothing_of_the_old() -> None:
    scheduler = make_scheduler()
    engine = FakeEngine(scheduler)
    serve(engine, "old", PROMPT)
    scheduler.add(make_request("running", PROMPT, max_tokens=30))
    engine.step()
    waiting = make_request("waiting", PROMPT, max_tokens=1)
    scheduler.add(waiting)
    scheduler.tables.begin_cost(waiting.sequences[0])  # it has been looked for before
    scheduler.forget_prefixes()
    while not waiting.finished:
        engine.step()
    assert waiting.num_cached_tokens == 0
    assert serve(engine, "newer", PROMPT) == 12
    engine.run()


def test_what_is_longest_unused_goes_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    scheduler = make_scheduler(num_blocks=12, max_model_len=48)
    engine = FakeEngine(scheduler)
    texts = {name: [start + i for i in range(13)] for start, name in ((0, "a"), (100, "b"), (200, "c"))}
    for name, text in texts.items():  # of each three blocks stay, of twelve
        serve(engine, name, text)
    serve(engine, "a again", texts["a"])
    serve(
        engine, "other", [300 + i for i in range(19)]
    )  # takes five: three are free, two of b's end are given up
    idle = {name: len(found(engine, text)) for name, text in texts.items()}
    assert idle == {"a": 3, "b": 1, "c": 3}


def test_of_prompts_that_arrive_together_the_later_go_past_what_the_first_computes() -> None:
    scheduler = make_scheduler(num_blocks=200, token_budget=64)
    engine = FakeEngine(scheduler)
    requests = [make_request(str(i), [*range(100), 200 + i, 1], max_tokens=4) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    plans = engine.run()
    # The second begins after 64 tokens, beside the first's last 38, with what is left of that forward: 26. Then it
    # finds the rest.
    assert [request.num_cached_tokens for request in requests] == [0, 64 + 10, 100, 100]
    assert sum(plan.num_tokens for plan in plans) == 102 + (26 + 2) + 2 + 2 + 4 * 3


def test_idle_blocks_are_available_until_they_are_found() -> None:
    scheduler = make_scheduler(num_blocks=12, max_model_len=48)
    engine = FakeEngine(scheduler)
    serve(engine, "a", PROMPT)
    assert len(found(engine, PROMPT)) == 3
    assert scheduler.tables.device.num_available == 12
    # Holding them makes them as little available as new ones; beside who holds them already they cost nothing.
    assert scheduler.tables.begin_cost(make_request("x", PROMPT).sequences[0]) == 4
    scheduler.add(make_request("running", PROMPT, max_tokens=20))
    engine.step()
    assert scheduler.tables.begin_cost(make_request("x", PROMPT).sequences[0]) == 1


def found(engine: FakeEngine, text: list[int]) -> list[int]:
    """Blocks in which a prompt's beginning would be found."""
    return engine.scheduler.tables._find(make_request("probe", text).sequences[0], None)

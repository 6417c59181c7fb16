"""Whatever arrives, is cancelled, forks or ends: no leak, no deadlock, no starvation, and every slot read is right."""

from __future__ import annotations

import random

import pytest
from fastgen.config import Schedule
from fastgen.errors import OverloadedError, RequestError
from fastgen.request import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_lab import FakeEngine, make_request, make_scheduler


class Traffic:
    """Random requests to one scheduler, with cancels, until all have ended."""

    def __init__(
        self, seed: int, *, longest: int = 60, rate: float = 0.3, paced: bool = False, **setup: object
    ) -> None:
        self.random = random.Random(seed)
        self.longest = longest
        self.rate = rate
        self.scheduler = make_scheduler(**setup)
        self.engine = FakeEngine(
            self.scheduler, seed, draft_probability=0.3, stop_probability=0.02, paced=paced
        )
        self.added: dict[str, tuple[Request, int]] = {}
        self.refused = 0

    def request(self, number: int) -> Request:
        rnd = self.random
        # Few tokens and few lengths: prompts begin alike, or are the same.
        prompt = [
            rnd.choice((0, 0, 0, 1)) for _ in range(rnd.choice((1, 3, 4, 5, 8, rnd.randint(1, self.longest))))
        ]
        kind = rnd.random()
        shape = (
            {"n": rnd.randint(2, 4)}
            if kind < 0.15
            else {"beam_width": rnd.randint(2, 4)}
            if kind < 0.3
            else {}
        )
        return make_request(
            f"r{number}",
            prompt,
            max_tokens=rnd.randint(1, 24),
            priority=rnd.choice((0, 0, 0, 1, 2, -1)),
            adapter=rnd.choice((None, None, "lora")),
            cache_salt=rnd.choice((None, None, "mine")),
            prompt_logprobs=rnd.choice((None, None, 1)),
            **shape,
        )

    def run(self, num_requests: int) -> None:
        number = 0
        while number < num_requests or self.scheduler.has_work:
            while number < num_requests and self.random.random() < self.rate:
                request = self.request(number)
                number += 1
                try:
                    self.scheduler.add(request)
                    self.added[request.id] = (request, self.engine.steps)
                except (RequestError, OverloadedError):
                    self.refused += 1
            if self.random.random() < 0.05 and number:
                self.scheduler.abort(f"r{self.random.randint(max(0, number - 20), number)}")
            if self.scheduler.has_work:
                meanwhile = f"r{self.random.randint(max(0, number - 20), number)}"
                self.engine.step(abort=meanwhile if self.random.random() < 0.02 else None)
        self.engine.check_empty()
        assert len(self.added) + self.refused == num_requests
        assert all(request.finished for request, _ in self.added.values())

    def check_waits(self) -> None:
        """Nobody was kept longer than those before it in the order needed, each alone and token by token."""
        patience = self.scheduler.policy.patience_steps
        work = {}
        for name, (request, arrived) in self.added.items():
            place = (request.priority * patience + arrived, request.arrival)
            tokens = len(request.prompt_ids) + request.params.max_tokens
            work[name] = (place, tokens * request.params.num_sequences)
        ends = {name: self.engine.ended_at[name] for name in work if name in self.engine.ended_at}
        for name, ended in ends.items():
            arrived, place = self.added[name][1], work[name][0]
            before = sum(
                tokens
                for other, (better, tokens) in work.items()
                if better <= place and ends.get(other, ended) >= arrived
            )
            assert ended - arrived <= before + 1, f"{name} waited for worse ones"


# How tight it is, and what must have happened so many times for the traffic to have shown anything.
USUAL = {
    "copied": 1000,
    "accepted": 1000,
    "aborted": 3,
    "drafts": 1000,
    "full": 500,
    "preempted": 100,
    "hits": 500,
}
SWAPS = {"swapped out": 500, "swapped in": 500}
SETUPS: dict[str, tuple[dict[str, object], dict[str, int]]] = {
    "roomy": ({"num_blocks": 400, "token_budget": 64, "rate": 0.8}, {**USUAL, "preempted": 0}),
    "tight": ({"num_blocks": 36, "token_budget": 24}, USUAL),
    "swapping": ({"num_blocks": 40, "token_budget": 24, "num_host_blocks": 30}, {**USUAL, **SWAPS}),
    "no prefixes": (
        {"num_blocks": 40, "token_budget": 20, "prefix": False, "num_host_blocks": 20},
        {**USUAL, **SWAPS, "hits": 0},
    ),
    "prompts first": (
        {"num_blocks": 48, "token_budget": 16, "kind": Schedule.PREFILL_FIRST, "num_host_blocks": 16},
        {**USUAL, **SWAPS},
    ),
    "tiny blocks": (
        {"num_blocks": 150, "block_size": 1, "token_budget": 12, "num_host_blocks": 40, "rate": 0.2},
        {**USUAL, **SWAPS, "copied": 0},
    ),
    "few places": (
        {"num_blocks": 60, "token_budget": 8, "max_sequences": 5, "patience_steps": 5000},
        USUAL,
    ),
    "less for prompts": (
        {"num_blocks": 36, "token_budget": 24, "prompt_fill": 6},
        {**USUAL, "full": 10, "preempted": 20},
    ),
    "paced": (
        {"num_blocks": 60, "token_budget": 24, "paced": True},
        {**USUAL, "limited": 500, "paused": 500, "preempted": 20},
    ),
    "full queue": (
        {"num_blocks": 40, "token_budget": 24, "max_waiting": 5, "rate": 0.6},
        {**USUAL, "refused": 100, "hits": 300},
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_random_traffic(name: str) -> None:
    setup, expected = SETUPS[name]
    traffic = Traffic(seed=len(name), **setup)
    traffic.run(3000)
    counts, stats = traffic.engine.counts, traffic.scheduler.stats()
    if setup.get("kind") is None:  # with prompts first, decodes do wait for worse ones
        traffic.check_waits()
    assert stats.preempted_total == counts["preempted"]
    shown = {**counts, "hits": stats.prefix_hit_tokens_total, "refused": traffic.refused}
    assert {key: shown.get(key, 0) for key, least in expected.items() if shown.get(key, 0) < least} == {}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(2, 40),
    block_size=st.integers(1, 8),
    token_budget=st.integers(2, 40),
    prompt_fill=st.none() | st.integers(1, 40),
    max_sequences=st.integers(1, 12),
    num_host_blocks=st.integers(0, 20),
    patience_steps=st.sampled_from([0, 1, 30]),
    prefix=st.booleans(),
    kind=st.sampled_from(list(Schedule)),
    paced=st.booleans(),
    max_model_len=st.integers(2, 80),
)
def test_any_setup(seed: int, **setup: object) -> None:
    if setup["kind"] is Schedule.PREFILL_FIRST:  # whole prompts have no limit
        setup |= {"paced": False, "prompt_fill": None}
    if setup["prompt_fill"] is not None:
        setup["prompt_fill"] = min(setup["prompt_fill"], setup["token_budget"])
    traffic = Traffic(seed, longest=30, rate=0.4, **setup)
    traffic.run(40)
    if setup["patience_steps"] and setup["kind"] is Schedule.SPLIT_FUSE:
        traffic.check_waits()

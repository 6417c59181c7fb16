"""The load generator: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
from fake_engine import FakeEngine
from fastgen.serve.bench.load import Ask, Run, Sample, closed_loop, mixed, open_loop
from fastgen.serve.bench.report import PERCENTILES, percentiles, summarize, table
from fastgen.serve.bench.target import HttpTarget
from hypothesis import given
from hypothesis import strategies as st
from server_lab import serving


class Sleeper:
    """Takes a while, and counts who waits."""

    def __init__(self, first_s: float, gap_s: float) -> None:
        self.first_s, self.gap_s = first_s, gap_s
        self.now = self.most = 0

    async def generate(self, prompt_ids: list[int], max_tokens: int) -> AsyncIterator[int]:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.first_s)
        yield 1
        for _ in range(max_tokens - 1):
            await asyncio.sleep(self.gap_s)
            yield 1
        self.now -= 1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300))
def test_percentiles(values: list[float]) -> None:
    expected = {p: float(np.percentile(values, p, method="inverted_cdf")) for p in PERCENTILES}
    assert percentiles(values) == pytest.approx(expected)
    assert percentiles([]) == {}


def test_a_row_counts_what_was_answered() -> None:
    good = Sample(10, [(0.5, 1), (0.7, 2), (1.0, 1)])
    assert good.gaps_s == pytest.approx([0.1, 0.1, 0.3])
    row = summarize(Run("2 clients", [good, Sample(10, [], "refused")], 2.0))
    assert (row.num_requests, row.num_failed, row.first_error) == (2, 1, "refused")
    assert (row.requests_per_s, row.output_tokens_per_s, row.total_tokens_per_s) == (0.5, 2.0, 7.0)
    assert (row.first_token_s[50], row.whole_s[99]) == (0.5, 1.0)
    assert "2 clients: 1 failed, the first: refused" in table([row])
    assert "-" in table([summarize(Run("1 clients", [Sample(1, [], "no")], 1.0))])


def test_lengths_are_in_their_ranges_and_loads_share_them() -> None:
    asks, again, others = (mixed(200, (3, 9), (2, 5), 7, text) for text in ("a", "a", "b"))
    assert asks == again
    assert {len(ask.prompt_ids) for ask in asks} == set(range(3, 10))
    assert {ask.max_tokens for ask in asks} == set(range(2, 6))
    assert [(len(a.prompt_ids), a.max_tokens) for a in asks] == [
        (len(b.prompt_ids), b.max_tokens) for b in others
    ]
    assert asks[0].prompt_ids != others[0].prompt_ids


def test_closed_loop_keeps_so_many_waiting() -> None:
    target, done = Sleeper(0.01, 0.002), []
    run = asyncio.run(closed_loop(target, [Ask([1], 5)] * 20, 4, lambda: done.append(1)))
    assert (target.most, len(done), len(run.samples)) == (4, 20, 20)
    assert all(sample.num_tokens == 5 and sample.first_s >= 0.01 for sample in run.samples)
    assert run.elapsed_s >= 5 * 0.018


def test_open_loop_does_not_wait_for_answers() -> None:
    target = Sleeper(0.3, 0.0)
    started_s = time.perf_counter()
    run = asyncio.run(open_loop(target, [Ask([1], 1)] * 50, 200.0, 3, lambda: None))
    assert target.most > 20
    assert 0.3 <= time.perf_counter() - started_s < 2.0
    assert all(sample.first_s >= 0.3 for sample in run.samples)


def test_times_count_from_the_planned_arrival() -> None:
    async def late(target: Sleeper) -> Run:
        work = asyncio.ensure_future(open_loop(target, [Ask([1], 1)] * 10, 1000.0, 0, lambda: None))
        await asyncio.sleep(0)
        time.sleep(0.2)  # the client itself is held up
        return await work

    run = asyncio.run(late(Sleeper(0.0, 0.0)))
    assert summarize(run).first_token_s[90] > 0.15


def test_over_http() -> None:
    with serving(FakeEngine(step_s=0.002), api_keys=("k",), served_name="m") as served:
        target = HttpTarget(f"{served.url}/v1/", model="m", api_key="k")
        asks = mixed(12, (4, 30), (5, 20), 1)
        run = asyncio.run(closed_loop(target, asks, 3, lambda: None))
        assert [sample.error for sample in run.samples] == [""] * 12
        assert sum(sample.num_tokens for sample in run.samples) == sum(ask.max_tokens for ask in asks)
        made = served.metric("fastgen_generated_tokens_total", Authorization="Bearer k")
        assert made == sum(ask.max_tokens for ask in asks)
        stranger = asyncio.run(closed_loop(HttpTarget(served.url), asks[:1], 1, lambda: None))
        assert "401" in stranger.samples[0].error
    gone = asyncio.run(closed_loop(target, asks[:1], 1, lambda: None))
    assert gone.samples[0].error

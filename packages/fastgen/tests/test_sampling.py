"""Tokens come with the probabilities that the parameters say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from fastgen import sampler
from fastgen.errors import ConfigError
from fastgen.request import SamplingParams
from fastgen.sampler import Row, choose, logprobs_of, uniform
from fastgen.seen import Seen
from hypothesis import given, settings
from hypothesis import strategies as st


def row(
    seed: int = 0,
    position: int = 0,
    token_ids=(),
    num_prompt_tokens: int = 0,
    allowed=None,
    banned=(),
    **params,
):
    seen = Seen().follow(list(token_ids), num_prompt_tokens)
    return Row(SamplingParams(**params), seed, 0, position, banned, allowed, seen)


def drawn(logits: torch.Tensor, count: int = 20_000, **params) -> Counter[int]:
    rows = [row(position=position, **params) for position in range(count)]
    return Counter(choose(logits.expand(count, -1), rows))


def assert_like(found: Counter[int], probs: torch.Tensor) -> None:
    """Within four standard deviations for each token; what has no probability never comes."""
    total = found.total()
    for token, prob in enumerate(probs.tolist()):
        if prob == 0.0:
            assert found[token] == 0
        deviation = (prob * (1 - prob) * total) ** 0.5
        assert abs(found[token] - prob * total) <= 4 * deviation + 1


LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, -3.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    assert_like(drawn(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(-1))


def test_tokens_are_the_same_however_many_are_drawn_at_once(monkeypatch):
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    rows = [row(seed=seed, top_p=0.9, top_k=20) for seed in range(7)]
    at_once = choose(logits, rows)
    monkeypatch.setattr(sampler, "_MOST_DRAWN", 120)
    assert choose(logits, rows) == at_once


def test_top_k_top_p_and_min_p():
    probs = LOGITS.softmax(-1)
    kept = probs * (probs >= probs.topk(3).values[-1])
    assert_like(drawn(LOGITS, top_k=3), kept / kept.sum())
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(-1) - probs[order]
    kept = torch.zeros_like(probs)
    kept[order[before < 0.8]] = probs[order[before < 0.8]]
    assert 1 < int((kept > 0).sum()) < 5
    assert_like(drawn(LOGITS, top_p=0.8), kept / kept.sum())
    kept = probs * (probs >= 0.2 * probs.max())
    assert 1 < int((kept > 0).sum()) < 5
    assert_like(drawn(LOGITS, min_p=0.2), kept / kept.sum())


def test_penalties_are_those_of_their_definitions():
    seen, prompt = [0, 3, 1, 1], 2
    logits = LOGITS.clone()
    repeated = torch.tensor([0, 1, 3])
    logits[repeated] = torch.where(logits[repeated] > 0, logits[repeated] / 1.5, logits[repeated] * 1.5)
    logits[1] -= 0.4 + 2 * 0.3
    found = drawn(
        LOGITS,
        token_ids=seen,
        num_prompt_tokens=prompt,
        repetition_penalty=1.5,
        presence_penalty=0.4,
        frequency_penalty=0.3,
    )
    assert_like(found, logits.softmax(-1))


@given(st.lists(st.integers(0, 200), max_size=300), st.integers(0, 300), st.lists(st.integers(0, 300)))
def test_tokens_are_counted_as_they_come(token_ids, num_prompt_tokens, stops):
    seen = Seen()
    for stop in sorted(stops):
        seen.follow(token_ids[:stop], num_prompt_tokens)
        seen.copy().follow([*token_ids[:stop], 5, 300], num_prompt_tokens)  # changes nothing
    seen.follow(token_ids, num_prompt_tokens)
    counts = Counter(token_ids[num_prompt_tokens:])
    assert dict(zip(seen.ids.tolist(), seen.times.tolist(), strict=True)) == {
        token: counts[token] for token in token_ids
    }


def test_penalties_read_each_token_of_a_text_once(monkeypatch):
    read = []

    class Ids(list):
        def __getitem__(self, at):
            read.append(at)
            return super().__getitem__(at)

    seen, token_ids = Seen(), Ids([7] * 1000)
    for _ in range(5):
        seen.follow(token_ids, 1000)
        token_ids.append(8)
    assert read == list(range(1004))


def test_a_bias_is_added_before_penalties():
    logits = LOGITS.clone()
    logits[3] += 4.0
    logits[5] += 2.5
    assert_like(drawn(LOGITS, logit_bias={3: 4.0, 5: 2.5}), logits.softmax(-1))
    logits[3] /= 2.0
    found = drawn(
        LOGITS, token_ids=[3], num_prompt_tokens=1, logit_bias={3: 4.0, 5: 2.5}, repetition_penalty=2.0
    )
    assert_like(found, logits.softmax(-1))
    rows = [
        row(temperature=0.0),
        row(temperature=0.0, logit_bias={0: -100}),
        row(temperature=0.0, logit_bias={5: 100}),
    ]
    assert choose(LOGITS.expand(3, -1), rows) == [0, 1, 5]
    assert hash(rows[1].params) is not None


def test_bans_and_masks():
    allowed = np.array([True, True, False, True, True, True])
    found = drawn(LOGITS, banned=(0,), allowed=allowed)
    assert found[0] == found[2] == 0
    assert choose(LOGITS[None], [row(temperature=0.0, banned=(0,), allowed=allowed)]) == [1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(0, 2**32), st.booleans())
def test_a_choice_depends_on_its_row_alone(vocab, seed, greedy):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocab, generator=generator) * 3
    rows = [
        row(seed=seed, position=at, temperature=0.0 if greedy and at % 2 else 0.8, top_p=0.9, top_k=at)
        for at in range(5)
    ]
    together = choose(logits, rows)
    assert together == [choose(logits[at : at + 1], rows[at : at + 1])[0] for at in range(5)]
    assert all(0 <= token < vocab for token in together)


def test_logits_are_left_as_they_were():
    logits = LOGITS[None].clone()
    choose(logits, [row(banned=(1,), repetition_penalty=2.0, token_ids=[0], top_p=0.5)])
    assert torch.equal(logits[0], LOGITS)


def test_logprobs():
    told = logprobs_of(LOGITS, 4, 2)
    assert told.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[4]))
    assert [token for token, _ in told.top] == [0, 1]


def test_uniform_numbers_are_uniform():
    numbers = np.array([uniform(7, index, position) for index in range(10) for position in range(1000)])
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert abs(counts - 500).max() < 5 * 500**0.5
    assert uniform(7, 1, 2) == uniform(7, 1, 2) != uniform(7, 2, 1)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-10])
def test_temperatures_near_zero_take_the_most_likely(temperature):
    assert drawn(LOGITS * 1000, 50, temperature=temperature) == {0: 50}


@pytest.mark.parametrize("wrong", [{"stop": "END"}, {"stop": ("a", "")}, {"stop_token_ids": 2}])
def test_ends_are_tuples(wrong):
    with pytest.raises(ConfigError, match="a tuple of"):
        SamplingParams(**wrong)

"""Every family: the logits and the greedy tokens of transformers, whatever is prefilled and decoded beside them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgen.weights import load_model
from model_lab import (
    MODELS,
    Driver,
    engine_config,
    make_model,
    prompts,
    reference_greedy,
    reference_logits,
    save,
)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_chunks_and_decodes(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    loaded = load_model(save(model, tmp_path), engine_config())
    driver = Driver(loaded)
    chosen = random.Random(7)
    texts = prompts(1, 9, 26, 45, 70)
    sequences = [driver.add(text[: -(-len(text) * 2 // 3)], len(text) // 3 or 1) for text in texts]
    for sequence, text in zip(sequences, texts, strict=True):
        sequence.token_ids = list(text)
    expected = [reference_logits(model, text) for text in texts]
    compared = 0
    while running := [each for each in sequences if each.num_uncomputed]:
        some = chosen.sample(running, chosen.randint(1, len(running)))
        # chunks of the first part, single tokens of the rest
        counts = [
            chosen.randint(1, min(11, left))
            if (left := each.num_prompt_tokens - each.num_computed) > 0
            else 1
            for each in some
        ]
        logits = driver.forward(list(zip(some, counts, strict=True)))
        for sequence, row in zip(some, logits, strict=True):
            wanted = expected[sequences.index(sequence)][sequence.num_computed - 1]
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=2e-4 * float(wanted.abs().max()))
            compared += 1
    assert compared > 50
    assert (
        min(float(each.std()) for each in expected) > 0.1
    )  # logits that differ, so that equal ones mean something


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name: str, tmp_path: Path) -> None:
    model = make_model(name, seed=1)
    driver = Driver(load_model(save(model, tmp_path), engine_config()))
    lengths = (34, 47, 60) if name == "phi3-longrope" else (3, 17, 40)
    texts = prompts(*lengths, seed=2)
    made = driver.greedy([driver.add(text, 64) for text in texts], 64)
    assert made == [reference_greedy(model, text, 64) for text in texts]
    assert len({tuple(each) for each in made}) > 1


def test_longrope_switches_by_length(tmp_path: Path) -> None:
    """Short and long sequences turn by other angles: the test above would not notice if all were long."""
    decoder = load_model(save(make_model("phi3-longrope"), tmp_path), engine_config()).decoder
    assert [decoder.length_class(length) for length in (32, 33)] == [0, 1]
    short = load_model(tmp_path, engine_config(max_model_len=32)).decoder
    assert short.length_class(1000) == 0  # asked for more than it may become
    spec = decoder.spec.rotaries[0]  # type: ignore[attr-defined]
    assert spec.inv_freq != spec.long_inv_freq


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-norm-after", "gemma3"])
def test_hidden_states(name: str) -> None:
    model = make_model(name)
    driver = Driver(load_model(model, engine_config()))
    (text,) = prompts(21)
    base = model.get_decoder() if model.base_model is model else model.base_model
    with torch.no_grad():
        wanted = base(torch.tensor([text])).last_hidden_state[0]
    seen = driver.hidden(driver.add(text))
    if name == "opt-norm-after":  # transformers gives them after the projection to the embedding's width
        seen = driver.model.decoder.project_out(seen, {})  # type: ignore[attr-defined]
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bloom"])
def test_activation_bytes(name: str) -> None:
    """The estimate is above what lives at once, and not by much."""
    model = make_model(name, vocab_size=2000)
    driver = Driver(load_model(model, engine_config()))
    texts = prompts(60, 60, 60, 60)
    sequences = [driver.add(text) for text in texts]
    with torch.profiler.profile(profile_memory=True) as seen:
        driver.forward([(each, 60) for each in sequences])
    changes = [event.nbytes() for event in _memory_events(seen)]
    live, most = 0, 0
    for change in changes:
        live += change
        most = max(most, live)
    estimate = driver.model.decoder.activation_bytes(240, 4)
    assert most < estimate < 6 * most


def _memory_events(profile: torch.profiler.profile) -> list[Any]:
    """Allocations and frees in order."""
    assert profile.profiler is not None
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    return sorted(events, key=lambda event: event.start_ns())

"""Forwards that are made again without Python: the same bits, also after weights, threads and lengths have changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import accel_kernels
import pytest
import torch
from engine_lab import engine_of, expected, prompts, run, tiny_llama, tokens
from fastgen import SamplingParams, replays
from fastgen.checkpoint import ModuleCheckpoint
from fastgen.fill import fill
from fastgen.models.decoder import Decoder
from fastgen.models.families import FAMILIES
from fastgen.request import Sequence
from fastgen.weights import load_model
from model_lab import MODELS, Driver, engine_config, make_model
from model_lab import prompts as texts

pytestmark = pytest.mark.skipif(
    accel_kernels.native.cpu is None, reason=f"no compiled ops here: {accel_kernels.native.why_not}"
)
REPLAYABLE = [name for name in MODELS if "mixtral" not in name and "moe" not in name]


class Count:
    """Replays of recordings."""

    def __init__(self) -> None:
        self.replays = 0
        self._plain = accel_kernels.Recording.replay

    def __call__(self, recording: accel_kernels.Recording) -> None:
        self.replays += 1
        self._plain(recording)


@pytest.fixture
def count() -> Iterator[Count]:
    counting = Count()
    with mock.patch.object(accel_kernels.Recording, "replay", lambda recording: counting(recording)):
        yield counting


def rows_of(driver: Driver, seed: int) -> list[torch.Tensor]:
    """Logits of forwards of few shapes with many values: chunks of 3, decodes, sequences that come and go."""
    chosen = random.Random(seed)
    sequences = [driver.add(text, 200) for text in texts(40, 21, 60, 33, 9, 27)]
    for each in sequences:
        each.token_ids += texts(150, seed=seed)[0]
    made = []
    for _ in range(40):
        some: list[Sequence] = chosen.sample(sequences, chosen.choice((2, 3)))
        made.append(driver.forward([(each, chosen.choice((1, 3))) for each in some]))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REPLAYABLE)
def test_every_family_gives_the_same_bits(name: str, dtype: torch.dtype, count: Count) -> None:
    loaded = load_model(make_model(name).to(dtype), engine_config())
    assert loaded.decoder.replayable
    plain, again = rows_of(Driver(loaded), 1), rows_of(Driver(loaded).replay(), 1)
    assert count.replays >= 15
    assert all(map(torch.equal, plain, again))
    assert len({float(row.sum()) for rows in plain for row in rows}) > 50


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(REPLAYABLE)))
def test_experts_that_are_asked_how_many_rows_they_have_are_not_recorded(name: str) -> None:
    assert not load_model(make_model(name), engine_config()).decoder.replayable


def test_weights_that_are_loaded_again_are_used(count: Count) -> None:
    model, other = make_model("llama"), make_model("llama", seed=5)
    loaded = load_model(model, engine_config())
    assert isinstance(loaded.decoder, Decoder)
    again = Driver(loaded).replay()
    rows_of(again, 1)
    assert count.replays > 0
    fill(loaded.decoder, FAMILIES["llama"], other.config, ModuleCheckpoint(other.state_dict(), "other"))
    wanted = rows_of(Driver(load_model(other, engine_config())), 2)
    again.sequences.clear()
    assert all(map(torch.equal, wanted, rows_of(again, 2)))


def test_another_number_of_threads_is_recorded_anew(count: Count) -> None:
    driver = Driver(load_model(make_model("llama"), engine_config())).replay()
    rows_of(driver, 1)
    assert driver.replays is not None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        held = driver.replays._recorded.copy()
        rows_of(driver, 1)
        assert held
        assert not set(held.values()) & set(driver.replays._recorded.values())
    finally:
        torch.set_num_threads(before)


def test_recordings_are_bounded(count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "_MOST_BYTES", 1)
    loaded = load_model(make_model("llama"), engine_config())
    driver = Driver(loaded).replay()
    assert all(map(torch.equal, rows_of(Driver(loaded), 3), rows_of(driver, 3)))
    assert driver.replays is not None
    assert len(driver.replays._recorded) == 1


def test_an_engine_that_preempts_forks_and_guesses_gives_the_same_tokens(count: Count) -> None:
    some = prompts(12, seed=3)
    jobs = {
        str(at): (
            ids,
            SamplingParams(
                max_tokens=40, temperature=0.8 * (at % 2), seed=at, n=1 + at % 3, ignore_eos=True, logprobs=2
            ),
        )
        for at, ids in enumerate(some)
    }
    found = [run(engine_of(blocks=60, replay=replay), jobs, at_once=3) for replay in (False, True)]
    assert count.replays > 50
    assert found[0] == found[1]


def test_against_transformers(count: Count) -> None:
    some = prompts(6, seed=4)
    jobs = {
        str(at): (ids, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
        for at, ids in enumerate(some)
    }
    found = run(engine_of(model=tiny_llama()), jobs)
    assert count.replays > 15
    assert all(tokens(found[str(at)]) == expected(tuple(ids), 30) for at, ids in enumerate(some))

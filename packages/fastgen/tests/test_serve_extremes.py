"""Any sampling fields that the server's schema allows: an answer or a refusal, and the engine lives on."""

from __future__ import annotations

from typing import Any

from engine_lab import TOKENIZER, engine_of
from fastgen.engine import Engine
from fastgen.errors import ConfigError, RequestError
from fastgen.request import SamplingParams
from fastgen.serve import Limits
from fastgen.serve.adapter_names import AdapterNames
from fastgen.serve.errors import ApiError
from fastgen.serve.interface import Job
from fastgen.serve.prompts import Prompts
from fastgen.serve.schemas import CompletionRequest
from hypothesis import given, settings
from hypothesis import strategies as st

VOCAB = len(TOKENIZER)
TOKEN = st.integers(0, VOCAB - 1) | st.sampled_from([VOCAB - 1, VOCAB, 2**31 - 1])
TINY = 1e-300
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 12),
    "min_tokens": st.sampled_from([0, 1, 5, 12, 2**31 - 1]),
    "n": st.sampled_from([1, 2, 5, 1024]),
    "best_of": st.sampled_from([1, 3, 1024]),
    "beam_width": st.sampled_from([0, 1, 3, 64]),
    "length_penalty": st.sampled_from([-10.0, -1.0, 0.0, 1.0, 10.0]),
    "temperature": st.sampled_from([0.0, TINY, 1e-6, 1.0, 100.0]),
    "top_k": st.sampled_from([0, 1, 2, VOCAB, 2**31 - 1]),
    "top_p": st.sampled_from([TINY, 1e-6, 0.5, 1.0]),
    "min_p": st.sampled_from([0.0, TINY, 0.5, 1.0]),
    "presence_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
    "frequency_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
    "repetition_penalty": st.sampled_from([0.01, 1.0, 100.0]),
    "logit_bias": st.dictionaries(
        TOKEN.map(lambda each: str(each % 10**9)), st.sampled_from([-100.0, 0.0, 100.0])
    ),
    "stop_token_ids": st.lists(TOKEN, max_size=64),
    "stop": st.sampled_from(["a", ["e", "the"], "\ufffd"]),
    "ignore_eos": st.booleans(),
    "seed": st.sampled_from([-(2**63), -1, 0, 2**63 - 1]),
    "logprobs": st.sampled_from([0, 1, 20]),
    "echo": st.booleans(),
    "regex": st.sampled_from(["a", "a{1,3}", "[ab]*", "(yes|no)"]),
    "response_format": st.sampled_from([{"type": "json_object"}]),
}


class Lab:
    """One engine for all requests, and what the server reads them with."""

    def __init__(self) -> None:
        self.engine: Engine = engine_of(blocks=64, budget=48)
        self.prompts = Prompts(
            TOKENIZER,
            self.engine.max_model_len,
            self.engine.room,
            served_name="tiny",
            adapters=AdapterNames((), None),
            limits=Limits(),
        )
        self.expected = self.answer(self.job(max_tokens=6, temperature=0.0))
        self.num_asked = self.num_answered = 0

    def job(self, **fields: Any) -> Job:
        (job,) = self.prompts.completion(CompletionRequest(prompt="The fox", **fields)).jobs
        return job

    def answer(self, job: Job) -> dict[int, list[int]]:
        """The tokens of each sequence."""
        self.engine.add("x", job.prompt_ids, job.params)
        found: dict[int, list[int]] = {}
        ended = set()
        while self.engine.has_work:
            for output in self.engine.step():
                found.setdefault(output.index, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    ended.add(output.index)
        assert len(ended) == job.params.n
        assert self.engine.stats().blocks_used == 0
        return found


LAB: list[Lab] = []


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_extreme_fields_get_an_answer_or_a_refusal(fields: dict[str, Any]) -> None:
    lab = LAB[0] if LAB else Lab()
    LAB[:] = [lab]
    try:
        lab.answer(lab.job(**fields))
    except (RequestError, ConfigError, ApiError):
        assert not lab.engine.has_work
    # The same engine still says what it said before.
    assert lab.answer(lab.job(max_tokens=6, temperature=0.0)) == lab.expected


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([TINY, 1e-40, 1e-6]),
    st.integers(0, 2**32),
    st.sampled_from([None, {"5": 100.0}]),
)
def test_next_to_no_temperature_takes_the_likeliest(
    temperature: float, seed: int, logit_bias: dict[str, float] | None
) -> None:
    lab = LAB[0] if LAB else Lab()
    LAB[:] = [lab]
    cold = lab.job(max_tokens=6, temperature=temperature, seed=seed, logit_bias=logit_bias)
    assert lab.answer(cold) == lab.answer(lab.job(max_tokens=6, temperature=0.0, logit_bias=logit_bias))


def test_what_an_engine_alone_may_be_asked_for() -> None:
    engine = engine_of(blocks=64, budget=48)
    for params in (
        SamplingParams(length_penalty=10, beam_width=3, max_tokens=12),
        SamplingParams(length_penalty=-10, beam_width=3, max_tokens=12),
        SamplingParams(logit_bias={5: 1e300, 6: -1e300}, max_tokens=3),
    ):
        engine.add("x", [1, 2, 3], params)
        while engine.has_work:
            engine.step()

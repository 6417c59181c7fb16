"""`LLM`: prompts in, completions out, in order."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_lab import TOKENIZER, expected, tiny_llama
from fastgen import (
    LLM,
    CachePolicy,
    ConfigError,
    EngineConfig,
    ModelError,
    RequestError,
    SamplingParams,
    SchedulePolicy,
    build_engine,
)
from fastgen.models.decoder import Decoder

CONFIG = EngineConfig(cache=CachePolicy(max_bytes=8 << 20), schedule=SchedulePolicy(token_budget=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def test_a_directory_completes_texts(folder):
    llm = LLM(folder, CONFIG)
    texts = ["Once upon a time", "x", "Zürich"]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    generations = llm.generate(texts, params, progress=False)
    for text, generation in zip(texts, generations, strict=True):
        ids = TOKENIZER.encode(text)
        assert generation.prompt_ids == ids
        assert generation.completions[0].token_ids == expected(tuple(ids), 12)
        assert generation.text == TOKENIZER.decode(
            generation.completions[0].token_ids, skip_special_tokens=True
        )


def test_one_prompt_several_completions_and_token_ids(folder):
    llm = LLM(folder, CONFIG)
    (generation,) = llm.generate(
        [1, 2, 3], SamplingParams(max_tokens=4, n=3, seed=1, logprobs=1), progress=False
    )
    assert [each.index for each in generation.completions] == [0, 1, 2]
    assert all(len(each.logprobs) == len(each.token_ids) for each in generation.completions)


def test_a_module_with_its_tokenizer(folder):
    llm = LLM(tiny_llama(), CONFIG, tokenizer=TOKENIZER)
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    assert llm.generate("hi", params, progress=False)[0].completions[0].token_ids == expected(
        tuple(TOKENIZER.encode("hi")), 5
    )
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(tiny_llama(), CONFIG)


def test_a_module_that_was_cast_runs_as_it_is():
    engine = build_engine(copy.deepcopy(tiny_llama()).bfloat16(), CONFIG, tokenizer=TOKENIZER)
    assert {each.dtype for each in (engine.runner.decoder.embed.weight, *engine.runner.cache.keys)} == {
        torch.bfloat16
    }


def test_where_one_prompt_cannot_be_served_none_is_left_behind(folder):
    llm = LLM(folder, CONFIG)
    with pytest.raises(RequestError):
        llm.generate(["fine", [99999]], progress=False)
    assert not llm.engine.has_work
    with pytest.raises(ConfigError, match="one for each of 2"):
        llm.generate(["a", "b"], [SamplingParams()], progress=False)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        LLM(tmp_path)


def test_a_forward_may_be_filled_beyond_what_is_tried_at_the_start(folder, monkeypatch):
    sizes = []
    plain = Decoder.activation_bytes

    def noted(decoder, num_tokens, num_logits):
        sizes.append(num_tokens)
        return plain(decoder, num_tokens, num_logits)

    monkeypatch.setattr(Decoder, "activation_bytes", noted)
    llm = LLM(folder, replace(CONFIG, schedule=SchedulePolicy(prompt_fill=3000)))
    assert llm.engine.scheduler.policy.token_budget == 3000
    assert sizes == [3000]  # memory for such forwards is kept free


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_cache_stays_near(folder, dtype):
    config = EngineConfig(
        cache=CachePolicy(max_bytes=8 << 20, dtype=torch.int8),
        schedule=SchedulePolicy(token_budget=64),
        dtype=dtype,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    plain = LLM(folder, CONFIG).generate("a longer text, of some length", params, progress=False)[0]
    small = LLM(folder, config).generate("a longer text, of some length", params, progress=False)[0]
    pairs = zip(plain.prompt_logprobs[1:], small.prompt_logprobs[1:], strict=True)
    assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 0.6


def test_more_prompts_than_the_queue_holds(folder):
    schedule = replace(CONFIG.schedule, max_waiting=3)
    llm = LLM(folder, replace(CONFIG, schedule=schedule))
    params = SamplingParams(max_tokens=3, temperature=0.0)
    texts = [f"prompt number {number}" for number in range(20)]
    found = llm.generate(texts, params, progress=False)
    assert [each.text for each in found] == [
        each.text for each in LLM(folder, CONFIG).generate(texts, params, progress=False)
    ]
    with pytest.raises(RequestError):
        llm.generate([*texts, [99999]], params, progress=False)
    assert not llm.engine.has_work


def test_settings_that_do_not_fit_are_refused_at_once(folder, monkeypatch):
    with pytest.raises(ConfigError, match="float16"):
        LLM(folder, replace(CONFIG, cache=replace(CONFIG.cache, dtype=torch.float16)))
    with pytest.raises(ConfigError, match="max_model_len"):
        EngineConfig(max_model_len=0)
    monkeypatch.setattr("fastgen.llm.TensorParallel", lambda group: SimpleNamespace(size=2))
    with pytest.raises(ConfigError, match=r"gap_s.*ranks\.lead"):
        LLM(folder, replace(CONFIG, schedule=replace(CONFIG.schedule, gap_s=0.1)))

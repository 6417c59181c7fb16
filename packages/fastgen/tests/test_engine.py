"""The same tokens as transformers, whatever the cache, the budget, the order of arrival and the guesses."""

from __future__ import annotations

from dataclasses import replace

import llguidance
import pytest
import torch
from engine_lab import TOKENIZER, embedded, engine_of, expected, prompts, run, tiny_llama, tokens
from fake_engine import sentencepiece_like
from fastgen import (
    CacheError,
    EngineConfig,
    FinishReason,
    RequestError,
    SamplingParams,
    Speculation,
    build_engine,
    runner,
)
from fastgen.request import Request, Sequence

COUNT = 24
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
JOBS = {str(number): (ids, GREEDY) for number, ids in enumerate(prompts(12))}
WAYS = {
    "plain": {},
    "small budget": {"budget": 7},
    "no prefix cache": {"prefix": False},
    "recomputed": {"blocks": 18, "sequences": 8},
    "swapped": {"blocks": 18, "sequences": 8, "swap_blocks": 64},
    "prompt lookup": {"speculation": Speculation(num_drafts=3, ngram=1)},
    "batch invariant": {"batch_invariant": True},
}


def jobs_sampled(**changes):
    return {
        name: (
            ids,
            SamplingParams(
                max_tokens=COUNT, ignore_eos=True, temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=number,
                n=1 + number % 3, presence_penalty=0.3, repetition_penalty=1.1, **changes,
            ),
        )
        for number, (name, (ids, _)) in enumerate(JOBS.items())
    }  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_transformers(way):
    engine = engine_of(**WAYS[way])
    found = run(engine, JOBS, at_once=3)
    for name, (ids, _) in JOBS.items():
        assert tokens(found[name]) == expected(tuple(ids), COUNT), name
        assert found[name][-1].finish_reason is not None
    if way in ("recomputed", "swapped"):
        assert engine.stats().preempted_total > 0, "the cache was too large for this test"
    if way == "prompt lookup":
        assert engine.stats().accepted_tokens_total > 0


@pytest.mark.parametrize("layers", [1, 2], ids=["another model", "the same model"])
def test_a_draft_model_changes_no_token(tmp_path, layers):
    draft = tiny_llama() if layers == 2 else tiny_llama(1, 1)
    draft.save_pretrained(tmp_path)
    engine = engine_of(speculation=Speculation(num_drafts=3, draft_model=str(tmp_path)))
    found = run(engine, JOBS)
    for name, (ids, _) in JOBS.items():
        assert tokens(found[name]) == expected(tuple(ids), COUNT)
    stats = engine.stats()
    if layers == 2:  # it guesses what it would say itself
        assert stats.accepted_tokens_total == stats.drafted_tokens_total > 100
    else:
        assert stats.accepted_tokens_total < stats.drafted_tokens_total


def test_drafts_end_with_the_greatest_length(tmp_path):
    """Which no block ends with: the draft model has no positions beyond it."""
    tiny_llama().save_pretrained(tmp_path)
    longest = 45
    engine = engine_of(
        speculation=Speculation(num_drafts=4, draft_model=str(tmp_path)), max_model_len=longest
    )
    ids = prompts(1, seed=2)[0][:20]
    params = SamplingParams(max_tokens=longest - len(ids), temperature=0.0, ignore_eos=True)
    found = tokens(run(engine, {"x": (ids, params)})["x"])
    assert found == tokens(run(engine_of(max_model_len=longest), {"x": (ids, params)})["x"])
    assert len(ids) + len(found) == longest


@pytest.mark.parametrize("way", [way for way in WAYS if way != "batch invariant"])
def test_a_seed_means_the_same_tokens_whatever_else_runs(way):
    jobs = jobs_sampled()
    alone = {name: run(engine_of(), {name: job})[name] for name, job in jobs.items()}
    together = run(engine_of(**WAYS[way]), jobs, at_once=5)
    for name, (_, params) in jobs.items():
        lines = [tokens(together[name], index) for index in range(params.n)]
        assert lines == [tokens(alone[name], index) for index in range(params.n)]
        assert all(len(line) == COUNT for line in lines)
        assert len({tuple(line) for line in lines}) == params.n, "sequences of one request differ"


def test_batch_invariant_log_probabilities_have_the_same_bits():
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    jobs = {name: (ids, params) for name, (ids, _) in JOBS.items()}
    alone = {name: run(engine_of(batch_invariant=True), {name: job})[name] for name, job in jobs.items()}
    together = run(engine_of(batch_invariant=True, budget=13), jobs, at_once=3)
    for name in jobs:
        bits = [
            [each for output in outputs for each in output.logprobs]
            for outputs in (alone[name], together[name])
        ]
        assert bits[0] == bits[1]
        assert alone[name][0].prompt_logprobs == together[name][0].prompt_logprobs


def test_log_probabilities_are_those_of_the_model():
    ids = prompts(1, seed=5)[0]
    params = SamplingParams(
        max_tokens=4, temperature=0.7, seed=3, ignore_eos=True, logprobs=2, prompt_logprobs=2
    )
    outputs = run(engine_of(budget=9), {"x": (ids, params)})["x"]
    said = tokens(outputs)
    with torch.no_grad():
        logprobs = tiny_llama()(torch.tensor([ids + said])).logits[0].log_softmax(-1)
    told = [*outputs[0].prompt_logprobs, *(each for output in outputs for each in output.logprobs)]
    assert told[0].logprob is None
    assert len(told) == len(ids) + 4
    for position, each in enumerate(told[1:], 1):
        row = logprobs[position - 1]
        assert each.token_id == (ids + said)[position]
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
        assert [token for token, _ in each.top] == row.topk(2).indices.tolist()


def test_a_shared_prompt_is_computed_once():
    shared = prompts(1, seed=9, longest=60)[0] * 3
    engine = engine_of()
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    run(engine, {"first": ([*shared, 1], params)})
    second = run(engine, {"second": ([*shared, 2], params)})["second"]
    assert second[0].num_cached_tokens == len(shared) // 8 * 8
    assert tokens(second) == expected((*shared, 2), 4)


STEERED = (
    {"repetition_penalty": 1.3, "logit_bias": {7: -3.0, 40: 2.5}},
    {"repetition_penalty": 1.3, "sequence_bias": [[[7], -3.0], [[40], 2.5]], "renormalize_logits": False},
)


@pytest.mark.parametrize(("width", "steering"), [(1, ({}, {})), (2, ({}, {})), (4, ({}, {})), (3, STEERED)])
def test_beams_are_those_of_transformers(width, steering):
    ids = prompts(3, seed=2)[1]
    params = SamplingParams(
        max_tokens=12, beam_width=width, n=width, temperature=0.0, ignore_eos=True, **steering[0]
    )
    outputs = run(engine_of(budget=16, blocks=60), {"x": (ids, params), "beside": (ids[:5], GREEDY)})
    given = torch.tensor([ids])
    with torch.no_grad():
        theirs = tiny_llama().generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=12, num_beams=width,
            num_return_sequences=width, do_sample=False, pad_token_id=0, **steering[1],
        )  # fmt: skip
    for index in range(width):
        assert tokens(outputs["x"], index) == theirs[index, len(ids) :].tolist()
    plain = run(engine_of(), {"x": (ids, replace(params, repetition_penalty=1.0, logit_bias=None))})["x"]
    assert (tokens(plain) != tokens(outputs["x"])) == bool(steering[0])
    assert tokens(outputs["beside"]) == expected(tuple(ids[:5]), COUNT)


def test_best_of_returns_the_most_likely():
    ids = prompts(1, seed=4)[0]
    params = {"max_tokens": 6, "seed": 11, "ignore_eos": True, "logprobs": 0}
    all_of_them = run(engine_of(), {"x": (ids, SamplingParams(n=5, **params))})["x"]
    likely = {
        tuple(tokens(all_of_them, index)): sum(
            each.logprob for output in all_of_them if output.index == index for each in output.logprobs
        )
        for index in range(5)
    }
    best = run(engine_of(), {"x": (ids, SamplingParams(n=2, best_of=5, **params))})["x"]
    assert [each.index for each in best] == [0, 1]
    ranked = sorted(likely, key=likely.__getitem__, reverse=True)
    assert [tuple(each.new_token_ids) for each in best] == ranked[:2]


def test_best_of_ranks_by_the_token():
    """Not by the whole: of two sequences as likely by the token, the shorter one would be the best."""
    short, long = (Sequence(Request("x", [1], SamplingParams()), 0, [1], 1) for _ in range(2))
    short.token_ids += [2, 3]
    long.token_ids += [2] * 10
    short.cumulative_logprob, long.cumulative_logprob = -4.0, -10.0
    assert short.mean_logprob < long.mean_logprob


def test_the_token_that_ends_a_beam_is_no_text():
    ids = prompts(1, seed=6)[0]
    params = SamplingParams(beam_width=2, n=2, temperature=0.0, max_tokens=12, ignore_eos=True)
    whole = run(engine_of(), {"x": (ids, params)})["x"]
    stop = tokens(whole)[3]
    ended = run(engine_of(), {"x": (ids, replace(params, stop_token_ids=(stop,)))})["x"]
    with_end = [each for each in ended if each.new_token_ids[-1] == stop]
    assert with_end
    for each in with_end:
        assert each.text == TOKENIZER.decode(each.new_token_ids[:-1], skip_special_tokens=True)


def test_a_text_goes_on_from_its_prompt():
    """A tokenizer that drops the space of a text's first word does not drop that of an answer's."""
    tokenizer = sentencepiece_like()
    engine = build_engine(tiny_llama(), EngineConfig(device=torch.device("cpu")), tokenizer=tokenizer)
    prompt, word = tokenizer.convert_tokens_to_ids(["\u2581a", "b", "\u2581a"]), "\u2581a"
    bias = {tokenizer.convert_tokens_to_ids(word): 100.0}
    for beam_width in (0, 2):
        params = SamplingParams(max_tokens=2, logit_bias=bias, temperature=0.0, beam_width=beam_width)
        found = run(engine, {"x": (prompt, params), "y": (prompt, replace(params, continues=False))})
        said = {name: "".join(each.text for each in outputs) for name, outputs in found.items()}
        assert said == {"x": " a a", "y": "a a"}
        assert tokenizer.decode(prompt) + said["x"] == tokenizer.decode([*prompt, *tokens(found["x"])])


def test_the_end_token_and_min_tokens():
    ids = prompts(1, seed=6)[0]
    eos = expected(tuple(ids), 4)[3]
    stopping = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "stop_token_ids": (eos,)}
    ended = run(engine_of(), {"x": (ids, SamplingParams(**stopping))})["x"]
    assert len(tokens(ended)) <= 4
    assert ended[-1].finish_reason.value == "stop"
    longer = run(engine_of(), {"x": (ids, SamplingParams(min_tokens=10, **stopping))})["x"]
    assert eos not in tokens(longer)[:9]
    assert len(tokens(longer)) >= 10


def test_an_abort_frees_everything():
    engine = engine_of(blocks=64)
    for name, (ids, params) in JOBS.items():
        engine.add(name, ids, params)
    for _ in range(5):
        engine.step()
    for name in JOBS:
        engine.abort(name)
    engine.abort("nobody")
    assert engine.stats().blocks_used == 0
    assert not engine.has_work
    assert not engine._lines
    assert not engine._jobs


def test_what_cannot_be_served_is_refused_with_the_reason():
    engine = engine_of(blocks=8)
    cases = [
        ([], GREEDY, {}, "at least one token"),
        ([99999], GREEDY, {}, "token ids below"),
        ([1] * 600, GREEDY, {}, "shorter than"),
        ([1] * 40, SamplingParams(max_tokens=20, n=2), {}, "fits the KV cache"),
        ([1], GREEDY, {"adapter": "poet"}, "'poet'"),
        ([1], SamplingParams(logit_bias={5: 1.0, 99999: 1.0}), {}, "logit_bias: expected token ids below"),
        ([1], SamplingParams(min_tokens=1, stop_token_ids=(5, 99999)), {}, "stop_token_ids: expected token"),
        ([1], SamplingParams(beam_width=2, stop=("x",)), {}, "beam_width"),
        ([1], SamplingParams(json_schema='{"type": "nonsense"}'), {}, "json_schema"),
        ([1], SamplingParams(regex="("), {}, "regex"),
    ]
    for ids, params, more, message in cases:
        with pytest.raises(RequestError, match=message):
            engine.add("x", ids, params, **more)
    assert not engine.has_work


def test_a_schema_is_compiled_once_and_none_is_spoiled_by_its_use(monkeypatch):
    compiled = []
    compile_schema = llguidance.LLMatcher.grammar_from_json_schema
    monkeypatch.setattr(
        llguidance.LLMatcher, "grammar_from_json_schema",
        staticmethod(lambda schema, **options: compiled.append(schema) or compile_schema(schema, **options)),
    )  # fmt: skip
    engine = engine_of()
    params = SamplingParams(json_schema='{"type": "boolean"}', max_tokens=8, temperature=0.0)
    engine.prepare(params)
    said = []
    for number in range(3):
        outputs = run(engine, {str(number): ([1, 2, 3], replace(params, max_tokens=8 + number))})
        said.append("".join(output.text for output in outputs[str(number)]))
    assert said == [said[0]] * 3
    assert said[0].strip() in ("true", "false")
    assert compiled == ['{"type": "boolean"}']
    with pytest.raises(RequestError, match="json_schema"):
        engine.prepare(SamplingParams(json_schema='{"type": "nonsense"}'))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_becomes_too_complex_has_not_come_to_its_end(temperature):
    params = SamplingParams(max_tokens=40, regex="(?:a?){500}a{500}", temperature=temperature, seed=1)
    (*_, last) = run(engine_of(), {"x": ([5], params)})["x"]
    assert last.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_a_grammar_allows_only_ends_they_come_and_min_tokens_hold(temperature):
    (end,) = TOKENIZER.encode("a")
    params = SamplingParams(
        max_tokens=20, min_tokens=10, regex="a{15}", stop_token_ids=(end,), temperature=temperature, seed=1
    )
    assert tokens(run(engine_of(), {"x": ([5], params)})["x"]) == [end] * 10


def test_embeddings_have_unit_length_and_depend_on_the_text():
    engine = engine_of()
    first, again, other = (embedded(engine, ids) for ids in ([1, 2, 3], [1, 2, 3], [3, 2, 1]))
    assert first == again != other
    assert sum(each * each for each in first) == pytest.approx(1.0, abs=1e-5)


def test_the_budget_is_measured_where_none_is_given():
    from fake_engine import tiny_tokenizer

    engine = build_engine(tiny_llama(), EngineConfig(max_model_len=64), tokenizer=tiny_tokenizer())
    assert 16 <= engine.scheduler.policy.token_budget <= 2048


def test_embeddings_in_chunks_are_those_of_one_forward():
    ids = prompts(1, longest=60)[0] + [7] * 70
    whole, chunked = (embedded(engine_of(budget=budget), ids) for budget in (256, 16))
    torch.testing.assert_close(torch.tensor(chunked), torch.tensor(whole), rtol=1e-4, atol=1e-5)


def test_embeddings_take_a_forward_of_the_budget_at_a_time_and_give_way_to_others(monkeypatch):
    engine = engine_of(budget=16)
    text, other = [7] * 40, [5] * 3
    assert [engine.embed(text) is None for _ in range(3)] == [True, True, False]
    assert engine.embed(text) is None
    assert engine.embed(other) is not None  # which takes the place of the one before
    assert [engine.embed(text) is None for _ in range(3)] == [True, True, False]
    monkeypatch.setattr(runner, "free_memory", lambda device: 1000)
    with pytest.raises(CacheError, match="a text of 40 tokens, got 1000"):
        engine.embed(text)


def test_no_sequence_is_longer_than_the_cache(caplog):
    engine = engine_of(blocks=10)
    assert engine.max_model_len == 80
    assert "of 80" in caplog.text
    assert engine.room(30, 1) == 50
    outputs = run(engine, {"a": ([1] * 30, replace(GREEDY, max_tokens=engine.room(30, 1)))})
    assert len(tokens(outputs["a"])) >= 1


@pytest.mark.parametrize("way", ["plain", "recomputed", "swapped", "prompt lookup"])
@pytest.mark.parametrize("place", ["runner.run", "scheduler.schedule", "scheduler.commit"])
@pytest.mark.parametrize("late", [False, True])
def test_what_comes_after_a_step_that_raised_is_served_as_ever(monkeypatch, way, place, late):
    engine = engine_of(**WAYS[way])
    owner, name = getattr(engine, place.split(".")[0]), place.split(".")[1]
    act, calls = getattr(owner, name), iter(range(10**6))

    def fails(*args):
        if next(calls) % 9 < 8:
            return act(*args)
        if late:  # when all of it has been done
            act(*args)
        raise MemoryError("no room")

    for round_ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(MemoryError):
                run(engine, {f"{round_}-{name}": job for name, job in JOBS.items()})
        for job in JOBS:
            engine.abort(f"{round_}-{job}")
        assert not engine.has_work
        assert engine.stats().blocks_used == 0
        found = run(engine, JOBS)
        assert all(tokens(found[job]) == expected(tuple(ids), COUNT) for job, (ids, _) in JOBS.items())

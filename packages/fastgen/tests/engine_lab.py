"""Engines over tiny random models, and transformers' own generation beside them."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache

import torch
from fake_engine import tiny_tokenizer
from fastgen import CachePolicy, EngineConfig, SamplingParams, SchedulePolicy, build_engine
from fastgen.engine import Engine
from fastgen.output import Output
from fastgen.ranks.leader import Leader
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = tiny_tokenizer()


@lru_cache
def tiny_llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A small model; its weights are large enough for its choices to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def engine_of(
    *,
    blocks: int = 400,
    budget: int = 64,
    sequences: int = 32,
    model: LlamaForCausalLM | None = None,
    **changes: object,
) -> Engine:
    """An engine with a cache of so many blocks of 8 tokens."""
    cache_changes = {
        name: changes.pop(name) for name in ("prefix", "swap_blocks", "cache_dtype") if name in changes
    }
    block_bytes = 8 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, head size, float32
    cache = CachePolicy(
        block_size=8,
        max_bytes=blocks * block_bytes,
        swap_bytes=int(cache_changes.get("swap_blocks", 0)) * block_bytes,  # type: ignore[call-overload]
        prefix=bool(cache_changes.get("prefix", True)),
    )
    schedule = SchedulePolicy(token_budget=budget, max_sequences=sequences)
    config = replace(EngineConfig(cache=cache, schedule=schedule, device=torch.device("cpu")), **changes)  # type: ignore[arg-type]
    return build_engine(model or tiny_llama(), config, tokenizer=TOKENIZER)


def embedded(engine: Engine | Leader, ids: list[int]) -> list[float]:
    """A text's vector, however many forwards it takes."""
    while (vector := engine.embed(ids)) is None:
        pass
    return vector


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Token ids of random lengths."""
    random_ = random.Random(seed)
    return [[random_.randrange(256) for _ in range(random_.randint(1, longest))] for _ in range(count)]


def run(
    engine: Engine, jobs: dict[str, tuple[list[int], SamplingParams]], *, at_once: int = 1000
) -> dict[str, list[Output]]:
    """Add jobs, a few at a time, and step until all have ended: the outputs of each."""
    found: dict[str, list[Output]] = {name: [] for name in jobs}
    left = list(jobs.items())
    for _ in range(100_000):
        for name, (ids, params) in left[:at_once]:
            engine.add(name, ids, params)
        del left[:at_once]
        for output in engine.step():
            found[output.request_id].append(output)
        if not engine.has_work and not left:
            break
    assert engine.stats().blocks_used == 0
    return found


def tokens(outputs: list[Output], index: int = 0) -> list[int]:
    """All tokens of one sequence."""
    return [token for output in outputs if output.index == index for token in output.new_token_ids]


@lru_cache
def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    """The same by transformers, greedily, alone."""
    with torch.no_grad():
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = tiny_llama().generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()

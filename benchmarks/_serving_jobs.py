"""What the serving benchmark measures: models of random weights, loads, and what each engine does with them.

In: a shape's name. Out: a module, an engine over the module's own weights, and tokens or seconds of each job.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import fastgen
import torch
import transformers
from fastgen import CachePolicy, EngineConfig, SamplingParams, SchedulePolicy
from fastgen.engine import Engine
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, int]] = {  # width, MLP, layers, heads, kv heads
    "tiny": dict(zip(("w", "f", "l", "h", "g"), (64, 128, 2, 4, 2), strict=True)),
    "10m": dict(zip(("w", "f", "l", "h", "g"), (256, 768, 8, 8, 4), strict=True)),
    "125m": dict(zip(("w", "f", "l", "h", "g"), (768, 2048, 12, 12, 4), strict=True)),
    "1b": dict(zip(("w", "f", "l", "h", "g"), (2048, 5632, 22, 32, 4), strict=True)),
}
VOCAB, LONG = 16_000, 4096
Load = list[tuple[list[int], int]]


def model_of(name: str) -> LlamaForCausalLM:
    """Random weights."""
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=shape["w"], intermediate_size=shape["f"], num_hidden_layers=shape["l"],
        num_attention_heads=shape["h"], num_key_value_heads=shape["g"], max_position_embeddings=2 * LONG,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    made: LlamaForCausalLM = model.to(torch.bfloat16).eval()
    return made


def engine_of(model: LlamaForCausalLM, gib: float, *, prefix: bool = True, **schedule: Any) -> Engine:
    """An engine over the model's own weights; `prefix`: it keeps what prompts begin with."""
    make: Any = PreTrainedTokenizerFast
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = make(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    cache = CachePolicy(max_bytes=int(gib * 2**30), prefix=prefix)
    config = EngineConfig(cache=cache, schedule=SchedulePolicy(**schedule))
    return fastgen.build_engine(model, config, tokenizer=tokenizer)


def mixed_load(count: int, scale: int) -> Load:
    """Prompts of 16 to 1024 tokens and outputs of 16 to 128, evenly in their logarithms, over `scale`."""
    chance = random.Random(0)

    def length(low: int, high: int) -> int:
        return max(1, round(low * math.exp(math.log(high / low) * chance.random())) // scale)

    return [
        ([chance.randrange(VOCAB) for _ in range(length(16, 1024))], length(16, 128)) for _ in range(count)
    ]


def greedy(count: int) -> SamplingParams:
    """So many tokens."""
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def serve(engine: Engine, load: Load) -> int:
    """All at once; tokens of output."""
    for number, (ids, count) in enumerate(load):
        engine.add(str(number), ids, greedy(count))
    total = 0
    while engine.has_work:
        total += sum(len(output.new_token_ids) for output in engine.step())
    return total


def static_batches(model: LlamaForCausalLM, load: Load, size: int) -> int:
    """The `generate` of transformers; tokens that were asked for."""
    for begin in range(0, len(load), size):
        batch = load[begin : begin + size]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in batch])
        most = max(count for _, count in batch)
        with torch.no_grad():
            model.generate(
                ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False
            )
    return sum(count for _, count in load)


def continuous(model: LlamaForCausalLM, load: Load) -> int:
    """Continuous batching of transformers, which gives all requests one length; tokens that were asked for."""
    make: Any = transformers.GenerationConfig
    config = make(do_sample=False, eos_token_id=-1, pad_token_id=0)
    most = max(count for _, count in load)
    found = model.generate_batch(
        [ids for ids, _ in load], generation_config=config, max_new_tokens=most, warmup=False
    )
    if len(found) != len(load):
        raise RuntimeError(f"expected {len(load)} answers, got {len(found)}")
    return sum(count for _, count in load)


def rate(act: Callable[[], int]) -> float:
    """Tokens a second."""
    begun = time.perf_counter()
    return act() / (time.perf_counter() - begun)


def prompt_rate(engine: Engine, length: int) -> float:
    """Tokens a second of one prompt, alone; of an engine that keeps no prefixes."""
    engine.add("prompt", [at % VOCAB for at in range(length)], greedy(1))
    begun = time.perf_counter()
    while engine.has_work:
        engine.step()
    return length / (time.perf_counter() - begun)


def one_stream(engine: Engine, count: int) -> float:
    """Seconds of a token, alone, after a short prompt."""
    engine.add("one", [1] * 16, greedy(count))
    engine.step()
    seconds = []
    while engine.has_work:
        begun = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def first_token(engine: Engine, shared: Sequence[int], own: int, count: int) -> float:
    """Median seconds to the first token of prompts of which nine tenths are shared."""
    seconds = []
    for number in range(count):
        ids = [*shared, *([number + 5] * own)]
        begun = time.perf_counter()
        engine.add(str(number), ids, greedy(1))
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])

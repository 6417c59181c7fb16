"""What the serving benchmark measures: models of random weights, loads, and what each engine does with them.

In: a shape's name. Out: a module, an engine over the module's own weights, and tokens or seconds of each job.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import fastgen
import torch
import transformers
from fastgen import CachePolicy, EngineConfig, SamplingParams, SchedulePolicy
from fastgen.engine import Engine
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.continuous_batching.utils import WorkloadHints

LONG = 4096


@dataclass(frozen=True)
class Shape:
    """A model's; `tied`: the embedding is the output's weight too."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 16_000, tied=True),
    "10m": Shape(256, 768, 8, 8, 4, 16_000, tied=True),
    "125m": Shape(768, 2048, 12, 12, 4, 32_000, tied=False),
    "1b": Shape(2048, 5632, 22, 32, 4, 32_000, tied=False),  # TinyLlama's
    "7b": Shape(4096, 11_008, 32, 32, 32, 32_000, tied=False),  # Llama 2's
}
VOCAB = 16_000  # ids of prompts: every model has them
Load = list[tuple[list[int], int]]


def model_of(name: str, device: str = "cpu") -> LlamaForCausalLM:
    """Random weights, made where they stay."""
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * LONG, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    made: LlamaForCausalLM = model.to(torch.bfloat16).eval()
    return made


def tokenizer_of(model: LlamaForCausalLM) -> Any:
    """A word for each id."""
    make: Any = PreTrainedTokenizerFast
    words = {f"w{number}": number for number in range(model.config.vocab_size)}
    return make(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def save(model: LlamaForCausalLM, folder: str) -> str:
    """Files that an engine loads; their folder."""
    model.save_pretrained(folder)
    tokenizer_of(model).save_pretrained(folder)
    return folder


def engine_of(model: LlamaForCausalLM | str, gib: float, *, prefix: bool = True, **schedule: Any) -> Engine:
    """An engine for the files in a folder, or over a module's own weights; `prefix`: it keeps how prompts begin."""
    cache = CachePolicy(max_bytes=int(gib * 2**30), prefix=prefix)
    config = EngineConfig(cache=cache, schedule=SchedulePolicy(**schedule))
    if isinstance(model, str):
        return fastgen.build_engine(model, config)
    config = replace(config, device=model.device)
    return fastgen.build_engine(model, config, tokenizer=tokenizer_of(model))


def streamed_bytes(model: LlamaForCausalLM) -> int:
    """Of the weights that each token needs whole: all but an embedding that is not the output's weight too."""
    embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
    read = {id(each): each for each in model.parameters()}
    if output is not embedding:
        del read[id(embedding)]
    return sum(each.nbytes for each in read.values())


def mixed_load(count: int, scale: int) -> Load:
    """Prompts of 16 to 1024 tokens, outputs of 16 to 128, evenly in their logarithms, in random pairs; over `scale`."""
    chance = random.Random(0)

    def lengths(low: int, high: int) -> list[int]:
        steps = (at / max(count - 1, 1) for at in range(count))
        found = [max(1, round(low * (high / low) ** step) // scale) for step in steps]
        chance.shuffle(found)
        return found

    pairs = zip(lengths(16, 1024), lengths(16, 128), strict=True)
    return [([chance.randrange(VOCAB) for _ in range(prompt)], output) for prompt, output in pairs]


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
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in batch], device=model.device
        )
        most = max(count for _, count in batch)
        with torch.no_grad():
            model.generate(
                ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False
            )
    return sum(count for _, count in load)


def continuous(model: LlamaForCausalLM, load: Load) -> int:
    """Continuous batching of transformers, each request with its own length; tokens that were asked for."""
    make: Any = transformers.GenerationConfig
    hints: Any = WorkloadHints(
        max_prompt_length=max(len(ids) for ids, _ in load),
        max_generated_length=max(count for _, count in load),
        num_requests=len(load),
    )
    config = make(do_sample=False, eos_token_id=-1, pad_token_id=0)
    made: dict[str, int] = {}
    peer: Any = model
    with peer.continuous_batching_context_manager(
        generation_config=config,
        block=True,
        timeout=5,
        warmup=model.device.type == "cuda",
        workload_hints=hints,
    ) as manager:
        asked = {manager.add_request(ids, max_new_tokens=count): count for ids, count in load}
        while len(made) < len(asked) and manager.is_running():
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                made[result.request_id] = len(result.generated_tokens)
    if made != asked:
        raise RuntimeError(f"expected answers of {list(asked.values())} tokens, got {list(made.values())}")
    return sum(made.values())


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

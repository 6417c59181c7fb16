"""fastgen beside transformers, on the CPU: a mixed load, one stream, long prompts beside decodes, shared prompts.

    python3 tools/dev.py bench serving
    python3 tools/dev.py bench serving --models 125m --requests 64
    python3 tools/dev.py bench serving --quick

Models have random weights, in Llama's shape, bfloat16. Peers: `generate` with static batches (left-padded, each as long
as its longest), and transformers' continuous batching. Every request is greedy and has a length of its own. One stream
is held against the bytes of the weights over the bandwidth of reading them; a long prompt beside decodes against the
same without it, also with whole prompts first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _measure
import fastgen
import torch
import transformers
from fastgen import CachePolicy, EngineConfig, SamplingParams, Schedule, SchedulePolicy
from fastgen.engine import Engine
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
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


def engine_of(model: LlamaForCausalLM, gib: float, **schedule: Any) -> Engine:
    """An engine over the model's own weights."""
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    config = EngineConfig(cache=CachePolicy(max_bytes=int(gib * 2**30)), schedule=SchedulePolicy(**schedule))
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


def read_bandwidth() -> float:
    """Bytes a second of reading memory with all threads."""
    data = torch.ones(1 << 28, dtype=torch.float32)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - begun)
    return data.nbytes / min(seconds)


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


def gaps(engine: Engine, prompt: int, running: int, count: int) -> list[float]:
    """Seconds between tokens of running requests of `count` tokens, while a prompt of so many (0: none) is computed."""
    for number in range(running):
        engine.add(str(number), [number + 1] * 16, greedy(count))
    started: set[str] = set()
    while len(started) < running:
        started |= {output.request_id for output in engine.step()}
    if prompt:
        engine.add("long", list(range(prompt)), greedy(1))
    last = dict.fromkeys(started, time.perf_counter())
    found: list[float] = []
    over = long_ended = False
    while engine.has_work and not over:
        over = long_ended  # the step after it shows the gap that it made
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            long_ended |= output.request_id == "long"
            if output.request_id in last:
                found.append(now - last[output.request_id])
                last[output.request_id] = now
    for number in range(running):
        engine.abort(str(number))
    return found


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


def p95(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One model."""
    model = model_of(name)
    scale = options.scale
    found: dict[str, float] = {}
    load = mixed_load(options.requests, scale)
    rates: dict[str, list[float]] = {"fastgen": [], "static": [], "continuous": []}
    for number in range(options.rounds):
        print(f"{name}: round {number + 1} of {options.rounds}", file=sys.stderr)
        engine = engine_of(model, options.gib)
        found["token_budget"] = engine.scheduler.policy.token_budget or 0
        rates["fastgen"].append(rate(lambda engine=engine: serve(engine, load)))  # type: ignore[misc]
        rates["static"].append(rate(lambda: static_batches(model, load, options.batch)))
        if options.continuous:
            rates["continuous"].append(rate(lambda: continuous(model, load)))
    found |= {f"{peer}_tokens_s": statistics.median(each) for peer, each in rates.items() if each}
    engine = engine_of(model, options.gib, token_budget=512)
    weight_bytes = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    found["stream_s"] = one_stream(engine, 128 // scale + 8)
    found["stream_bound_s"] = weight_bytes / read_bandwidth()
    for kind in Schedule:
        engine = engine_of(model, options.gib, token_budget=options.gap_budget, kind=kind)
        alone = gaps(engine, 0, 4, 96 // scale + 16)
        beside = gaps(engine, LONG // scale, 4, 2000 // scale)
        found[f"{kind.value}_gap"] = p95(beside) / p95(alone)
    shared = list(range(1, 901 // scale + 1))
    for prefix in (True, False):
        engine = engine_of(model, options.gib, token_budget=512)
        if not prefix:
            engine.scheduler.tables.prefix = None
        found[f"first_token_{'cached' if prefix else 'computed'}_s"] = first_token(
            engine, shared, 100 // scale + 1, 9
        )
    return found


def page(found: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """The results as a page."""
    hardware = _measure.hardware()
    lines = [
        "# Serving on the CPU, bfloat16, Llama's shape",
        "",
        f"{_measure.today()}; {hardware['processor']} ({hardware['instruction_set']}), "
        f"{torch.get_num_threads()} threads; transformers {transformers.__version__}, torch {torch.__version__}; "
        f"{options.requests} requests, medians of {options.rounds} rounds.",
        "",
        "| | " + " | ".join(found) + " |",
        "| --- |" + " --- |" * len(found),
    ]

    def row(title: str, value: Callable[[dict[str, float]], str]) -> None:
        lines.append(f"| {title} | " + " | ".join(value(each) for each in found.values()) + " |")

    row("mixed load, tokens a second", lambda f: f"{f['fastgen_tokens_s']:.0f}")
    row(
        f"`generate`, static batches of {options.batch}",
        lambda f: f"{f['static_tokens_s']:.0f}: **{f['fastgen_tokens_s'] / f['static_tokens_s']:.2f} x**",
    )
    if options.continuous:
        row(
            "continuous batching of transformers",
            lambda f: (
                f"{f['continuous_tokens_s']:.0f}: **{f['fastgen_tokens_s'] / f['continuous_tokens_s']:.2f} x**"
            ),
        )
    row("one stream, ms a token", lambda f: f"{1e3 * f['stream_s']:.2f}")
    row("of weight bytes / bandwidth", lambda f: f"**{100 * f['stream_bound_s'] / f['stream_s']:.0f} %**")
    row("p95 gap beside a long prompt / without, SplitFuse", lambda f: f"**{f['split_fuse_gap']:.2f}**")
    row("the same, whole prompts first", lambda f: f"{f['prefill_first_gap']:.2f}")
    row(
        "first token, nine tenths shared: computed / cached",
        lambda f: f"**{f['first_token_computed_s'] / f['first_token_cached_s']:.1f} x**",
    )
    row("token budget, measured", lambda f: f"{f['token_budget']:.0f}")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="10m,125m", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="of static batches")
    parser.add_argument("--gib", type=float, default=2.0, help="of the KV cache")
    parser.add_argument(
        "--gap-budget", type=int, default=32, help="tokens of a forward where gaps are measured"
    )
    parser.add_argument("--no-continuous", dest="continuous", action="store_false", help="without that peer")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    options.scale = 1
    if options.quick:
        options.models, options.requests, options.rounds, options.scale, options.gib = "tiny", 4, 1, 16, 0.05
        options.continuous = False
    found = {name: measure(name, options) for name in options.models.split(",")}
    text = page(found, options)
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "serving.md").write_text(text)
        (options.out / "serving.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

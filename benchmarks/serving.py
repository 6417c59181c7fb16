"""fastgen beside transformers and llama.cpp, on the CPU: mixed load, one stream, prompts, long prompts beside decodes.

    python3 tools/dev.py peers                       # once: llama.cpp, in an environment of its own
    python3 tools/dev.py bench serving
    python3 tools/dev.py bench serving --models 125m --requests 64
    python3 tools/dev.py bench serving --gaps-alone --models 10m,125m
    python3 tools/dev.py bench serving --quick

Models have random weights, in Llama's shape, bfloat16. Peers: `generate` with static batches (left-padded, each as long
as its longest); transformers' continuous batching; llama.cpp with the same weights, two sequences or thirty-two in one
`llama_decode`, in bfloat16 or float16, whichever is faster here. Every request is greedy and has a length of its own.
One stream is held against the bytes of the weights over the bandwidth of reading them. `--gaps-alone` holds a long
prompt beside decodes against the same without it, also with whole prompts first; of 1b that takes more than an hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import _measure
import _serving_gaps
import numpy as np
import torch
from _llama_cpp import LlamaCpp, begin, check, missing
from _processes import say
from _serving_jobs import (
    LONG,
    SHAPES,
    VOCAB,
    continuous,
    engine_of,
    first_token,
    mixed_load,
    model_of,
    one_stream,
    prompt_rate,
    rate,
    save,
    serve,
    static_batches,
    streamed_bytes,
)
from _serving_page import Found, page
from accel_kernels import native
from accel_kernels.isa import chosen_cpu_isa
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "docs" / "images" / "fastgen-gaps.svg"
REQUESTS, FEWER = 32, {"1b": 16}  # fewer where the static batches of transformers take minutes
PROMPT = 1024
PLACES = 32  # sequences of llama.cpp
SHARED = (1000, 4000)  # tokens of prompts that begin alike


def bandwidth() -> float:
    """Bytes a second of reading memory with all threads: the faster of torch's sum and accel-kernels' loop."""
    data = torch.from_numpy(np.ones(1 << 28, dtype=np.float32))  # numpy asks for huge pages
    readers: list[Callable[[], object]] = [data.sum]
    if native.cpu is not None:
        read, isa, threads = native.cpu.stream_read, chosen_cpu_isa(), torch.get_num_threads()
        readers.append(lambda: read(data.data_ptr(), data.numel(), threads, isa))
    return data.nbytes / min(seconds(reader) for reader in readers for _ in range(5))


def seconds(act: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def measure(name: str, options: argparse.Namespace) -> Found:
    """One model."""
    model = model_of(name)
    with ExitStack() as stack:
        folder = save(model, stack.enter_context(tempfile.TemporaryDirectory()))
        if options.gaps_alone:
            return beside(name, folder, None, options)
        peer = None
        if options.llama_cpp:
            say(f"{name}: llama.cpp begins")
            peer = begin(model)
            stack.callback(peer.stop)
        found: Found = mixed(name, model, folder, peer, options) | alone(name, model, folder, peer, options)
        if peer is not None:
            found |= peer.describe()
        if options.quick:
            found |= beside(name, folder, int(found["prompt_fill"]), options)
        say(f"{name}: shared prompts")
        return found | shared_prompts(folder, options)


def mixed(
    name: str, model: LlamaForCausalLM, folder: str, peer: LlamaCpp | None, options: argparse.Namespace
) -> dict[str, float]:
    """Tokens a second of a mixed load, all engines in turn."""
    requests = options.requests or FEWER.get(name, REQUESTS)
    load = mixed_load(requests, options.scale)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        say(f"{name}: mixed load, round {number + 1} of {options.rounds}")
        engine = engine_of(folder, options.gib)
        fill = engine.scheduler.policy.prompt_fill or 0
        ours = rate(lambda engine=engine: serve(engine, load))  # type: ignore[misc]
        del engine
        theirs: dict[str, float] = {}
        if peer is not None:
            theirs["llama_cpp"] = peer.rate(load, PLACES)
        theirs["static"] = rate(lambda: static_batches(model, load, options.batch))
        if options.continuous:
            theirs["continuous"] = rate(lambda: continuous(model, load))
        rounds.append(
            {"prompt_fill": fill, "fastgen_tokens_s": ours}
            | {f"{each}_tokens_s": value for each, value in theirs.items()}
            | {f"{each}_ratio": ours / value for each, value in theirs.items()}
        )
    return {"requests": requests, **medians(rounds)}


def alone(
    name: str, model: LlamaForCausalLM, folder: str, peer: LlamaCpp | None, options: argparse.Namespace
) -> dict[str, float]:
    """One request: seconds of a token, and tokens a second of a prompt; llama.cpp in turn."""
    engine = engine_of(folder, options.gib, prefix=False)
    weight_bytes = streamed_bytes(model)
    length, count = PROMPT // options.scale, 128 // options.scale + 8
    rounds: list[dict[str, float]] = []
    for number in range(2 * options.rounds + 1):
        say(f"{name}: alone, round {number} of {2 * options.rounds}")
        before = bandwidth()  # on both sides, for it changes with what else runs on the machine
        stream = one_stream(engine, count)
        after = bandwidth()
        bound = weight_bytes * 2 / (before + after)
        prompt = prompt_rate(engine, length)
        rounds.append({"stream_s": stream, "stream_bound_s": bound, "stream_share": bound / stream})
        rounds[-1]["prompt_tokens_s"] = prompt
        if peer is not None:
            theirs, their_prompt = peer.stream(count), peer.prompt_rate(length)
            rounds[-1] |= {"llama_cpp_stream_s": theirs, "llama_cpp_prompt_tokens_s": their_prompt}
            rounds[-1] |= {"stream_ratio": theirs / stream, "prompt_ratio": prompt / their_prompt}
    return {"rounds_alone": len(rounds) - 1, **medians(rounds[1:])}  # the first one warmed up


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each number."""
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def beside(name: str, folder: str, fill: int | None, options: argparse.Namespace) -> Found:
    """Gaps between tokens beside a long prompt, by schedule; drawn for one model."""
    say(f"{name}: gaps beside a long prompt")
    found = _serving_gaps.compare(
        folder,
        options.gib,
        budget=options.gap_budget,
        measured=fill,
        rounds=options.rounds,
        scale=options.scale,
    )
    if name == options.drawn and not options.quick:
        title = (
            f"{_serving_gaps.RUNNING} requests beside a prompt of {LONG:,} tokens: {name}, {_measure.today()}"
        )
        _serving_gaps.draw(options.picture, found, title)
    return {f"{kind}_gap": each.ratio for kind, each in found.items()} | {
        f"{kind}_prompt_s": each.prompt_s for kind, each in found.items()
    }


def shared_prompts(folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token of prompts that begin alike, with and without the cache of prefixes."""
    found = {}
    for length in SHARED:
        own = length // 10 // options.scale
        shared = [1 + at % VOCAB for at in range(9 * own)]
        for prefix in (True, False):
            engine = engine_of(folder, options.gib, prefix=prefix, token_budget=512)
            seconds = first_token(engine, shared, own, 9)
            found[f"first_token_{'cached' if prefix else 'computed'}_{length}_s"] = seconds
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="10m,125m,1b", help=f"comma-separated, of {', '.join(SHAPES)}")
    fewer = ", ".join(f"{count} of {name}" for name, count in FEWER.items())
    parser.add_argument("--requests", type=int, help=f"of the mixed load; {REQUESTS}, {fewer}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="of static batches")
    parser.add_argument("--gib", type=float, default=2.0, help="of the KV cache")
    parser.add_argument(
        "--gap-budget", type=int, default=32, help="tokens of a forward where gaps are measured"
    )
    parser.add_argument("--no-continuous", dest="continuous", action="store_false", help="without that peer")
    parser.add_argument("--no-llama-cpp", dest="llama_cpp", action="store_false", help="without that peer")
    parser.add_argument(
        "--gaps-alone", action="store_true", help="only the gaps beside a long prompt, to serving_gaps.*"
    )
    parser.add_argument("--drawn", default="125m", help="model whose gaps are drawn")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="of them; written where results are")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    options.scale = 1
    if options.quick:
        options.models, options.requests, options.rounds, options.scale, options.gib = "tiny", 4, 1, 16, 0.05
        options.continuous = options.llama_cpp = False
    if options.llama_cpp and (why := missing()):
        say(why)
        options.llama_cpp = False
    if options.llama_cpp:
        check(model_of("tiny"))
    stem = options.out / ("serving_gaps" if options.gaps_alone else "serving")
    kept = stem.with_suffix(".json")
    # Models that are not measured now keep their columns.
    found: dict[str, Found] = json.loads(kept.read_text()) if kept.exists() and not options.quick else {}
    for name in options.models.split(","):
        found[name] = measure(name, options) | {"date": _measure.today(), "rounds": options.rounds}
        if not options.quick:  # what is there if a later model does not come to its end
            options.out.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".md").write_text(page(found, options))
            kept.write_text(json.dumps(found, indent=1))
    print(page(found, options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""fastgen on a CUDA device: one stream against the weights' bytes, a mixed load beside transformers, experts' products.

    python benchmarks/gpu_serving.py [--models 1b,7b] [--quick] [--out FILE]

Random weights in Llama's shape, bfloat16. The bound of a stream is the bytes of the weights that a token needs over the
bandwidth of reading memory, measured before and after. Experts in Mixtral's shape (width 4096, MLP 14336, two of eight)
are held against a loop over experts that looks for each one's tokens, as in transformers' first implementation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _measure
import torch
from _processes import say
from _serving_jobs import (
    SHAPES,
    Shape,
    continuous,
    engine_of,
    mixed_load,
    model_of,
    one_stream,
    rate,
    serve,
    static_batches,
    streamed_bytes,
)
from fastgen.config import Weights
from fastgen.linear import Linear, LinearPolicy
from fastgen.models import spec
from fastgen.models.moe import MoeLayer
from fastgen.parallel import TensorParallel
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
REQUESTS, BATCH = 128, 32
EXPERTS, TOP_K, TOKENS = 8, 2, (1, 16, 128, 2048)
Row = dict[str, Any]


def bandwidth(device: str, nbytes: int) -> float:
    """Bytes a second of reading memory: the fastest of ten sums."""
    data = torch.ones(nbytes // 4, device=device)
    return nbytes / min(seconds(data.sum, device) for _ in range(10))


def seconds(act: Callable[[], object], device: str) -> float:
    """Of one call, to its end on the device."""
    wait(device)
    begun = time.perf_counter()
    act()
    wait(device)
    return time.perf_counter() - begun


def wait(device: str) -> None:
    """Until it has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def one_model(name: str, args: argparse.Namespace) -> Row:
    """Decode at batch 1, with forwards made again as graphs and without; a mixed load with all engines in turn."""
    model = model_of(name, args.device)
    shares = []
    engine = engine_of(model, args.gib, prefix=False)
    for number in range(args.rounds + 1):
        say(f"{name}: one stream, round {number} of {args.rounds}")
        before = bandwidth(args.device, args.read_bytes)
        stream_s = one_stream(engine, 8 if args.quick else 256)
        found = (before + bandwidth(args.device, args.read_bytes)) / 2
        shares.append((streamed_bytes(model) / found / stream_s, stream_s, found))
    share, stream_s, read = (statistics.median(each) for each in zip(*shares[1:], strict=True))
    del engine
    load = mixed_load(4 if args.quick else REQUESTS, 16 if args.quick else 1)
    rates: dict[str, list[float]] = {"fastgen": [], "generate": [], "continuous": []}
    for number in range(args.rounds):
        say(f"{name}: mixed load, round {number + 1} of {args.rounds}")
        engine = engine_of(model, args.gib)
        rates["fastgen"].append(rate(lambda engine=engine: serve(engine, load)))  # type: ignore[misc]
        del engine
        rates["generate"].append(rate(lambda: static_batches(model, load, BATCH)))
        rates["continuous"].append(rate(lambda: continuous(model, load)))
    middle = {f"{engine}_tokens_s": statistics.median(found) for engine, found in rates.items()}
    weights = sum(each.numel() for each in {id(each): each for each in model.parameters()}.values())
    return {"parameters": weights, "share": share, "stream_s": stream_s, "read_gb_s": read / 1e9, **middle}


def experts_of(shape: Shape, device: str) -> MoeLayer:
    """A layer of experts with random weights."""
    policy = LinearPolicy(torch.bfloat16, torch.device(device), Weights.DENSE, False)
    mlp = spec.Mlp(shape.mlp, "silu")
    layer = MoeLayer(spec.Experts(EXPERTS, TOP_K, mlp), shape.width, policy, TensorParallel())
    for linear in layer.modules():
        if isinstance(linear, Linear):
            linear.load(torch.randn(linear.shard.shape, dtype=torch.bfloat16, device=device) * 0.02, None)
    layer.finish()
    return layer


@torch.no_grad()
def looped(layer: MoeLayer, x_TE: Tensor) -> Tensor:
    """Expert by expert, each with the tokens that chose it: what `layer` is held against."""
    weights_TK, chosen_TK = layer.router(x_TE, {}).float().softmax(dim=-1).topk(TOP_K, dim=-1)
    weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(x_TE.dtype)
    mask_XKT = torch.nn.functional.one_hot(chosen_TK, EXPERTS).permute(2, 1, 0)
    y_TE = torch.zeros_like(x_TE)
    for expert, mask_KT in zip(layer.experts, mask_XKT, strict=True):
        choice, token = torch.where(mask_KT)
        y_TE.index_add_(0, token, expert(x_TE[token], {}) * weights_TK[token, choice, None])
    return y_TE


@torch.no_grad()
def experts(shape: Shape, args: argparse.Namespace) -> list[Row]:
    """Both ways in turn, by tokens of a forward."""
    layer = experts_of(shape, args.device)
    rows = []
    for tokens in TOKENS:
        x_TE = torch.randn(tokens, shape.width, dtype=torch.bfloat16, device=args.device)
        ours, naive = layer(x_TE, {}), looped(layer, x_TE)
        torch.testing.assert_close(ours, naive, rtol=0.05, atol=0.05 * float(naive.abs().max()))
        pairs = []
        for _ in range(3 if args.quick else 30):
            ours_s = seconds(partial(layer, x_TE, {}), args.device)
            pairs.append((ours_s, seconds(partial(looped, layer, x_TE), args.device)))
        ours_s, naive_s = (statistics.median(each) for each in zip(*pairs, strict=True))
        rows.append({"tokens": tokens, "ours_s": ours_s, "naive_s": naive_s})
    return rows


def page(models: dict[str, Row], layers: list[Row], device: str) -> str:
    """The results as Markdown."""
    lines = [
        f"# Serving on {device}",
        "",
        f"{_measure.today()}; torch {torch.__version__}. "
        "Bars: one stream >= 85 % of the bound; experts >= 2.4 x the loop.",
        "",
        "| model | parameters | one stream, ms a token | of the bound | reads, GB/s | mixed load, tokens/s "
        "| over `generate` | over continuous batching |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in models.items():
        ours = row["fastgen_tokens_s"]
        lines.append(
            f"| {name} | {row['parameters']:,} | {1e3 * row['stream_s']:.2f} | **{row['share']:.0%}** "
            f"| {row['read_gb_s']:.0f} | {ours:.0f} | **{ours / row['generate_tokens_s']:.2f} x** "
            f"| **{ours / row['continuous_tokens_s']:.2f} x** |"
        )
    lines += ["", "| tokens through eight experts | ms | a loop's | ratio |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['tokens']} | {1e3 * row['ours_s']:.3f} | {1e3 * row['naive_s']:.3f} "
        f"| **{row['naive_s'] / row['ours_s']:.2f} x** |"
        for row in layers
    ]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; 2 without a device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="1b,7b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=16.0, help="of the KV cache")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --quick, to see that it runs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_serving.json")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: expected --quick with it; `serving` measures the CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_serving needs a CUDA device, and a torch built for it")
        return 2
    shape, args.read_bytes = Shape(4096, 14_336, 1, 32, 8, 32_000, tied=False), 4 << 30
    if args.quick:
        args.models, args.rounds, args.gib, args.read_bytes, shape = "tiny", 1, 0.05, 1 << 26, SHAPES["tiny"]
    models = {name: one_model(name, args) for name in args.models.split(",")}
    layers = experts(shape, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    found = page(models, layers, device)
    print(found)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"date": _measure.today(), "device": device, "models": models, "experts": layers}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

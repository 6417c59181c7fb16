"""What each fused op of fastgen saves on the CPU: the whole engine with it, and with plain torch in its place.

    python3 tools/dev.py bench fused_ops
    python3 tools/dev.py bench fused_ops --models 10m,125m,1b
    python3 tools/dev.py bench fused_ops --quick

A variant has one op in plain torch, which is recorded and made again without Python as the fused ones are. Shown are a
token of one stream, and a prompt of 1,024 tokens; variants take turns, medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _measure
import accel_kernels
import torch
from _processes import say
from _serving_jobs import SHAPES, engine_of, model_of, one_stream, prompt_rate, save
from fastgen import choices
from fastgen.engine import Engine
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
OPS = {
    "rms_norm": "RMSNorm with the residual's addition",
    "rotary": "rotary embedding",
    "silu_mul": "SwiGLU's product",
    "linear": "products with weights",
    "greatest": "the most likely token",
}
FUSED = "everything fused"
PROMPT = 1024


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, weight_offset: float = 0.0
) -> Tensor:
    """As `accel_kernels.rms_norm`."""
    if residual is not None:
        x = residual.add_(x)
    return F.rms_norm(x.float(), x.shape[-1:], weight.float() + weight_offset, eps).to(x.dtype)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False
) -> None:
    """As `accel_kernels.rotary`, of models that turn whole heads, half by half."""
    assert not interleaved
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    for x in (q, k):
        low, high = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `accel_kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def greatest(logits_LV: Tensor) -> list[int]:
    """As `fastgen.sampler.greatest`."""
    found: list[int] = logits_LV.argmax(-1).tolist()
    return found


PLAIN: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm, "rotary": rotary, "silu_mul": silu_mul, "linear": F.linear, "greatest": greatest,
}  # fmt: skip


@contextmanager
def plain(op: str) -> Iterator[None]:
    """One op in plain torch."""
    if op == FUSED:
        yield
        return
    home: Any = choices if op == "greatest" else accel_kernels
    fused = getattr(home, op)
    setattr(home, op, PLAIN[op])
    try:
        yield
    finally:
        setattr(home, op, fused)


def measure(name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of a token and of a prompt, by variant."""
    variants = [FUSED, *OPS]
    seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        save(model_of(name), folder)
        engines: dict[str, Engine] = {}
        for number in range(options.rounds + 1):
            say(f"{name}: round {number} of {options.rounds}")
            for variant in variants:
                with plain(variant):  # calls are recorded under it, too
                    if variant not in engines:
                        engines[variant] = engine_of(folder, options.gib, prefix=False, prompt_fill=PROMPT)
                    stream = one_stream(engines[variant], options.tokens)
                    prompt = PROMPT / prompt_rate(engines[variant], PROMPT)
                if number:  # the first one warmed up
                    seconds[variant].append((stream, prompt))
    return {
        variant: {
            "token_ms": 1e3 * statistics.median(each[0] for each in found),
            "prompt_ms": 1e3 * statistics.median(each[1] for each in found),
        }
        for variant, found in seconds.items()
    }


def page(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as Markdown."""
    hardware = _measure.hardware()
    lines = [
        "# What fused ops save in fastgen",
        "",
        f"{_measure.today()}; {hardware['processor']} ({hardware['instruction_set']}), {torch.get_num_threads()} "
        f"threads; torch {torch.__version__}. Random bfloat16 weights in Llama's shape: ms of a token of one stream, "
        f"and of a prompt of {PROMPT:,} tokens, with the op in plain torch; bold: over everything fused.",
        "",
        "| in plain torch | " + " | ".join(f"{name}: a token | a prompt" for name in found) + " |",
        "| --- |" + " --- | --- |" * len(found),
    ]
    for variant in [FUSED, *OPS]:
        cells = []
        for rows in found.values():
            for each in ("token_ms", "prompt_ms"):
                ratio = rows[variant][each] / rows[FUSED][each]
                cells.append(
                    f"{rows[variant][each]:.2f}" + (f": **{ratio:.2f} x**" if variant != FUSED else "")
                )
        lines.append(f"| {OPS.get(variant, 'nothing')} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="10m,125m", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of a stream")
    parser.add_argument("--gib", type=float, default=0.25, help="of each engine's KV cache")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fused_ops.json")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.rounds, options.tokens, options.gib = "tiny", 1, 8, 0.05
    found = {name: measure(name, options) for name in options.models.split(",")}
    text = page(found)
    print(text)
    if not options.quick:
        options.out.write_text(json.dumps({"date": _measure.today(), "models": found}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

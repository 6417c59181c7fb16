"""The codecs of accel-kernels on the CPU: GB/s of each (bytes read and written) beside the memory's own speed.

Quantization to int8 and int4 and back, sums of messages into floats and into messages, signs with error feedback. The
limit of an op is a loop that reads as much and writes as much, pass by pass, with next to no arithmetic: in 4 or 16
places side by side, with ordinary or non-temporal stores, whichever is fastest. Peers are what torch and NumPy have:
`quantize_per_channel` with a channel for each block, and the passes of plain torch with `numpy.packbits`.

    python benchmarks/wire_codecs.py [--quick] [--only NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _measure
import accel_kernels as ak
import numpy as np
import torch
from accel_kernels import native
from adam_step import ROOT, alternate, timed

BLOCK = 256
BAR = 0.6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {  # places that are streamed side by side, non-temporal stores
    f"{places} places, {stores} stores": (places, stores == "non-temporal")
    for places in (4, 16)
    for stores in ("ordinary", "non-temporal")
}
Call = Callable[[], Any]


class Op(NamedTuple):
    """One op: the bytes that each of its passes reads and writes, and perhaps a peer that does the same."""

    name: str
    call: Call
    passes: tuple[tuple[int, int], ...]
    peer: Call | None = None

    @property
    def num_bytes(self) -> int:
        """Read and written, in all passes."""
        return sum(map(sum, self.passes))


def messages_of(make: Callable[[torch.Tensor], Any], num_bytes: int, device: str) -> list[torch.Tensor]:
    """Four messages, each made by `make`."""
    messages = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(4)]
    for message in messages:
        make(message)
    return messages


def block_ops(dtype: torch.dtype, bits: int, symmetric: bool, numel: int, device: str) -> list[Op]:
    """Quantization of floats of one dtype, and back."""
    form: dict[str, Any] = {"bits": bits, "block_size": BLOCK, "symmetric": symmetric}
    x = torch.randn(numel, device=device).to(dtype)
    y = torch.empty_like(x)
    floats, size = x.nbytes, ak.block_bytes(numel, **form)
    sent = messages_of(lambda m: ak.quantize_blocks(x, m, **form), size, device)
    kind = f"int{bits}" + ("" if symmetric else " asymmetric")
    peers = per_channel(x) if (bits, symmetric, device) == (8, True, "cpu") else (None, None)
    there, back = ((floats, size),), ((size, floats),)
    ops = [
        Op(f"quantize {kind}", lambda: ak.quantize_blocks(x, sent[0], **form), there, peers[0]),
        Op(f"dequantize {kind}", lambda: ak.dequantize_blocks(sent[0], y, **form), back, peers[1]),
    ]
    if symmetric:
        stochastic = functools.partial(ak.quantize_blocks, x, sent[1], seed=1, **form)
        total = functools.partial(ak.dequantize_sum, sent, y, scale=0.25, **form)
        ops += [
            Op(f"quantize {kind}, stochastic", stochastic, there),
            Op(f"sum of 4 {kind}", total, ((4 * size, floats),)),
        ]
    return ops


def per_channel(x: torch.Tensor) -> tuple[Call, Call]:
    """The same by torch: scales of blocks, then `quantize_per_channel`, which wants fp32; and back."""
    whole = x[: x.numel() // BLOCK * BLOCK].view(-1, BLOCK)
    zeros = torch.zeros(whole.shape[0], dtype=torch.long)

    def quantize() -> torch.Tensor:
        wide = whole.float()
        return torch.quantize_per_channel(wide, wide.abs().amax(dim=1) / 127, zeros, 0, torch.qint8)

    quantized = quantize()
    return quantize, lambda: quantized.dequantize().to(x.dtype)


def requantize_ops(bits: int, numel: int, device: str) -> list[Op]:
    """Sums of messages into a message."""
    form: dict[str, Any] = {"bits": bits, "block_size": BLOCK}
    x, size = torch.randn(numel, device=device), ak.block_bytes(numel, **form)
    sent = messages_of(lambda m: ak.quantize_blocks(x, m, **form), size, device)
    out = torch.empty_like(sent[0])

    def sums(k: int) -> Call:
        return lambda: ak.requantize_sum(sent[:k], out, n=numel, scale=1 / k, **form)

    return [Op(f"requantize {k} int{bits}", sums(k), ((k * size, size),)) for k in (2, 4)]


def sign_ops(dtype: torch.dtype, numel: int, device: str) -> list[Op]:
    """Signs of floats of one dtype, and back."""
    x, error = torch.randn(numel, device=device).to(dtype), torch.zeros(numel, device=device)
    y, theirs, size = torch.empty_like(x), torch.zeros_like(error), ak.sign_bytes(numel)
    sent = messages_of(lambda m: ak.pack_signs(x, m), size, device)
    out = torch.empty_like(sent[0])

    def passes() -> Any:
        c = x + theirs
        scale = c.norm() / numel**0.5
        torch.sub(c, torch.where(c >= 0, scale, -scale), out=theirs)
        return np.packbits((c >= 0).numpy(), bitorder="little")

    floats, lost = x.nbytes, error.nbytes  # read twice: the scale is known only after the last element
    with_error = ((floats + lost, 0), (floats + lost, size + lost))
    peer = passes if device == "cpu" else None
    return [
        Op("pack signs, error", lambda: ak.pack_signs(x, out, error=error), with_error, peer),
        Op("pack signs", lambda: ak.pack_signs(x, out), ((floats, 0), (floats, size))),
        Op("unpack signs", lambda: ak.unpack_signs(sent[0], y), ((size, floats),)),
        Op("mean of 4 signs", lambda: ak.mean_signs(sent, y), ((4 * size, floats),)),
    ]


def groups(numel: int, device: str = "cpu") -> Iterator[tuple[str, list[Op]]]:
    """What the floats are, and ops that share arrays; one group after the other, all would not fit memory together."""
    for name, dtype in DTYPES.items():
        for symmetric in (True, False):
            for bits in (8, 4):
                yield name, block_ops(dtype, bits, symmetric, numel, device)
        yield name, sign_ops(dtype, numel, device)
    for bits in (8, 4):
        yield "-", requantize_ops(bits, numel, device)


class Limits:
    """Loops over arrays of their own that move what an op moves."""

    def __init__(self, most_read: int, most_written: int) -> None:
        self.source, self.target = (torch.ones(size // 4 + 16) for size in (most_read, most_written))

    def calls(self, op: Op) -> dict[str, Callable[[], float]]:
        """The passes of `op`, timed, in each way."""
        cpu, threads = native.cpu, torch.get_num_threads()
        assert cpu is not None

        def move(places: int, non_temporal: bool) -> None:
            for read, written in op.passes:
                addresses = (self.source.data_ptr(), read, self.target.data_ptr(), written)
                cpu.stream_mix(*addresses, places, non_temporal, threads, "")

        return {name: timed(functools.partial(move, *how)) for name, how in LIMITS.items()}


def measure(numel: int, rounds: int, only: str) -> list[dict[str, Any]]:
    """A row for each op whose name holds `only`: it takes turns with its limits and its peer."""
    limits, rows = Limits(8 * numel, 9 * numel), []
    for dtype, ops in groups(numel):
        for op in (op for op in ops if only in op.name):
            calls = {"ours": timed(op.call), **limits.calls(op)}
            if op.peer is not None:
                calls["peer"] = timed(op.peer)
            seconds = alternate(calls, rounds)
            rows.append({"op": op.name, "dtype": dtype, "passes": op.passes, "seconds": seconds})
    return rows


def table(record: dict[str, Any], which: str) -> str:
    """The rows as Markdown."""
    lines = [
        f"{which.capitalize()} of the rounds (bar: >= {BAR:.0%} of the limit)",
        "",
        "| op | floats | bytes read + written an element | ms | GB/s | limit GB/s | of limit | peer ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        s = row["seconds"][which]
        read, written = (sum(side) for side in zip(*row["passes"], strict=True))
        ours, limit = s["ours"], min(s[name] for name in LIMITS)
        peer = f"{s['peer'] * 1e3:.1f} | {s['peer'] / ours:.1f}" if "peer" in s else "- | -"
        lines.append(
            f"| {row['op']} | {row['dtype']} | {read / record['numel']:.2f} + {written / record['numel']:.2f} "
            f"| {ours * 1e3:.2f} | {(read + written) / ours / 1e9:.1f} | {(read + written) / limit / 1e9:.1f} "
            f"| {limit / ours:.0%} | {peer} |"
        )
    return "\n".join(lines)


LEGEND = f"""\
Blocks of {BLOCK} elements. The limit reads and writes as many bytes as the op, from one array and to another, in 4 or
16 places side by side, with ordinary or with non-temporal stores, whichever is fastest; where an op passes over its
input twice, as signs need, so does the limit. Contestants take turns, one call each, after a sweep through the
caches. The peers quantize with `torch.quantize_per_channel` (scales found by torch, fp32 made of halves first), and
pack signs with torch's passes and `numpy.packbits`. Where the load average says that the machine had other work, ops
and limits shared what that left of it: the ratios hold for that, and say little about a machine left alone.
"""


def page(record: dict[str, Any]) -> str:
    """The results as a page."""
    hardware, load = record["hardware"], record["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    head = (
        f"# Codecs on the CPU\n\n{record['date']}; {hardware['processor']} ({hardware['instruction_set']}), "
        f"{record['threads']} threads, {hardware['memory_gib']} GiB; {record['numel']:,} elements; {versions}; "
        f"load average {load[0]:.1f} at the start."
    )
    return f"{head}\n\n{table(record, 'median')}\n\n{table(record, 'best')}\n\n{LEGEND}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="1 M elements, few rounds; writes no file unless --out"
    )
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--only", default="", help="ops whose name holds this; writes no file unless --out")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if native.cpu is None:
        sys.exit(f"the C++ back end is not here ({native.why_not}); nothing to measure")
    numel, rounds = (1_000_000, args.rounds or 3) if args.quick else (50_000_000, args.rounds or 15)
    written = None if args.quick or args.only else ROOT / "benchmarks/results/wire_codecs.json"
    out = args.out or written
    torch.set_num_threads(min(2, torch.get_num_threads()))
    load = os.getloadavg()
    rows = measure(numel, rounds, args.only)
    record = {
        "benchmark": "wire_codecs",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "load_average": [load[0], os.getloadavg()[0]],
        "versions": {
            "accel-kernels": ak.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "numel": numel,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    print(page(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()

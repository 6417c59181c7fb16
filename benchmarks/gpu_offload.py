"""Training past a CUDA device's memory: how far a cap on it goes, and what steps that begin early hide.

    python benchmarks/gpu_offload.py [--caps 16,24,32] [--folder /mnt/fast] [--out FILE]
    python benchmarks/gpu_offload.py --quick --device cpu

A GPT in bfloat16 with fp32 masters, AdamW, recomputed blocks, one process a case. The device's memory is capped by
`torch.cuda.set_per_process_memory_fraction`. First table: the most layers that get through a few steps with everything
on the device, with everything at rest in host memory, and with masters and moments on a drive besides; layers are
added or taken away by an eighth from what the bytes suggest. Second table: one model, its masters, moments and
gradients in host memory, with the exact step, steps that begin during backward, and ZenFlow. Hidden is the part of
the exact step's seconds, beyond forward and backward alone, that an iteration does not show.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _measure
import torch
from _gpu_offload_worker import FULL
from _processes import say

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
PLACES = ("device", "host", "drive, states")
OVERLAPS = ("none", "exact", "promised", "speculative", "zenflow")
NAMES = {
    "none": "forward and backward alone", "exact": "exact", "promised": "exact, `last_backward()`",
    "speculative": "speculative", "zenflow": "ZenFlow",
}  # fmt: skip
BYTES_ON_DEVICE, BYTES_ON_HOST = 18, 18
"""A parameter's: 2 and 12 of values, masters and moments, 2 of gradients, and as much again while they are reduced."""
Row = dict[str, Any]


def run(args: argparse.Namespace, cap_gib: float, **case: Any) -> Row | None:
    """One case in a process of its own; None: memory did not suffice.

    Raises:
        RuntimeError: it failed otherwise.
    """
    order = {
        "device": args.device, "cap_bytes": int(cap_gib * GIB), "host_bytes": args.host_bytes, "width": args.width,
        "words": args.words, "tokens": args.tokens, "sequences": 1, "stage": 3, "overlap": "exact",
        "steps": args.steps, "folder": str(args.folder), "count_bytes": False, **case,
    }  # fmt: skip
    say(f"{cap_gib:g} GiB: {order['rests']}, {order['layers']} layers, {order['overlap']}")
    done = subprocess.run(
        [sys.executable, HERE / "_gpu_offload_worker.py"],
        env={**os.environ, "ORDER": json.dumps(order)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == FULL:
        return None
    if done.returncode:
        raise RuntimeError(f"{order} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def largest(args: argparse.Namespace, cap_gib: float, rests: str) -> Row:
    """The most layers that get through, to within an eighth."""
    per_layer, words = 12 * args.width**2, 2 * args.words * args.width
    room = cap_gib * GIB / BYTES_ON_DEVICE if rests == "device" else args.host_bytes / BYTES_ON_HOST
    if rests == "drive, states":
        room *= BYTES_ON_HOST / 6
    layers = min(max(int((room - words) / per_layer), 1), args.most_layers)
    found, good = run(args, cap_gib, rests=rests, layers=layers), layers
    while found is None and layers > 1:
        good = layers = min(layers * 7 // 8, layers - 1)
        found = run(args, cap_gib, rests=rests, layers=layers)
    if found is None:
        raise RuntimeError(f"{rests}: not one layer of width {args.width} gets through in {cap_gib:g} GiB")
    while good == layers and layers < args.most_layers:
        layers = min(max(layers * 9 // 8, layers + 1), args.most_layers)
        more = run(args, cap_gib, rests=rests, layers=layers)
        if more is not None:
            found, good = more, layers
    return {"cap_gib": cap_gib, "rests": rests, **found}


def overlaps(args: argparse.Namespace) -> list[Row]:
    """One model with each way to step, in turn; medians of rounds."""
    rounds: list[dict[str, Row]] = []
    for _ in range(args.rounds):
        rows = {}
        for overlap in OVERLAPS:
            found = run(
                args,
                args.caps[0],
                rests="host, sums" if overlap == "zenflow" else "host, states",
                stage=2,
                layers=args.layers,
                overlap=overlap,
                steps=args.overlap_steps,
                sequences=args.sequences,
                count_bytes=overlap != "none",
            )
            if found is None:
                raise RuntimeError(
                    f"{args.layers} layers do not fit into {args.caps[0]:g} GiB; lower --layers"
                )
            rows[overlap] = found
        rounds.append(rows)
    result = []
    for overlap in OVERLAPS:
        shown = sorted(rows["exact"]["step_s"] - rows["none"]["step_s"] for rows in rounds)
        seen = sorted(rows[overlap]["step_s"] - rows["none"]["step_s"] for rows in rounds)
        middle = sorted((rows[overlap] for rows in rounds), key=lambda row: row["step_s"])[len(rounds) // 2]
        hidden = 1 - seen[len(seen) // 2] / shown[len(shown) // 2]
        result.append({"overlap": overlap, "hidden": hidden, **middle})
    return result


def page(record: Row) -> str:
    """The results as Markdown."""
    lines = [
        f"# Offload on {record['device']}",
        "",
        f"{record['date']}; torch {torch.__version__}; host memory for what rests there: "
        f"{record['host_bytes'] / GIB:.0f} GiB. GPT of width {record['width']} in bfloat16 with fp32 masters, AdamW, "
        f"recomputed blocks, one sequence of {record['tokens']} tokens. Caps by `set_per_process_memory_fraction`.",
        "",
        "| cap, GiB | everything rests | layers | parameters, M | ratio | peak on it, GiB | step s | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone = {row["cap_gib"]: row["parameters"] for row in record["largest"] if row["rests"] == "device"}
    lines += [
        f"| {row['cap_gib']:g} | {row['rests']} | {row['layers']} | {row['parameters'] / 1e6:.0f} "
        f"| **{row['parameters'] / alone[row['cap_gib']]:.1f}** | {row['peak_bytes'] / GIB:.1f} "
        f"| {row['step_s']:.2f} | {row['tokens_s']:.0f} |"
        for row in record["largest"]
    ]
    lines += [
        "",
        f"{record['layers']} layers, stage 2, masters, moments and gradients in host memory, {record['sequences']} "
        f"sequences; a link must carry 4 bytes a parameter and step.",
        "",
        "| | iteration s | tokens/s | of the host's step hidden | down, bytes a parameter | up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["overlaps"]:
        down, up = (row.get(name, 0) / row["parameters"] for name in ("down_bytes", "up_bytes"))
        hidden = f"**{row['hidden']:.0%}**" if row["overlap"] != "none" else ""
        lines.append(
            f"| {NAMES[row['overlap']]} | {row['step_s']:.3f} | {row['tokens_s']:.0f} | {hidden} "
            f"| {f'{down:.2f}' if down else ''} | {f'{up:.2f}' if up else ''} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; 2 without a device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--caps", default="16,24,32", help="GiB of the device, comma-separated")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence")
    parser.add_argument("--layers", type=int, default=16, help="of the second table's model")
    parser.add_argument("--sequences", type=int, default=8, help="of the second table's steps")
    parser.add_argument("--steps", type=int, default=2, help="that count, of a first table's case")
    parser.add_argument("--overlap-steps", type=int, default=12, help="the same of the second table's")
    parser.add_argument("--rounds", type=int, default=3, help="of the second table")
    parser.add_argument(
        "--host-gib", type=float, default=0.0, help="that stores may use; 0: four fifths of what is free"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the drive")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --quick, to see that it runs"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_offload.json")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: expected --quick with it; `offload` measures the CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_offload needs a CUDA device, and a torch built for it")
        return 2
    args.caps = [float(cap) for cap in args.caps.split(",")]
    args.words, args.most_layers = 32_000, 512
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    args.host_bytes = int(args.host_gib * GIB) or free * 4 // 5
    if args.quick:
        args.caps, args.width, args.words, args.tokens = args.caps[:1], 64, 256, 64
        args.layers, args.most_layers, args.sequences = 2, 3, 1
        args.steps, args.overlap_steps, args.rounds, args.host_bytes = 1, 1, 1, 1 << 30
    rows = [largest(args, cap, rests) for cap in args.caps for rests in PLACES]
    record = {
        "benchmark": "gpu_offload",
        "date": _measure.today(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "the CPU",
        **{name: getattr(args, name) for name in ("host_bytes", "width", "tokens", "layers", "sequences")},
        "largest": rows,
        "overlaps": overlaps(args),
    }
    text = page(record)
    print(text)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

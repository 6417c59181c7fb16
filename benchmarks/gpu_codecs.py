"""The codecs of accel-kernels on a CUDA device: GB/s of each (bytes read and written) beside a copy's; medians.

python benchmarks/gpu_codecs.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import _measure
import accel_kernels as ak
import torch
from gpu_steps import RESULTS, alternate
from wire_codecs import groups

BAR = 0.8


def measure(numel: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each op, which takes turns with a copy of fp32."""
    source, target = torch.empty(2, numel, device="cuda").unbind()
    rows = []
    for dtype, ops in groups(numel, "cuda"):
        for op in ops:
            ms = alternate({"copy": lambda: target.copy_(source), "ours": op.call}, rounds)
            rows.append(
                {"op": op.name, "dtype": dtype, "bytes": op.num_bytes, "copy_bytes": 8 * numel, "ms": ms}
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"Bar: >= {BAR:.0%} of a copy's bandwidth",
        "",
        "| op | floats | ms | GB/s | copy GB/s | of it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, copy = (
            row[b] / row["ms"][name] / 1e6 for b, name in (("bytes", "ours"), ("copy_bytes", "copy"))
        )
        lines.append(
            f"| {row['op']} | {row['dtype']} | {row['ms']['ours']:.3f} | {ours:.0f} | {copy:.0f} | {ours / copy:.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, few rounds; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_codecs.json")
    args = parser.parse_args()
    if not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None:
        print(
            "gpu_codecs needs a CUDA device, a torch built for it, and CuPy (accel-kernels[cuda12] or [cuda13])"
        )
        return 2
    rows = measure(1_000_000 if args.quick else 100_000_000, 5 if args.quick else 51)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, accel-kernels {ak.__version__}\n\n{table(rows)}")
    if not args.quick:
        record = {
            "benchmark": "gpu_codecs", "date": _measure.today(), "device": device,
            "versions": {"torch": torch.__version__, "accel_kernels": ak.__version__}, "rows": rows,
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fused AdamW on a CUDA device against torch's fused AdamW and the device's memory; alternating, medians.

The limit is what a device-to-device copy moves in a second, over the bytes that a step must move. A second table
compares a whole mixed-precision update: unscale, norm, clip, step, write the bf16 copy.

    python benchmarks/gpu_steps.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _measure
import accel_kernels as ak
import torch

RESULTS = Path(__file__).resolve().parent / "results"
BYTES_STEP = 28  # read param, grad, two moments; write all but grad


class Arrays:
    """One set of flat arrays on the device, and each contestant's way to update it."""

    def __init__(self, numel: int) -> None:
        self.param = torch.nn.Parameter(torch.rand(numel, device="cuda"))
        self.grad = torch.rand(numel, device="cuda") + 0.5
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, numel, device="cuda").unbind()
        self.bf16 = torch.empty(numel, device="cuda", dtype=torch.bfloat16)
        self.segments = [ak.AdamSegment(start=0, stop=numel, lr=1e-3, weight_decay=0.01, step=10)]
        self.optimizer = torch.optim.AdamW([self.param], lr=1e-3, weight_decay=0.01, fused=True)
        self.param.grad = self.grad
        self.optimizer.step()

    def ours(self) -> None:
        """Our fused step."""
        ak.adam_step(self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.segments)

    def ours_update(self) -> None:
        """Unscale, norm, clip, step and bf16 copy; the factor stays on the device."""
        norm = ak.grad_norm_scale(self.grad)[0].sqrt()
        clip = (1e12 / (norm + 1e-6)).clamp(max=1.0).float().reshape(1)
        ak.adam_step(
            self.param,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self.segments,
            grad_scale=clip,
            low_precision=self.bf16,
        )

    def torch_update(self) -> None:
        """The same in torch's separate passes."""
        self.grad.mul_(1.0)
        torch.nn.utils.clip_grad_norm_([self.param], 1e12)
        self.optimizer.step()
        with torch.no_grad():
            self.bf16.copy_(self.param)


def milliseconds(call: Callable[[], Any]) -> float:
    """Device time of one call."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def alternate(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, one call in turn, after three rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 3):
        for name, call in contestants.items():
            elapsed_ms = milliseconds(call)
            if number >= 3:
                times[name].append(elapsed_ms)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(numel: int, rounds: int) -> dict[str, Any]:
    """One line of both tables."""
    arrays = Arrays(numel)
    source, target = torch.empty(2, numel, device="cuda").unbind()
    found = alternate(
        {
            "copy": lambda: target.copy_(source),
            "adam_step": arrays.ours,
            "torch AdamW(fused)": arrays.optimizer.step,
            "whole update": arrays.ours_update,
            "torch's passes": arrays.torch_update,
        },
        rounds,
    )
    copy_bytes_per_ms = 8 * numel / found["copy"]
    return {"numel": numel, "ms": found, "limit_ms": BYTES_STEP * numel / copy_bytes_per_ms}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| elements | adam_step ms | of limit | torch fused ms | ratio | whole update ms | torch's passes ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ms, passes = row["ms"], row["ms"]["torch's passes"]
        lines.append(
            f"| {row['numel']:,} | {ms['adam_step']:.3f} | {row['limit_ms'] / ms['adam_step']:.1%} "
            f"| {ms['torch AdamW(fused)']:.3f} | {ms['torch AdamW(fused)'] / ms['adam_step']:.2f} "
            f"| {ms['whole update']:.3f} | {passes:.3f} "
            f"| {passes / ms['whole update']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, few rounds; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_steps.json")
    args = parser.parse_args()
    if not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None:
        print(
            "gpu_steps needs a CUDA device, a torch built for it, and CuPy (accel-kernels[cuda12] or [cuda13])"
        )
        return 2
    sizes = [1_000_000] if args.quick else [10_000_000, 100_000_000, 500_000_000]
    rows = [measure(numel, 5 if args.quick else 51) for numel in sizes]
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, accel-kernels {ak.__version__}\n\n{table(rows)}")
    if not args.quick:
        record = {
            "benchmark": "gpu_steps", "date": _measure.today(), "device": device,
            "versions": {"torch": torch.__version__, "accel_kernels": ak.__version__}, "rows": rows,
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

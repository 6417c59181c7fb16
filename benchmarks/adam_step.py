"""Fused AdamW on the CPU against torch's fused AdamW, DeepSpeed's CPU Adam and the memory's own speed.

All contestants of a row work on the same arrays in the same run (DeepSpeed: in its own process, on arrays of the
same size, made the same way), one call each in turn; medians, and the best of each. The limit is a loop that reads
four arrays and writes three of them back, the traffic of an Adam step, with ordinary and with non-temporal stores,
whichever is faster. A second table compares a whole mixed-precision update: unscale, norm, clip, step, write the
bf16 copy.

    python benchmarks/adam_step.py [--quick] [--peer-python PATH] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _measure
import accel_kernels as ak
import torch
from accel_kernels import native

ROOT = Path(__file__).resolve().parents[1]
CACHE_BYTES = 128 << 20  # read between calls
BYTES_STEP = 28  # read param, grad, two moments; write all but grad

PEER = """
import json, sys, time
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
import deepspeed
sizes, threads, halves = json.loads(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))
torch.set_num_threads(threads)
params = [torch.nn.Parameter(torch.rand(n)) for n in sizes]
for param in params:
    param.grad = torch.rand_like(param) + 0.5
if halves:
    low, low_grads = ([t.bfloat16() for t in tensors] for tensors in (params, [p.grad for p in params]))
optimizer = DeepSpeedCPUAdam(params, lr=1e-3, weight_decay=0.01, adamw_mode=True)
@torch.no_grad()
def step():
    if halves:
        torch._foreach_copy_([p.grad for p in params], low_grads)
    optimizer.step()
    if halves:
        torch._foreach_copy_(low, params)
step()
print("READY", json.dumps({"deepspeed": deepspeed.__version__, "torch": torch.__version__}), flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    step()
    print("TIME", time.perf_counter() - start, flush=True)
"""


class Arrays:
    """One set of flat arrays, and each contestant's way to update it."""

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.param = torch.nn.Parameter(torch.rand(numel))
        self.grad = (
            torch.rand(numel) + 0.5
        )  # positive: the second moment stays so under the plain stream, too
        # As optimizers make them: zeros whose pages get their place in memory at the first step, side by side.
        self.exp_avg = torch.zeros(numel)
        self.exp_avg_sq = torch.zeros(numel)
        self.bf16 = torch.empty(numel, dtype=torch.bfloat16)
        self.segments = [ak.AdamSegment(start=0, stop=numel, lr=1e-3, weight_decay=0.01, step=10)]
        self.optimizer = torch.optim.AdamW([self.param], lr=1e-3, weight_decay=0.01, fused=True)
        self.param.grad = self.grad
        self.optimizer.state[self.param] = {
            "step": torch.tensor(10.0),
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }

    def ours(self) -> None:
        """Our fused step."""
        ak.adam_step(self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.segments)

    def torch_fused(self) -> None:
        """The fused step of torch."""
        self.optimizer.step()

    def stream(self, non_temporal: bool) -> None:
        """The limit: the traffic without the arithmetic."""
        assert native.cpu is not None
        pointers = [t.data_ptr() for t in (self.param, self.grad, self.exp_avg, self.exp_avg_sq)]
        native.cpu.stream_4r3w(*pointers, self.numel, non_temporal, torch.get_num_threads(), "")

    def ours_update(self) -> None:
        """Unscale by 1, clip to a bound that does not bind: the arithmetic is done, the values stay sane."""
        total, nonfinite = ak.grad_norm_scale(self.grad, scale=1.0).tolist()
        assert nonfinite == 0
        clip = min(1.0, 1e12 / (total**0.5 + 1e-6))
        self.ours_given_norm(clip)

    def ours_given_norm(self, clip: float = 1.0) -> None:
        """Unscale, clip, step and bf16 copy in one call."""
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


class DeepSpeedPeer:
    """DeepSpeed's CPU Adam in another interpreter; one line in, one time out.

    Parameters of these sizes; with `halves` in bf16, with fp32 masters that gradients and values are copied to and fro.
    """

    def __init__(self, python: Path, sizes: Sequence[int], threads: int, *, halves: bool = False) -> None:
        self.process = subprocess.Popen(
            [str(python), "-c", PEER, json.dumps(list(sizes)), str(threads), str(int(halves))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions: dict[str, str] = json.loads(self._read("READY"))

    def _read(self, tag: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(tag):
                return line[len(tag) :].strip()
        raise RuntimeError("the DeepSpeed process ended")

    def __call__(self) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self._read("TIME"))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def timed(fn: Callable[[], Any]) -> Callable[[], float]:
    def call() -> float:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start

    return call


def alternate(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and least seconds of each, one call in turn, after one round that does not count.

    Before each call a buffer larger than the caches is read, so that nobody inherits lines, or the duty to write them
    back, from the one before.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    sweep = torch.ones(CACHE_BYTES // 4)
    for k in range(rounds + 1):
        for name, call in contestants.items():
            sweep.sum()
            seconds = call()
            if k > 0:
                times[name].append(seconds)
    return {
        "median": {name: statistics.median(values) for name, values in times.items()},
        "best": {name: min(values) for name, values in times.items()},
    }


def measure(
    numel: int, threads: int, rounds: int, peer_python: Path | None, versions: dict[str, str]
) -> list[Any]:
    torch.set_num_threads(threads)
    arrays = Arrays(numel)
    step = {
        "stream": timed(lambda: arrays.stream(False)),
        "adam_step": timed(arrays.ours),
        "stream, non-temporal": timed(lambda: arrays.stream(True)),
        "torch AdamW(fused)": timed(arrays.torch_fused),
    }
    peer = None if peer_python is None else DeepSpeedPeer(peer_python, [numel], threads)
    if peer is not None:
        step["DeepSpeed CPUAdam"] = peer
        versions.update({f"peer {name}": version for name, version in peer.versions.items()})
    seconds = alternate(step, rounds)
    if peer is not None:
        peer.close()
    update = {
        "adam_step + grad_norm_scale": timed(arrays.ours_update),
        "torch mul, clip, fused, copy": timed(arrays.torch_update),
        "adam_step, norm known": timed(arrays.ours_given_norm),
    }
    row = {"numel": numel, "threads": threads}
    return [{**row, "seconds": seconds}, {**row, "seconds": alternate(update, rounds)}]


def show(results: dict[str, list[Any]], which: str) -> str:
    """Both tables, as Markdown."""
    lines = [
        f"AdamW step, fp32, {which} of the rounds (bars: ratios >= 1.0, of the limit >= 95 %)",
        "",
        "| elements | threads | ours ms | GB/s | limit GB/s | of limit | torch fused | ratio | DeepSpeed | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["step"]:
        s, n = row["seconds"][which], row["numel"]
        ours, fused, deep = s["adam_step"], s["torch AdamW(fused)"], s.get("DeepSpeed CPUAdam")
        limit = min(s["stream"], s["stream, non-temporal"])
        peer = f"{deep * 1e3:.2f} | {deep / ours:.2f}" if deep else "- | -"
        lines.append(
            f"| {n:,} | {row['threads']} | {ours * 1e3:.2f} | {n * BYTES_STEP / ours / 1e9:.1f} "
            f"| {n * BYTES_STEP / limit / 1e9:.1f} | {limit / ours:.1%} "
            f"| {fused * 1e3:.2f} | {fused / ours:.2f} | {peer} |"
        )
    lines += [
        "",
        f"Unscale + norm + clip + step + bf16 copy, {which} of the rounds (bar: ratio >= 1.3)",
        "",
        "| elements | threads | ours ms | torch's passes ms | ratio | ours, norm known, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["update"]:
        ours, passes, known = row["seconds"][which].values()
        lines.append(
            f"| {row['numel']:,} | {row['threads']} | {ours * 1e3:.2f} | {passes * 1e3:.2f} | {passes / ours:.2f} "
            f"| {known * 1e3:.2f} | {passes / known:.2f} |"
        )
    return "\n".join(lines)


def page(record: dict[str, Any]) -> str:
    """The results as a page."""
    hardware, load = record["hardware"], record["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    head = (
        f"# Fused AdamW on the CPU\n\n{record['date']}; {hardware['processor']} ({hardware['instruction_set']}), "
        f"{hardware['cores']} cores, {hardware['memory_gib']} GiB; {versions}; "
        f"load average {load[0]:.1f} at the start."
    )
    return f"{head}\n\n{show(record, 'median')}\n\n{show(record, 'best')}\n\n{LEGEND}"


LEGEND = """\
The limit is the faster of two loops that read four arrays and write three of them back, with ordinary and with
non-temporal stores. Contestants take turns, one call each. The best of the rounds is what a machine with other work
on it would show when left alone.
"""


def has_deepspeed(python: Path) -> bool:
    probe = [str(python), "-c", "from deepspeed.ops.adam import DeepSpeedCPUAdam"]
    return python.exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="1 M elements, few rounds; writes no file unless --out"
    )
    parser.add_argument("--peer-python", type=Path, default=ROOT / ".venv-peers/bin/python", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if native.cpu is None:
        sys.exit(f"the C++ back end is not here ({native.why_not}); nothing to measure")
    peer = args.peer_python if has_deepspeed(args.peer_python) else None
    if peer is None:
        print(f"DeepSpeed's CPU Adam is left out: {args.peer_python} cannot import it")
    sizes = [1_000_000] if args.quick else [10_000_000, 100_000_000]
    out = args.out or (None if args.quick else ROOT / "benchmarks/results/adam_step.json")
    cores = torch.get_num_threads()
    versions = {
        "accel-kernels": ak.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    results: dict[str, list[Any]] = {"step": [], "update": []}
    load = os.getloadavg()
    for numel in sizes:
        rounds = args.rounds or (5 if args.quick else 41 if numel < 50_000_000 else 15)
        for threads in (1, 2):
            if threads <= cores:
                step, update = measure(numel, threads, rounds, peer, versions)
                results["step"].append(step)
                results["update"].append(update)
    record = {
        "benchmark": "adam_step",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "load_average": [load[0], os.getloadavg()[0]],
        "versions": versions,
        **results,
    }
    print(page(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()

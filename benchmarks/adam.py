"""CPUAdamW on the parameters of a GPT against torch's AdamW, fused and foreach, DeepSpeed's CPU Adam, and the memory.

The step of a whole list of parameters, as a training loop calls it; in fp32, and in bf16 with fp32 masters (the peers
have no masters of their own: theirs are parameters, and gradients and values are copied to and from them, all at once).
A third job is a thousand parameters of a thousand elements. Contestants, limit and clock are those of `adam_step`.

    python benchmarks/adam.py [--quick] [--peer-python PATH] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _measure
import accel_kernels as ak
import torch
import zero_offload_nvme as off
from accel_kernels import native
from adam_step import BYTES_STEP, ROOT, DeepSpeedPeer, alternate, has_deepspeed, timed
from gpt import GPT, PRESETS

OURS, FUSED, FOREACH, DEEP = "CPUAdamW", "torch AdamW(fused)", "torch AdamW(foreach)", "DeepSpeed CPUAdam"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}


def sizes_of(preset: str) -> list[int]:
    """Elements of each parameter of a GPT."""
    with torch.device("meta"):
        return [param.numel() for param in GPT(PRESETS[preset]).parameters()]


def parameters(sizes: Sequence[int], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients; positive, so that a stream over them stays finite."""
    made = [torch.nn.Parameter(torch.rand(n).to(dtype)) for n in sizes]
    for param in made:
        param.grad = (torch.rand(param.numel()) + 0.5).to(dtype)
    return made


def with_masters(optimizer: torch.optim.Optimizer, low: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A step of fp32 masters beside bf16 parameters."""
    masters = optimizer.param_groups[0]["params"]

    grads = [param.grad for param in low if param.grad is not None]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_([master.grad for master in masters], grads)
        optimizer.step()
        torch._foreach_copy_(list(low), masters)

    return step


def contestants(sizes: Sequence[int], halves: bool) -> dict[str, Callable[[], Any]]:
    """Steps of the same parameters; moments are each contestant's own."""
    params = parameters(sizes, torch.bfloat16 if halves else torch.float32)
    # What one writes into parameters, another would have to notice: with masters ours has parameters of its own.
    theirs = parameters(sizes, torch.bfloat16) if halves else params
    masters = parameters(sizes, torch.float32) if halves else params
    fused = torch.optim.AdamW(masters, fused=True, **OPTIONS)
    foreach = torch.optim.AdamW(masters, foreach=True, **OPTIONS)
    calls: dict[str, Callable[[], Any]] = {OURS: off.CPUAdamW(params, **OPTIONS).step}
    calls[FUSED] = with_masters(fused, theirs) if halves else fused.step
    calls[FOREACH] = with_masters(foreach, theirs) if halves else foreach.step
    return calls


def streams(numel: int) -> dict[str, Callable[[], Any]]:
    """The limit: as many elements, four arrays read and three written back."""
    cpu = native.cpu
    assert cpu is not None
    arrays = [torch.rand(numel) + 0.5 for _ in range(4)]

    def run(non_temporal: bool) -> None:
        cpu.stream_4r3w(*(a.data_ptr() for a in arrays), numel, non_temporal, torch.get_num_threads(), "")

    return {"stream": lambda: run(False), "stream, non-temporal": lambda: run(True)}


def measure(
    job: str, sizes: Sequence[int], threads: int, rounds: int, peer_python: Path | None
) -> dict[str, Any]:
    """One row: every contestant, one call each in turn."""
    torch.set_num_threads(threads)
    halves = "bf16" in job
    steps = {
        name: timed(call) for name, call in {**contestants(sizes, halves), **streams(sum(sizes))}.items()
    }
    peer = None if peer_python is None else DeepSpeedPeer(peer_python, sizes, threads, halves=halves)
    if peer is not None:
        steps[DEEP] = peer
    seconds = alternate(steps, rounds)
    row = {"job": job, "parameters": len(sizes), "numel": sum(sizes), "threads": threads, "seconds": seconds}
    if peer is not None:
        row["peer"] = peer.versions
        peer.close()
    return row


def table(rows: Sequence[dict[str, Any]], which: str) -> str:
    """The rows as Markdown."""
    lines = [
        f"Step of all parameters, {which} of the rounds (bars: of the limit >= 95 %, ratios >= 1.0)",
        "",
        "| job | parameters | elements | threads | ours ms | GB/s | of limit | torch fused ms | ratio "
        "| foreach ms | ratio | DeepSpeed ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        s, n = row["seconds"][which], row["numel"]
        ours, limit = s[OURS], min(s["stream"], s["stream, non-temporal"])
        peers = [
            f"{s[p] * 1e3:.2f} | {s[p] / ours:.2f}" if p in s else "- | -" for p in (FUSED, FOREACH, DEEP)
        ]
        lines.append(
            f"| {row['job']} | {row['parameters']} | {n:,} | {row['threads']} | {ours * 1e3:.2f} "
            f"| {n * BYTES_STEP / ours / 1e9:.1f} | {limit / ours:.1%} | {' | '.join(peers)} |"
        )
    return "\n".join(lines)


LEGEND = """\
The limit is the faster of two loops over as many elements that read four fp32 arrays and write three of them back, with
ordinary and with non-temporal stores; a bf16 step with masters moves as many bytes (14 read, 14 written an element).
Contestants take turns, one call each, after a sweep through the caches.
"""


def page(record: dict[str, Any]) -> str:
    """The results as a page."""
    hardware, load = record["hardware"], record["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    head = (
        f"# AdamW over a list of parameters on the CPU\n\n{record['date']}; {hardware['processor']} "
        f"({hardware['instruction_set']}), {hardware['cores']} cores, {hardware['memory_gib']} GiB; {versions}; "
        f"load average {load[0]:.1f} at the start."
    )
    return f"{head}\n\n{table(record['rows'], 'median')}\n\n{table(record['rows'], 'best')}\n\n{LEGEND}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small GPT, few rounds; writes no file unless --out"
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
    preset = "tiny" if args.quick else "110m"
    out = args.out or (None if args.quick else ROOT / "benchmarks/results/adam.json")
    rounds = args.rounds or (3 if args.quick else 15)
    load, cores = os.getloadavg(), torch.get_num_threads()
    jobs = {f"GPT {preset}, fp32": sizes_of(preset), f"GPT {preset}, bf16 + master": sizes_of(preset)}
    jobs |= {"small ones, fp32": [1000] * 1000, "small ones, bf16 + master": [1000] * 1000}
    rows = [
        measure(job, sizes, threads, rounds if sum(sizes) > 1e7 else 3 * rounds, peer)
        for job, sizes in jobs.items()
        for threads in (1, 2)
        if threads <= cores
    ]
    versions = {
        "accel-kernels": ak.__version__,
        "zero-offload-nvme": off.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{f"peer {name}": version for name, version in rows[0].get("peer", {}).items()},
    }
    record = {
        "benchmark": "adam",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "load_average": [load[0], os.getloadavg()[0]],
        "versions": versions,
        "rows": rows,
    }
    print(page(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()

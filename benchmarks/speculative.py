"""What training waits for in `step`: the exact step, the exact step begun in the last backward, and speculation.

    python3 tools/dev.py bench speculative
    python3 tools/dev.py bench speculative --quick

A GPT at ZeRO stage 2, with its optimizer state in host memory or on a drive. Contestants take turns, a few steps each;
a stall is the time inside `step`. Also shown is the whole iteration, forward and backward included: on a CPU the thread
takes cores and memory bandwidth from them, on a GPU it would not. One contestant has every fourth step clipped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _measure
import torch
import zero_core as zero
import zero_offload_nvme as off
from gpt import GPT, PRESETS, num_parameters, random_batch
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks

HERE = Path(__file__).resolve().parent
EXACT, LAST, SPECULATIVE, CLIPPED = (
    "exact",
    "exact, last_backward()",
    "speculative",
    "speculative, 1 step in 4 clipped",
)
NEVER, ALWAYS = 1e9, 1e-3


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained."""

    preset: str
    store: str
    folder: str
    sequences: int
    window: int
    rounds: int
    threads: int


@dataclass
class Times:
    """Seconds of one contestant: of each step, and of each window of steps."""

    stalls: list[float] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)


class Contestant:
    """A model and an optimizer of its own."""

    def __init__(self, job: Job, name: str) -> None:
        torch.manual_seed(0)
        self.config, self.name = PRESETS[job.preset], name
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",))
        store = off.HostStore() if job.store == "host" else off.NvmeStore(job.folder)
        self.model = zero.shard(GPT(self.config), mesh, stage=2, store=zero.Stores(optimizer=store))
        inner = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        overlap: Any = "speculative" if name in (SPECULATIVE, CLIPPED) else "exact"
        self.optimizer = off.OffloadedOptimizer(self.model, inner, overlap=overlap)
        self.times = Times()
        self.seed = 0

    def window(self, job: Job, *, counts: bool) -> None:
        """Train for a few steps."""
        begun = time.perf_counter()
        for number in range(job.window):
            tokens, targets = random_batch(self.config, sequences=job.sequences, seed=self.seed)
            self.seed += 1
            loss = self.model(tokens, targets)
            with self.optimizer.last_backward() if self.name == LAST else nullcontext():
                loss.backward()
            if self.name == CLIPPED:
                zero.clip_grad_norm(self.optimizer, ALWAYS if number == job.window - 1 else NEVER)
            before = time.perf_counter()
            self.optimizer.step()
            if counts:
                self.times.stalls.append(time.perf_counter() - before)
            self.optimizer.zero_grad()
        if counts:
            self.times.windows.append(time.perf_counter() - begun)


def measure(rank: int, job: Job) -> dict[str, Any]:
    """All contestants, a window each in turn; the first round (states are made) does not count."""
    torch.set_num_threads(job.threads)
    contestants = {name: Contestant(job, name) for name in (EXACT, LAST, SPECULATIVE, CLIPPED)}
    names = list(contestants)
    for number in range(job.rounds + 1):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            contestants[name].window(job, counts=number >= 1)
    for each in contestants.values():
        each.optimizer.close()
    return {
        name: {
            "stall_s": each.times.stalls,
            "window_s": each.times.windows,
            "early": vars(each.optimizer.early_steps),
        }
        for name, each in contestants.items()
    }


def row_of(job: Job, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """Medians and ratios to the exact step."""
    row: dict[str, Any] = {"store": job.store, "ranks": ranks, "contestants": {}}
    exact = found[EXACT]
    for name, times in found.items():
        stall = statistics.fmean(times["stall_s"])
        windows = zip(times["window_s"], exact["window_s"], strict=True)
        row["contestants"][name] = {
            "stall_ms": stall * 1e3,
            "median_stall_ms": statistics.median(times["stall_s"]) * 1e3,
            "stall_ratio": stall / statistics.fmean(exact["stall_s"]),
            "iteration_ms": statistics.median(times["window_s"]) / job.window * 1e3,
            "iteration_ratio": statistics.median(a / b for a, b in windows),
            "early": times["early"],
        }
    return row


def page(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    hardware, job = record["hardware"], record["job"]
    lines = [
        "# Steps that begin during backward: what `step` makes training wait for",
        "",
        f"GPT of {record['parameters'] / 1e6:.1f} M parameters, stage 2, fp32, {job['sequences']} x 256 tokens, "
        f"{job['rounds']} rounds of {job['window']} steps; {hardware['processor']}, {hardware['cores']} cores, "
        f"{record['date']}; torch {record['versions']['torch']}.",
        "",
        "The thread that steps and backward share the cores and the memory of this machine, so the whole iteration "
        "says little about one with a device of its own. Part of what is left of a stall is the copy of new values to "
        "where the model computes, 4 bytes a parameter.",
        "",
        "| store | ranks | | mean stall, ms | of the exact step's | median stall, ms | forward, backward and step, ms "
        "| ratio | unit steps begun early, committed, discarded |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        for name, each in row["contestants"].items():
            early = ", ".join(str(number) for number in each["early"].values())
            lines.append(
                f"| {row['store']} | {row['ranks']} | {name} | {each['stall_ms']:.1f} | {each['stall_ratio']:.0%} "
                f"| {each['median_stall_ms']:.1f} | {each['iteration_ms']:.0f} | {each['iteration_ratio']:.2f} "
                f"| {early} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="25m")
    parser.add_argument("--stores", nargs="+", choices=["host", "nvme"], default=["host", "nvme"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1])
    parser.add_argument("--sequences", type=int, default=1, help="a rank and step")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the drive; None: a temporary one")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speculative.json")
    options = parser.parse_args()
    preset, rounds = ("tiny", 1) if options.quick else (options.preset, options.rounds)
    cores = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for store in options.stores:
            for ranks in options.ranks:
                job = Job(
                    preset=preset, store=store, folder=folder, sequences=options.sequences, window=options.window,
                    rounds=rounds, threads=max(cores // ranks, 1),
                )  # fmt: skip
                rows.append(row_of(job, ranks, run_ranks(measure, ranks, job, timeout_s=1200)[0]))
    with torch.device("meta"):
        parameters = num_parameters(GPT(PRESETS[preset]))
    record = {
        "benchmark": "speculative",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "job": {key: getattr(job, key) for key in ("preset", "sequences", "window", "rounds")},
        "parameters": parameters,
        "rows": rows,
    }
    text = page(record)
    print(text)
    if not options.quick:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()

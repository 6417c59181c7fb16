"""What a step of ZenFlow makes training wait for, beside the exact step of the same optimizer from the same store.

    python3 tools/dev.py bench zenflow
    python3 tools/dev.py bench zenflow --quick

A GPT at ZeRO stage 2, with its optimizer state in host memory or on a drive. Contestants take turns, one window of
steps each; a stall is the time inside `step`, once all ranks have come to it, and what forward and backward then wait
for values that are still on their way; a window's is that of all its steps. Also shown is the time of the whole window,
forward and backward included: on a CPU the threads take cores from them, on a GPU they would not.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
EXACT, OVERLAP, IN_PLACE = "exact", "ZenFlow", "ZenFlow, overlap_step=False"
BAR = 0.15


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
    ratio: float = 0.05


@dataclass
class Times:
    """Seconds of one contestant: per window, and of each step inside it."""

    stalls: list[float] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)


class Contestant:
    """A model and an optimizer of its own."""

    def __init__(self, job: Job, policy: off.ZenFlow | None) -> None:
        torch.manual_seed(0)
        self.config = PRESETS[job.preset]
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",))
        store = off.HostStore() if job.store == "host" else off.NvmeStore(job.folder)
        self.model = zero.shard(GPT(self.config), mesh, stage=2, store=zero.Stores(optimizer=store))
        inner = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        overlap: Any = "exact" if policy is None else "zenflow"
        self.optimizer = off.OffloadedOptimizer(self.model, inner, overlap=overlap, zenflow=policy)
        self.times = Times()
        self.seed = 0
        self.waited_s = 0.0
        for unit in zero.sharded(self.model).units:
            unit.settle = partial(self._settle, unit.settle)  # type: ignore[method-assign]

    def _settle(self, settle: Callable[[], None]) -> None:
        """Wait for a unit's values, and count the time."""
        begun = time.perf_counter()
        settle()
        self.waited_s += time.perf_counter() - begun

    def window(self, job: Job, *, counts: bool) -> None:
        """Train for a window of steps."""
        begun, steps = time.perf_counter(), []
        for _ in range(job.window):
            tokens, targets = random_batch(self.config, sequences=job.sequences, seed=self.seed)
            self.seed += 1
            self.waited_s = 0.0
            self.model(tokens, targets).backward()
            if torch.distributed.get_world_size() > 1:
                torch.distributed.barrier()  # one rank's lateness in backward is not the step's
            waited_s, before = self.waited_s, time.perf_counter()
            self.optimizer.step()
            steps.append(waited_s + time.perf_counter() - before)
            self.optimizer.zero_grad()
        if counts:
            self.times.windows.append(time.perf_counter() - begun)
            self.times.stalls.append(sum(steps))
            self.times.steps.append(steps)


def measure(rank: int, job: Job) -> dict[str, Any]:
    """All contestants, a window each in turn; the first two rounds (first selection, first late step) do not count."""
    torch.set_num_threads(job.threads)
    options: dict[str, Any] = {
        "topk_ratio": job.ratio, "update_interval": job.window, "select_strategy": "step",
        "select_interval": 1000 * job.window,
    }  # fmt: skip
    contestants = {
        EXACT: Contestant(job, None),
        OVERLAP: Contestant(job, off.ZenFlow(**options)),
        IN_PLACE: Contestant(job, off.ZenFlow(overlap_step=False, **options)),
    }
    names = list(contestants)
    for number in range(job.rounds + 2):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            contestants[name].window(job, counts=number >= 2)
    for each in contestants.values():
        each.optimizer.close()
    return {
        name: {"stall_s": each.times.stalls, "window_s": each.times.windows, "steps_s": each.times.steps}
        for name, each in contestants.items()
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of the ratio in each."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def row_of(job: Job, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, and ratios to the exact step."""
    row: dict[str, Any] = {"store": job.store, "ranks": ranks, "contestants": {}}
    exact = found[EXACT]
    for name, times in found.items():
        steps = list(zip(*times["steps_s"], strict=True))
        row["contestants"][name] = {
            "stall_ms_per_step": statistics.median(times["stall_s"]) / job.window * 1e3,
            "stall_ms_by_step": [statistics.median(each) * 1e3 for each in steps],
            "stall_ratio": ratio(times["stall_s"], exact["stall_s"]),
            "iteration_ms": statistics.median(times["window_s"]) / job.window * 1e3,
            "iteration_ratio": ratio(times["window_s"], exact["window_s"]),
        }
    return row


def page(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    hardware, job = record["hardware"], record["job"]
    lines = [
        "# ZenFlow: what a step makes training wait for",
        "",
        f"GPT of {record['parameters'] / 1e6:.1f} M parameters, stage 2, fp32, {job['sequences']} x 256 tokens; top-k "
        f"ratio {job['ratio']}, windows of {job['window']} steps, {job['rounds']} rounds; {hardware['processor']}, "
        f"{hardware['cores']} cores, {record['date']}; torch {record['versions']['torch']}.",
        "",
        "| store | ranks | | stall, ms a step | of the exact step's | its steps in order, ms "
        "| forward, backward and step, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        for name, each in row["contestants"].items():
            steps = ", ".join(f"{ms:.1f}" for ms in each["stall_ms_by_step"])
            lines.append(
                f"| {row['store']} | {row['ranks']} | {name} | {each['stall_ms_per_step']:.1f} "
                f"| {each['stall_ratio']:.1%} | {steps} | {each['iteration_ms']:.0f} | {each['iteration_ratio']:.2f} |"
            )
    lines += ["", f"Bar: a stall of ZenFlow is at most {BAR:.0%} of the exact step's.", ""]
    return "\n".join(lines)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="25m")
    parser.add_argument("--stores", nargs="+", choices=["host", "nvme"], default=["host", "nvme"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sequences", type=int, default=1, help="a rank and step")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the drive; None: a temporary one")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "zenflow.json")
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
                found = run_ranks(measure, ranks, job, timeout_s=1200)[0]
                rows.append(row_of(job, ranks, found))
    with torch.device("meta"):
        parameters = num_parameters(GPT(PRESETS[preset]))
    record = {
        "benchmark": "zenflow",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "job": {key: getattr(job, key) for key in ("preset", "sequences", "window", "rounds", "ratio")},
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

"""What `zero_offload_nvme.preflight` forecasts beside what is then measured: the optimizer's step, and the whole step.

    python3 tools/dev.py bench offload_preflight
    python3 tools/dev.py bench offload_preflight --folder /mnt/nvme --model 110m
    python3 tools/dev.py bench offload_preflight --quick

Two ranks train a GPT in fp32 at stage 3 with everything in host memory, with everything on the drive, and with a part
of the optimizer's state alone on the drive (Twin-Flow). Each forecast is made just before its run, from speeds of this
machine; seconds of a forward and backward, which it cannot know, come from the same job without a store. Measured are
medians over steps, each between two meetings of the ranks; shown are medians of a few forecasts and of their runs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _measure
import torch
import torch.distributed as dist
import zero_core as zero
import zero_offload_nvme as off
from gpt import GPT, PRESETS, random_batch
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks

HERE = Path(__file__).resolve().parent
RANKS = 2
BAR = 0.20
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Case:
    """Where what rests.

    Attributes:
        tier: of the optimizer's state, or of everything.
        ratio: None: everything; else the part of the optimizer's state that rests there, and nothing else.
    """

    tier: off.Tier
    ratio: float | None = None

    @property
    def name(self) -> str:
        """In the table."""
        return self.tier if self.ratio is None else f"{self.ratio:.0%} of the state on {self.tier}"

    def store(self, folder: str) -> zero.ShardStore | zero.Stores | None:
        """For `zero_core.shard`."""
        if self.tier == "device" or self.ratio == 0:
            return None
        store = off.HostStore() if self.tier == "host" else off.NvmeStore(folder)
        return store if self.ratio is None else zero.Stores(optimizer=store, optimizer_ratio=self.ratio)

    def placement(self) -> dict[str, Any]:
        """For `preflight`."""
        if self.ratio is None:
            return {"params": self.tier, "grads": self.tier, "optimizer": self.tier}
        return {"optimizer": self.tier, "optimizer_ratio": self.ratio} if self.ratio else {}


CASES = (Case("host"), Case("nvme"), *(Case("nvme", ratio) for ratio in RATIOS))


def seconds_of_rank(rank: int, case: Case, model_name: str, folder: str, steps: int) -> list[list[float]]:
    """Of each step but the first two: forward and backward, the optimizer's step, and how long the drive is busy."""
    torch.manual_seed(0)
    config, store = PRESETS[model_name], case.store(folder)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    model = zero.shard(GPT(config), mesh, stage=3, store=store)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-4)
    made: Any = zero.ShardedOptimizer if store is None else off.OffloadedOptimizer
    opt = made(model, inner)
    batch = random_batch(config, sequences=1, seed=rank)
    found = []
    for _ in range(steps + 2):
        marks = [meet()]
        model(*batch).backward()
        marks.append(meet())
        busy_s = _measure.drive_busy_s(folder)
        opt.step()
        marks.append(meet())
        busy_s = math.nan if busy_s is None else (_measure.drive_busy_s(folder) or 0.0) - busy_s
        opt.zero_grad()
        found.append([marks[1] - marks[0], marks[2] - marks[1], busy_s])
    return found[2:]


def meet() -> float:
    """The time at which every rank has come."""
    dist.barrier()
    return time.perf_counter()


def measured(case: Case, model: str, folder: str, steps: int) -> dict[str, float]:
    """Medians of a run."""
    found = run_ranks(seconds_of_rank, RANKS, case, model, folder, steps, timeout_s=600)[0]
    backward_s, optimizer_s, _ = (statistics.median(each) for each in zip(*found, strict=True))
    busy = statistics.median(each[2] / each[1] for each in found)
    return {"backward_s": backward_s, "optimizer_s": optimizer_s, "busy": busy}


def forecast_of(case: Case, model: str, folder: str, compute_s: float) -> dict[str, float]:
    """Seconds that a step will take."""
    with torch.device("meta"):
        built = GPT(PRESETS[model])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank will have
    found = off.preflight(
        built, stage=3, world=RANKS, path=folder, compute_s=compute_s, strict=True, **case.placement()
    )
    torch.set_num_threads(threads)
    print(found, end="\n\n", flush=True)
    assert found.forecast is not None
    assert found.forecast.step_s is not None
    return {
        "forecast_optimizer_s": found.forecast.optimizer_s,
        "forecast_step_s": found.forecast.step_s,
    }


def row_of(case: Case, model: str, folder: str, steps: int, rounds: int) -> dict[str, Any]:
    """What was forecast, then what came: medians of rounds."""
    found = []
    for _ in range(rounds):
        alone = measured(Case("device"), model, folder, steps)["backward_s"]
        forecast = forecast_of(case, model, folder, alone)
        came = measured(case, model, folder, steps)
        step_s = came["optimizer_s"] + came["backward_s"]
        found.append({**forecast, "optimizer_s": came["optimizer_s"], "step_s": step_s, "busy": came["busy"]})
    return {
        "case": case.name,
        **{name: statistics.median(each[name] for each in found) for name in found[0]},
        "rounds": found,
    }


def page(record: dict[str, Any]) -> str:
    """The table, as Markdown."""
    hardware = record["hardware"]
    lines = [
        "# Forecasts of preflight",
        "",
        f"{record['date']}; {hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB; "
        + ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
        + ".",
        "",
        f"GPT {record['model']}, fp32, stage 3, {RANKS} ranks, everything in one tier, or a part of the "
        f"optimizer's state alone; medians of {record['rounds_each']} forecasts, each with a run of {record['steps']} "
        f"steps (bar: the optimizer's step within {BAR:.0%}). Drive busy: of it, as the system counts ticks.",
        "",
        "| at rest | optimizer's step, forecast | measured | off by | drive busy | whole step, forecast | measured "
        "| off by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        cells = [row["case"]]
        for forecast, came in (("forecast_optimizer_s", "optimizer_s"), ("forecast_step_s", "step_s")):
            ratio = row[forecast] / row[came] - 1
            cells += [f"{row[forecast] * 1e3:.1f} ms", f"{row[came] * 1e3:.1f} ms", f"**{ratio:+.0%}**"]
        rests = "nvme" in row["case"] and not row["case"].startswith("0%") and not math.isnan(row["busy"])
        cells.insert(4, f"{row['busy']:.0%}" if rests else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Forecast, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive in question")
    parser.add_argument("--model", choices=PRESETS, default="25m")
    parser.add_argument("--steps", type=int, default=7, help="of a run")
    parser.add_argument("--rounds", type=int, default=3, help="forecasts, each with its run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "offload_preflight.json")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, two steps, one round; writes nothing"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.steps, options.rounds = "tiny", 2, 1
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="preflight-bench-") as folder:
        rows = [row_of(case, options.model, folder, options.steps, options.rounds) for case in CASES]
    record = {
        "benchmark": "offload_preflight",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "versions": {
            "zero-offload-nvme": off.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "model": options.model,
        "steps": options.steps,
        "rounds_each": options.rounds,
        "rows": rows,
    }
    print(page(record))
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

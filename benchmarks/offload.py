"""Training with what a stage shards in host memory or on a drive: time beside DeepSpeed's, and how far a budget goes.

    python3 tools/dev.py peers                       # once: DeepSpeed, in an environment of its own
    python3 tools/dev.py bench offload --folder /mnt/fast
    python3 tools/dev.py bench offload --part largest --budget-mib 1024 --folder /mnt/fast
    python3 tools/dev.py bench offload --quick

Part "time": the same GPT on two gloo ranks by every engine, alternating; DeepSpeed with its own CPU Adam and, where its
asynchronous I/O was built, its NVMe path. Part "largest": both ranks in one memory control group (needs root); layers
are added until one no longer gets through three steps, without a store and with everything in files. There `limit` is
the time that the bytes which a step moves take at the bandwidth that was measured just before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _measure
from _processes import DTYPES, HERE, RANKS, Engine, free_port, missing, say
from gpt import GPT, PRESETS, num_parameters
from train_step import run_group
from zero_offload_nvme.forecast import drive_seconds
from zero_offload_nvme.speeds import measure_speeds

ENGINES = (
    "ddp", "zero-core-2", "zero-core-3", "zero-core-2-host", "zero-core-3-host", "zero-core-2-drive",
    "zero-core-3-drive", "deepspeed-2-host", "deepspeed-3-host", "deepspeed-2-drive", "deepspeed-3-drive",
)  # fmt: skip
GROUPS = Path("/sys/fs/cgroup/memory")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "THP_MEM_ALLOC_ENABLE": "1"}
"""For every case alike: large blocks come in few pages and are given back when freed, not kept by the C library."""


def time_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every engine that runs here, with the seconds of its rounds."""
    names = [name for name in dict.fromkeys(["ddp", *options.engines.split(",")]) if not missing(name)]
    engines = {engine.name: engine for engine in run_group(names, options.dtype, options)}
    return [_row(engine, engines) for engine in engines.values()]


def _row(engine: Engine, engines: dict[str, Engine]) -> dict[str, Any]:
    seconds = [each.seconds for each in engine.rounds]

    def ratio(other: str) -> float | None:
        if other not in engines or other == engine.name:
            return None
        return statistics.median(a / b.seconds for a, b in zip(seconds, engines[other].rounds, strict=True))

    return {
        "engine": engine.name,
        "step_s": statistics.median(seconds),
        "vs_ddp": ratio("ddp"),
        "vs_deepspeed": ratio(engine.name.replace("zero-core", "deepspeed")),
        "peak_mib": engine.memory["peak_bytes"] / _measure.MIB,
        "rest_mib": engine.memory["rest_bytes"] / _measure.MIB,
        "losses": engine.losses,
    }


def time_lines(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """As a table."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"**{value:.2f}**"

    lines = [
        f"GPT of {num_parameters(GPT(PRESETS[options.model])) / 1e6:.1f} M parameters, {options.dtype}, "
        f"{options.sequences} sequences a rank; medians of {options.rounds} rounds of {options.steps} steps. "
        "`host`, `drive`: all that the stage shards rests there (DeepSpeed: states; at stage 3 parameters, too).",
        "",
        "| engine | step s | / DDP | / DeepSpeed's | peak MiB a rank | at rest MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['engine']} | {r['step_s']:.2f} | {shown(r['vs_ddp'])} | {shown(r['vs_deepspeed'])} "
        f"| {r['peak_mib']:.0f} | {r['rest_mib']:.0f} |"
        for r in rows
    ]
    return lines


# -- how far a budget goes ------------------------------------------------------------------------------------


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group whose processes have so much memory together, page cache included."""
    group = GROUPS / f"offload-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def attempt(layers: int, drive: bool, limit_bytes: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Three steps (the first warms up) of a GPT of so many layers in a memory group; None: it did not get through."""
    order = {
        "layers": layers, "width": options.width, "drive": drive, "steps": 3, "sequences": 1,
        "tokens": options.tokens,
    }  # fmt: skip
    with memory_group(limit_bytes) as group:
        port, ranks = free_port(), []
        for rank in range(RANKS):
            enter = f"echo $$ > {group}/tasks && exec {sys.executable} {HERE / '_offload_worker.py'}"
            environ = {
                **os.environ, **MALLOC, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                "ORDER": json.dumps(order),
            }  # fmt: skip
            ranks.append(
                subprocess.Popen(
                    ["sh", "-c", enter],
                    env=environ,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = []
        for process in ranks:
            out, _ = process.communicate()
            said.append(out)
            if process.returncode:
                for other in ranks:
                    other.kill()
        for process in ranks:
            process.wait()
    if any(process.returncode for process in ranks):
        return None
    return dict(json.loads(said[0].splitlines()[-1]))


def largest(drive: bool, limit_bytes: int, options: argparse.Namespace, layers: int) -> dict[str, Any]:
    """The most layers that get through, from `layers` on: doubled, then halved in between to within an eighth."""
    best: dict[str, Any] | None = None
    good, bad = 0, 0
    while not bad or bad - good > max(good // 8, 1):
        say(f"{'everything in files' if drive else 'no store'}: {layers} layers")
        found = attempt(layers, drive, limit_bytes, options)
        if found is None:
            bad = layers
        else:
            good, best = layers, found
        layers = (good + bad) // 2 if bad else 2 * layers
        if layers == good or layers > options.most_layers:
            break
    if best is None:
        raise SystemExit(f"offload: nothing gets through in {limit_bytes} bytes; raise --budget-mib")
    return best


def largest_lines(options: argparse.Namespace) -> tuple[list[str], list[dict[str, Any]]]:
    """Both, as a table."""
    if not os.access(GROUPS, os.W_OK):
        return [f"(no memory control groups can be made in {GROUPS}: needs root)"], []
    speeds = measure_speeds([str(options.folder)], ranks=RANKS, device="cpu", seconds=4.0)
    budget = options.budget_mib << 20
    plain = largest(False, budget, options, 2)
    same = attempt(plain["layers"], True, budget, options)
    if same is None:
        raise SystemExit(f"offload: {plain['layers']} layers get through in memory and not in files")
    stored = largest(True, budget, options, 5 * plain["layers"] + 1)
    rows = [{"drive": drive, **row} for drive, row in ((False, plain), (True, same), (True, stored))]
    for row in rows:
        row["limit_s"] = drive_seconds(row["read_bytes"], row["written_bytes"], speeds, RANKS)
    lines = [
        f"Both ranks in {options.budget_mib} MiB, page cache included; GPT of width {options.width}, fp32, one "
        f"sequence of {options.tokens} tokens a rank, recomputed blocks, units stepped during backward. The limit is "
        f"the drive's, which moves {speeds.drive_both:.1f} GB/s while both ranks read and write it at once, and "
        f"{speeds.drive_read:.1f} GB/s where they only read: a step reads more than it writes.",
        "",
        "| everything rests | layers | parameters, M | ratio | step s | bytes a parameter and step | limit s "
        "| step / limit | loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        moved = RANKS * (row["read_bytes"] + row["written_bytes"]) / row["parameters"]
        beside = f"**{row['step_s'] / row['limit_s']:.2f}**" if row["drive"] else ""
        lines.append(
            f"| {'in files' if row['drive'] else 'in memory'} | {row['layers']} | {row['parameters'] / 1e6:.0f} "
            f"| **{row['parameters'] / rows[0]['parameters']:.1f}** | {row['step_s']:.1f} | {moved:.0f} "
            f"| {row['limit_s']:.1f} | {beside} | {row['loss']:.6f} |"
        )
    return lines, rows


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("time", "largest"), default="time")
    parser.add_argument("--model", choices=PRESETS, default="25m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated; ddp is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of an engine in one round")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=2, help="sequences a rank and step")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder of the drive")
    parser.add_argument("--budget-mib", type=int, default=1024, help="largest: memory of both ranks")
    parser.add_argument("--width", type=int, default=512, help="largest: channels")
    parser.add_argument(
        "--tokens", type=int, default=64, help="largest: of a sequence; few, so that the drive bounds"
    )
    parser.add_argument("--most-layers", type=int, default=160, help="largest: go no further")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    options.accumulate, options.recompute, options.keep_going = 1, False, True
    if options.quick:
        options.model, options.rounds, options.steps, options.warm_up = "tiny", 1, 1, 1
        options.engines = "zero-core-2-host,zero-core-3-drive"
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="offload-bench-") as folder:
        os.environ["OFFLOAD_FOLDER"] = folder
        if options.part == "time":
            result = time_rows(options)
            lines, name = time_lines(result, options), f"offload_{options.model}_{options.dtype}"
        else:
            lines, result = largest_lines(options)
            name = "offload_largest"
    hardware = _measure.hardware()
    title = "# Offload" if options.part == "time" else "# The largest model in a budget of memory"
    text = "\n".join(
        [
            title,
            "",
            f"{_measure.today()}; {hardware['processor']} ({hardware['instruction_set']}), {hardware['cores']} cores; "
            f"{RANKS} ranks.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.md").write_text(text)
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

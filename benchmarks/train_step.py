"""One training step of the same GPT by every engine, on two gloo ranks with one thread each, side by side.

    python3 tools/dev.py peers                       # once: DeepSpeed, in an environment of its own
    python3 tools/dev.py bench train_step            # the whole table, for 25.6 M parameters
    python3 tools/dev.py bench train_step --model 110m --dtypes bf16 --engines ddp,zero-core-3
    python3 tools/dev.py bench train_step --model 350m --recompute --accumulate 4 --rounds 1 --steps 1 --warm-up 1
    python3 tools/dev.py bench train_step --quick    # does it still work? nothing is written

Every engine is two processes that live through the whole run with their model built, and only one engine works
at a time; the others sleep. Rounds visit all engines in a new order each time. Inside a round, each engine's time
is divided by that of plain DDP, so that a machine that slows down slows both; the median over the rounds is the
result. Engines that do not fit in memory together are run in groups, each with a DDP of its own; where not even two
fit, one after another, DDP first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _measure
import torch
from _engines import ADAMW, ENGINES, MAX_NORM
from _processes import DTYPES, HERE, RANKS, Engine, EngineError, Round, missing, say
from gpt import GPT, PRESETS, num_parameters

BASELINE = "ddp"
ONLY_MIXED = ("ddp-autocast",)  # in float32 it would be DDP again
# Memory of one idle process: the interpreter with torch, then per parameter (value, gradient, two moments, and
# as much again for buckets and master copies at the worst).
PROCESS_BYTES, BYTES_PER_PARAMETER = 400 << 20, 24
MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    engine: str
    dtype: str
    step_vs_ddp: float
    step_vs_ddp_range: tuple[float, float]
    step_ms: float
    processor_vs_ddp: float
    processor_ms: float
    peak_mib: float
    rest_mib: float
    live_tensors_mib: float
    sent_mib: float
    loss_vs_ddp: float
    losses: list[float] = field(repr=False)
    rounds: list[Round] = field(repr=False)


def groups(names: Sequence[str], parameters: int) -> list[list[str]]:
    """Engines that fit in memory at the same time, each group led by the baseline; where no two fit, each alone."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    per_engine = RANKS * (PROCESS_BYTES + BYTES_PER_PARAMETER * parameters)
    fitting = int(available * MEMORY_SHARE / per_engine)
    others = [name for name in names if name != BASELINE]
    if fitting < 1:
        return [[name] for name in [BASELINE, *others]]
    # The one that works needs about as much again for activations and buckets.
    beside = max(1, fitting - 2)
    count = max(1, -(-len(others) // beside))
    size = max(1, -(-len(others) // count))
    return [[BASELINE, *others[start : start + size]] for start in range(0, max(1, len(others)), size)]


def run_group(names: Iterable[str], dtype: str, options: argparse.Namespace) -> list[Engine]:
    """Let some engines take turns; those that could run, measured and stopped."""
    engines: list[Engine] = []
    try:
        for name in names:
            say(f"{dtype}: starting {name}")
            try:
                engine = Engine(name, dtype, options)
                engines.append(engine)
                engine.warm_up(options.warm_up)
                engine.measure_memory()
            except EngineError as error:
                if name == BASELINE or not options.keep_going:
                    raise
                say(str(error))
                engines = [other for other in engines if other.name != name]
        shuffled = random.Random(0)
        for number in range(options.rounds):
            say(f"{dtype}: round {number + 1} of {options.rounds}")
            for engine in shuffled.sample(engines, len(engines)):
                engine.measure_round(options.steps)
        for engine in engines:
            engine.measure_memory()
    finally:
        for engine in engines:
            engine.stop()
    return engines


def row(engine: Engine, baseline: Engine, reference: Sequence[float]) -> Row:
    """Put one engine's rounds beside the baseline's."""
    pairs = list(zip(engine.rounds, baseline.rounds, strict=True))
    times = [mine.seconds / its.seconds for mine, its in pairs]
    processor = [mine.processor_seconds / its.processor_seconds for mine, its in pairs]
    mib = {key: round(value / _measure.MIB, 1) for key, value in engine.memory.items()}
    differences = [abs(mine - its) / abs(its) for mine, its in zip(engine.losses, reference, strict=True)]
    return Row(
        engine=engine.name,
        dtype=engine.dtype,
        step_vs_ddp=round(statistics.median(times), 3),
        step_vs_ddp_range=(round(min(times), 3), round(max(times), 3)),
        step_ms=round(1e3 * statistics.median(mine.seconds for mine in engine.rounds), 1),
        processor_vs_ddp=round(statistics.median(processor), 3),
        processor_ms=round(1e3 * statistics.median(mine.processor_seconds for mine in engine.rounds), 1),
        peak_mib=mib["peak_bytes"],
        rest_mib=mib["rest_bytes"],
        live_tensors_mib=mib["live_tensor_bytes"],
        # Others on this machine may use the loopback too; they only ever add.
        sent_mib=round(min(mine.sent_bytes for mine in engine.rounds) / _measure.MIB, 1),
        loss_vs_ddp=max(differences),
        losses=engine.losses,
        rounds=engine.rounds,
    )


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| engine | dtype | step / DDP | range | step ms | CPU / DDP | peak MiB | at rest MiB | live tensors MiB "
        "| sent MiB | loss vs DDP |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        low, high = r.step_vs_ddp_range
        lines.append(
            f"| {r.engine} | {r.dtype} | **{r.step_vs_ddp:.3f}** | {low:.2f}-{high:.2f} | {r.step_ms:.0f} "
            f"| {r.processor_vs_ddp:.3f} | {r.peak_mib:.0f} | {r.rest_mib:.0f} | {r.live_tensors_mib:.0f} "
            f"| {r.sent_mib:.0f} | {r.loss_vs_ddp:.1e} |"
        )
    return "\n".join(lines)


LEGEND = """\
Step and CPU: ratio to DDP inside each round, median over rounds; CPU is the processor time of both ranks. Memory
is per rank, beyond the process before its model was built: the peak of resident memory, what is resident between
steps, and the tensors that Python can reach then. Sent: bytes a rank puts on the loopback wire per step, headers
included; zero-core's ranks exchange through memory that they share where they are on one machine (`-messages`: are
told not to). All engines run with a C library that keeps freed memory. Loss: the largest relative difference over the
first steps from DDP's, in the first dtype of the table.
In bf16, `ddp` and `ddp+zero-redundancy` hold everything in bfloat16; all others keep a float32 copy of the
parameters.
"""


def record(rows: list[Row], versions: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that a reader of the results needs to know."""
    model = PRESETS[options.model]
    setup = {
        "model": {**vars(model), "parameters": num_parameters(GPT(model))},
        "ranks": RANKS,
        "threads_per_rank": 1,
        "sequences_per_rank": options.sequences,
        "micro_batches_per_step": options.accumulate,
        "recompute": options.recompute,
        "optimizer": {"AdamW": ADAMW, "clip": MAX_NORM},
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "taking_turns": all(len(group) > 1 for group in groups(options.engines, num_parameters(GPT(model)))),
    }
    return {
        "benchmark": "train_step",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "versions": versions,
        "setup": setup,
        "rows": [{**vars(r), "rounds": [vars(one) for one in r.rounds]} for r in rows],
    }


def name_of(options: argparse.Namespace) -> str:
    """Of the files with the results."""
    accumulate = f"_accumulate{options.accumulate}" if options.accumulate > 1 else ""
    return f"train_step_{options.model}{accumulate}{'_recompute' if options.recompute else ''}"


def page(result: dict[str, Any], rows: list[Row]) -> str:
    """The results as a page."""
    hardware, setup = result["hardware"], result["setup"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    how = f" and micro-batch, {setup['micro_batches_per_step']} micro-batches a step" * (
        setup["micro_batches_per_step"] > 1
    )
    how += ", blocks recomputed" * setup["recompute"]
    head = (
        f"# Training step, GPT of {setup['model']['parameters'] / 1e6:.1f} M parameters\n\n"
        f"{result['date']}; {hardware['processor']} ({hardware['instruction_set']}), {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB; {versions}.\n"
        f"{RANKS} gloo ranks, one thread each, {setup['sequences_per_rank']} sequences of "
        f"{setup['model']['sequence_length']} tokens a rank{how}; AdamW, clip {MAX_NORM}; "
        f"{setup['rounds']} rounds of {setup['steps_per_round']} steps"
        f"{'' if setup['taking_turns'] else '; one engine after another, since no two fit in memory'}.\n\n"
    )
    return f"{head}{table(rows)}\n\n{LEGEND}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PRESETS, default="25m")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated; ddp is always there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of an engine in one round")
    parser.add_argument("--warm-up", type=int, default=6, help="first steps: compared by loss, not by time")
    parser.add_argument("--sequences", type=int, default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of every block")
    parser.add_argument("--keep-going", action="store_true", help="leave out an engine that fails")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, few steps; prints, writes nothing"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.rounds, options.steps, options.warm_up = "tiny", 2, 2, 3
    options.dtypes = options.dtypes.split(",")
    options.engines = [name for name in dict.fromkeys([BASELINE, *options.engines.split(",")]) if name]
    for known, given in ((DTYPES, options.dtypes), (ENGINES, options.engines)):
        for name in given:
            if name not in known:
                parser.error(f"unknown: {name}; there are: {', '.join(known)}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    names = []
    for name in options.engines:
        if reason := missing(name):
            say(f"left out: {name} ({reason})")
        else:
            names.append(name)
    parameters = num_parameters(GPT(PRESETS[options.model]))
    rows: list[Row] = []
    versions: dict[str, str] = {}
    reference: list[float] = []
    for dtype in options.dtypes:
        baseline: Engine | None = None
        chosen = [name for name in names if dtype != "fp32" or name not in ONLY_MIXED]
        for group in groups(chosen, parameters):
            engines = run_group(group, dtype, options)
            baseline = next((engine for engine in engines if engine.name == BASELINE), baseline)
            assert baseline is not None  # the first group has one
            reference = reference or baseline.losses
            have = {(r.engine, r.dtype) for r in rows}
            rows += [row(e, baseline, reference) for e in engines if (e.name, e.dtype) not in have]
            for engine in engines:
                versions |= engine.versions
    result = record(rows, versions, options)
    text = page(result, rows)
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".json", json.dumps(result, indent=1)), (".md", text)):
            (options.out / f"{name_of(options)}{suffix}").write_text(content)
    if torch.__version__ != versions["torch"]:
        say(f"careful: engines ran on torch {versions['torch']} and {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

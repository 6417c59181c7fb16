"""What compression is worth on slow links: two hosts on one machine, at several rates each way.

    sudo python3 tools/dev.py bench compression
    sudo python3 tools/dev.py bench compression --mbits 100,1000 --models 25m --dtypes bf16 --sequences 1
    python3 tools/dev.py bench compression --quick

Every engine trains the same GPT on two ranks, one in each network namespace (`tools/slow_network.py`). They take turns:
in each round every engine takes some steps at each rate, after one that is not counted. Beside each row stands the
model max(compute, bytes / bandwidth): compute is the engine's own step over the link as fast as the machine, bytes are
those that the kernel counts on the link, headers included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import _measure
from _lab import Lab, LabError, lab
from _processes import DTYPES, HERE, RANKS, Engine, missing, say
from gpt import GPT, PRESETS, num_parameters

NAMES = (
    "ddp", "fsdp2", "zero-core-3-network", "zero++-3", "zero++-3-auto", "ddp-int8", "1-bit-adam", "1-bit-lamb",
    "0-1-adam",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One engine on one job at one rate: seconds of a step, over the fast link too, and what a rank sends in it."""

    model: str
    dtype: str
    sequences: int
    mbit: float
    engine: str
    fast_s: float
    step_s: float
    sent_mib: float

    @property
    def wire_s(self) -> float:
        """What its bytes take."""
        return self.sent_mib * _measure.MIB * 8 / (self.mbit * 1e6)

    @property
    def bound_s(self) -> float:
        """The model: the longer of compute and wire."""
        return max(self.fast_s, self.wire_s)


def measure(
    engines: Sequence[Engine], hosts: Lab, mbits: Sequence[float], rounds: int, steps: int
) -> Iterator[tuple[str, float, float, float, float]]:
    """Engine, rate, seconds over the fast link and at the rate, MiB sent a step: medians over rounds."""
    seconds: dict[tuple[str, float | None], list[float]] = {}
    sent: dict[str, float] = {}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for rate in (None, *mbits) if number % 2 == 0 else (*reversed(mbits), None):
            hosts = hosts.set_rate(rate)
            for engine in engines:
                before = [hosts.sent_bytes(rank) for rank in range(RANKS)]
                engine.measure_round(steps, lead=1)
                after = [hosts.sent_bytes(rank) for rank in range(RANKS)]
                seconds.setdefault((engine.name, rate), []).append(engine.rounds[-1].seconds)
                sent[engine.name] = max(b - a for a, b in zip(before, after, strict=True)) / (steps + 1)
    for engine in engines:
        fast = statistics.median(seconds[engine.name, None])
        for mbit in mbits:
            slow = statistics.median(seconds[engine.name, mbit])
            yield engine.name, mbit, fast, slow, sent[engine.name] / _measure.MIB


@contextmanager
def started(
    names: Sequence[str], dtype: str, options: argparse.Namespace, hosts: Lab | None
) -> Iterator[list[Engine]]:
    """Engines, past their warm-up, and ended at the end."""
    engines: list[Engine] = []
    try:
        for name in names:
            say(f"starting {name}")
            engines.append(Engine(name, dtype, options, hosts))
            engines[-1].warm_up(options.warm_up)
        yield engines
    finally:
        for engine in engines:
            engine.stop()


def table(rows: Sequence[Row]) -> list[str]:
    """One job at one rate."""
    first = rows[0]
    steps = {row.engine: row.step_s for row in rows}
    lines = [
        "",
        f"## {first.model}, {first.dtype}, {first.sequences} sequences a rank, {first.mbit:g} Mb/s",
        "",
        "| engine | step s | DDP / step | sent MiB | compute s | wire s | of the model | fast link: step / DDP |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    fast = {row.engine: row.fast_s for row in rows}
    lines += [
        f"| {row.engine} | {row.step_s:.2f} | **{steps['ddp'] / row.step_s:.2f}** | {row.sent_mib:.1f} "
        f"| {row.fast_s:.2f} | {row.wire_s:.2f} | {100 * row.bound_s / row.step_s:.0f} % "
        f"| {row.fast_s / fast['ddp']:.2f} |"
        for row in rows
    ]
    if {"zero++-3", "zero-core-3-network"} <= set(steps):
        lines += [
            "",
            f"ZeRO++ against stage 3 as it is: **{steps['zero-core-3-network'] / steps['zero++-3']:.2f} x**.",
        ]
    return lines


def page(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The results as a page."""
    hardware = _measure.hardware()
    lines = [
        "# Training over slow links, with and without compression",
        "",
        f"{_measure.today()}; {hardware['processor']} ({hardware['instruction_set']}), {hardware['cores']} cores; two "
        f"network namespaces; {options.rounds} rounds of {options.steps} steps, medians. "
        + ", ".join(
            f"{name}: {num_parameters(GPT(PRESETS[name])) / 1e6:.1f} M parameters"
            for name in options.models.split(",")
        )
        + ".",
    ]
    jobs = dict.fromkeys((row.model, row.dtype, row.sequences, row.mbit) for row in rows)
    for job in jobs:
        lines += table([row for row in rows if (row.model, row.dtype, row.sequences, row.mbit) == job])
    legend = """
DDP / step: DDP's step over this one, above 1 is faster. Compute: the engine's step over the same two namespaces without
a rate. Wire: what its bytes take at the rate. Of the model: max(compute, wire) over the step. The 1-bit optimizers are
past their warm-up. `zero++-3`: int8 weights, int4 gradients, weights kept from forward to backward; `auto` leaves off
what does not pay where its first steps are measured, which here is the fast link. `zero-core-3-network`: stage 3 as it
is, two blocks on their way at once."""
    return "\n".join([*lines, legend, ""])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Steps a second against the rate, for the first job of the rows."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    first = rows[0]
    mine = [
        row
        for row in rows
        if (row.model, row.dtype, row.sequences) == (first.model, first.dtype, first.sequences)
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(row.engine for row in mine):
        points = sorted((row.mbit, 1 / row.step_s) for row in mine if row.engine == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="Mb/s each way", ylabel="steps a second")
    axes.set_title(f"{first.model}, {first.dtype}, {first.sequences} sequences a rank")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def quick(options: argparse.Namespace) -> list[Row]:
    """A tiny model: over two namespaces where they can be had, else over this machine's own loopback."""
    job = replace(Row("tiny", "fp32", 1, 1000.0, "", 0.0, 0.0, 0.0))
    options.model, options.sequences = "tiny", 1
    names = ["ddp", "zero++-3", "1-bit-adam"]
    try:
        with lab() as hosts, started(names, "fp32", options, hosts) as engines:
            found = list(measure(engines, hosts, [1000.0], 1, 2))
    except LabError as error:
        say(f"compression: no slow link here: {error}")
        with started(names, "fp32", options, None) as engines:
            for engine in engines:
                engine.measure_round(2, lead=1)
            found = [
                (
                    e.name,
                    1000.0,
                    e.rounds[-1].seconds,
                    e.rounds[-1].seconds,
                    e.rounds[-1].sent_bytes / _measure.MIB,
                )
                for e in engines
            ]
    return [
        replace(job, engine=name, mbit=mbit, fast_s=fast, step_s=slow, sent_mib=sent)
        for name, mbit, fast, slow, sent in found
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; 2 where there can be no lab."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbits", default="100,1000,10000", help="comma-separated rates")
    parser.add_argument("--models", default="25m", help=f"comma-separated, of {', '.join(PRESETS)}")
    parser.add_argument("--dtypes", default="bf16", help=f"comma-separated, of {', '.join(DTYPES)}")
    parser.add_argument(
        "--sequences", dest="all_sequences", default="1,4", help="comma-separated, a rank and step"
    )
    parser.add_argument("--engines", default=",".join(NAMES), help="comma-separated; ddp is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of an engine in one round, at each rate")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    options.accumulate, options.recompute, options.warm_up = 1, False, 4
    if options.quick:
        options.models, options.rounds, options.steps = "tiny", 1, 2
        print(page(quick(options), options))
        return 0
    names = [name for name in dict.fromkeys(["ddp", *options.engines.split(",")]) if not missing(name)]
    rates = [float(rate) for rate in options.mbits.split(",")]
    rows: list[Row] = []
    try:
        with lab() as hosts:
            for model in options.models.split(","):
                for dtype in options.dtypes.split(","):
                    for sequences in map(int, options.all_sequences.split(",")):
                        options.model, options.sequences = model, sequences
                        say(f"{model}, {dtype}, {sequences} sequences a rank")
                        with started(names, dtype, options, hosts.set_rate(None)) as engines:
                            rows += [
                                Row(model, dtype, sequences, mbit, name, fast, slow, sent)
                                for name, mbit, fast, slow, sent in measure(
                                    engines, hosts, rates, options.rounds, options.steps
                                )
                            ]
    except LabError as error:
        say(f"compression: {error}")
        return 2
    text = page(rows, options)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compression.md").write_text(text)
    (options.out / "compression.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    draw(rows, HERE.parent / "docs" / "images" / "compression.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What compression is worth on slow links: two hosts on one machine, at several rates each way.

    sudo python3 tools/dev.py bench compression
    sudo python3 tools/dev.py bench compression --models 110m --dtypes bf16 --sequences 1 --engines zero++-3,1-bit-adam
    python3 tools/dev.py bench compression --quick

Every engine trains the same GPT on two ranks, one in each network namespace (`tools/slow_network.py`). They take turns:
in each round every engine takes some steps at each rate, more where they are short, after one that is not counted
(eight where one of eight sends). An engine that decides for itself (`-auto`) is started anew for each rate, and has
decided before it is measured. Beside each row stands the model max(compute, bytes / bandwidth): compute is the engine's
own step over the link as fast as the machine, bytes are those that the kernel counts on the link, headers included.
Jobs that are not measured again stay as the file has them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import _measure
from _compressed_engines import LOCAL_STEPS
from _lab import Lab, LabError, lab
from _processes import DTYPES, HERE, RANKS, Engine, missing, say
from gpt import GPT, PRESETS, num_parameters

NAMES = (
    "ddp", "fsdp2", "zero-core-3-network", "zero++-3", "zero++-3-auto", "ddp-int8", "1-bit-adam", "1-bit-lamb",
    "0-1-adam", "0-1-adam-local",
)  # fmt: skip


PERIODS = {"0-1-adam-local": LOCAL_STEPS}
"""Steps of which one sends: as many lead, and whole periods are measured."""
WARM_UP, DECIDE = 4, 14
"""Steps before anything is measured; of an engine that first finds out what pays."""
LEAST_S = 2.5
"""Of an engine's steps in a round, once it is known how long they take."""


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
    rounds: int
    steps: int
    date: str

    @property
    def job(self) -> tuple[str, str, int]:
        """What is trained."""
        return self.model, self.dtype, self.sequences

    @property
    def wire_s(self) -> float:
        """What its bytes take."""
        return self.sent_mib * _measure.MIB * 8 / (self.mbit * 1e6)

    @property
    def bound_s(self) -> float:
        """The model: the longer of compute and wire."""
        return max(self.fast_s, self.wire_s)


Rate = float | None
"""Mb/s; None: as fast as the machine."""
Engines = dict[Rate, list[Engine]]
"""Those to measure at each rate; most are the same at all."""


def measure(
    engines: Engines, hosts: Lab, rounds: int, steps: int
) -> Iterator[tuple[str, float, float, float, float]]:
    """Engine, rate, seconds over the fast link and at the rate, MiB sent a step at the rate: medians over rounds."""
    seconds: dict[tuple[str, Rate], list[float]] = {}
    sent: dict[tuple[str, Rate], float] = {}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for rate in list(engines)[:: -1 if number % 2 else 1]:
            hosts = hosts.set_rate(rate)
            for engine in engines[rate]:
                known = seconds.setdefault((engine.name, rate), [])
                period = PERIODS.get(engine.name, 1)
                count = max(steps, math.ceil(LEAST_S / known[-1])) if known else steps
                count = math.ceil(count / period) * period
                before = [hosts.sent_bytes(rank) for rank in range(RANKS)]
                engine.measure_round(count, lead=period)
                after = [hosts.sent_bytes(rank) for rank in range(RANKS)]
                known.append(engine.rounds[-1].seconds)
                most = max(b - a for a, b in zip(before, after, strict=True))
                sent[engine.name, rate] = most / (count + period) / _measure.MIB
    for mbit in engines:
        if mbit is None:
            continue
        for engine in engines[mbit]:
            fast, slow = (statistics.median(seconds[engine.name, rate]) for rate in (None, mbit))
            yield engine.name, mbit, fast, slow, sent[engine.name, mbit]


@contextmanager
def started(
    names: Sequence[str], dtype: str, options: argparse.Namespace, hosts: Lab | None, rates: Sequence[Rate]
) -> Iterator[Engines]:
    """Engines, past their warm-up, and ended at the end."""
    engines: Engines = {rate: [] for rate in rates}
    try:
        for name in names:
            say(f"starting {name}")
            decides = name.endswith("-auto")
            for rate in rates if decides else rates[:1]:
                if hosts is not None:
                    hosts = hosts.set_rate(rate)
                engine = Engine(name, dtype, options, hosts)
                for other in [rate] if decides else rates:
                    engines[other].append(engine)
                engine.warm_up(DECIDE if decides else WARM_UP)
                engine.measure_memory()  # which gives back what is free: all engines are in memory at once
        yield engines
    finally:
        for engine in {id(each): each for some in engines.values() for each in some}.values():
            engine.stop()


def table(rows: Sequence[Row]) -> list[str]:
    """One job at one rate."""
    first = rows[0]
    steps = {row.engine: row.step_s for row in rows}
    lines = [
        "",
        f"## {first.model}, {first.dtype}, {first.sequences} {'sequence' if first.sequences == 1 else 'sequences'} "
        f"a rank, {first.mbit:g} Mb/s",
        "",
        f"{first.date}; medians of {first.rounds} rounds of {first.steps} steps, or more where they are short.",
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


def page(rows: Sequence[Row]) -> str:
    """The results as a page."""
    hardware = _measure.hardware()
    models = [
        f"{name}: {num_parameters(GPT(PRESETS[name])) / 1e6:.1f} M parameters"
        for name in dict.fromkeys(row.model for row in rows)
    ]
    lines = [
        "# Training over slow links, with and without compression",
        "",
        f"{hardware['processor']} ({hardware['instruction_set']}), {hardware['cores']} cores; "
        f"two network namespaces, frames of 9,000 bytes. {', '.join(models)}; "
        f"sequences of {PRESETS['25m'].sequence_length} tokens.",
    ]
    for job in dict.fromkeys((*row.job, row.mbit) for row in rows):
        lines += table([row for row in rows if (*row.job, row.mbit) == job])
    legend = """
DDP / step: DDP's step over this one, above 1 is faster. Compute: the engine's step over the same two namespaces without
a rate. Wire: what its bytes take at the rate. Of the model: max(compute, wire) over the step. The 1-bit optimizers are
past their warm-up. `zero++-3`: int8 weights, int4 gradients, weights kept from forward to backward; `auto` leaves off
what does not pay over this link. `zero-core-3-network`: stage 3 as it is, two blocks on their way at once. `ddp-int8`:
DDP's buckets of 4 MiB, so that coding one runs beside the sending of another; the others have DDP's own of 25.
`0-1-adam-local`: 0/1 Adam past its doublings, where one step of eight sends."""
    return "\n".join([*lines, legend, ""])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Steps a second against the rate: a row of panels for each model, with a panel for each dtype and batch."""
    import matplotlib
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.model for row in rows))
    jobs = list(dict.fromkeys(row.job[1:] for row in rows))
    colours = dict(zip(NAMES, matplotlib.color_sequences["tab10"], strict=False))
    figure = Figure(figsize=(4.6 * len(jobs), 4.0 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(jobs), squeeze=False)
    for model, line in zip(models, panels, strict=True):
        for (dtype, sequences), panel in zip(jobs, line, strict=True):
            mine = [row for row in rows if row.job == (model, dtype, sequences)]
            for name in dict.fromkeys(row.engine for row in mine):
                points = sorted((row.mbit, 1 / row.step_s) for row in mine if row.engine == name)
                panel.plot(
                    *zip(*points, strict=True), marker="o", markersize=4, label=name, color=colours[name]
                )
            panel.set(xscale="log", yscale="log", xlabel="Mb/s each way", ylabel="steps a second")
            panel.set_title(f"{model}, {dtype}, batch of {sequences} a rank", fontsize=10)
            panel.set_visible(bool(mine))
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES))
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "compression"}):
        figure.savefig(path, metadata={"Date": None})


def quick(options: argparse.Namespace) -> list[Row]:
    """A tiny model: over two namespaces where they can be had, else over this machine's own loopback."""
    job = Row("tiny", "fp32", 1, 1000.0, "", 0.0, 0.0, 0.0, rounds=1, steps=2, date=_measure.today())
    options.model, options.sequences = "tiny", 1
    names, rates = ["ddp", "zero++-3", "1-bit-adam"], [None, 1000.0]
    try:
        with lab() as hosts, started(names, "fp32", options, hosts, rates) as engines:
            found = list(measure(engines, hosts, 1, 2))
    except LabError as error:
        say(f"compression: no slow link here: {error}")
        with started(names, "fp32", options, None, [None]) as engines:
            for engine in engines[None]:
                engine.measure_round(2, lead=1)
            last = [(engine.name, engine.rounds[-1]) for engine in engines[None]]
            found = [
                (name, 1000.0, each.seconds, each.seconds, each.sent_bytes / _measure.MIB)
                for name, each in last
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
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"comma-separated, of {', '.join(DTYPES)}")
    parser.add_argument(
        "--sequences", dest="all_sequences", default="1,4", help="comma-separated, a rank and step"
    )
    parser.add_argument("--engines", default=",".join(NAMES), help="comma-separated; ddp is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=2, help="of an engine in one round, at each rate, at least"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    options.accumulate, options.recompute = 1, False
    if options.quick:
        print(page(quick(options)))
        return 0
    names = [name for name in dict.fromkeys(["ddp", *options.engines.split(",")]) if not missing(name)]
    rates = [None, *(float(rate) for rate in options.mbits.split(","))]
    for model in options.models.split(","):
        for dtype in options.dtypes.split(","):
            for sequences in map(int, options.all_sequences.split(",")):
                options.model, options.sequences = model, sequences
                say(f"{model}, {dtype}, {sequences} sequences a rank")
                try:
                    with lab() as hosts, started(names, dtype, options, hosts, rates) as engines:
                        rows = [
                            Row(
                                model, dtype, sequences, mbit, name, fast, slow, sent,
                                options.rounds, options.steps, _measure.today(),
                            )
                            for name, mbit, fast, slow, sent in measure(
                                engines, hosts, options.rounds, options.steps
                            )
                        ]  # fmt: skip
                except LabError as error:
                    say(f"compression: {error}")
                    return 2
                for mbit in dict.fromkeys(row.mbit for row in rows):
                    print("\n".join(table([row for row in rows if row.mbit == mbit])))
                write(rows, options.out)
    return 0


def write(rows: Sequence[Row], folder: Path) -> None:
    """Results and picture of one job, with those of other jobs that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "compression.json"
    known = [Row(**each) for each in json.loads(kept.read_text())] if kept.exists() else []
    every = [row for row in known if row.job != rows[0].job] + list(rows)
    every.sort(key=lambda row: (list(PRESETS).index(row.model), row.dtype, row.sequences, row.mbit))
    kept.write_text(json.dumps([asdict(row) for row in every], indent=1) + "\n")
    (folder / "compression.md").write_text(page(every))
    pictures = HERE.parent / "docs" / "images" if folder == HERE / "results" else folder
    draw(every, pictures / "compression.svg")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

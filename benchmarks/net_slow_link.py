"""How much of the communication hides behind compute on a slow link: two hosts on one machine, 1 Gb/s each way.

    sudo python3 tools/dev.py bench net_slow_link
    sudo python3 tools/dev.py bench net_slow_link --mbit 250 --dtype bf16
    sudo python3 tools/dev.py bench net_slow_link --quick

Every engine trains the same GPT on two ranks, one in each network namespace (`tools/slow_network.py`), and takes turns:
some steps over the link as fast as the machine, some over the slow one, right after each other, each time after one
that is not counted. What its bytes take at the link's rate is the communication; what a step gets longer in such a pair
is the part of it that shows (median over pairs); of the rest, compute can hide no more than it lasts itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _measure
from _lab import Lab, LabError, lab
from _processes import DTYPES, HERE, RANKS, Engine, missing, say
from gpt import GPT, PRESETS, num_parameters

ENGINES = (
    "ddp", "fsdp2", "deepspeed-3", "zero-core-2-messages", "zero-core-2-network",
    "zero-core-3-messages", "zero-core-3-network",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One engine. Seconds of a step over the fast and the slow link, and what its bytes take on the slow one.

    Attributes:
        hidden: the part of what compute could hide that it hid.
    """

    engine: str
    fast_s: float
    slow_s: float
    sent_mib: float
    communication_s: float
    hidden: float


def measure(engines: Sequence[Engine], hosts: Lab, mbit: float, rounds: int, steps: int) -> list[Row]:
    """Each engine over both rates in each round; medians."""
    seconds: dict[str, dict[float | None, list[float]]] = {e.name: {None: [], mbit: []} for e in engines}
    sent: dict[str, float] = {}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for engine in engines:
            for rate in (None, mbit) if number % 2 == 0 else (mbit, None):
                hosts = hosts.set_rate(rate)
                before = [hosts.sent_bytes(rank) for rank in range(RANKS)]
                engine.measure_round(steps, lead=1)
                seconds[engine.name][rate].append(engine.rounds[-1].seconds)
                after = [hosts.sent_bytes(rank) for rank in range(RANKS)]
                sent[engine.name] = max(b - a for a, b in zip(before, after, strict=True)) / (steps + 1)
    return [row(name, pair[None], pair[mbit], sent[name], mbit) for name, pair in seconds.items()]


def row(name: str, fast: list[float], slow: list[float], sent_bytes: float, mbit: float) -> Row:
    """One engine's line."""
    communication_s = sent_bytes * 8 / (mbit * 1e6)
    shown_s = max(0.0, statistics.median(s - f for f, s in zip(fast, slow, strict=True)))
    fast_s = statistics.median(fast)
    hidden = (communication_s - shown_s) / min(communication_s, fast_s)
    return Row(name, fast_s, statistics.median(slow), sent_bytes / _measure.MIB, communication_s, hidden)


def page(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The results as a page."""
    hardware = _measure.hardware()
    baseline = next(r for r in rows if r.engine == "ddp")
    lines = [
        f"# Training step over {options.mbit:g} Mb/s, GPT of {num_parameters(GPT(PRESETS[options.model])) / 1e6:.1f} M "
        f"parameters, {options.dtype}",
        "",
        f"{_measure.today()}; {hardware['processor']} ({hardware['instruction_set']}), {hardware['cores']} cores; two "
        f"network namespaces, {options.sequences} sequences a rank; {options.rounds} rounds of {options.steps} steps.",
        "",
        "| engine | step s, fast link | step s | step / DDP | sent MiB | communication s | hidden |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.engine} | {r.fast_s:.2f} | {r.slow_s:.2f} | **{r.slow_s / baseline.slow_s:.3f}** | {r.sent_mib:.0f} "
        f"| {r.communication_s:.2f} | **{100 * r.hidden:.0f} %** |"
        for r in rows
    ]
    legend = """
Fast link: the same two namespaces without a rate. Sent: bytes a rank puts on the link in a step, headers included;
communication: what they take at the link's rate. Hidden: 100 % would be a step that takes as long as over the fast
link (or, where communication takes longer than compute, no longer than communication). `-network`: two blocks are on
their way at once; at stage 2 updated parameters are published beside the next forward, and halves of blocks are units.
`-messages`: as it comes."""
    return "\n".join([*lines, legend, ""])


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; 2 where there can be no lab."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, default=1000.0, help="megabits a second, each way")
    parser.add_argument("--model", choices=PRESETS, default="25m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated; ddp is always there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of an engine in one round, at each rate")
    parser.add_argument("--sequences", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.rounds, options.steps = "tiny", 1, 2
        options.engines = "zero-core-3-messages"
    options.accumulate, options.recompute = 1, False
    names = [name for name in dict.fromkeys(["ddp", *options.engines.split(",")]) if not missing(name)]
    engines: list[Engine] = []
    try:
        with lab() as hosts:
            try:
                for name in names:
                    say(f"starting {name}")
                    engines.append(Engine(name, options.dtype, options, hosts))
                    engines[-1].warm_up(4)
                rows = measure(engines, hosts, options.mbit, options.rounds, options.steps)
            finally:
                for engine in engines:
                    engine.stop()
    except LabError as error:
        say(f"net_slow_link: {error}")
        return 2
    text = page(rows, options)
    print(text)
    if not options.quick:
        name = f"slow_link_{options.model}_{options.dtype}_{options.mbit:g}mbit"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.md").write_text(text)
        (options.out / f"{name}.json").write_text(json.dumps([vars(r) for r in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

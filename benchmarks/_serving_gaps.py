"""Seconds between the tokens of running requests while a long prompt is computed, by schedule; and a picture of them.

In: a model's folder. Out: how much longer gaps are beside the prompt than without it (p95, the median of rounds that
alternate), and how long the prompt takes. A smaller part of the prompt in each forward makes gaps shorter and the
prompt later.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _serving_jobs import LONG, engine_of, greedy
from fastgen import Schedule
from fastgen.engine import Engine

RUNNING = 4
STRETCH = 1.4
"""What `gap_s` allows, in p95 of the gaps without a prompt."""


@dataclass(frozen=True)
class Gaps:
    """Of all running requests: seconds between two tokens, when the second came, when the prompt's token came."""

    seconds: list[float]
    ends_s: list[float]
    prompt_s: float

    @property
    def p95(self) -> float:
        """The 95th percentile."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(0.95 * len(self.seconds)))]


def gaps(engine: Engine, prompt: int, count: int) -> Gaps:
    """Gaps of running requests of `count` tokens while a prompt of so many (0: none) is computed."""
    for number in range(RUNNING):
        engine.add(str(number), [number + 1] * 16, greedy(count))
    started: set[str] = set()
    while len(started) < RUNNING:
        started |= {output.request_id for output in engine.step()}
    if prompt:
        engine.add("long", list(range(prompt)), greedy(1))
    begun = time.perf_counter()
    last = dict.fromkeys(started, begun)
    seconds, ends_s = list[float](), list[float]()
    prompt_s, over = 0.0, False
    while engine.has_work and not over:
        over = prompt_s > 0  # the step after it shows the gap that it made
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id == "long":
                prompt_s = now - begun
            else:
                seconds.append(now - last[output.request_id])
                ends_s.append(now - begun)
                last[output.request_id] = now
    for number in range(RUNNING):
        engine.abort(str(number))
    return Gaps(seconds, ends_s, prompt_s)


@dataclass(frozen=True)
class Beside:
    """One schedule: gaps beside the prompt over gaps without, seconds of the prompt; and the last round's gaps."""

    ratio: float
    prompt_s: float
    alone: Gaps
    beside: Gaps


def compare(
    model: str, gib: float, *, budget: int, measured: int | None, rounds: int, scale: int
) -> dict[str, Beside]:
    """Every schedule: by default, a fixed budget, `gap_s`, whole prompts first; `measured`: where throughput saturates.

    Schedules have an engine each, which is warm: its first round is not counted. Without the prompt the running
    requests make as many tokens as beside it: a later token takes longer, since more came before.
    """
    engine = engine_of(model, gib, prefix=False, token_budget=budget)
    gap_s = STRETCH * statistics.median(gaps(engine, 0, 1000 // scale).p95 for _ in range(rounds + 1))
    del engine
    schedules: dict[str, dict[str, Any]] = {
        "default": {"prompt_fill": measured},
        "fixed": {"token_budget": budget},
        "gap_s": {"prompt_fill": measured, "gap_s": gap_s},
        "prefill_first": {"token_budget": budget, "kind": Schedule.PREFILL_FIRST},
    }
    found = {}
    for name, schedule in schedules.items():
        engine = engine_of(model, gib, prefix=False, **schedule)
        alone, beside = list[Gaps](), list[Gaps]()
        for _ in range(rounds + 1):
            beside.append(gaps(engine, LONG // scale, 3000 // scale))
            alone.append(gaps(engine, 0, max(16, 2 + len(beside[-1].seconds) // RUNNING)))
        ratios = [there.p95 / here.p95 for here, there in zip(alone[1:], beside[1:], strict=True)]
        prompt_s = statistics.median(each.prompt_s for each in beside[1:])
        found[name] = Beside(statistics.median(ratios), prompt_s, alone[-1], beside[-1])
    return found


def draw(path: Path, found: dict[str, Beside], title: str) -> None:
    """Every gap as a line as long as it lasted, at its height."""
    import matplotlib
    from matplotlib.figure import Figure

    names = {
        "prefill_first": "whole prompts first",
        "fixed": "SplitFuse, fixed token budget",
        "gap_s": "SplitFuse, gap_s",
    }
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    series: list[tuple[str, str, Gaps]] = [
        (names[name], colour, found[name].beside)
        for name, colour in zip(names, ("#b4552d", "#c79a2b", "#0b6e5f"), strict=True)
    ]
    for label, colour, each in [*series, ("without the prompt", "#555555", found["fixed"].alone)]:
        ends, seconds = [0.0, *each.ends_s], [each.seconds[0], *each.seconds]
        panel.plot(ends, [1e3 * one for one in seconds], drawstyle="steps-pre", color=colour, label=label)
    panel.set(
        xlabel="seconds since the prompt came", ylabel="between two tokens, ms", yscale="log", title=title
    )
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "gaps"}):
        figure.savefig(path, metadata={"Date": None})

"""What a run leaves behind for people: `loss.png`, `losses.json`, and the tables printed at the end.

In: losses, bytes, numbers of one rank. Out: files and text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..explain import num_bytes, table


@dataclass
class Losses:
    """Mean loss over ranks of every step, in nats a byte.

    Attributes:
        ours: By step, from 0.
        ddp: The first steps of plain DDP on the same data.
        held_out: (step, loss) on text kept apart.
    """

    ours: list[float] = field(default_factory=list)
    ddp: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write them, whole or not at all."""
        hidden = path.with_name(f".{path.name}.tmp")
        hidden.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        hidden.replace(path)

    @staticmethod
    def load(path: Path, steps: int) -> Losses:
        """Those of the first `steps` steps; empty where there is no file."""
        if not path.exists():
            return Losses()
        raw = json.loads(path.read_text(encoding="utf-8"))
        held_out = [(step, loss) for step, loss in raw["held_out"] if step <= steps]
        return Losses(raw["ours"][:steps], raw["ddp"], held_out)


def draw(losses: Losses, path: Path, title: str) -> None:
    """Draw the loss of every step, its running mean, and plain DDP's first steps over it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(losses.ours) + 1)
    axes.plot(steps, losses.ours, color="#9ecae1", linewidth=1, label="each step")
    axes.plot(steps, _running_mean(losses.ours), color="#08519c", linewidth=2, label="running mean")
    if losses.ddp:
        dots = range(1, len(losses.ddp) + 1)
        axes.plot(
            dots, losses.ddp, "x", color="#d94801", markersize=4, label="plain DDP, same start and data"
        )
    if losses.held_out:
        at, values = zip(*losses.held_out, strict=True)
        axes.plot(at, values, "o", color="#238b45", markersize=6, label="text kept apart")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _running_mean(values: Sequence[float], weight: float = 0.95) -> list[float]:
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1
        means.append(total / mass)
    return means


def held_table(held: Sequence[Mapping[str, int]], without: Mapping[str, int]) -> str:
    """Bytes that each rank held, by kind, beside what each would hold without ZeRO."""
    head = ["live between steps", *[f"rank {rank}" for rank in range(len(held))], "each, without ZeRO"]
    rows = [[kind, *[num_bytes(part[kind]) for part in held], num_bytes(without[kind])] for kind in without]
    totals = [sum(part.values()) for part in held]
    whole = sum(without.values())
    shares = [f"{num_bytes(total)} ({total / whole:.0%})" for total in totals]
    return table(head, [*rows, ["total", *shares, num_bytes(whole)]])


def continuation_table(first_step: int, uninterrupted: Sequence[float], resumed: Sequence[float]) -> str:
    """Losses of the steps after a checkpoint, with and without going through it."""
    rows = [
        [str(first_step + i), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}"]
        for i, (a, b) in enumerate(zip(uninterrupted, resumed, strict=True))
    ]
    return table(["step", "uninterrupted", "resumed from the checkpoint", "difference"], rows)

"""How ZenFlow learns beside exact AdamW: held-out loss by step, three seeds, from the same values and batches.

    python3 tools/dev.py bench zenflow_learning
    python3 tools/dev.py bench zenflow_learning --quick

A small GPT is trained with exact AdamW on the reference manual of Python (English), and then goes on with the source of
`argparse` (code): fine-tuning, which the method is for. At each rate it is compared with the exact step from the same
values. Last, training from nothing on the code. A curve is within noise where its mean over seeds is no further from
that of exact AdamW than the seeds of exact AdamW are from each other (their standard deviation).
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import _measure
import torch
import zero_core as zero
import zero_offload_nvme as off
from gpt import GPT, PRESETS
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks

HERE = Path(__file__).resolve().parent
CONFIG = PRESETS["tiny"]
SEEDS = (0, 1, 2)
POLICIES: dict[str, off.ZenFlow | None] = {
    "exact AdamW": None,
    "ZenFlow()": off.ZenFlow(),
    'ZenFlow(late_step="one")': off.ZenFlow(late_step="one"),
}
COLOURS = ("#222222", "#1f77b4", "#d62728")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Characters as numbers, the last tenth held out."""

    train: torch.Tensor
    held_out: torch.Tensor


def text_of(text: str) -> Text:
    """Split a text."""
    numbers = torch.tensor(list(text.encode("ascii", "ignore")))
    cut = len(numbers) // 10
    return Text(train=numbers[:-cut], held_out=numbers[-cut:])


def batch(text: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows, and what follows each character."""
    length = CONFIG.sequence_length
    starts = torch.randint(0, len(text) - length - 1, (count,), generator=generator).tolist()
    both = torch.stack([text[start : start + length + 1] for start in starts])
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def curve(
    text: Text,
    seed: int,
    *,
    steps: int,
    rate: float,
    policy: off.ZenFlow | None,
    begin: dict[str, torch.Tensor] | None,
    every: int,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Held-out losses each `every` steps, the last one with all that waits applied; and the final values."""
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    model = GPT(CONFIG)
    if begin is not None:
        model.load_state_dict(begin)
    model = zero.shard(model, mesh, stage=2, store=zero.Stores(optimizer=off.HostStore()))
    inner = torch.optim.AdamW(model.parameters(), lr=rate)
    overlap: Any = "exact" if policy is None else "zenflow"
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    with off.OffloadedOptimizer(model, inner, overlap=overlap, zenflow=policy) as optimizer:
        for step in range(1, steps + 1):
            model(*batch(text.train, 16, generator)).backward()
            zero.clip_grad_norm(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step == steps:
                optimizer.flush()
            if step % every == 0 or step == steps:
                with torch.no_grad():
                    shown = batch(text.held_out, 256, torch.Generator().manual_seed(9))
                    losses.append(float(model(*shown)))
    values = {name: value.clone() for name, value in zero.full_state_dict(model).items()}
    return losses, values


def measure(rank: int, pretraining: int, steps: int, every: int) -> list[dict[str, Any]]:
    """All rows."""
    torch.set_num_threads(1)
    english = text_of("\n".join(text for _, text in sorted(topics.topics.items())))
    code = text_of(inspect.getsource(argparse))
    begun = [
        curve(english, seed, steps=pretraining, rate=2e-3, policy=None, begin=None, every=pretraining)[1]
        for seed in SEEDS
    ]
    rows: list[dict[str, Any]] = []
    for kind, rate, num in (
        ("fine-tuning", 1e-4, steps), ("fine-tuning", 2e-4, steps), ("fine-tuning", 1e-3, steps),
        ("from nothing", 3e-4, 2 * steps), ("from nothing", 2e-3, steps),
    ):  # fmt: skip
        for name, policy in POLICIES.items():
            curves = [
                curve(
                    code, seed, steps=num, rate=rate, policy=policy, every=every,
                    begin=begun[seed] if kind == "fine-tuning" else None,
                )[0]
                for seed in SEEDS
            ]  # fmt: skip
            rows.append({"kind": kind, "rate": rate, "steps": num, "name": name, "curves": curves})
    return rows


def page(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# ZenFlow: how it learns",
        "",
        f"GPT of {record['parameters'] / 1e6:.2f} M parameters, batches of 16 x {CONFIG.sequence_length} characters, "
        f"clip 1.0, windows of four steps; {record['pretraining']} steps of exact AdamW on Python's reference manual, "
        f"then the source of argparse. Held-out loss, mean and standard deviation over {len(SEEDS)} seeds; "
        f"{record['date']}; torch {record['versions']['torch']}.",
        "",
        "| | rate | | half-way | at the end | beyond exact AdamW | in its standard deviations | largest at any point |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    exact: list[tuple[float, ...]] = []
    for row in record["rows"]:
        by_step: list[tuple[float, ...]] = list(zip(*row["curves"], strict=True))
        exact = by_step if row["name"] == "exact AdamW" else exact
        gaps = [statistics.mean(a) - statistics.mean(b) for a, b in zip(by_step, exact, strict=True)]
        last, noise = by_step[-1], statistics.stdev(exact[-1])
        shown = (
            ""
            if by_step is exact
            else f"{gaps[-1]:+.3f} | {gaps[-1] / noise:+.1f} | {max(gaps, key=abs):+.3f}"
        )
        lines.append(
            f"| {row['kind']}, {row['steps']} steps | {row['rate']:g} | {row['name']} "
            f"| {statistics.mean(by_step[len(by_step) // 2 - 1]):.3f} "
            f"| {statistics.mean(last):.3f} ± {statistics.stdev(last):.3f} | {shown or ' | | '} |"
        )
    lines += ["", "![held-out loss by step](zenflow_learning.svg)", ""]
    return "\n".join(lines)


def picture(record: dict[str, Any]) -> str:
    """Every curve of every seed, a panel for each kind of training, as SVG."""
    kinds = list(dict.fromkeys((row["kind"], row["rate"]) for row in record["rows"]))
    width, height, parts = 300, 240, list[str]()
    for place, (kind, rate) in enumerate(kinds):
        rows = [row for row in record["rows"] if (row["kind"], row["rate"]) == (kind, rate)]
        losses = [loss for row in rows for losses in row["curves"] for loss in losses]
        low, high, left = min(losses), max(losses), place * width + 40
        parts.append(f'<text x="{left}" y="14">{kind}, rate {rate:g}</text>')
        for value, y in ((high, 30), (low, height - 30)):
            parts.append(f'<text x="{left - 38}" y="{y + 4}">{value:.2f}</text>')
        for row, colour in zip(rows, COLOURS, strict=True):
            for losses in row["curves"]:
                points = " ".join(
                    f"{left + number * (width - 60) / (len(losses) - 1):.1f},"
                    f"{30 + (high - loss) / (high - low) * (height - 60):.1f}"
                    for number, loss in enumerate(losses)
                )
                parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    for number, (name, colour) in enumerate(zip(POLICIES, COLOURS, strict=True)):
        parts.append(f'<text x="{40 + number * 220}" y="{height - 6}" fill="{colour}">{name}</text>')
    size = f'width="{len(kinds) * width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect {size} fill="white"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--pretraining", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "zenflow_learning.json")
    options = parser.parse_args()
    pretraining, steps, every = (4, 4, 4) if options.quick else (options.pretraining, options.steps, 20)
    rows = run_ranks(measure, 1, pretraining, steps, every, timeout_s=3600)[0]
    record = {
        "benchmark": "zenflow_learning",
        "date": _measure.today(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "parameters": sum(param.numel() for param in GPT(CONFIG).parameters()),
        "pretraining": pretraining,
        "rows": rows,
    }
    text = page(record)
    print(text)
    if not options.quick:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".svg").write_text(picture(record))


if __name__ == "__main__":
    main()

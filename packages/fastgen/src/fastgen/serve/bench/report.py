"""What a benchmark says: percentiles of each load, as a table, as JSON, and as a picture against throughput."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .load import Run, Sample

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Row:
    """One load; times are percentiles in seconds, {50: ..., 99: ...}; empty where nothing was answered."""

    load: str
    num_requests: int
    num_failed: int
    first_error: str
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    first_token_s: dict[int, float]
    inter_token_s: dict[int, float]
    whole_s: dict[int, float]


def summarize(run: Run) -> Row:
    """One load in numbers."""
    answered = [sample for sample in run.samples if not sample.error]
    errors = [sample.error for sample in run.samples if sample.error]
    num_output = sum(sample.num_tokens for sample in answered)
    num_prompt = sum(sample.num_prompt_tokens for sample in answered)
    return Row(
        load=run.load,
        num_requests=len(run.samples),
        num_failed=len(errors),
        first_error=errors[0] if errors else "",
        requests_per_s=len(answered) / run.elapsed_s,
        output_tokens_per_s=num_output / run.elapsed_s,
        total_tokens_per_s=(num_output + num_prompt) / run.elapsed_s,
        first_token_s=percentiles([sample.first_s for sample in answered]),
        inter_token_s=percentiles([gap for sample in answered for gap in sample.gaps_s]),
        whole_s=percentiles([sample.whole_s for sample in answered]),
    )


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """By nearest rank: the smallest value that so many percent do not exceed."""
    ranked = sorted(values)
    if not ranked:
        return {}
    return {p: ranked[max(0, -(-p * len(ranked) // 100) - 1)] for p in PERCENTILES}


def table(rows: Sequence[Row]) -> str:
    """As text for a terminal; times in milliseconds."""
    head = ["load", "requests", "failed", "req/s", "out tok/s", "TTFT ms p50", "p95", "p99"]
    head += ["ITL ms p50", "p95", "p99", "whole ms p50", "p95"]
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = [
        f"{row.load}: {row.num_failed} failed, the first: {row.first_error}" for row in rows if row.num_failed
    ]
    return "\n".join([*text, *notes])


def _cells(row: Row) -> list[str]:
    def ms(times: dict[int, float], *wanted: int) -> list[str]:
        return [f"{1000 * times[each]:.1f}" if times else "-" for each in wanted]

    return [
        row.load,
        str(row.num_requests),
        str(row.num_failed),
        f"{row.requests_per_s:.2f}",
        f"{row.output_tokens_per_s:.1f}",
        *ms(row.first_token_s, 50, 95, 99),
        *ms(row.inter_token_s, 50, 95, 99),
        *ms(row.whole_s, 50, 95),
    ]


def write_json(path: str, rows: Sequence[Row], settings: dict[str, Any], runs: Sequence[Run]) -> None:
    """All numbers, with every request's, beside and renamed."""
    content = {
        "settings": settings,
        "loads": [asdict(row) for row in rows],
        "samples": {run.load: [_sample(sample) for sample in run.samples] for run in runs},
    }
    beside = Path(f"{path}.new")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def _sample(sample: Sample) -> dict[str, Any]:
    if sample.error:
        return {"num_prompt_tokens": sample.num_prompt_tokens, "error": sample.error}
    return {
        "num_prompt_tokens": sample.num_prompt_tokens,
        "num_tokens": sample.num_tokens,
        "first_s": round(sample.first_s, 6),
        "whole_s": round(sample.whole_s, 6),
    }


def draw(path: str, rows: Sequence[Row], title: str) -> None:
    """Latency against throughput, a point a load.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--picture: expected matplotlib; install it with `pip install fastgen[plot]`"
        ) from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    kinds = {"closed loop": "clients", "open loop": "requests/s"}
    for panel, name, field in zip(
        panels, ["time to first token", "between two tokens"], ["first_token_s", "inter_token_s"], strict=True
    ):
        for color, (kind, unit) in zip(("#0b6e5f", "#b4552d"), kinds.items(), strict=True):
            shown = [row for row in rows if row.load.endswith(unit) and getattr(row, field)]
            for percent, style in ((50, "o-"), (95, "s:")):
                xs = [row.output_tokens_per_s for row in shown]
                ys = [1000 * getattr(row, field)[percent] for row in shown]
                if shown:
                    panel.plot(xs, ys, style, color=color, label=f"{kind}, p{percent}", markersize=4)
            for row in shown:
                place = (row.output_tokens_per_s, 1000 * getattr(row, field)[50])
                panel.annotate(
                    row.load.split()[0], place, textcoords="offset points", xytext=(4, 5), fontsize=8
                )
        panel.set(xlabel="output tokens/s", ylabel=f"{name}, ms", yscale="log", xlim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)

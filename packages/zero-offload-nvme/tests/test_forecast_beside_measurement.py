"""A forecast of the optimizer's step is within a fifth of what is then measured; needs a machine to itself."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_optimizers_step_takes_as_long_as_was_forecast(tmp_path) -> None:
    benchmark = pytest.importorskip("offload_preflight", reason="benchmarks/ is not here")
    best: dict[str, float] = {}
    for case in benchmark.CASES:
        for _ in range(3):  # whatever else runs makes a step longer, never shorter
            row = benchmark.row_of(case, "25m", str(tmp_path), 7, 1)
            off_by = abs(row["forecast_optimizer_s"] / row["optimizer_s"] - 1)
            best[case.name] = min(off_by, best.get(case.name, off_by))
            if best[case.name] <= benchmark.BAR:
                break
    assert max(best.values()) <= benchmark.BAR, best

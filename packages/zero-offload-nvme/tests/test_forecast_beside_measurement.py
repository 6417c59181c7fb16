"""A forecast of the optimizer's step is within a fifth of what is then measured; needs a machine to itself."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_optimizers_step_takes_as_long_as_was_forecast(tmp_path) -> None:
    benchmark = pytest.importorskip("offload_preflight", reason="benchmarks/ is not here")
    best: dict[str, float] = {}
    for _ in range(3):  # whatever else runs makes a step longer, never shorter
        for row in benchmark.rows_of("25m", str(tmp_path), 10):
            off_by = abs(row["forecast_optimizer_s"] / row["optimizer_s"] - 1)
            best[row["case"]] = min(off_by, best.get(row["case"], off_by))
        if max(best.values()) <= benchmark.BAR:
            break
    assert set(best) == {case.name for case in benchmark.CASES}
    assert max(best.values()) <= benchmark.BAR, best

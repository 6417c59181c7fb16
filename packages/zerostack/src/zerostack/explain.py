"""A configuration as a person reads it: every effective value, where it came from, what it costs in bytes.

In: `resolve.Effective`, and a model's size if known. Out: text. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import zero_core as zero
from torch import nn

from . import policies, signs
from .resolve import Effective


def explain(settings: Effective, model_or_num_params: nn.Module | float | None = None) -> str:
    """The whole explanation.

    Args:
        settings: The effective configuration.
        model_or_num_params: What bytes per rank are to be counted for; None leaves them out.
    """
    rows = [(path, _shown(value), source) for path, value, source in settings.rows()]
    parts = [f"Effective configuration for {settings.world} rank(s)", table(("key", "value", "from"), rows)]
    findings = settings.findings
    if findings.no_effect:
        parts += ["Accepted, without effect", table(("key", "because"), sorted(findings.no_effect.items()))]
    if findings.switched_off:
        parts += [
            "Accepted, switched off",
            table(("key", "switched on, it"), _refusals(findings.switched_off)),
        ]
    parts += ["Handed to zero-core", _policies(settings)]
    if model_or_num_params is not None:
        parts += [f"Bytes per rank, stage {_stage(settings)}", _memory(settings, model_or_num_params)]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the last one as long as it likes."""
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head) - 1)]
    lines = ["  ".join([c.ljust(w) for c, w in zip(row, widths, strict=False)] + [row[-1]]) for row in cells]
    rule = "  ".join(["-" * w for w in widths] + ["-" * len(head[-1])])
    return "\n".join([lines[0], rule, *lines[1:]])


def num_bytes(count: float) -> str:
    """Bytes in decimal units, as memory is sold and as the ZeRO paper counts."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:  # from there on, three digits would say 1000
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3f}".rstrip("0").rstrip(".") + " PB"


def _refusals(switched_off: dict[str, str]) -> list[tuple[str, str]]:
    return sorted((path, f"would be refused: {note}") for path, note in switched_off.items())


def _shown(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _stage(settings: Effective) -> int:
    return settings.config.zero_optimization.stage


def _policies(settings: Effective) -> str:
    scaler = policies.loss_scaler(settings.config)
    scale = "none" if scaler is None else f"{scaler.value:g}, {'dynamic' if scaler.dynamic else 'static'}"
    lines = [
        str(policies.precision(settings.config)),
        str(policies.overlap(settings.config)),
        f"LossScaler: {scale}",
    ]
    return "\n".join(lines).replace("torch.", "")


def optimizer_kind(settings: Effective) -> str:
    """The optimizer's name as `zero_core.plan_memory` knows it."""
    section = settings.config.optimizer
    if section is None:
        return "adam"
    momentum = section.type == "SGD" and section.params.momentum
    return "sgd-momentum" if momentum else str(section.type).lower()


def plan(settings: Effective, model_or_num_params: nn.Module | float) -> zero.MemoryPlan:
    """Bytes per rank under a configuration."""
    of = signs.state_bytes(settings.config, settings.world, 1)
    planned = zero.plan_memory(
        model_or_num_params,
        stage=_stage(settings) if of is None else 0,
        world=settings.world,
        precision=policies.precision(settings.config),
        optimizer="adam" if of is not None else optimizer_kind(settings),
    )
    if of is None:
        return planned
    whole = signs.state_bytes(
        settings.config, settings.world, planned.optimizer // 8
    )  # Adam's: 8 a parameter
    assert whole is not None
    return replace(planned, stage=_stage(settings), optimizer=whole)


def _memory(settings: Effective, model_or_num_params: nn.Module | float) -> str:
    planned = plan(settings, model_or_num_params)
    kinds = ("params", "grads", "master", "optimizer", "in_flight")
    rows = [(kind, num_bytes(getattr(planned, kind))) for kind in kinds]
    if not isinstance(model_or_num_params, nn.Module) and _stage(settings) >= 2:
        rows[-1] = ("in_flight", "the largest units of the model, which a number does not tell")
    return table(("what", "bytes"), [*rows, ("total", num_bytes(planned.total))])

"""A configuration as a person reads it: every effective value, where it came from, what it costs in bytes.

In: `resolve.Effective`, and a model's size if known. Out: text. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from zero_offload_nvme import Tier

from . import policies
from .footprint import TIERS, footprint
from .resolve import Effective


def explain(
    settings: Effective,
    model_or_num_params: nn.Module | float | None = None,
    optimizer: Optimizer | None = None,
    num_shards: int | None = None,
) -> str:
    """The whole explanation.

    Args:
        settings: The effective configuration.
        model_or_num_params: What bytes per rank are to be counted for; None leaves them out.
        optimizer: See `footprint`.
        num_shards: Likewise.
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
        stage = settings.config.zero_optimization.stage
        parts += [
            f"Bytes per rank, stage {stage}",
            _memory(settings, model_or_num_params, optimizer, num_shards),
        ]
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


def _policies(settings: Effective) -> str:
    scaler = policies.loss_scaler(settings.config)
    scale = "none" if scaler is None else f"{scaler.value:g}, {'dynamic' if scaler.dynamic else 'static'}"
    lines = [
        str(policies.precision(settings.config)),
        str(policies.overlap(settings.config)),
        f"LossScaler: {scale}",
    ]
    return "\n".join(lines).replace("torch.", "")


def _memory(
    settings: Effective,
    model_or_num_params: nn.Module | float,
    optimizer: Optimizer | None,
    num_shards: int | None,
) -> str:
    found = footprint(settings, model_or_num_params, optimizer, num_shards)
    tiers: list[Tier] = [tier for tier in TIERS.values() if tier == "device" or found.total(tier)]
    head = ["what", "bytes"] if len(tiers) == 1 else ["what", *tiers]
    rows = [[kind, *[num_bytes(of.get(tier, 0)) for tier in tiers]] for kind, of in found.nbytes.items()]
    lines = [table(head, [*rows, ["total", *[num_bytes(found.total(tier)) for tier in tiers]]])]
    if found.assumed is not None:
        lines.append(f"optimizer: {found.assumed} is assumed")
    if not isinstance(model_or_num_params, nn.Module) and settings.config.zero_optimization.stage >= 2:
        lines.append("in_flight: besides, the largest units of the model, which a number does not tell")
    return "\n".join(lines)

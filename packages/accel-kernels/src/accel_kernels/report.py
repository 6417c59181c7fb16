"""Which back end each op uses here, and why: for a person to read, and for a program to ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from . import native
from .dispatch import (
    INFERENCE_OPS,
    why_inference_unavailable,
    why_no_module,
    why_unavailable,
)
from .dispatch_codecs import CODEC_OPS
from .isa import available_cpu_isas, chosen_cpu_isa
from .transfers.drivers import preferred as preferred_driver

_STEPS = ("adam_step", "lion_step", "adagrad_step", "sgd_step")
OPS = (*_STEPS, "grad_norm_scale", "cast_copy", *CODEC_OPS, *INFERENCE_OPS)
DEVICES = ("cpu", "cuda", "other")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The back end of one op on one device (None: that device is not here), and why."""

    backend: str | None
    why: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}" if self.backend else f"none: {self.why}"


class Report(Mapping[str, Mapping[str, Choice]]):
    """``report()["adam_step"]["cpu"]`` is a ``Choice``; ``print(report())`` shows all of them.

    ``report().transfers`` is the choice of the transfer engine.
    """

    def __init__(self, choices: Mapping[str, Mapping[str, Choice]], transfers: Choice) -> None:
        self._choices = choices
        self.transfers = transfers

    def __getitem__(self, op: str) -> Mapping[str, Choice]:
        return self._choices[op]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("op", *DEVICES)]
        rows += [(op, *(str(by_device[device]) for device in DEVICES)) for op, by_device in self.items()]
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"transfers  {self.transfers}")
        return "\n".join(line.rstrip() for line in lines)


def report() -> Report:
    """The back end that each op uses for tensors of each device here, and why.

    Asks torch whether there is a CUDA device, and so may load the CUDA driver; compiles nothing.
    """
    driver, why = preferred_driver()
    return Report(
        {op: {"cpu": _cpu(op), "cuda": _cuda(op), "other": _other()} for op in OPS},
        Choice(backend=driver, why=why),
    )


def _portable(op: str) -> str:
    if op in INFERENCE_OPS:
        return "plain torch"
    if op not in _STEPS:
        return "plain torch in cache-sized pieces"
    reason = why_no_module("numba")
    return "numba" if reason is None else f"plain torch in cache-sized pieces, numba {reason}"


def _cpu(op: str) -> Choice:
    reason = native.why_not
    if op in INFERENCE_OPS:
        reason = why_inference_unavailable(op, "cpu", "cpu", torch.float32)
    if reason is not None:
        return Choice(backend="portable", why=f"{_portable(op)}; {reason}")
    threads = torch.get_num_threads() if native.cpu is not None and native.cpu.has_openmp() else 1
    isa = chosen_cpu_isa() or available_cpu_isas()[0]
    if op not in INFERENCE_OPS and isa == "amx":
        isa = "avx512"  # all that the training ops know of it
    return Choice(backend="cpu", why=f"C++ {isa}, {threads} thread{'s' if threads != 1 else ''}")


def _cuda(op: str) -> Choice:
    if torch.version.cuda is None:
        return Choice(backend=None, why="this torch is built without CUDA")
    if not torch.cuda.is_available():
        return Choice(backend=None, why="no CUDA device")
    if op in INFERENCE_OPS:
        reason = why_inference_unavailable(op, "cuda", "cuda", torch.float32)
    else:
        reason = why_unavailable("cuda", "cuda")
    if reason is not None:
        return Choice(backend="portable", why=f"plain torch; {reason}")
    compiler = "Triton" if op == "paged_attention" else "NVRTC through CuPy"
    return Choice(backend="cuda", why=f"{compiler}, compiled at first use")


def _other() -> Choice:
    return Choice(backend="portable", why="plain torch")

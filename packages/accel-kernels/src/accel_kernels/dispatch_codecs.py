"""Which back end runs a codec op, and what it provides: ``dispatch`` for messages.

A codec back end is a module in ``backends.codecs`` with the five functions of ``CodecBackend``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from .dispatch import choose_name
from .messages import BlockFormat

CODEC_OPS = (
    "quantize_blocks",
    "dequantize_blocks",
    "dequantize_sum",
    "requantize_sum",
    "pack_signs",
    "unpack_signs",
    "mean_signs",
)


class CodecBackend(Protocol):
    """What a back end provides for messages; arguments have been checked, and there is at least one element."""

    def quantize(self, src: Tensor, out: Tensor, form: BlockFormat, seed: int | None) -> None:
        """Floats into a message."""

    def dequantize_sum(self, sources: Sequence[Tensor], out: Tensor, form: BlockFormat, scale: float) -> None:
        """``scale`` times the sum of messages, into floats."""

    def requantize_sum(
        self,
        sources: Sequence[Tensor],
        out: Tensor,
        numel: int,
        form: BlockFormat,
        out_form: BlockFormat,
        scale: float,
        seed: int | None,
    ) -> None:
        """The same, into a message."""

    def pack_signs(self, src: Tensor, out: Tensor, error: Tensor | None, squared: bool) -> None:
        """Floats into a message of signs; scale from the sum of squares, or of magnitudes."""

    def mean_signs(self, sources: Sequence[Tensor], out: Tensor) -> None:
        """Mean of messages of signs, into floats."""


@functools.cache
def _load(name: str) -> CodecBackend:
    return cast(CodecBackend, importlib.import_module(f".backends.codecs.{name}", __package__))


def choose_codec(op: str, device: torch.device, backend: str | None) -> CodecBackend:
    """The back end for messages on ``device``; raises as ``dispatch.choose`` does."""
    return _load(choose_name(op, device, backend))

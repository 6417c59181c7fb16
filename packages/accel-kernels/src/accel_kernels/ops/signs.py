"""One bit an element: signs with one scale, what that loses kept for the next time.

How a message lies in memory: ``messages``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import checks
from ..dispatch_codecs import choose_codec
from ..errors import AccelTypeError, AccelValueError
from ..messages import sign_message_bytes
from .blocks import check_sources
from .common import mark_written

NORMS = ("l2", "l1")


def _message(numel: int) -> tuple[int, str]:
    size = sign_message_bytes(numel)
    return size, f"{size} bytes ({numel} signs and their scale)"


def sign_bytes(n: int) -> int:
    """Bytes of a message of ``n`` signs: 4 for the scale and ``ceil(n / 8)``; 0 for n = 0.

    Raises:
        AccelTypeError: not an integer.
        AccelValueError: negative.
    """
    if not isinstance(n, int):
        raise AccelTypeError(f"sign_bytes: n: expected an integer, got {type(n).__name__}")
    if n < 0:
        raise AccelValueError(f"sign_bytes: n: expected at least 0, got {n}")
    return sign_message_bytes(n)


def pack_signs(
    src: Tensor,
    out: Tensor,
    *,
    error: Tensor | None = None,
    norm: str = "l2",
    backend: str | None = None,
) -> None:
    """Signs of ``c = src + error`` and one scale into a message; what they lose into ``error``.

    scale = |c|_2 / sqrt(n), or |c|_1 / n; the bit is 1 where c >= 0; then error = c - scale * (+1 | -1), so that
    what comes back and the new error add up to c, to fp32 rounding. The sum under the scale is formed in fp64 in one
    order, so the same bytes, and the same error, come from every back end and any number of threads.

    If an element of c is an infinity or NaN, the scale is NaN - everything comes back as NaN, and whoever looks for
    overflow finds it - and ``error`` is left as it was: the step that is then skipped costs no residual.

    Two passes: reads 16 bytes an fp32 element with its error and writes 4 and a bit.

    Args:
        src: fp32, bf16 or fp16, flat, contiguous, n elements; read.
        out: uint8, ``sign_bytes(n)`` elements, at any address; written.
        error: fp32, n elements; read and written in place. None: c = src, and nothing is kept.
        norm: "l2" or "l1".
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: sizes, devices, layout, overlap, read-only memory, or another norm.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Tang et al., "1-bit Adam", arXiv:2102.02888, section 3.3 (error compensation, l2); Karimireddy et al.,
    arXiv:1901.09847, algorithm 1 (l1).
    """
    op = "pack_signs"
    if norm not in NORMS:
        raise AccelValueError(f"{op}: norm: expected one of {NORMS}, got {norm!r}")
    roles: list[checks.SizedRole] = [
        ("src", src, checks.FLOATS, False, None),
        ("out", out, checks.BYTES, True, _message(checks.numel_of(src))),
    ]
    if error is not None:
        roles.append(("error", error, checks.SINGLE, True, None))
    checks.check_sized(op, roles)
    chosen = choose_codec(op, src.device, backend)
    if src.numel() > 0:
        chosen.pack_signs(src, out, error, norm == "l2")
    mark_written(out, error)


def unpack_signs(src: Tensor, out: Tensor, *, backend: str | None = None) -> None:
    """A message back to floats: scale where the bit is 1, -scale where it is 0.

    Args:
        src: uint8, ``sign_bytes(n)`` elements, at any address; read.
        out: fp32, bf16 or fp16, flat, contiguous, n elements; written.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: sizes, devices, layout, overlap or read-only memory.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    _mean("unpack_signs", "src", [src], out, backend)


def mean_signs(sources: Sequence[Tensor], out: Tensor, *, backend: str | None = None) -> None:
    """The mean of messages, in one pass.

    Added in fp32, in the order of the messages, multiplied by the fp32 number nearest to 1 / k, rounded to the
    dtype of ``out``: the same bits on every back end.

    Args:
        sources: k >= 1 messages, uint8, ``sign_bytes(n)`` elements each, at any address; read.
        out: fp32, bf16 or fp16, flat, contiguous, n elements; written.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: no message, sizes, devices, layout, overlap or read-only memory.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    _mean("mean_signs", "sources", sources, out, backend)


def _mean(op: str, name: str, sources: Sequence[Tensor], out: Tensor, backend: str | None) -> None:
    roles = check_sources(op, sources, _message(checks.numel_of(out)))
    if name == "src":
        roles = [(name, *roles[0][1:])]
    checks.check_sized(op, [("out", out, checks.FLOATS, True, None), *roles])
    chosen = choose_codec(op, out.device, backend)
    if out.numel() > 0:
        chosen.mean_signs(sources, out)
    mark_written(out)

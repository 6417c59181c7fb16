"""Frozen weights at rest as quantized numbers: a store for `zero_core.Stores(frozen=...)`.

In: shards of frozen parameters. Out: what quantization has made of them, on the device where they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import zero_core as zero

from . import ops
from .errors import CompressConfigError, CompressStateError
from .hops import Done
from .settings import Quantized


@dataclass
class _Message:
    content: torch.Tensor
    numel: int
    dtype: torch.dtype


class QuantizedStore:
    """Keeps flat tensors as messages; a `zero_core.ShardStore` for parameters that nobody trains.

    Args:
        bits: "int8" or "int4".
        block_size: elements that share a scale.

    Raises:
        CompressConfigError: a value that cannot be honoured. From `put`: a dtype that cannot be quantized.

    Bytes per rank: 1 + 4 / block_size an element, or 1/2 + 4 / block_size, on the device of the tensor.
    Source: DeepSpeed's documentation of `zero_quantized_nontrainable_weights`.
    """

    is_lossy = True

    def __init__(self, bits: Quantized = "int8", block_size: int = 256) -> None:
        form = ops.block_format(bits, "bits", block_size)
        if form is None:
            raise CompressConfigError("bits: expected 'int8' or 'int4', got None")
        self.form = form
        self._messages: dict[str, _Message] = {}

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(message.content.numel() for message in self._messages.values())

    def put(self, name: str, values: torch.Tensor, start: int = 0) -> zero.Handle:
        """Keep values, or replace some from `start` on; the others in their blocks are quantized once more then."""
        if values.dtype not in ops.FLOATS:
            raise CompressConfigError(
                f"QuantizedStore: '{name}': expected fp32, bf16 or fp16, got {values.dtype}"
            )
        whole = values
        if name in self._messages and (start or values.numel() != self._known(name).numel):
            whole = self.view(name)
            whole[start : start + values.numel()].copy_(values)
        content = torch.empty(self.form.message_bytes(whole.numel()), dtype=torch.uint8, device=whole.device)
        ops.encode(whole.contiguous(), content, self.form)
        self._messages[name] = _Message(content, whole.numel(), whole.dtype)
        return Done()

    def fetch(self, name: str, out: torch.Tensor, start: int = 0) -> zero.Handle:
        """Fill `out`."""
        if not start and out.numel() == self._known(name).numel and out.dtype in ops.FLOATS:
            ops.decode(self._known(name).content, out, self.form)
        else:
            out.copy_(self.view(name)[start : start + out.numel()])
        return Done()

    def prefetch(self, name: str) -> None:
        """Everything is near."""

    def forget(self, name: str) -> None:
        """Nothing was done."""

    def view(self, name: str) -> torch.Tensor:
        """A copy of what is kept, in the dtype in which it came."""
        known = self._known(name)
        out = torch.empty(known.numel, dtype=known.dtype, device=known.content.device)
        ops.decode(known.content, out, self.form)
        return out

    def release(self, name: str) -> None:
        """Keep it no longer."""
        self._messages.pop(name, None)

    def _known(self, name: str) -> _Message:
        if name not in self._messages:
            raise CompressStateError(
                f"QuantizedStore: nothing is kept under '{name}'; expected one of {sorted(self._messages)[:4]}"
            )
        return self._messages[name]

"""How quantized tensors lie in a message, in bytes: pure arithmetic.

A message is one flat ``uint8`` tensor that can be sent as it is; how many elements it stands for is known to both
sides. Numbers of more than one byte are little-endian, and nothing is padded or aligned.

``BlockFormat``, n elements in blocks of ``block_size`` neighbours, the last one shorter where n wants it::

    scales          fp32, one a block
    minima          fp32, one a block; asymmetric only
    values          8 bits: one byte an element, two's complement (symmetric) or unsigned (asymmetric)
                    4 bits: byte j holds elements 2j (low half) and 2j + 1 (high half), plus 8 if symmetric;
                    the half that an odd n leaves over is 0

Signs, n elements::

    scale           fp32
    bits            element i is bit i % 8 of byte i // 8, 1 for +; bits past the last element are 0

Next: ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SCALE_BYTES = 4
# Note [Smallest scale]
# The smallest normal fp32 number. A block of elements as small as that is known to 2^-127, and the reciprocal of
# a scale never overflows.
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class BlockFormat:
    """How blocks are quantized: bits an element, elements a block, whether zero is the middle of the range."""

    bits: int
    block_size: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        """The smallest quantized value."""
        return -self.highest if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest quantized value: 127 or 7 where symmetric, else 255 or 15."""
        return int((1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1)

    @property
    def stored_zero(self) -> int:
        """What is added to a value before it is stored."""
        return 8 if self.symmetric and self.bits == 4 else 0

    def num_blocks(self, numel: int) -> int:
        """Blocks of ``numel`` elements."""
        return -(-numel // self.block_size)

    def scale_bytes(self, numel: int) -> int:
        """Bytes before the values: scales, and minima where there are any."""
        return SCALE_BYTES * self.num_blocks(numel) * (1 if self.symmetric else 2)

    def message_bytes(self, numel: int) -> int:
        """Bytes of the whole message."""
        return self.scale_bytes(numel) + (numel * self.bits + 7) // 8

    def with_bits(self, bits: int) -> BlockFormat:
        """The same blocks with another number of bits."""
        return replace(self, bits=bits)


def sign_message_bytes(numel: int) -> int:
    """Bytes of a message of signs."""
    return 0 if numel == 0 else SCALE_BYTES + (numel + 7) // 8

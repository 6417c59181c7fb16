"""Where a decoder's weights are in a checkpoint: for each module, tensors and the rows of them that are taken.

A family writes a table `decoder module -> checkpoint module`, with `{i}` for the layer and `{e}` for the expert. This
module turns an entry into `Source`s: pieces which, one below the other, are the decoder's full matrix. Pure: names and
ranges, no tensors. `weights` reads what of them a rank holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .spec import DecoderSpec


@dataclass(frozen=True)
class Source:
    """Rows of a checkpoint tensor.

    Attributes:
        name: of the tensor, without the family's prefix.
        rows: taken, in this order.
        size: rows that the tensor has.
        transposed: it holds the matrix with rows and columns exchanged (GPT-2).
        expert: it holds the matrices of all experts, and this one is taken; None: it holds one matrix.
    """

    name: str
    rows: tuple[range, ...]
    size: int
    transposed: bool = False
    expert: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows taken."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Joined:
    """A module that holds the decoder's sections (q, k, v; gate, up) as they are, one below the other.

    Attributes:
        transposed: as a Conv1D of GPT-2.
    """

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Grouped:
    """A module with q, k and v interleaved: for each key head its queries, the key, the value (NeoX, BLOOM, Falcon)."""

    name: str


@dataclass(frozen=True)
class Stacked:
    """A tensor with the matrices of all experts, `[experts, rows, columns]`; its name has no `.weight`."""

    name: str


Entry = str | tuple[str, ...] | Joined | Grouped | Stacked
Table = dict[str, Entry | list[Entry]]
"""Decoder module (`layers.{i}.attention.qkv`) to where it is: modules for each section, or one for all; a list is of
alternatives, of which the first that the checkpoint has is taken."""


def sources(
    table: Table, spec: DecoderSpec, module: str, parameter: str, sizes: tuple[int, ...]
) -> list[tuple[Source, ...]]:
    """Alternatives of where a parameter of a decoder module is.

    Args:
        table: the family's.
        spec: of the decoder.
        module: its name in the decoder, `layers.3.attention.qkv`.
        parameter: `weight` or `bias`.
        sizes: rows of each of its sections.

    Raises:
        KeyError: the family's table has no entry for this module.
    """
    numbers = dict(zip("ie", re.findall(r"(?<=\.)\d+(?=\.)", module), strict=False))
    key = re.sub(r"(?<=layers\.)\d+", "{i}", module, count=1)
    key = re.sub(r"(?<=experts\.)\d+", "{e}", key)
    entries = table[key]
    return [
        _entry_sources(entry, spec, parameter, sizes, numbers)
        for entry in (entries if isinstance(entries, list) else [entries])
    ]


def _entry_sources(
    entry: Entry, spec: DecoderSpec, parameter: str, sizes: tuple[int, ...], numbers: dict[str, str]
) -> tuple[Source, ...]:
    total = sum(sizes)
    if isinstance(entry, tuple):
        names = [name.format(**numbers) for name in entry]
        return tuple(
            Source(f"{name}.{parameter}", (range(size),), size)
            for name, size in zip(names, sizes, strict=True)
        )
    if isinstance(entry, Stacked):
        return (Source(entry.name.format(**numbers), (range(total),), total, expert=int(numbers["e"])),)
    if isinstance(entry, Grouped):
        rows = grouped_rows(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        return (Source(f"{entry.name.format(**numbers)}.{parameter}", rows, total),)
    joined = Joined(entry) if isinstance(entry, str) else entry
    transposed = joined.transposed and parameter == "weight"
    return (Source(f"{joined.name.format(**numbers)}.{parameter}", (range(total),), total, transposed),)


def grouped_rows(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[range, ...]:
    """Rows of an interleaved qkv in the order of q, k, v."""
    per_group = num_heads // num_kv_heads

    def head(group: int, place: int) -> range:
        first = (group * (per_group + 2) + place) * head_dim
        return range(first, first + head_dim)

    queries = tuple(head(h // per_group, h % per_group) for h in range(num_heads))
    keys = tuple(head(group, per_group) for group in range(num_kv_heads))
    values = tuple(head(group, per_group + 1) for group in range(num_kv_heads))
    return queries + keys + values


def pieces(parts: tuple[Source, ...], wanted: tuple[range, ...]) -> list[tuple[Source, range]]:
    """Where the wanted rows of a matrix are, which is made of `parts` one below the other.

    Returns:
        (source, rows of its tensor), in the order of `wanted`; neighbouring rows in one piece.
    """
    found: list[tuple[Source, range]] = []
    for rows in wanted:
        first = 0
        for part in parts:
            for held in part.rows:
                start, stop = max(rows.start, first), min(rows.stop, first + len(held))
                if start < stop:
                    piece = range(held.start + start - first, held.start + stop - first)
                    if found and found[-1][0] is part and found[-1][1].stop == piece.start:
                        piece = range(found.pop()[1].start, piece.stop)
                    found.append((part, piece))
                first += len(held)
    return found

"""Tensor parallelism: which part of each weight a rank holds, and the two collectives of a forward.

A matrix is cut by rows (column parallel: qkv, gate and up, embedding and logits) or by columns (row parallel: o, down),
so that a block needs one all-reduce after attention and one after the MLP. Layers ask for ranges and call
`all_reduce`; with one rank the ranges are whole and the collectives return what they get.

Source: Shoeybi et al., arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The part of a full matrix (or vector) that is held here.

    Attributes:
        sections: rows of the full matrix's sections (of q, k and v; of gate and up), which lie one below the other.
        rows: ranges of its rows that are held, one after another.
        width: its columns; None: it is a vector.
        cols: those that are held.
    """

    sections: tuple[int, ...]
    rows: tuple[range, ...]
    width: int | None = None
    cols: range | None = None

    @staticmethod
    def whole(*sections: int, width: int | None = None) -> Shard:
        """All of it."""
        cols = None if width is None else range(width)
        return Shard(sections, (range(sum(sections)),), width, cols)

    def take_rows(self, *rows: range) -> Shard:
        """Of every section its range of rows, counted from the section's first."""
        starts = [sum(self.sections[:i]) for i in range(len(self.sections))]
        moved = tuple(
            range(first + own.start, first + own.stop) for first, own in zip(starts, rows, strict=True)
        )
        return replace(self, rows=moved)

    def take_cols(self, cols: range) -> Shard:
        """A range of columns."""
        return replace(self, cols=cols)

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return sum(map(len, self.rows))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor held."""
        return (self.num_rows,) if self.cols is None else (self.num_rows, len(self.cols))

    @property
    def bias(self) -> Shard:
        """The same rows of a vector."""
        return Shard(self.sections, self.rows)


class TensorParallel:
    """A rank's place among those that share each layer.

    Args:
        group: of these ranks, or a mesh of one dimension; None: this process alone.
        ordered: sums in the order of the ranks whatever the size, so that a row's bits depend on that row alone.
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None = None, ordered: bool = False) -> None:
        self.group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.ordered = ordered

    def split(self, total: int, what: str) -> range:
        """This rank's equal part of `total`."""
        if total % self.size:
            raise ConfigError(
                f"{what}: expected a multiple of {self.size} ranks, got {total}; use fewer ranks"
            )
        part = total // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def kv_heads(self, total: int) -> range:
        """This rank's key heads: a part, or one that several ranks hold where there are more ranks than heads."""
        if total >= self.size:
            return self.split(total, "key and value heads")
        if self.size % total:
            raise ConfigError(
                f"key and value heads: expected a divisor of {self.size} ranks, got {total}; use {total} ranks"
            )
        head = self.rank * total // self.size
        return range(head, head + 1)

    def vocabulary(self, total: int) -> range:
        """This rank's tokens; the last ranks may have fewer."""
        part = -(-total // self.size)
        return range(min(self.rank * part, total), min((self.rank + 1) * part, total))

    def least(self, value: float) -> float:
        """The least of the ranks' values: what each measured for itself, and all must do alike."""
        if self.group is None:
            return value
        on_cpu = "cpu" in dist.get_backend_config(self.group)
        agreed = torch.tensor(value, dtype=torch.float64, device="cpu" if on_cpu else "cuda")
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.group)
        return float(agreed)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; may be in place."""
        if self.group is None:
            return x
        if self.ordered:
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self.group)
            return torch.stack(parts).sum(dim=0)
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def gather_vocabulary(self, logits_LV: Tensor, total: int) -> Tensor:
        """Logits of all tokens from each rank's `vocabulary`."""
        if self.group is None:
            return logits_LV
        part = -(-total // self.size)
        mine = torch.nn.functional.pad(logits_LV, (0, part - logits_LV.shape[1])).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts, dim=1)[:, :total]

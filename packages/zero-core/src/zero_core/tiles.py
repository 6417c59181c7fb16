"""Linear and embedding layers whose weight is cut into tiles, each a unit of its own.

In: a weight and a grid. Out: modules that compute what `nn.Linear` and `nn.Embedding` do, one tile after another, and
whose state dict is theirs. `tiling` puts them into a model; `units` makes a unit of every `Tile`, so that stage 3
gathers, uses and releases one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from .layout import ALIGN_ELEMENTS, round_up
from .units import OwnUnit

Range = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """PURE: a matrix cut along rows and columns; tiles go row by row."""

    rows: tuple[Range, ...]
    cols: tuple[Range, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix."""
        return self.rows[-1][1], self.cols[-1][1]

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Where each tile lies in the whole."""
        for top, bottom in self.rows:
            for left, right in self.cols:
                yield slice(top, bottom), slice(left, right)


def plan_grid(shape: tuple[int, int], max_elements: int, *, first: int) -> Grid:
    """PURE: cut a matrix along one dimension, then if need be the other, so that tiles are small enough.

    Cuts lie at multiples of `ALIGN_ELEMENTS` where the limit leaves room for that: matrix kernels work in blocks, and
    then a tile rounds as the whole does.

    Args:
        shape: rows and columns.
        max_elements: of a tile.
        first: the dimension to cut first; the other one is cut only if a single row (column) is too large.
    """
    other = shape[1 - first]
    pieces = (_cut(shape[first], max(1, max_elements // other)), _cut(other, max_elements))
    return Grid(pieces[first], pieces[1 - first])


def _cut(total: int, limit: int) -> tuple[Range, ...]:
    """`total` in the fewest ranges of at most `limit`, alike in size but for the last."""
    if total <= limit:
        return ((0, total),)
    align = ALIGN_ELEMENTS if limit >= ALIGN_ELEMENTS else 1
    count = math.ceil(total / (limit // align * align))
    size = round_up(math.ceil(total / count), align)
    return tuple((lo, min(lo + size, total)) for lo in range(0, total, size))


class _OnWeight(Protocol):
    """`F.linear` and `F.embedding`: input, weight, then the rest."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, /, *rest: Any) -> torch.Tensor: ...


class Tile(OwnUnit):
    """A part of a weight; its state dict is part of the tiled layer's."""

    def __init__(self, weight: nn.Parameter, init: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.weight = weight
        self.init = init

    def forward(self, function: _OnWeight, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        """`function(x, weight, *rest)`, with the weight whole."""
        return function(x, self.weight, *rest)

    def reset_parameters(self) -> None:
        """Fill the part as the untiled layer's constructor would have (`shard` calls it for a meta model)."""
        self.init(self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: see `Tiled`."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: see `Tiled`."""


class Tiled(nn.Module):
    """A layer with a weight in tiles; in a state dict, one `weight` of the untiled shape (a copy).

    Attributes:
        grid: the cuts.
        tiles: row by row.
    """

    def __init__(self, weight: torch.Tensor, grid: Grid, init: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.grid = grid
        self.tiles = nn.ModuleList()
        for place in grid.places():
            part = weight.detach()[place].clone(memory_format=torch.contiguous_format)
            self.tiles.append(Tile(nn.Parameter(part, requires_grad=weight.requires_grad), init))

    def parts(self) -> list[Tile]:
        """The tiles, row by row."""
        return [cast(Tile, tile) for tile in self.tiles]

    def whole_weight(self) -> torch.Tensor:
        """The untiled weight: a copy, which gradients flow through."""
        across = len(self.grid.cols)
        weights: list[torch.Tensor] = [tile.weight for tile in self.parts()]
        return torch.cat([torch.cat(weights[i : i + across], 1) for i in range(0, len(weights), across)])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        whole = self.whole_weight()
        destination[prefix + "weight"] = whole if keep_vars else whole.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        given = state_dict.get(key)
        if given is None:
            missing_keys += [key] if strict else []
        elif tuple(given.shape) != self.grid.shape:
            error_msgs.append(
                f"size mismatch for {key}: expected {self.grid.shape}, got {tuple(given.shape)}"
            )
        else:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._take(given, assign=assign)
        if strict:
            unexpected_keys += [name for name in state_dict if name.startswith(f"{prefix}tiles.")]
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def _take(self, whole: torch.Tensor, *, assign: bool) -> None:
        for tile, place in zip(self.parts(), self.grid.places(), strict=True):
            if assign:
                tile.weight = nn.Parameter(whole[place].clone(), requires_grad=tile.weight.requires_grad)
            else:
                tile.weight.copy_(whole[place])


class TiledLinear(Tiled):
    """`nn.Linear` in tiles: outputs of tiles along the output dimension are joined, along the input dimension added.

    Where only the output dimension is cut, outputs and the weight's gradient are bit for bit those of the untiled layer
    (if the matrix kernels round parts as the whole, as they do for cuts at multiples of a block); the input's gradient
    is a sum over tiles.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, grid: Grid) -> None:
        bound = 1 / math.sqrt(layer.in_features)
        init = partial(nn.init.uniform_, a=-bound, b=bound)  # what nn.Linear's constructor comes to
        super().__init__(layer.weight, grid, init)
        self._init = init
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("bias", layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [..., in_features] -> outputs [..., out_features]."""
        tiles, outputs = iter(self.parts()), []
        for lo, hi in self.grid.rows:
            part: torch.Tensor | None = None
            for left, right in self.grid.cols:
                bias = self.bias[lo:hi] if self.bias is not None and part is None else None
                columns = x if len(self.grid.cols) == 1 else x[..., left:right]
                product = next(tiles)(F.linear, columns, bias)
                part = product if part is None else part + product
            assert part is not None
            outputs.append(part)
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]

    def reset_parameters(self) -> None:
        """Fill the bias; tiles fill themselves."""
        if self.bias is not None:
            self._init(self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tiles={len(self.tiles)}"


class TiledEmbedding(Tiled):
    """`nn.Embedding` in tiles: tiles along the columns are joined, along the rows each gives the ids that it has."""

    def __init__(self, layer: nn.Embedding, grid: Grid) -> None:
        super().__init__(layer.weight, grid, nn.init.normal_)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        for tile, (rows, _) in zip(self.parts(), grid.places(), strict=True):
            tile.init = partial(_normal_but_padding, row=_row_in(self.padding_idx, rows.start, rows.stop))
        self.scale_grad_by_freq, self.sparse = layer.scale_grad_by_freq, layer.sparse

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [...] -> [..., embedding_dim]."""
        tiles, columns = iter(self.parts()), [ids.new_empty(0)] * len(self.grid.cols)
        for lo, hi in self.grid.rows:
            own = ((ids >= lo) & (ids < hi)).unsqueeze(-1)
            local = ids if lo == 0 else (ids - lo).clamp(min=0)
            local = local if hi == self.num_embeddings else local.clamp(max=hi - lo - 1)
            padding = _row_in(self.padding_idx, lo, hi)
            options = (padding, None, 2.0, self.scale_grad_by_freq, self.sparse)
            for column, before in enumerate(columns):
                found = next(tiles)(F.embedding, local, *options)
                columns[column] = found if lo == 0 else torch.where(own, found, before)
        return torch.cat(columns, -1)

    def reset_parameters(self) -> None:
        """Nothing: tiles fill themselves."""

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}, tiles={len(self.tiles)}"


def _row_in(row: int | None, start: int, stop: int) -> int | None:
    """A row of the whole weight as a row of a tile; None where it is in another."""
    return row - start if row is not None and start <= row < stop else None


@torch.no_grad()
def _normal_but_padding(weight: torch.Tensor, *, row: int | None) -> None:
    nn.init.normal_(weight)
    if row is not None:
        weight[row].zero_()

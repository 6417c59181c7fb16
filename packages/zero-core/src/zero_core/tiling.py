"""Large layers of a model become tiled ones, and full values of a tiled model have the names of the untiled one.

In: a plain model (or one under construction in `sharded_init`). Out: the same model with `tiles` in the place of layers
whose weight is over a budget; next comes `shard`. `Untiled` joins and cuts weights for `materialize`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .errors import ZeroConfigError
from .tiles import Grid, Tiled, TiledEmbedding, TiledLinear, plan_grid

logger = logging.getLogger(__name__)


def tile_linear(
    model: nn.Module, *, max_bytes: int, layers: Callable[[str, nn.Module], bool] | None = None
) -> nn.Module:
    """Cut linear and embedding layers whose weight is larger than `max_bytes` into tiles, each a unit of its own.

    At stage 3 a layer then never is whole: tiles are gathered, used and released one after another, in forward and
    backward. Call it on a plain model, or inside `sharded_init`, before the optimizer is built and before `shard`.
    Linear layers are cut along the output dimension, embeddings along the columns; along the other one too if a single
    row (column) is over the budget. State dicts keep the names and shapes of the untiled model; parameters are
    `<layer>.tiles.<i>.weight`, and layers have no `weight` any more: initialise and tie before.

    Args:
        model: what to change in place.
        max_bytes: of a tile, in the dtype that the weight has now.
        layers: `(name, module) -> bool`, which layers may be cut; None: every `nn.Linear` and `nn.Embedding`.
            Subclasses are left alone, since they may compute something else.

    Returns:
        `model`, or the tiled layer where the model is one large layer itself.

    Raises:
        ZeroConfigError: a weight over the budget is tied to another module's, an embedding has `max_norm` (which looks
            at whole rows), the model is sharded already, or `max_bytes` is too small for one element; nothing was
            changed.

    Bytes per rank at stage 3: of parameters at a time, one tile in use and what `Overlap` gathers ahead (one largest
    unit, by default), instead of whole layers. Outputs are not tiled.
    Source: ZeRO-Infinity (Rajbhandari et al., 2021), section 5.1.3, memory-centric tiling.
    """
    if any(getattr(module, "_zero_core_sharded", None) is not None for module in model.modules()):
        raise ZeroConfigError("tile_linear: the model is sharded already; tile it before shard")
    chosen = {
        module: _grid(name, module, max_bytes)
        for name, module in model.named_modules()
        if _is_large(name, module, max_bytes) and (layers is None or layers(name, module))
    }
    _check_ties(model, set(chosen))
    tiled = {module: _tiled(module, grid) for module, grid in chosen.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in tiled:
                parent.add_module(name, tiled[child])
    return tiled.get(model, model)


def _is_large(name: str, module: nn.Module, max_bytes: int) -> bool:
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return False
    large: bool = module.weight.numel() * module.weight.element_size() > max_bytes
    if large and type(module) not in (nn.Linear, nn.Embedding):
        logger.warning("tile_linear: '%s' is a %s and stays whole", name, type(module).__name__)
        return False
    return large


def _grid(name: str, module: nn.Module, max_bytes: int) -> Grid:
    assert isinstance(module, (nn.Linear, nn.Embedding))
    rows, cols = module.weight.shape
    size = module.weight.element_size()
    if max_bytes < size:
        raise ZeroConfigError(
            f"tile_linear(max_bytes=...): expected at least {size}, an element of '{name}', got {max_bytes}"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ZeroConfigError(
            f"tile_linear: the embedding '{name}' has max_norm, which looks at whole rows; leave it out with layers="
        )
    grid = plan_grid((rows, cols), max_bytes // size, first=0 if isinstance(module, nn.Linear) else 1)
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq and len(grid.rows) > 1:
        raise ZeroConfigError(
            f"tile_linear: the embedding '{name}' has scale_grad_by_freq, and a column of it is over the budget: "
            f"tiles of rows would count each other's ids; raise max_bytes to {rows * size}"
        )
    return grid


def _tiled(module: nn.Module, grid: Grid) -> Tiled:
    assert isinstance(module, (nn.Linear, nn.Embedding))
    made = TiledLinear(module, grid) if isinstance(module, nn.Linear) else TiledEmbedding(module, grid)
    return made.train(module.training)


def _check_ties(model: nn.Module, chosen: set[nn.Module]) -> None:
    """Refuse weights that several modules hold: their tiles would have to be cut alike and stay whole together."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is not None:
                holders.setdefault(id(param), []).append((f"{prefix}.{name}" if prefix else name, module))
    for held in holders.values():
        if len(held) > 1 and any(module in chosen and n.endswith("weight") for n, module in held):
            names = ", ".join(f"'{name}'" for name, _ in held)
            raise ZeroConfigError(
                f"tile_linear: {names} are one tied weight, which cannot be tiled; untie it, raise max_bytes, or leave "
                "it out with layers=lambda name, module: ..."
            )


@dataclass(frozen=True)
class _Place:
    """Where a tile's parameter lies in the untiled weight."""

    name: str
    shape: tuple[int, int]
    index: tuple[slice, slice]
    num_tiles: int


class Untiled:
    """Between the parameters of a model and the names of its state dict, where some layers are tiled."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, _Place] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            for i, index in enumerate(module.grid.places() if isinstance(module, Tiled) else ()):
                place = _Place(f"{dot}weight", module.grid.shape, index, len(module.tiles))
                self._places[f"{dot}tiles.{i}.weight"] = place
        self._open: dict[str, tuple[torch.Tensor, int]] = {}

    def name(self, param_name: str) -> str:
        """The state dict's name for a parameter."""
        place = self._places.get(param_name)
        return param_name if place is None else place.name

    def part(self, param_name: str, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A parameter's values in a state dict."""
        place = self._places.get(param_name)
        return state_dict[param_name] if place is None else state_dict[place.name][place.index]

    def join(self, names: list[str], tensor: torch.Tensor) -> Iterator[tuple[list[str], torch.Tensor]]:
        """What a parameter adds to a state dict: itself; of a tiled weight, all of it once the last tile is there."""
        place = self._places.get(names[0])
        if place is None:
            yield names, tensor
            return
        whole, count = self._open.get(place.name) or (tensor.new_empty(place.shape), 0)
        whole[place.index].copy_(tensor)
        self._open[place.name] = whole, count + 1
        if count + 1 == place.num_tiles:
            del self._open[place.name]
            yield [self.name(name) for name in names], whole

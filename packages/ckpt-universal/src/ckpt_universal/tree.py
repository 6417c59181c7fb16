"""A state tree -> named parts of logical tensors, and what is left when they are taken out.

In: nested dictionaries and lists of tensors, `DTensor`s, shards, numbers, and objects with `state_dict`. Out: a `Part`
for each tensor of which this rank holds something, and the tree with a `TensorRef` in each one's place. A tensor's
name is its path, joined by dots. Next: `plan` for saving, `load` for the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .boxes import Box, flat_boxes, whole_box
from .errors import ConfigError
from .values import MAX_DEPTH, PerRankValues, TensorRef


@dataclass(frozen=True)
class Shard:
    """This rank's part of a logical tensor.

    Attributes:
        global_shape: shape of the whole tensor.
        dtype: its dtype.
        offsets: where the part begins: one index for each dim; or `(start,)`, an element of the flattened tensor.
        local: the part: of as many dims as the tensor; or 1-D, elements of the flattened tensor.
    """

    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    local: torch.Tensor


class ShardLike(Protocol):
    """What describes itself as `Shard` does; no class needs to be known here."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """See `Shard`."""

    @property
    def dtype(self) -> torch.dtype:
        """See `Shard`."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """See `Shard`."""

    @property
    def local(self) -> torch.Tensor:
        """See `Shard`."""


class Stateful(Protocol):
    """An object that gives its state as a tree and takes it back: a module, an optimizer, a scheduler, a loader."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state over."""


def first_or_modulo(saved: tuple[Any, ...], rank: int, world: int) -> Any:
    """The value of the same rank, or of `rank` modulo the number of ranks that saved."""
    return saved[rank % len(saved)]


@dataclass
class PerRank:
    """A value that each rank has for itself, such as the state of its random numbers.

    Attributes:
        value: this rank's; anything but large tensors.
        redeal: `(values by rank that saved, rank, world) -> value`, asked when another number of ranks loads.
    """

    value: Any = None
    redeal: Callable[[tuple[Any, ...], int, int], Any] = first_or_modulo


@dataclass(slots=True)
class Part:
    """What this rank holds of one logical tensor.

    Attributes:
        pieces: boxes of the tensor, each with a view of its values (of the box's shape, on any device).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[Box, torch.Tensor]]

    @property
    def whole(self) -> torch.Tensor:
        """The tensor, where its one piece is all of it."""
        ((_, values),) = self.pieces
        return values


Boxes = dict[tuple[int, Any, tuple[int, ...]], "tuple[Box | None, Any]"]
"""Where this rank's part of a `DTensor` lies, by its mesh's id, placements and shape; with the mesh, to keep its id."""


@dataclass
class Flat:
    """A tree, flattened.

    Attributes:
        parts: by name.
        values: the tree with `TensorRef` in place of tensors, and `PerRankValues` of one in place of `PerRank`.
        boxes: see `Boxes`; a few serve all, and the next tree, too.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    values: Any = None
    boxes: Boxes = field(default_factory=dict)


@torch.no_grad()  # a DTensor's part need not be recorded
def flatten(state: Mapping[str, Any], boxes: Boxes | None = None) -> Flat:
    """Take a state tree apart.

    Args:
        state: the tree.
        boxes: of an earlier one; grows.

    Raises:
        ConfigError: two leaves have one name, a tensor cannot be stored, or it is nested too deeply.
    """
    flat = Flat(boxes={} if boxes is None else boxes)
    flat.values = _walk(state, "", 0, flat)
    return flat


def _walk(node: Any, name: str, depth: int, flat: Flat) -> Any:
    """`name`: of the node, and a dot."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{name[:100]}...: nested deeper than {MAX_DEPTH}; is it a cycle?")
    if is_tensor_leaf(node):
        name = name[:-1]
        if name in flat.parts:
            raise ConfigError(f"two tensors have the name {name!r}; rename one of the keys on the way to it")
        flat.parts[name] = part_of(node, name, flat.boxes)
        return TensorRef(name)
    if isinstance(node, PerRank):
        return PerRankValues((node.value,))
    if is_stateful(node):
        return _walk(node.state_dict(), name, depth, flat)
    depth += 1
    if isinstance(node, Mapping):
        return {key: _walk(each, f"{name}{key}.", depth, flat) for key, each in node.items()}
    if type(node) is list:
        return [_walk(each, f"{name}{at}.", depth, flat) for at, each in enumerate(node)]
    if isinstance(node, tuple):
        return tuple(_walk(each, f"{name}{at}.", depth, flat) for at, each in enumerate(node))
    return node


def join(path: tuple[str, ...]) -> str:
    """The name of the tensor at a path."""
    return ".".join(path)


def is_tensor_leaf(node: Any) -> bool:
    """Whether a node of a tree is (a part of) a tensor."""
    # By hand: `isinstance` with a protocol takes longer than all the rest of a walk.
    return isinstance(node, torch.Tensor) or (
        hasattr(node, "global_shape")
        and hasattr(node, "offsets")
        and hasattr(node, "local")
        and hasattr(node, "dtype")
        and not isinstance(node, type)
    )


def is_stateful(node: Any) -> TypeGuard[Stateful]:
    """Whether a node of a tree gives and takes a state."""
    return callable(getattr(node, "state_dict", None)) and callable(getattr(node, "load_state_dict", None))


def part_of(leaf: Any, name: str, boxes: Boxes | None = None) -> Part:
    """What a leaf says that this rank holds; the views share its memory.

    Args:
        leaf: a tensor, a `DTensor`, or what describes itself as `Shard` does.
        name: of the tensor.
        boxes: of other leaves of the tree.

    Raises:
        ConfigError: its description contradicts itself, or it is of a kind that cannot be stored.
    """
    if isinstance(leaf, DTensor):
        return _part_of_dtensor(leaf, name, {} if boxes is None else boxes)
    if isinstance(leaf, torch.Tensor):
        tensor = leaf.detach()
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConfigError(f"{name}: a tensor of layout {tensor.layout} cannot be stored; make it dense")
        return Part(name, tuple(tensor.shape), tensor.dtype, [(whole_box(tensor.shape), tensor)])
    shape, offsets, local = tuple(leaf.global_shape), tuple(leaf.offsets), leaf.local.detach()
    if local.dtype != leaf.dtype:
        raise ConfigError(f"{name}: the shard says {leaf.dtype} and its values are {local.dtype}")
    if local.dim() == len(shape) == len(offsets):
        box = Box(offsets, tuple(local.shape))
        pieces = [(box, local)] if local.numel() else []
        valid = box.within(shape)
    elif local.dim() == len(offsets) == 1:
        numel = 1
        for size in shape:
            numel *= size
        start, stop = offsets[0], offsets[0] + local.numel()
        valid = start >= 0 and stop <= numel
        pieces = list(_flat_pieces(shape, start, local)) if valid else []
    else:
        raise ConfigError(
            f"{name}: expected a 1-D part with one offset, or one of {len(shape)} dims with as many offsets, got shape "
            f"{tuple(local.shape)} and offsets {offsets}"
        )
    if not valid:
        raise ConfigError(f"{name}: part {tuple(local.shape)} at {offsets} leaves the tensor {shape}")
    return Part(name, shape, leaf.dtype, pieces)


def _flat_pieces(
    shape: tuple[int, ...], start: int, local: torch.Tensor
) -> Iterator[tuple[Box, torch.Tensor]]:
    at = 0
    for box in flat_boxes(shape, start, start + local.numel()):
        yield box, local[at : at + box.numel].view(box.sizes)
        at += box.numel


def _part_of_dtensor(leaf: DTensor, name: str, boxes: Boxes) -> Part:
    shape = tuple(leaf.shape)
    local: torch.Tensor = leaf.to_local()
    if local.requires_grad:
        local = local.detach()
    key = (id(leaf.device_mesh), leaf.placements, shape)
    if key not in boxes:
        if any(placement.is_partial() for placement in leaf.placements):
            raise ConfigError(
                f"{name}: a DTensor with partial sums; call .redistribute() to sum them before saving"
            )
        holds_some = leaf.device_mesh.get_coordinate() is not None
        boxes[key] = _box_of(leaf) if holds_some else None, leaf.device_mesh
    box = boxes[key][0]
    if box is None or not local.numel():
        return Part(name, shape, leaf.dtype, [])
    if box.sizes != tuple(local.shape):
        raise ConfigError(f"{name}: expected a local part of shape {box.sizes}, got {tuple(local.shape)}")
    return Part(name, shape, leaf.dtype, [(box, local)])


def _box_of(leaf: DTensor) -> Box:
    """Where this rank's part lies: each mesh dim cuts what the ones before it have left, as `torch.chunk` does."""
    mesh, shape = leaf.device_mesh, tuple(leaf.shape)
    if not all(type(each) is Split or each.is_replicate() for each in leaf.placements):
        sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, leaf.placements)
        box = Box(tuple(offsets), tuple(sizes))
        _check_is_box(leaf, box)
        return box
    start, size = [0] * len(shape), list(shape)
    for axis, placement in enumerate(leaf.placements):
        if isinstance(placement, Split):
            dim = placement.dim % len(shape)
            chunk = -(-size[dim] // mesh.size(axis))
            low = min(size[dim], chunk * mesh.get_local_rank(axis))
            start[dim] += low
            size[dim] = min(size[dim], low + chunk) - low
    return Box(tuple(start), tuple(size))


def _check_is_box(leaf: DTensor, box: Box) -> None:
    """Refuse a part whose elements lie apart in the tensor, as those of a column do after `reshape(-1)`."""
    coordinate = leaf.device_mesh.get_coordinate()
    assert coordinate is not None
    where = [torch.arange(size) for size in leaf.shape]
    for axis, placement in enumerate(leaf.placements):
        if not placement.is_replicate():
            dim = placement.dim % len(where)  # type: ignore[attr-defined]  # of every kind of shard
            pieces, _ = placement._split_tensor(  # type: ignore[attr-defined]
                where[dim], leaf.device_mesh.size(axis), with_padding=False, contiguous=False
            )
            where[dim] = pieces[coordinate[axis]]
    for dim, (found, start, size) in enumerate(zip(where, box.start, box.sizes, strict=True)):
        if size and not torch.equal(found, torch.arange(start, start + size)):
            raise ConfigError(
                f"a DTensor of shape {tuple(leaf.shape)}, placed as {leaf.placements}: what this rank holds of "
                f"dimension {dim} lies apart; call .redistribute() to have it in one piece"
            )

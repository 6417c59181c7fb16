"""What a state tree wants from a checkpoint: the way back of `tree.flatten`, without touching anything yet.

In: the tree to load into, and the tree of values of the checkpoint. Out: for each tensor the `Part` to fill, and one
call that puts values in place and hands objects their state, to be made when all tensors have been read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .errors import MismatchError
from .index import TensorRecord
from .tree import Boxes, Part, PerRank, Stateful, is_stateful, is_tensor_leaf, join, part_of
from .values import DTYPES, PerRankValues, TensorRef

Path = tuple[str, ...]
Apply = Callable[[], Any]
_NOTHING = object()


@dataclass
class Targets:
    """Everything that a load is to do on this rank.

    Attributes:
        parts: by name in the state.
        missing: paths of values that the checkpoint lacks.
        unexpected: paths of values of the checkpoint that the state lacks.
        chosen: whether the value at a path is to be replaced; the others stay as they are.
        apply: puts values in place; called when the parts have been filled.
        matched: some value was chosen.
        boxes: see `tree.Flat`.
    """

    rank: int
    world: int
    tensors: Mapping[str, TensorRecord]
    parts: dict[str, Part] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    chosen: Callable[[str], bool] = lambda path: True
    apply: Apply = lambda: None
    matched: bool = False
    boxes: Boxes = field(default_factory=dict)


@torch.no_grad()  # a DTensor's part need not be recorded
def find_targets(
    into: Mapping[str, Any],
    values: Any,
    tensors: Mapping[str, TensorRecord],
    rank: int,
    world: int,
    chosen: Callable[[str], bool] = lambda path: True,
) -> Targets:
    """Plan a load into a tree.

    Args:
        into: the tree; its dictionaries and lists are changed in place by `apply`.
        values: the checkpoint's tree.
        tensors: the checkpoint's tensors, by name.
        rank: of those who load.
        world: how many load.
        chosen: see `Targets`.

    Raises:
        ConfigError: the tree cannot be understood.
    """
    targets = Targets(rank, world, tensors, chosen=chosen)
    targets.apply = _visit(targets, into, values, (), own=False)
    return targets


def _visit(targets: Targets, node: Any, saved: Any, path: Path, *, own: bool) -> Apply:
    """Plan one node; `own`: it is part of a state dict that was made for us, which may grow."""
    if is_tensor_leaf(node):
        _want(targets, node, path)
        return lambda: node
    if isinstance(node, PerRank):
        return _per_rank(targets, node, saved, path)
    if is_stateful(node):
        return _stateful(targets, node, saved, path)
    if isinstance(node, Mapping):
        return _mapping(targets, node, saved, path, own=own)
    if type(node) in (list, tuple):
        return _sequence(targets, node, saved, path, own=own)
    if not targets.chosen(join(path)):
        return lambda: node
    if saved is _NOTHING or isinstance(saved, TensorRef):
        targets.missing.append(join(path))
        return lambda: node
    targets.matched = True
    value = _value(targets, saved, path)
    return lambda: value


def _want(targets: Targets, leaf: Any, path: Path) -> None:
    part = part_of(leaf, join(path), targets.boxes)
    if any(view.is_meta for _, view in part.pieces):
        raise MismatchError(
            f"{part.name}: it is on the meta device and has no memory to load into; use to_empty() first"
        )
    targets.parts[part.name] = part


def _per_rank(targets: Targets, node: PerRank, saved: Any, path: Path) -> Apply:
    if not targets.chosen(join(path)):
        return lambda: node
    if not isinstance(saved, PerRankValues):
        targets.missing.append(join(path))
        return lambda: node
    targets.matched = True
    values = saved.values
    same = len(values) == targets.world
    value = values[targets.rank] if same else node.redeal(values, targets.rank, targets.world)

    def apply() -> PerRank:
        node.value = value
        return node

    return apply


def _stateful(targets: Targets, node: Stateful, saved: Any, path: Path) -> Apply:
    state = node.state_dict()
    if saved is _NOTHING and not _has_tensors(state):
        if targets.chosen(join(path)):
            targets.missing.append(join(path))
        return lambda: node
    if isinstance(node, Optimizer):
        _make_room(targets, node, state, saved, path)
    # A module has no use for what it does not know; tensors have names of their own, whatever the tree is like.
    inner = _visit(targets, state, saved, path, own=not isinstance(node, nn.Module))
    if not targets.chosen(join(path)) and not targets.chosen(join(path) + "."):
        prefix = join(path) + "."
        if not (isinstance(node, Optimizer) and any(each.startswith(prefix) for each in _chosen(targets))):
            return lambda: node  # of a module, tensors alone may have been chosen: they are filled in place

    def apply() -> Stateful:
        node.load_state_dict(inner())
        return node

    return apply


def _make_room(targets: Targets, optimizer: Optimizer, state: dict[str, Any], saved: Any, path: Path) -> None:
    """State that a torch optimizer makes at its first step: tensors for it, shaped and sharded as its parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    stored = saved.get("state", {}) if isinstance(saved, Mapping) else {}
    state["state"] = {index: dict(have) for index, have in state["state"].items()}  # the optimizer's own stay
    for index, entries in stored.items() if isinstance(stored, Mapping) else ():
        if not (type(index) is int and index < len(params) and isinstance(entries, Mapping)):
            continue
        have = state["state"].setdefault(index, {})
        for key, ref in entries.items():
            record = targets.tensors.get(ref.name) if isinstance(ref, TensorRef) else None
            name = join((*path, "state", str(index), key))
            if key not in have and record is not None and targets.chosen(name):
                have[key] = _like(params[index], record)


def _chosen(targets: Targets) -> list[str]:
    return [name for name in targets.parts if targets.chosen(name)]


def _like(param: torch.Tensor, record: TensorRecord) -> torch.Tensor:
    dtype = DTYPES[record.dtype]
    if isinstance(param, DTensor) and tuple(param.shape) == record.shape:
        return torch.zeros_like(param, dtype=dtype)
    device = param.device if record.shape else "cpu"
    return torch.zeros(record.shape, dtype=dtype, device=device)


def _mapping(targets: Targets, node: Mapping[str, Any], saved: Any, path: Path, *, own: bool) -> Apply:
    stored = saved if isinstance(saved, Mapping) else {}
    inner = {
        key: _visit(targets, each, stored.get(key, _NOTHING), (*path, str(key)), own=own)
        for key, each in node.items()
    }
    for key, each in stored.items():
        if key not in node and own:
            value = _value(targets, each, (*path, str(key)))
            inner[key] = _giving(value)
        elif key not in node and not _has_tensors(each):  # tensors are compared by name
            targets.unexpected.append(join((*path, str(key))))

    def apply() -> Any:
        found = {key: call() for key, call in inner.items()}
        if not isinstance(node, dict):
            return found
        for key, value in found.items():  # `update` of a Counter adds
            node[key] = value
        return node

    return apply


def _sequence(targets: Targets, node: Any, saved: Any, path: Path, *, own: bool) -> Apply:
    stored = list(saved) if isinstance(saved, (list, tuple)) else []
    inner = [
        _visit(targets, each, stored[at] if at < len(stored) else _NOTHING, (*path, str(at)), own=own)
        for at, each in enumerate(node)
    ]
    for at in range(len(node), len(stored)):
        if own or isinstance(node, list):
            value = _value(targets, stored[at], (*path, str(at)))
            inner.append(_giving(value))
        else:
            targets.unexpected.append(join((*path, str(at))))

    def apply() -> Any:
        found = [call() for call in inner]
        if isinstance(node, list):
            node[:] = found
            return node
        return tuple(found)

    return apply


def _giving(value: Any) -> Apply:
    return lambda: value


def _value(targets: Targets, saved: Any, path: Path) -> Any:
    """A value of the checkpoint that the state has no place for: whole tensors where it has any."""
    if isinstance(saved, TensorRef):
        record = targets.tensors[saved.name]
        tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        targets.parts[saved.name] = part_of(tensor, saved.name)
        return tensor
    if isinstance(saved, PerRankValues):
        return saved.values[targets.rank % len(saved.values)]
    if isinstance(saved, dict):
        return {key: _value(targets, each, (*path, str(key))) for key, each in saved.items()}
    if isinstance(saved, (list, tuple)):
        return type(saved)(_value(targets, each, (*path, str(at))) for at, each in enumerate(saved))
    return saved


def _has_tensors(saved: Any) -> bool:
    if isinstance(saved, TensorRef) or is_tensor_leaf(saved):
        return True
    if isinstance(saved, Mapping):
        return any(_has_tensors(each) for each in saved.values())
    return isinstance(saved, (list, tuple)) and any(_has_tensors(each) for each in saved)


def whole_tree(values: Any, tensors: Mapping[str, TensorRecord], rank: int, world: int) -> Targets:
    """Plan to read everything: `apply` returns the tree, with whole tensors on the CPU."""
    targets = Targets(rank, world, tensors)
    tree = _value(targets, values, ())
    targets.apply = lambda: tree
    return targets

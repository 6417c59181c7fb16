"""Which parameters are gathered, reduced and freed together, and at which modules that happens.

In: an `nn.Module` and the user's choice of units. Out: `UnitSpec`s in order of definition. Only reads the module
tree; moves no data. Next: `flat_unit` gives each spec its flat buffer.

By default a unit is one of the model's repeated blocks (two or more children of one class in a `ModuleList` or
`Sequential`, or in children of theirs that are never called themselves), so that a branch taken inside a block never
changes which collectives run. A leaf outside the blocks that is as large as a block (an embedding, an output head) is a
unit of its own; the rest belongs to the root. An `OwnUnit` and an embedding with sparse gradients (unless tied) are one
whatever the choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .errors import ZeroConfigError

UnitChoice = type[nn.Module] | Iterable[type[nn.Module]] | Callable[[str, nn.Module], bool] | None


class OwnUnit(nn.Module):
    """A module that is a unit of its own, inside other units too: nothing outside computes with its parameters."""


@dataclass(frozen=True)
class UnitSpec:
    """Parameters of one dtype and one `requires_grad`, and the modules whose forward needs them.

    Attributes:
        name: name of the unit's module ("(root)" for the rest), with what sets it apart where a module has more.
        params: each distinct parameter with all its names.
        holders: of each, the modules that hold it, and its name there.
        anchors: modules at whose entry the unit must be whole and at whose exit it may be freed.
        stays_whole: the user wants it so, at stage 3.
        sparse: it is the weight of an embedding whose gradient is sparse by rows.
    """

    name: str
    params: tuple[tuple[tuple[str, ...], nn.Parameter], ...]
    holders: tuple[tuple[tuple[nn.Module, str], ...], ...]
    anchors: tuple[nn.Module, ...]
    trainable: bool
    stays_whole: bool = False
    sparse: bool = False


def find_units(model: nn.Module, units: UnitChoice = None, whole: UnitChoice = None) -> list[UnitSpec]:
    """Split the parameters of `model` into units; every parameter is in exactly one.

    A parameter that several modules hold goes to the innermost unit that contains all of them.

    Args:
        model: any module.
        units: modules that are units.
        whole: modules that are units too, and whose parameters stay whole.

    Raises:
        ZeroConfigError: a choice matches no module, or is neither classes nor a predicate.
    """
    names, owners = _names_and_owners(model)
    stay = {} if whole is None else select_modules(model, whole, "Placement(whole_modules=...)")
    sparse = {
        name
        for name, module in model.named_modules()
        if name and isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }
    boundaries = _boundaries(model, units) | set(stay) | sparse
    boundaries |= {name for name, module in model.named_modules() if name and isinstance(module, OwnUnit)}
    grouped: dict[tuple[str, torch.dtype, bool], list[nn.Parameter]] = {}
    for param in names:
        home = _home(owners[param], boundaries)
        grouped.setdefault((home, param.dtype, param.requires_grad), []).append(param)

    kinds = Counter(home for home, _, _ in grouped)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    specs = []
    for (home, dtype, trainable), params in sorted(grouped.items(), key=lambda item: order[item[0][0]]):
        anchors = [model.get_submodule(home)]
        if home not in boundaries:  # the root's own: also reachable by calling a submodule directly
            anchors += [module for param in params for _, module in owners[param]]
        label = home or "(root)"
        if kinds[home] > 1:
            label += f"[{str(dtype).removeprefix('torch.')}{'' if trainable else ', frozen'}]"
        specs.append(
            UnitSpec(
                label,
                tuple((tuple(names[p]), p) for p in params),
                tuple(_holders(names[p], owners[p]) for p in params),
                tuple(dict.fromkeys(anchors)),
                trainable,
                stays_whole=home in stay,
                sparse=home in sparse,
            )
        )
    return specs


def _names_and_owners(
    model: nn.Module,
) -> tuple[dict[nn.Parameter, list[str]], dict[nn.Parameter, list[tuple[str, nn.Module]]]]:
    """Every name of every parameter, and the modules (with their names) that hold it, in order of definition."""
    names: dict[nn.Parameter, list[str]] = {}
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module._parameters.items():
            if param is not None:
                names.setdefault(param, []).append(f"{prefix}.{name}" if prefix else name)
                owners.setdefault(param, []).append((prefix, module))
    return names, owners


def _holders(names: list[str], owners: list[tuple[str, nn.Module]]) -> tuple[tuple[nn.Module, str], ...]:
    """The modules that hold a parameter, each once, and its name there."""
    held = ((owner, name.rpartition(".")[2]) for name, (_, owner) in zip(names, owners, strict=True))
    return tuple(dict.fromkeys(held))


def select_modules(
    model: nn.Module,
    choice: type[nn.Module] | Iterable[type[nn.Module]] | Callable[[str, nn.Module], bool],
    argument: str,
) -> dict[str, nn.Module]:
    """Submodules of `model`, by name, that are of some classes or that a predicate accepts.

    Raises:
        ZeroConfigError: nothing matches, or `choice` is neither; the message calls it `argument`.
    """
    chosen: dict[str, nn.Module]
    if isinstance(choice, type) or not callable(choice):
        classes: tuple[type[nn.Module], ...] = (choice,) if isinstance(choice, type) else tuple(choice)
        wrong = [c for c in classes if not (isinstance(c, type) and issubclass(c, nn.Module))]
        if wrong or not classes:
            raise ZeroConfigError(
                f"{argument}: expected nn.Module classes or a predicate (name, module) -> bool, got {wrong or choice!r}"
            )
        chosen = {
            name: module for name, module in model.named_modules() if name and isinstance(module, classes)
        }
        wanted = ", ".join(c.__name__ for c in classes)
    else:
        chosen = {name: module for name, module in model.named_modules() if name and choice(name, module)}
        wanted = "the predicate"
    if not chosen:
        present = sorted({type(module).__name__ for module in model.modules()})
        raise ZeroConfigError(
            f"{argument}: no module matches {wanted}; the model is made of {', '.join(present)}"
        )
    return chosen


def _boundaries(model: nn.Module, units: UnitChoice) -> set[str]:
    """Names of the modules that are units; the root ("") is not among them."""
    return _repeated_blocks(model) if units is None else set(select_modules(model, units, "units"))


def _repeated_blocks(model: nn.Module) -> set[str]:
    blocks: dict[str, nn.Module] = {}
    for prefix, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or _inside(prefix, blocks):
            continue
        filled = {
            n: child
            for n, child in _entered(container)
            if _num_elements(child) and not isinstance(child, OwnUnit)
        }
        repeats = Counter(type(child) for child in filled.values())
        for name, child in filled.items():
            if repeats[type(child)] > 1:
                blocks[f"{prefix}.{name}" if prefix else name] = child
    if not blocks:
        return set()
    largest = max(_num_elements(block) for block in blocks.values())
    leaves = {
        name
        for name, module in model.named_modules()
        if name
        and not _inside(name, blocks)
        and not list(module.children())
        and _num_elements(module) >= largest
    }
    return set(blocks) | leaves


def _entered(container: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children of a container, by name; in place of those without a forward (holders, lists) what they hold."""
    for name, child in container.named_children():
        if "forward" in vars(child) or type(child).forward is not nn.Module.forward:
            yield prefix + name, child
        else:
            yield from _entered(child, f"{prefix}{name}.")


def _num_elements(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _inside(name: str, boundaries: Iterable[str]) -> bool:
    return any(name == b or name.startswith(b + ".") for b in boundaries)


def _home(owners: list[tuple[str, nn.Module]], boundaries: set[str]) -> str:
    """The unit of a parameter, given the modules that hold it."""
    first, module = owners[0]
    if isinstance(module, OwnUnit) and all(owner is module for _, owner in owners):
        return first  # reached through several names, perhaps, but always entered itself
    return _common_boundary([prefix for prefix, _ in owners], boundaries)


def _common_boundary(prefixes: list[str], boundaries: set[str]) -> str:
    """The innermost boundary that contains every one of the modules named; "" is the root."""
    path = prefixes[0].split(".") if prefixes[0] else []
    for depth in range(len(path), 0, -1):
        candidate = ".".join(path[:depth])
        if candidate in boundaries and all(_inside(prefix, (candidate,)) for prefix in prefixes):
            return candidate
    return ""

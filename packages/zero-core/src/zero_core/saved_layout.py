"""What the state dict of a rank's optimizer says of itself, and whether it fits the optimizer that is to load it.

In: an optimizer's parameters and where they lie. Out: a `Layout`, of plain values that any file keeps; of two of them,
what does not fit; and state by the numbers of the optimizer that loads it. Next: ranks agree (`agreement`), and
`optimizer` loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from .claims import Member
from .steppers import ShardSlot

Layout = dict[str, Any]
"""Keys:
- rank, world_size, stage: of whom it is. At stage 0 every rank has all: it is rank 0 of 1.
- groups: for each group the names of its parameters, whichever ranks they lie on.
- frozen: those among them that are not stepped.
- numbered: for each group the names that this rank has state of, in the order in which torch numbers them.
- parts: name -> [first element, number of elements] of this rank's part of the master.
- owners: name -> the rank that steps it whole; None where each steps its slices.
"""


def describe(
    groups: Sequence[dict[str, Any]],
    members: Sequence[Member],
    frozen: Sequence[Member],
    slots: Sequence[ShardSlot],
    ranks: dist.ProcessGroup,
    stage: int,
    owners: dict[str, int] | None,
) -> Layout:
    """The layout of an optimizer.

    Args:
        groups: of the torch optimizer.
        members: all its parameters.
        frozen: those that are not stepped.
        slots: this rank's.
        ranks: those that share the shards.
        stage: of the model.
        owners: see `Layout`.
    """
    of_group: dict[int, list[Member]] = {id(group): [] for group in groups}
    for member in members:
        of_group[id(member.group)].append(member)
    return {
        "rank": 0 if stage == 0 else ranks.rank(),
        "world_size": 1 if stage == 0 else ranks.size(),
        "stage": stage,
        "groups": [[member.name for member in of_group[id(group)]] for group in groups],
        "frozen": [member.name for member in frozen],
        "numbered": [
            [member.name for member in of_group[id(group)] if member.master is not None] for group in groups
        ],
        "parts": {slot.name: [slot.place.param_start, slot.place.numel] for slot in slots},
        "owners": owners,
    }


def find_misfit(given: Any, own: Layout) -> str:
    """Why a state dict cannot be loaded, with what to do about it; "" if it can.

    Args:
        given: whatever was passed as the state dict.
        own: the layout of the optimizer that is to load it.
    """
    if not isinstance(given, Mapping) or "layout" not in given:
        what = (
            f"entries {sorted(map(str, given))[:6]}" if isinstance(given, Mapping) else type(given).__name__
        )
        return (
            f"expected what ShardedOptimizer.state_dict() returned on this rank, got {what}; a torch optimizer's own "
            "state is loaded into that optimizer before ShardedOptimizer takes it over, ranges of tensors with "
            "zero_core.load_sharded_state"
        )
    saved = given["layout"]
    if _whose(saved) != _whose(own):
        return (
            f"expected the state of {_whose(own)}, got that of {_whose(saved)}; load what this rank has saved itself, "
            "and for another world size or stage use zero_core.sharded_state (as ckpt-universal does)"
        )
    if (saved["owners"] is None) != (own["owners"] is None):
        return (
            "one of the two optimizers steps whole tensors, the other slices; build this one with "
            f"whole_tensors={saved['owners'] is not None}"
        )
    masters = given.get("masters", {})
    lost = [n for n, (_, numel) in saved["parts"].items() if n not in masters or masters[n].numel() != numel]
    if lost:
        return (
            f"the masters of {_some(lost)} are not in the state as it says of itself; load it as it was saved"
        )
    return _other_parameters(saved, own) or _other_parts(saved, own)


def renumber(inner: Mapping[str, Any], saved: Layout, own: Layout) -> dict[str, Any]:
    """A torch optimizer's state dict for an optimizer that numbers its parameters in another order, or has others."""
    numbers = {
        name: number
        for names, group in zip(saved["numbered"], inner["param_groups"], strict=True)
        for name, number in zip(names, group["params"], strict=True)
    }
    unused = max(numbers.values(), default=-1) + 1  # numbers for those that were frozen then
    groups = []
    for names, group in zip(own["numbered"], inner["param_groups"], strict=True):
        kept = {
            key: value for key, value in group.items() if key != "param_names"
        }  # torch puts its own there
        numbered = [numbers.get(name, unused + at) for at, name in enumerate(names)]
        unused += len(names)
        groups.append({**kept, "params": numbered})
    return {**inner, "param_groups": groups}


def _whose(layout: Layout) -> str:
    if layout["stage"] == 0:
        return "any rank at stage 0"
    return f"rank {layout['rank']} of {layout['world_size']} at stage {layout['stage']}"


def _other_parameters(saved: Layout, own: Layout) -> str:
    """Groups of other parameters, or parameters that were stepped there and are frozen here."""
    if len(saved["groups"]) != len(own["groups"]):
        return (
            f"expected {len(own['groups'])} groups of parameters, got {len(saved['groups'])}; build the optimizer with "
            "the groups that were saved, or call add_param_group before"
        )
    for number, (theirs, ours) in enumerate(zip(saved["groups"], own["groups"], strict=True)):
        if set(theirs) != set(ours):
            return (
                f"group {number}: the state alone has {_some(set(theirs) - set(ours))}, this optimizer alone "
                f"{_some(set(ours) - set(theirs))}; build the optimizer on the parameters that were saved"
            )
    asleep = [name for name in own["frozen"] if name not in saved["frozen"]]
    if asleep:
        return (
            f"{_some(asleep)} frozen here, but not where the state was saved; unfreeze before (requires_grad_()), "
            "and freeze again afterwards what is to rest"
        )
    return ""


def _other_parts(saved: Layout, own: Layout) -> str:
    asleep = {*saved["frozen"], *own["frozen"]}
    wrong = [
        name
        for name in saved["parts"].keys() | own["parts"].keys()
        if name not in asleep and list(saved["parts"].get(name, [])) != list(own["parts"].get(name, []))
    ]
    if not wrong:
        return ""
    name = min(wrong)
    return (
        f"this rank's part of '{name}' is {_range(saved['parts'].get(name))} in the state and "
        f"{_range(own['parts'].get(name))} here: the units or shapes are others; shard as it was saved (units=), or "
        "use zero_core.sharded_state"
    )


def _range(part: Sequence[int] | None) -> str:
    return "empty" if part is None else f"elements {part[0]} to {part[0] + part[1]}"


def _some(names: Sequence[str] | set[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(map(repr, sorted(names)[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

"""What there is to save: an engine's tensors by their names in a checkpoint, and the values beside them.

In: an engine. Out: this rank's parts of tensors, and a `Saved`; and a `Saved` of the values that a checkpoint holds,
an engine's or DeepSpeed's. Next: `saving` writes them, `loading` takes them over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import ckpt_universal as ckpt
import torch
import zero_core as zero
from torch.optim.lr_scheduler import LRScheduler

from .. import signs
from .names import MODEL, is_master

if TYPE_CHECKING:
    from ..engine import Engine


def described(engine: Engine, *, states: bool) -> dict[str, zero.Shard]:
    """This rank's parts of parameters, masters, buffers and (as asked) the optimizer's states, by name."""
    parts = engine.parts
    found = {MODEL + name: shard for name, shard in zero.sharded_state(parts.module, None).items()}
    both = zero.sharded_state(parts.module, parts.optimizer)
    kept = {name: shard for name, shard in both.items() if MODEL + name not in found}
    return found | {name: shard for name, shard in kept.items() if states or is_master(name)}


def frozen(engine: Engine) -> set[str]:
    """Names of parameters that are not trained, whichever rank holds them."""
    named = engine.module.named_parameters(remove_duplicate=False)
    return {MODEL + name for name, param in named if not param.requires_grad}


def adapting_scaler(engine: Engine) -> zero.LossScaler | None:
    """The loss scaler, if it has learned anything; a fixed scale is the configuration's to say."""
    scaler = engine.parts.scaler
    return scaler if scaler is not None and scaler.dynamic else None


def stateful_schedule(engine: Engine) -> LRScheduler | None:
    """The schedule, if it has a state to save; one that has `step()` alone begins anew."""
    schedule = engine.parts.scheduler
    return schedule if hasattr(schedule, "state_dict") and hasattr(schedule, "load_state_dict") else None


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parameter group."""
    plain = {name: value for name, value in group.items() if name != "params"}
    return {name: v.item() if isinstance(v, torch.Tensor) else v for name, v in plain.items()}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The values beside tensors, equal on all ranks but for the scalars of parameters that a rank has a part of.

    Attributes:
        progress: `facts.Progress`, as a dictionary.
        optimizer_type: the class of the optimizer.
        optimizer_groups: `hyperparameters` of each group.
        optimizer_scalars: `zero_core.optimizer_scalars`.
        compressed: `signs.scalars`.
        lr_scheduler: the schedule's class (`type`) and its `state`.
        scaler: state of `adapting_scaler`.
        loader: the loader's position.
        saved_at: stage and number of ranks, for who looks at the checkpoint.
        frozen: whether parameters that are not trained are there.
        client_state: what `save_checkpoint` was given.

    None: there is none, or the checkpoint does not say.
    """

    progress: Mapping[str, int] | None = None
    optimizer_type: str | None = None
    optimizer_groups: list[dict[str, Any]] | None = None
    optimizer_scalars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    compressed: Mapping[str, Any] | None = None
    lr_scheduler: Mapping[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    loader: Mapping[str, int] | None = None
    saved_at: Mapping[str, int] | None = None
    frozen: bool = True
    client_state: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine, client_state: Mapping[str, Any], *, frozen: bool) -> Saved:
        """The engine's, as they are now."""
        parts, scaler = engine.parts, adapting_scaler(engine)
        schedule = stateful_schedule(engine)
        return cls(
            progress=asdict(engine.progress),
            optimizer_type=type(parts.optimizer.inner).__name__,
            optimizer_groups=[hyperparameters(group) for group in parts.optimizer.param_groups],
            optimizer_scalars=zero.optimizer_scalars(parts.optimizer),
            compressed=signs.scalars(parts.optimizer),
            lr_scheduler=None
            if schedule is None
            else {"type": type(schedule).__name__, "state": schedule.state_dict()},
            scaler=None if scaler is None else scaler.state_dict(),
            loader=None if parts.loader is None else parts.loader.state_dict(),
            saved_at={"stage": engine.zero_optimization_stage(), "world": engine.world_size},
            frozen=frozen,
            client_state=client_state,
        )

    @classmethod
    def of_deepspeed(cls, facts: Mapping[str, Any], engine: Engine) -> Saved:
        """What ckpt-universal's conversion has kept of DeepSpeed's numbers."""
        steps, skipped = facts.get("global_steps", 0), facts.get("skipped_steps", 0)
        names = [name for name, _ in engine.module.named_parameters()]
        schedule, scaler = facts.get("lr_scheduler") or {}, adapting_scaler(engine)
        return cls(
            progress={
                "micro_steps": steps * engine.gradient_accumulation_steps(),
                "global_steps": steps,
                "global_samples": facts.get("global_samples", 0),
                "skipped_steps": skipped,
            },
            optimizer_scalars=facts.get("scalars")
            or {name: {"step": float(steps - skipped)} for name in names},
            lr_scheduler={"type": None, "state": {"last_epoch": schedule["last_batch_iteration"] + 1}}
            if "last_batch_iteration" in schedule
            else None,
            scaler={**scaler.state_dict(), "value": facts["cur_scale"]}
            if scaler is not None and "cur_scale" in facts
            else None,
            client_state=facts.get("client_state", {}),
        )

    def to_tree(self, *, first: bool) -> dict[str, Any]:
        """As a checkpoint holds them; of what ranks may keep differently, the `first` rank's counts."""
        tree = {each.name: getattr(self, each.name) for each in fields(self)}
        tree["client_state"] = ckpt.PerRank(dict(self.client_state) if first else None)
        if self.lr_scheduler is not None:
            state = ckpt.PerRank(dict(self.lr_scheduler["state"]) if first else None)
            tree["lr_scheduler"] = {**self.lr_scheduler, "state": state}
        return tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Saved:
        """The way back."""
        known = {each.name for each in fields(cls)}
        found = {name: _of_first_rank(value) for name, value in tree.items() if name in known}
        if found.get("lr_scheduler") is not None:
            found["lr_scheduler"] = {name: _of_first_rank(v) for name, v in found["lr_scheduler"].items()}
        return cls(**found)


def _of_first_rank(value: Any) -> Any:
    return value.values[0] if isinstance(value, ckpt.PerRankValues) else value

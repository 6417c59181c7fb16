"""What a checkpoint of an engine holds, and how it is taken back.

In: an engine. Out: `checkpoint.save` of zero-core's description of it, plus counters, schedule, loss scale and
random states; and back, on any number of ranks, at any stage and in another precision. Everything is read and
checked on all ranks before anything of the engine changes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import zero_core as zero

from . import checkpoint, ranks
from .checkpoint import Range, Reader
from .checkpoint.values import decode, encode
from .errors import CheckpointError
from .facts import Progress

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger(__name__)

_OPTIMIZER = "optimizer."
_MASTER = ".master"


# -- saving ---------------------------------------------------------------------------------------------------


def save(
    engine: Engine, root: Path, tag: str, client_state: Mapping[str, Any], *, point_latest: bool
) -> Path:
    """Save an engine; see `Engine.save_checkpoint`."""
    tag = _agreed_tag(engine, tag)
    parts = engine.parts
    left = engine.micro_steps % engine.gradient_accumulation_steps()
    if left:
        log.warning(
            "save_checkpoint: the gradients of %d micro-batch(es) since the last update are not saved", left
        )
    values = {
        "progress": asdict(engine.progress),
        "optimizer_type": type(parts.optimizer.inner).__name__,
        "optimizer_groups": [_hyperparameters(group) for group in parts.optimizer.param_groups],
        "optimizer_scalars": _scalars_of_all_ranks(engine),
        "lr_scheduler": None
        if parts.scheduler is None
        else {
            "type": type(parts.scheduler).__name__,
            "state": encode(parts.scheduler.state_dict(), "lr_scheduler"),
        },
        "scaler": None if (scaler := _adapting_scaler(engine)) is None else scaler.state_dict(),
        "saved_at": {"stage": engine.zero_optimization_stage(), "world": engine.world_size},
        "client_state": dict(client_state),
    }
    return checkpoint.save(
        root,
        tag,
        zero.sharded_state(parts.module, parts.optimizer),
        values,
        group=parts.group,
        per_rank=_random_states(engine),
        point_latest=point_latest,
    )


def _adapting_scaler(engine: Engine) -> zero.LossScaler | None:
    """The loss scaler, if it has learned anything; a fixed scale is the configuration's to say."""
    scaler = engine.parts.scaler
    return scaler if scaler is not None and scaler.dynamic else None


def _agreed_tag(engine: Engine, tag: str) -> str:
    """The first rank's tag; ranks that name a checkpoint differently may be about to mix two of them."""
    given = ranks.gather_text(tag, engine.parts.group)
    policy = engine.config.checkpoint.tag_validation
    if len(set(given)) == 1 or policy == "Ignore":
        return given[0]
    message = (
        f"save_checkpoint: ranks give different tags: {', '.join(map(repr, given))}; the first rank's is used"
    )
    if policy == "Fail":
        raise CheckpointError(message + ' (checkpoint.tag_validation is "Fail")')
    log.warning(message)
    return given[0]


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in group.items() if name != "params"}
    return {name: encode(value, f"optimizer.param_groups.{name}") for name, value in plain.items()}


def _scalars_of_all_ranks(engine: Engine) -> dict[str, dict[str, float]]:
    """Step counts and the like, by parameter; a rank knows those of the parameters that it has a part of."""
    merged: dict[str, dict[str, float]] = {}
    for part in ranks.gather_json(zero.optimizer_scalars(engine.parts.optimizer), engine.parts.group):
        merged |= part
    return merged


def _random_states(engine: Engine) -> dict[str, torch.Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(engine.device)
    return states


# -- loading --------------------------------------------------------------------------------------------------


def load(
    engine: Engine,
    root: Path,
    tag: str | None,
    *,
    strict: bool,
    optimizer: bool,
    scheduler: bool,
    progress: bool,
) -> tuple[str | None, dict[str, Any]]:
    """Load into an engine; see `Engine.load_checkpoint`."""
    parts = engine.parts
    reader = checkpoint.open_checkpoint(root, tag, parts.group)
    if reader is None:
        log.warning("load_checkpoint: %s has no 'latest' and no tag was given; nothing was loaded", root)
        return None, {}
    described = zero.sharded_state(parts.module, parts.optimizer if optimizer else None)
    wanted, sources = _wanted(reader, described, parts.optimizer if optimizer else None)
    _check_names(engine, reader, wanted, sources, strict=strict, optimizer=optimizer)
    tensors = {
        name: tensor.view(wanted[name].shape) if tensor.numel() == wanted[name].whole else tensor
        for name, tensor in reader.read(wanted, sources).items()
    }
    own, values = reader.own(), reader.index.values
    reader.together(lambda: _check_values(engine, values, optimizer=optimizer, scheduler=scheduler))

    zero.load_sharded_state(parts.module, parts.optimizer if optimizer else None, tensors, strict=False)
    if optimizer:
        zero.load_optimizer_scalars(parts.optimizer, values["optimizer_scalars"])
        for group, saved in zip(parts.optimizer.param_groups, values["optimizer_groups"], strict=True):
            group.update({name: decode(value) for name, value in saved.items()})
        if (scaler := _adapting_scaler(engine)) is not None and values["scaler"] is not None:
            scaler.load_state_dict(values["scaler"])
    if scheduler and parts.scheduler is not None and values["lr_scheduler"] is not None:
        parts.scheduler.load_state_dict(decode(values["lr_scheduler"]["state"]))
    if progress:
        engine.progress = Progress(**values["progress"])
        # Gradients are not saved, and another number of ranks may accumulate over another number of micro-batches.
        engine.progress.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        _restore_random_states(engine, own)
    engine.zero_grad()
    return str(reader.path), values["client_state"]


def _wanted(
    reader: Reader, described: Mapping[str, zero.Shard], optimizer: zero.ShardedOptimizer | None
) -> tuple[dict[str, Range], dict[str, str]]:
    """The ranges this rank needs, and where those are stored that have another name in the checkpoint.

    Optimizer state that does not exist yet covers the same range as its parameter; that of an optimizer that looks at
    whole parameters belongs to those this rank steps, in a shape of its own. A parameter without a separate master
    takes the checkpoint's master, and a master that the checkpoint lacks is the parameter.
    """
    owned = None if optimizer is None or optimizer.whole is None else {each.name for each in optimizer.whole}
    wanted = {name: Range.of(shard) for name, shard in described.items()}
    sources: dict[str, str] = {}
    stored = reader.index.tensors
    for name in stored:
        parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
        if not name.startswith(_OPTIMIZER) or name in wanted:
            continue
        if key == "master":
            if parameter in wanted:
                sources[parameter] = name
        elif owned is not None and parameter in owned:
            whole = stored[name]
            wanted[name] = Range(whole.shape, whole.dtype, 0, math.prod(whole.shape))
        elif optimizer is not None and owned is None and parameter in wanted:
            part = wanted[parameter]
            wanted[name] = Range(part.shape, stored[name].dtype, part.start, part.stop)
    sources |= {name: _parameter_of(name) for name in wanted if _is_master(name) and name not in stored}
    return wanted, sources


def _is_master(name: str) -> bool:
    return name.startswith(_OPTIMIZER) and name.endswith(_MASTER)


def _parameter_of(master: str) -> str:
    return master.removeprefix(_OPTIMIZER).removesuffix(_MASTER)


def _check_names(
    engine: Engine,
    reader: Reader,
    wanted: dict[str, Range],
    sources: Mapping[str, str],
    *,
    strict: bool,
    optimizer: bool,
) -> None:
    """Compare the checkpoint's names with those of all ranks; without `strict`, leave out what it lacks."""
    everyone = {name for names in ranks.gather_json(sorted(wanted), engine.parts.group) for name in names}
    stored = reader.index.tensors
    if not strict:
        for name in [name for name in wanted if sources.get(name, name) not in stored]:
            del wanted[name]
        return
    unexpected = [
        name
        for name in stored
        if name not in everyone and not _is_master(name) and (optimizer or not name.startswith(_OPTIMIZER))
    ]
    missing = [
        name
        for name in sorted(everyone)
        if name not in stored and not (_is_master(name) and _parameter_of(name) in stored)
    ]
    if unexpected or missing:
        raise CheckpointError(
            f"{reader.path} does not fit the model: missing there: {_some(missing)}; not in the model: "
            f"{_some(unexpected)}; pass load_module_strict=False to load what both have"
        )


def _some(names: list[str], most: int = 5) -> str:
    if not names:
        return "nothing"
    return ", ".join(map(repr, names[:most])) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def _check_values(engine: Engine, values: Mapping[str, Any], *, optimizer: bool, scheduler: bool) -> None:
    """Find out now what would fail half-way through taking over."""
    groups, saved = len(engine.parts.optimizer.param_groups), len(values["optimizer_groups"])
    if optimizer and groups != saved:
        raise CheckpointError(f"the checkpoint has {saved} parameter group(s), the optimizer {groups}")
    own, of_saved = type(engine.parts.optimizer.inner).__name__, values["optimizer_type"]
    if optimizer and own != of_saved:
        raise CheckpointError(
            f"the checkpoint holds the state of {of_saved}, the engine steps with {own}; pass "
            "load_optimizer_states=False to start the optimizer anew"
        )
    schedule, of_saved = engine.parts.scheduler, (values["lr_scheduler"] or {}).get("type")
    if scheduler and schedule is not None and of_saved not in {None, type(schedule).__name__}:
        raise CheckpointError(
            f"the checkpoint holds the state of a {of_saved}, the engine has a {type(schedule).__name__}; pass "
            "load_lr_scheduler_states=False to start the schedule anew"
        )
    if scheduler and (engine.parts.scheduler is None) != (values["lr_scheduler"] is None):
        has = "a schedule" if engine.parts.scheduler is None else "no schedule"
        log.warning("load_checkpoint: the checkpoint has %s and the engine differs; the rates may jump", has)


def _restore_random_states(engine: Engine, own: Mapping[str, torch.Tensor]) -> None:
    if not own:
        log.info("load_checkpoint: saved by another number of ranks; random states are left as they are")
        return
    torch.set_rng_state(own["rng.cpu"])
    if engine.device.type == "cuda" and "rng.cuda" in own:
        torch.cuda.set_rng_state(own["rng.cuda"], engine.device)

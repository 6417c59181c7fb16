"""What a checkpoint of an engine holds, and how it is taken back.

In: an engine. Out: `ckpt_universal.save` of zero-core's description of it, plus counters, schedule, loss scale, random
states and the loader's position; and back, on any number of ranks, at any stage and in another precision. Everything is
read and checked on all ranks before anything of the engine changes; optimizer state that rests in a store, of which
there may be more than memory holds, in parts, and then once more.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ckpt_universal as ckpt
import torch
import zero_core as zero

from . import ranks, signs
from .errors import CheckpointError
from .facts import Progress

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger(__name__)

_MODEL, _OPTIMIZER = "model.", "optimizer."
_MASTER = ".master"
PART_BYTES = 512 << 20
"""Of optimizer state that is read at once where it rests in a store, on each rank."""


# -- saving ---------------------------------------------------------------------------------------------------


def save(
    engine: Engine,
    root: Path,
    tag: str,
    client_state: Mapping[str, Any],
    *,
    point_latest: bool,
    frozen: bool,
) -> Path:
    """Save an engine; see `Engine.save_checkpoint`."""
    tag = _agreed_tag(engine, tag)
    parts = engine.parts
    left = engine.micro_steps % engine.gradient_accumulation_steps()
    if left:
        log.warning(
            "save_checkpoint: the gradients of %d micro-batch(es) since the last update are not saved", left
        )
    described = _of_optimizer(signs.described(parts.optimizer)) | _described(engine, optimizer=True)
    if not frozen:
        left_out = _frozen(engine)
        described = {name: shard for name, shard in described.items() if name not in left_out}
    state = {
        "model": _under(_MODEL, described),
        "optimizer": _under(_OPTIMIZER, described),
        "engine": _values(engine, client_state, frozen=frozen),
        "random": ckpt.RandomStates(),
    }
    policy = ckpt.SavePolicy(point_latest=point_latest)
    path = ckpt.save(root, state, step=engine.global_steps, name=tag, group=parts.group, policy=policy)
    return Path(path)


def _described(engine: Engine, *, optimizer: bool) -> dict[str, zero.Shard]:
    """This rank's parts of parameters, buffers and (as asked) optimizer state, by their names in a checkpoint."""
    parts = engine.parts
    found = {_MODEL + name: shard for name, shard in zero.sharded_state(parts.module, None).items()}
    if optimizer:
        both = zero.sharded_state(parts.module, parts.optimizer)
        found |= {name: shard for name, shard in both.items() if _MODEL + name not in found}
    return found


def _of_optimizer(state: Mapping[str, zero.Shard]) -> dict[str, zero.Shard]:
    """By the names that it has in a checkpoint."""
    return {_OPTIMIZER + name: shard for name, shard in state.items()}


def _under(prefix: str, described: Mapping[str, zero.Shard]) -> dict[str, zero.Shard]:
    return {name.removeprefix(prefix): s for name, s in described.items() if name.startswith(prefix)}


def _frozen(engine: Engine) -> set[str]:
    """Names in a checkpoint of parameters that are not trained, whichever rank holds them."""
    named = engine.parts.module.named_parameters(remove_duplicate=False)
    return {_MODEL + name for name, param in named if not param.requires_grad}


def _values(engine: Engine, client_state: Mapping[str, Any], *, frozen: bool) -> dict[str, Any]:
    """Small values, equal on all ranks but for the scalars of parameters that a rank has a part of."""
    parts = engine.parts
    return {
        "progress": asdict(engine.progress),
        "optimizer_type": type(parts.optimizer.inner).__name__,
        "optimizer_groups": [_hyperparameters(group) for group in parts.optimizer.param_groups],
        "optimizer_scalars": zero.optimizer_scalars(parts.optimizer),
        "compressed": signs.scalars(parts.optimizer),
        "lr_scheduler": None
        if parts.scheduler is None
        else {
            "type": type(parts.scheduler).__name__,
            "state": _of_first_rank(engine, parts.scheduler.state_dict()),
        },
        "scaler": None if (scaler := _adapting_scaler(engine)) is None else scaler.state_dict(),
        "loader": None if parts.loader is None else parts.loader.state_dict(),
        "saved_at": {"stage": engine.zero_optimization_stage(), "world": engine.world_size},
        "frozen": frozen,
        "client_state": _of_first_rank(engine, client_state),
    }


def _of_first_rank(engine: Engine, value: Mapping[str, Any]) -> ckpt.PerRank:
    """The first rank's counts; other ranks may keep other things in theirs."""
    return ckpt.PerRank(dict(value) if engine.parts.group.rank() == 0 else None)


def _first(value: Any) -> Any:
    """What `_of_first_rank` saved."""
    return value.values[0] if isinstance(value, ckpt.PerRankValues) else value


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
    return {name: v.item() if isinstance(v, torch.Tensor) else v for name, v in plain.items()}


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
    if tag is None and ranks.any_rank(
        not (root / "latest").exists() and not (root / "COMMIT").exists(), parts.group
    ):
        log.warning("load_checkpoint: %s has no 'latest' and no tag was given; nothing was loaded", root)
        return None, {}
    found = ckpt.describe(root, name=tag, group=parts.group)
    values = _values_of(engine, found, needed=optimizer or scheduler or progress)
    _check_values(engine, values, optimizer=optimizer, scheduler=scheduler)
    with parts.optimizer.being_replaced() if optimizer else nullcontext():
        _load_tensors(engine, found, values, strict=strict, optimizer=optimizer)
    if scheduler and parts.scheduler is not None and values["lr_scheduler"] is not None:
        parts.scheduler.load_state_dict(_first(values["lr_scheduler"]["state"]))
    if progress:
        engine.progress = Progress(**values["progress"])
        # Gradients are not saved, and another number of ranks may accumulate over another number of micro-batches.
        engine.progress.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        if parts.loader is not None and values["loader"] is not None:
            parts.loader.load_state_dict(values["loader"])
        if "random" in found.values:
            state = {"random": ckpt.RandomStates()}
            ckpt.load(found.path, into=state, only="random*", group=parts.group)
    engine.zero_grad()
    return found.path, _first(values["client_state"])


def _load_tensors(
    engine: Engine, found: ckpt.Description, values: Mapping[str, Any], *, strict: bool, optimizer: bool
) -> None:
    """Parameters and buffers, and (as asked) what the optimizer keeps, loss scale included."""
    parts = engine.parts
    described = _described(engine, optimizer=optimizer)
    saved_signs = values.get("compressed") if optimizer else None
    room = _of_optimizer(signs.room(parts.optimizer, saved_signs))
    wanted, sources = _wanted(found, room | described, parts.optimizer if optimizer else None)
    anew = _without_state(engine, found) if optimizer and saved_signs is None else set()
    _check_names(engine, found, wanted, sources, values, anew, strict=strict, optimizer=optimizer)
    later = _parts_of_state(engine, {n: s for n, s in wanted.items() if n not in room}) if optimizer else []
    in_parts = {name for part in later for name in part}
    read = partial(_read, engine, found.path, sources)
    wanted = read({name: shard for name, shard in wanted.items() if name not in in_parts})
    for part in later:
        read(part)  # to find out now what is damaged
    tensors = _as_given({n: shard for n, shard in wanted.items() if n in described or n not in room})
    zero.load_sharded_state(parts.module, parts.optimizer if optimizer else None, tensors, strict=False)
    for part in later:
        zero.load_optimizer_state(parts.optimizer, _as_given(read(part)))
    if optimizer:
        zero.forget_optimizer_state(parts.optimizer, anew)
        scalars = {name: of for name, of in values["optimizer_scalars"].items() if name not in anew}
        zero.load_optimizer_scalars(parts.optimizer, scalars)
        signs.load(parts.optimizer, saved_signs, _filled(room, wanted))
        for group, saved in zip(parts.optimizer.param_groups, values["optimizer_groups"] or [], strict=False):
            group.update(saved)
        if (scaler := _adapting_scaler(engine)) is not None and values["scaler"] is not None:
            scaler.load_state_dict(values["scaler"])


def _values_of(engine: Engine, found: ckpt.Description, *, needed: bool) -> dict[str, Any]:
    """What an engine saved beside tensors, or what can be made of another program's numbers.

    Raises:
        CheckpointError: there is neither, and more than the model is to be loaded.
    """
    tree = found.values if isinstance(found.values, dict) else {}
    if "engine" in tree:
        return dict(tree["engine"])
    nothing = {
        "progress": asdict(engine.progress),
        "optimizer_type": None,
        "optimizer_groups": None,
        "optimizer_scalars": {},
        "compressed": None,
        "lr_scheduler": None,
        "scaler": None,
        "loader": None,
        "frozen": True,
        "client_state": {},
    }
    if "deepspeed" in tree:
        return nothing | _values_of_deepspeed(engine, tree["deepspeed"])
    if needed:
        raise CheckpointError(
            f"{found.path}: no engine saved it: it has no counters; pass load_module_only=True for its parameters alone"
        )
    return nothing


def _values_of_deepspeed(engine: Engine, saved: Mapping[str, Any]) -> dict[str, Any]:
    steps, skipped = saved.get("global_steps", 0), saved.get("skipped_steps", 0)
    names = [name for name, _ in engine.parts.module.named_parameters()]
    scalars = saved.get("scalars") or {name: {"step": float(steps - skipped)} for name in names}
    schedule = saved.get("lr_scheduler") or {}
    return {
        "progress": {
            "micro_steps": steps * engine.gradient_accumulation_steps(),
            "global_steps": steps,
            "global_samples": saved.get("global_samples", 0),
            "skipped_steps": skipped,
        },
        "optimizer_scalars": scalars,
        "lr_scheduler": {"type": None, "state": {"last_epoch": schedule["last_batch_iteration"] + 1}}
        if "last_batch_iteration" in schedule
        else None,
    }


def _wanted(
    found: ckpt.Description, described: Mapping[str, zero.Shard], optimizer: zero.ShardedOptimizer | None
) -> tuple[dict[str, zero.Shard], dict[str, str]]:
    """Room for the ranges this rank needs, and where those are stored that have another name in the checkpoint.

    Optimizer state that does not exist yet covers the same range as its parameter; that of an optimizer that looks at
    whole parameters belongs to those this rank steps, in a shape of its own. A parameter without a separate master
    takes the checkpoint's master, and a master that the checkpoint lacks is the parameter.
    """
    sends_signs = optimizer is not None and signs.scalars(optimizer) is not None
    owned = None if optimizer is None or optimizer.whole is None else {each.name for each in optimizer.whole}
    wanted = {
        name: _room(shard.global_shape, shard.dtype, shard.offsets[0], shard.local.numel())
        for name, shard in described.items()
    }
    sources: dict[str, str] = {}
    for name, (shape, dtype) in found.tensors.items():
        parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
        if not name.startswith(_OPTIMIZER) or name in wanted:
            continue
        own = wanted.get(_MODEL + parameter)
        if key == "master":
            if own is not None:
                sources[_MODEL + parameter] = name
        elif owned is not None and parameter in owned:
            wanted[name] = _room(shape, dtype, 0, torch.Size(shape).numel())
        elif optimizer is not None and owned is None and own is not None and not sends_signs:
            wanted[name] = _room(own.global_shape, dtype, own.offsets[0], own.local.numel())
    sources |= {
        name: _parameter_of(name) for name in wanted if _is_master(name) and name not in found.tensors
    }
    return wanted, sources


def _filled(room: Mapping[str, zero.Shard], wanted: Mapping[str, zero.Shard]) -> dict[str, zero.Shard]:
    """What was read, as the ranges of `room`: of a master, `wanted` may hold more."""
    filled = {}
    for name, shard in room.items():
        read = wanted[name]
        start = shard.offsets[0] - read.offsets[0]
        local = read.local.view(-1)[start : start + shard.local.numel()]
        filled[name.removeprefix(_OPTIMIZER)] = replace(shard, local=local)
    return filled


def _room(shape: tuple[int, ...], dtype: torch.dtype, start: int, numel: int) -> zero.Shard:
    """Without memory, which `_read` makes."""
    return zero.Shard(shape, dtype, (start,), torch.empty(numel, dtype=dtype, device="meta"))


def _parts_of_state(engine: Engine, wanted: Mapping[str, zero.Shard]) -> list[dict[str, zero.Shard]]:
    """Optimizer state that is to be read a part at a time, as many parts on every rank; none where none is stored."""
    units = zero.sharded(engine.parts.module).units
    if not any(unit.stores.optimizer is not None for unit in units):
        return []
    parts: list[dict[str, zero.Shard]] = []
    nbytes = PART_BYTES
    for name in sorted(name for name in wanted if name.startswith(_OPTIMIZER)):
        size = wanted[name].local.nbytes
        if nbytes + size > PART_BYTES:
            parts.append({})
            nbytes = 0
        parts[-1][name] = wanted[name]
        nbytes += size
    most = max(ranks.gather_json(len(parts), engine.parts.group))
    return parts + [{} for _ in range(most - len(parts))]


def _read(
    engine: Engine, path: str, sources: Mapping[str, str], wanted: Mapping[str, zero.Shard]
) -> dict[str, zero.Shard]:
    """Ranges of a checkpoint, in memory; every rank calls it."""
    real = {name: replace(s, local=torch.empty_like(s.local, device="cpu")) for name, s in wanted.items()}
    into = {"model": _under(_MODEL, real), "optimizer": _under(_OPTIMIZER, real)}
    ckpt.load(path, into=into, strict=False, only="*", rename=sources, group=engine.parts.group)
    return real


def _as_given(read: Mapping[str, zero.Shard]) -> dict[str, torch.Tensor]:
    """By zero-core's names, whole tensors in their shape."""
    return {
        name.removeprefix(_MODEL): shard.local.view(shard.global_shape)
        if shard.local.numel() == torch.Size(shard.global_shape).numel()
        else shard.local
        for name, shard in read.items()
    }


def _is_master(name: str) -> bool:
    return name.startswith(_OPTIMIZER) and name.endswith(_MASTER)


def _parameter_of(master: str) -> str:
    return _MODEL + master.removeprefix(_OPTIMIZER).removesuffix(_MASTER)


def _check_names(
    engine: Engine,
    found: ckpt.Description,
    wanted: dict[str, zero.Shard],
    sources: Mapping[str, str],
    values: Mapping[str, Any],
    anew: Collection[str],
    *,
    strict: bool,
    optimizer: bool,
) -> None:
    """Compare the checkpoint's names with those of all ranks; what it lacks is left as it is, if that is allowed.

    `anew`: parameters whose optimizer state is made anew, since the checkpoint is from before it was.
    """
    everyone = {name for names in ranks.gather_json(sorted(wanted), engine.parts.group) for name in names}
    stored = found.tensors
    for name in [name for name in wanted if sources.get(name, name) not in stored]:
        del wanted[name]
    if not strict:
        return
    known = {
        _MODEL + name for name, _ in engine.parts.module.named_parameters(remove_duplicate=False)
    }  # tied ones too
    unexpected = [
        name
        for name in stored
        if name not in everyone | known
        and not _is_master(name)
        and (optimizer or not name.startswith(_OPTIMIZER))
    ]
    frozen = set() if values["frozen"] else _frozen(engine)
    missing = [
        name
        for name in sorted(everyone)
        if name not in stored
        and not (_is_master(name) and _parameter_of(name) in stored)
        and name.removeprefix(_OPTIMIZER).rpartition(".")[0] not in anew
        and name not in frozen
    ]
    if unexpected or missing:
        raise CheckpointError(
            f"{found.path} does not fit the model: missing there: {_some(missing)}; not in the model: "
            f"{_some(unexpected)}; pass load_module_strict=False to load what both have"
        )


def _without_state(engine: Engine, found: ckpt.Description) -> set[str]:
    """Parameters that the checkpoint has, and no state of an optimizer of them: it had not moved them yet."""
    with_state = {
        name.removeprefix(_OPTIMIZER).rpartition(".")[0]
        for name in found.tensors
        if name.startswith(_OPTIMIZER) and not _is_master(name)
    }
    names = {name for name, _ in engine.parts.module.named_parameters()}
    return {name for name in names - with_state if _MODEL + name in found.tensors}


def _some(names: list[str], most: int = 5) -> str:
    if not names:
        return "nothing"
    return ", ".join(repr(name.removeprefix(_MODEL)) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def _check_values(engine: Engine, values: Mapping[str, Any], *, optimizer: bool, scheduler: bool) -> None:
    """Find out now what would fail half-way through taking over."""
    if optimizer and values["optimizer_groups"] is not None:
        groups, saved = len(engine.parts.optimizer.param_groups), len(values["optimizer_groups"])
        if groups != saved:
            raise CheckpointError(f"the checkpoint has {saved} parameter group(s), the optimizer {groups}")
    own, of_saved = type(engine.parts.optimizer.inner).__name__, values["optimizer_type"]
    if optimizer and of_saved is not None and own != of_saved:
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

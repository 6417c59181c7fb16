"""A step of ckpt-universal -> an engine, on any number of ranks, at any stage and in another precision.

In: an engine and a place. Out: the engine as it was saved, as far as was asked. Everything is read and checked on all
ranks before anything of the engine changes; optimizer state that rests in a store, of which there may be more than
memory holds, in parts, and then once more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ckpt_universal as ckpt
import torch
import zero_core as zero
from torch.optim.lr_scheduler import LRScheduler

from .. import ranks, signs
from ..errors import CheckpointError
from ..facts import Progress
from . import contents, fit
from .contents import Saved
from .names import MODEL, OPTIMIZER, is_master, of_optimizer, under

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger(__name__)


def load(
    engine: Engine,
    root: Path,
    tag: str | None,
    *,
    strict: bool,
    states: bool,
    schedule: bool,
    progress: bool,
    loader: bool,
) -> tuple[str | None, dict[str, Any]]:
    """Load into an engine; see `Engine.load_checkpoint`."""
    parts = engine.parts
    if tag is None and ranks.any_rank(
        not (root / "latest").exists() and not (root / "COMMIT").exists(), parts.group
    ):
        log.warning("load_checkpoint: %s has no 'latest' and no tag was given; nothing was loaded", root)
        return None, {}
    found = ckpt.describe(root, name=tag, group=parts.group)
    saved = _saved(engine, found, needed=states or schedule or progress)
    if states:
        fit.check_optimizer(saved, type(parts.optimizer.inner).__name__, len(parts.optimizer.param_groups))
    own_schedule = _schedule_to_load(engine, saved) if schedule else None
    with parts.optimizer.being_replaced() if states else nullcontext():
        _load_tensors(engine, found, saved, strict=strict, states=states)
    if own_schedule is not None:
        assert saved.lr_scheduler is not None
        own_schedule.load_state_dict(saved.lr_scheduler["state"])
    if progress:
        _load_progress(engine, found, saved)
    if loader and parts.loader is not None and saved.loader is not None:
        parts.loader.load_state_dict(saved.loader)
        samples = saved.loader["samples"]
        epoch = saved.loader["epoch"] + (samples == 0)  # where one has ended, the next begins
        log.info("load_checkpoint: the loader goes on at sample %d of epoch %d", samples, epoch)
    engine.zero_grad()
    return found.path, dict(saved.client_state)


def _saved(engine: Engine, found: ckpt.Description, *, needed: bool) -> Saved:
    """What an engine saved beside tensors, or what can be made of another program's numbers.

    Raises:
        CheckpointError: there is neither, and more than the model is to be loaded.
    """
    tree = found.values if isinstance(found.values, dict) else {}
    if "engine" in tree:
        return Saved.from_tree(tree["engine"])
    if "deepspeed" in tree:
        return Saved.of_deepspeed(tree["deepspeed"], engine)
    if needed:
        raise CheckpointError(
            f"{found.path}: no engine saved it: it has no counters; pass load_module_only=True for its parameters alone"
        )
    return Saved()


def _schedule_to_load(engine: Engine, saved: Saved) -> LRScheduler | None:
    """The engine's schedule, if the checkpoint has a state for it.

    Raises:
        CheckpointError: of another schedule, or one that the engine's does not take; on all ranks.
    """
    own = contents.stateful_schedule(engine)
    if (own is None) != (saved.lr_scheduler is None):
        has = "a schedule" if own is None else "no schedule"
        log.warning("load_checkpoint: the checkpoint has %s and the engine differs; the rates may jump", has)
    error: CheckpointError | None = None
    if own is None or saved.lr_scheduler is None:
        own = None
    else:
        try:
            fit.check_schedule(saved, type(own).__name__)
            _try_state(own, saved.lr_scheduler["state"], engine.parts.optimizer.param_groups)
        except CheckpointError as caught:
            error = caught
    ranks.agree(error, engine.parts.group, CheckpointError, "load_checkpoint: the schedule")
    return own


def _try_state(schedule: LRScheduler, state: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Find out whether a schedule takes a state, and leave it and the rates as they were.

    Raises:
        CheckpointError: it does not.
    """
    # No copy of it is tried: one would share its optimizer, whose rates it may set, and schedules inside it.
    before, rates = schedule.state_dict(), [dict(group) for group in groups]
    try:
        schedule.load_state_dict(dict(state))
    except Exception as error:
        raise CheckpointError(
            f"{type(schedule).__name__} does not take the schedule's state in the checkpoint ({type(error).__name__}: "
            f"{error}); nothing was loaded: pass load_lr_scheduler_states=False to start the schedule anew"
        ) from error
    finally:
        with suppress(Exception):  # one that takes no state has not changed
            schedule.load_state_dict(before)
        for group, values in zip(groups, rates, strict=True):
            group.update(values)


def _load_progress(engine: Engine, found: ckpt.Description, saved: Saved) -> None:
    """Counters and random states."""
    assert saved.progress is not None
    engine.progress = Progress(**saved.progress)
    # Gradients are not saved, and another number of ranks may accumulate over another number of micro-batches.
    engine.progress.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if "random" in found.values:
        state = {"random": ckpt.RandomStates()}
        ckpt.load(found.path, into=state, only="random*", group=engine.parts.group)


# -- tensors --------------------------------------------------------------------------------------------------


def _load_tensors(
    engine: Engine, found: ckpt.Description, saved: Saved, *, strict: bool, states: bool
) -> None:
    """Parameters, masters and buffers, and (as asked) what else the optimizer keeps, loss scale included."""
    parts, optimizer = engine.parts, engine.parts.optimizer
    described = contents.described(engine, states=states)
    saved_signs = saved.compressed if states else None
    room = of_optimizer(signs.room(optimizer, saved_signs))
    wanted, sources = fit.wanted(
        found.tensors,
        room | described,
        makes_state=states and signs.scalars(optimizer) is None,
        whole=None if optimizer.whole is None else {each.name for each in optimizer.whole},
    )
    anew = set[str]()
    if states and saved_signs is None:
        anew = fit.without_state(found.tensors, [name for name, _ in parts.module.named_parameters()])
    if strict:
        fit.check_names(
            found.path,
            found.tensors,
            {name for names in ranks.gather_json(sorted(wanted), parts.group) for name in names},
            known={MODEL + name for name, _ in parts.module.named_parameters(remove_duplicate=False)},
            optional=set() if saved.frozen else contents.frozen(engine),
            anew=anew,
            states=states,
        )
    wanted = {name: shard for name, shard in wanted.items() if sources.get(name, name) in found.tensors}
    later = _read_later(engine, {name: shard for name, shard in wanted.items() if name not in room})
    in_parts = {name for part in later for name in part}
    read = partial(_read, engine, found.path, sources)
    at_once = read({name: shard for name, shard in wanted.items() if name not in in_parts})
    for part in later:
        read(part)  # to find out now what is damaged
    tensors = _as_given({n: shard for n, shard in at_once.items() if n in described or n not in room})
    zero.load_sharded_state(parts.module, optimizer if states else None, tensors, strict=False)
    if not states:  # masters all the same: they say more of the parameters than these do
        masters = {name: shard for name, shard in at_once.items() if is_master(name)}
        zero.load_optimizer_state(optimizer, _as_given(masters))
    for part in later:
        zero.load_optimizer_state(optimizer, _as_given(read(part)))
    if states:
        zero.forget_optimizer_state(optimizer, anew)
        scalars = {name: of for name, of in saved.optimizer_scalars.items() if name not in anew}
        zero.load_optimizer_scalars(optimizer, scalars)
        signs.load(optimizer, saved_signs, _filled(room, at_once))
        for group, of_saved in zip(optimizer.param_groups, saved.optimizer_groups or [], strict=False):
            group.update(of_saved)
        if (scaler := contents.adapting_scaler(engine)) is not None and saved.scaler is not None:
            scaler.load_state_dict(saved.scaler)


def _read_later(engine: Engine, rooms: Mapping[str, zero.Shard]) -> list[dict[str, zero.Shard]]:
    """Masters and states to be read a part at a time, as many parts on every rank; none where none is stored."""
    units = zero.sharded(engine.module).units
    if not any(unit.stores.optimizer is not None for unit in units):
        return []
    parts = fit.in_parts(rooms)
    most = max(ranks.gather_json(len(parts), engine.parts.group))
    return parts + [{} for _ in range(most - len(parts))]


def _read(
    engine: Engine, path: str, sources: Mapping[str, str], rooms: Mapping[str, zero.Shard]
) -> dict[str, zero.Shard]:
    """Ranges of a checkpoint, in memory; every rank calls it."""
    real = {name: replace(s, local=torch.empty_like(s.local, device="cpu")) for name, s in rooms.items()}
    into = {"model": under(MODEL, real), "optimizer": under(OPTIMIZER, real)}
    ckpt.load(path, into=into, strict=False, only="*", rename=sources, group=engine.parts.group)
    return real


def _as_given(read: Mapping[str, zero.Shard]) -> dict[str, torch.Tensor]:
    """By zero-core's names, whole tensors in their shape."""
    return {
        name.removeprefix(MODEL): shard.local.view(shard.global_shape)
        if shard.local.numel() == torch.Size(shard.global_shape).numel()
        else shard.local
        for name, shard in read.items()
    }


def _filled(room: Mapping[str, zero.Shard], read: Mapping[str, zero.Shard]) -> dict[str, zero.Shard]:
    """What was read, as the ranges of `room`: of a master, more may have been."""
    filled = {}
    for name, shard in room.items():
        start = shard.offsets[0] - read[name].offsets[0]
        local = read[name].local.view(-1)[start : start + shard.local.numel()]
        filled[name.removeprefix(OPTIMIZER)] = replace(shard, local=local)
    return filled

"""`load`: a step into a state tree of any other layout; `read_tree`: all of it, whole.

The way of a load: all ranks take the same step -> `targets.find_targets` says what the state wants -> names, shapes and
dtypes are compared, on all ranks -> `reader.read_into` fills tensors -> values are put in place, objects get their
state. Up to the first byte that is read into a tensor, nothing has changed.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .errors import ConfigError, MismatchError
from .index import Index, TensorRecord
from .places import open_directory
from .ranks import Ranks
from .reader import Want, check_sizes, read_into
from .steps import Step, find_step, read_step
from .targets import Targets, find_targets, whole_tree
from .tree import Part
from .values import DTYPES

log = logging.getLogger(__name__)

Rename = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Description:
    """What a step holds, before any of it is loaded.

    Attributes:
        path: of the step.
        step: its number.
        world: ranks that saved it.
        tensors: shape and dtype of each, by name.
        values: the tree beside them, with `TensorRef` in place of tensors and `PerRankValues` of all ranks.
    """

    path: str
    step: int
    world: int
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    values: Any


def describe(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    group: dist.ProcessGroup | None = None,
    timeout_s: float = 600.0,
) -> Description:
    """What there is to load; every rank of the group calls it, and hears of the same step.

    Args:
        path: As for `load`.
        name: As for `load`.
        group: As for `load`.
        timeout_s: As for `load`.

    Raises:
        NotACheckpointError, CorruptError: As for `load`.
    """
    ranks = Ranks(group, timeout_s=timeout_s)
    try:
        step, index = _agreed_step(path, name, ranks)
    finally:
        ranks.close()
    tensors = {each: (record.shape, DTYPES[record.dtype]) for each, record in index.tensors.items()}
    return Description(step.directory.path, index.step, index.world, tensors, index.values)


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        path: of the step.
        step: its number.
        world: ranks that saved it.
        missing: names and paths in the state that the checkpoint lacks; left as they were.
        unexpected: names and paths in the checkpoint that the state lacks.
        read_bytes, wanted_bytes: of data files, read by this rank; and of the tensors that it filled.
    """

    path: str
    step: int
    world: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    read_bytes: int
    wanted_bytes: int


def load(
    path: str | os.PathLike[str],
    into: Mapping[str, Any],
    *,
    name: str | None = None,
    strict: bool = True,
    only: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    group: dist.ProcessGroup | None = None,
    timeout_s: float = 600.0,
    progress: Callable[[int], None] | None = None,
) -> Loaded:
    """Load a step into a state tree; every rank of the group calls it.

    Args:
        path: The directory of steps (the latest one is taken), or of one step, or a URL for fsspec.
        into: The tree, as for `save`: tensors and shards are filled in place (cast, where both are floating-point),
            other values are replaced in their dictionaries and lists, objects with `load_state_dict` get theirs.
            It may be sharded in any way, whatever the one that was saved.
        name: The name of the step below `path`.
        strict: Refuse where the state and the checkpoint have different names.
        only: Patterns (as of the shell) of names and paths in the state; what matches none is left as it is, and what
            the checkpoint has besides is not unexpected.
        rename: From a tensor's name in the state to its name in the checkpoint: a dictionary, or a function.
        group: The ranks; None: all, or this process alone where torch.distributed is not initialised.
        timeout_s: How long ranks wait for each other.
        progress: Told of the bytes that this rank has read, now and then.

    Raises:
        NotACheckpointError: There is no committed step.
        MismatchError: Names are missing or unexpected (`strict`), or shapes differ; on every rank, nothing was changed.
        CorruptError: Bytes are missing or damaged; the state may hold old and new values: load another step.

    Bytes per rank: `into`, 24 MiB of buffers (four chunks, if they are compressed); of files, what it holds, in pages.
    """
    ranks = Ranks(group, timeout_s=timeout_s)
    try:
        step, index = _agreed_step(path, name, ranks)

        def understand() -> tuple[Targets, list[Part], dict[str, str]]:
            found = find_targets(into, index.values, index.tensors, ranks.rank, ranks.world, _matcher(only))
            parts = [part for each, part in found.parts.items() if found.chosen(each)]
            return found, parts, _names(parts, rename)

        (targets, chosen, names), matched = ranks.share(
            "load: understanding the state", understand, lambda found: bool(found[1]) or found[0].matched
        )
        if only is not None and not any(matched):
            raise ConfigError(f"only: nothing of the state matches {only!r}, on any rank")
        missing, unexpected = _compare(step, index, targets, chosen, names, ranks, strict, only is not None)
        wants = [Want(names[part.name], part.pieces) for part in chosen if names[part.name] in index.tensors]
        report = ranks.together("load", lambda: read_into(step.directory, index, wants, progress))
        ranks.together("load: handing out the state", targets.apply)
    finally:
        ranks.close()
    return Loaded(
        step.directory.path,
        index.step,
        index.world,
        missing,
        unexpected,
        report.read_bytes,
        report.wanted_bytes,
    )


def read_tree(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    only: str | Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """A step as it was saved, with whole tensors on the CPU; this process alone, whatever it is part of.

    Args:
        path: As for `load`.
        name: As for `load`.
        only: Patterns of tensors' names; then a flat dictionary of those alone.
        progress: As for `load`.

    Raises:
        NotACheckpointError, CorruptError: As for `load`.
    """
    step = find_step(open_directory(path), name)
    index = step.index()
    check_sizes(step.directory, index)  # before room is made for what the index says
    targets = whole_tree(index.values, index.tensors, 0, index.world)
    matches = _matcher(only)
    chosen = [part for each, part in targets.parts.items() if matches(each)]
    read_into(step.directory, index, [Want(part.name, part.pieces) for part in chosen], progress)
    if only is None:
        return targets.apply()
    return {part.name: part.whole for part in chosen}


def _agreed_step(path: str | os.PathLike[str], name: str | None, ranks: Ranks) -> tuple[Step, Index]:
    """The first rank's choice, with its index: another save may be committed while ranks look."""

    def choose() -> list[str]:
        step = find_step(open_directory(path), name)
        return [step.directory.path, step.name]

    def read() -> tuple[Step, Index]:
        step = read_step(open_directory(chosen_path), chosen)
        return step, step.index()

    chosen_path, chosen = ranks.on_first("load", choose)
    return ranks.together("load: reading the index", read)


def _matcher(only: str | Sequence[str] | None) -> Callable[[str], bool]:
    if only is None:
        return lambda path: True
    patterns = [only] if isinstance(only, str) else list(only)
    return lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _names(parts: Sequence[Part], rename: Rename | None) -> dict[str, str]:
    if rename is None:
        return {part.name: part.name for part in parts}
    call = rename if callable(rename) else lambda name: rename.get(name, name)
    return {part.name: call(part.name) for part in parts}


def _compare(
    step: Step,
    index: Index,
    targets: Targets,
    parts: Sequence[Part],
    names: Mapping[str, str],
    ranks: Ranks,
    strict: bool,
    partial: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of all ranks with those of the checkpoint; raises on all ranks, before anything has changed."""
    missing = [part.name for part in parts if names[part.name] not in index.tensors]
    misfits = [
        text
        for part in parts
        if (record := index.tensors.get(names[part.name])) is not None and (text := _misfit(part, record))
    ]
    missing += targets.missing
    told = ranks.gather([missing, misfits, list(names.values()), targets.unexpected], "load: comparing names")
    all_missing = sorted({each for rank in told for each in rank[0]})
    all_misfits = sorted({each for rank in told for each in rank[1]})
    wanted = {each for rank in told for each in rank[2]}
    unexpected: list[str] = []
    if not partial:
        # A value is unexpected where no rank has a place for it.
        common = set(told[0][3]).intersection(*(rank[3] for rank in told[1:]))
        unexpected = sorted(set(index.tensors) - wanted) + sorted(common)
    if all_misfits or (strict and (all_missing or unexpected)):
        parts_of = []
        if all_missing:
            parts_of.append(f"missing in the checkpoint: {_some(all_missing)}")
        if unexpected:
            parts_of.append(f"unexpected there: {_some(unexpected)}")
        if all_misfits:
            parts_of.append(f"of another shape: {_some(all_misfits, quote=False)}")
        raise MismatchError(
            f"{step.directory.path} does not fit the state: {'; '.join(parts_of)}. Nothing was changed"
            + ("; strict=False loads what both have" if not all_misfits else "")
        )
    if all_missing or unexpected:
        log.warning(
            "%s: missing there: %s; unexpected there: %s",
            step.directory.path,
            _some(all_missing),
            _some(unexpected),
        )
    return tuple(all_missing), tuple(unexpected)


def _misfit(part: Part, record: TensorRecord) -> str:
    if part.shape != record.shape:
        return f"'{part.name}': {part.shape} in the state, {record.shape} in the checkpoint"
    saved = DTYPES[record.dtype]
    floats = part.dtype.is_floating_point and saved.is_floating_point
    if part.dtype != saved and not floats and not (part.dtype.is_complex and saved.is_complex):
        return f"'{part.name}': {part.dtype} in the state, {saved} in the checkpoint"
    return ""


def _some(names: Sequence[str], most: int = 8, *, quote: bool = True) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(f"'{name}'" if quote else name for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")

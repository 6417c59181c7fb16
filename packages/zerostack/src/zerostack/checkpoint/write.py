"""Write a checkpoint: every rank its own pieces, the first rank the index and the renames.

In: this rank's shards and small values. On the way: `layout.plan_pieces` on what all ranks hold -> `tensor_file` on
each rank -> `index` and `files.commit` on the first. After each stage all ranks go on together or fail together.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .. import ranks
from ..errors import CheckpointError
from . import files, tensor_file
from .index import Index, Stored, TensorEntry
from .layout import PIECE_BYTES, Piece, Range, ShardLike, TensorPlan, piece_key, plan_pieces
from .tensor_file import dtype_name, dtype_of
from .values import check_json

T = TypeVar("T")


def save(
    root: Path,
    tag: str,
    tensors: Mapping[str, ShardLike],
    values: Mapping[str, Any],
    *,
    group: dist.ProcessGroup,
    per_rank: Mapping[str, torch.Tensor] | None = None,
    point_latest: bool = True,
    piece_bytes: int = PIECE_BYTES,
) -> Path:
    """Save what all ranks hold as `root/tag`; every rank calls it with the same root, which all must see.

    Args:
        root: Directory of checkpoints; made if missing.
        tag: Name of this one; an older one of the same name is replaced.
        tensors: This rank's shards by name; together the ranks must hold every element.
        values: Small values of JSON's own types; the first rank's are kept.
        group: The ranks that save.
        per_rank: 1-D tensors that belong to this rank alone.
        point_latest: Whether `root/latest` is to name this checkpoint.
        piece_bytes: Size up to which a tensor is one piece.

    Returns:
        `root/tag`.

    Raises:
        TypeError: For a value that JSON would change; it names the path.
        CheckpointError: If a rank could not write; the directory then holds what it held before.
        OSError: On the rank whose disk refused.
    """
    own = per_rank or {}
    plans, nonce = _plan(tag, tensors, values, group, piece_bytes)
    path, first = files.hidden(root, tag, nonce), group.rank() == 0
    try:
        _together(lambda: files.prepare(root, tag, nonce) if first else None, group)
        written = _together(lambda: _write_mine(path, plans, tensors, own, group.rank()), group)
        everyone = ranks.gather_json(written, group)
        index = _index(plans, everyone, dict(values))
        _together(lambda: _finish(root, tag, path, index, point_latest) if first else None, group)
    except BaseException:
        if first:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return root / tag


def _together(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run one stage on every rank and agree that it went well."""
    error: BaseException | None = None
    try:
        result = work()
    except (OSError, TypeError, ValueError, CheckpointError) as caught:
        error = caught
    ranks.agree(error, group, CheckpointError, "saving the checkpoint")
    return result


def _plan(
    tag: str,
    tensors: Mapping[str, ShardLike],
    values: Mapping[str, Any],
    group: dist.ProcessGroup,
    piece_bytes: int,
) -> tuple[dict[str, TensorPlan], str]:
    """Who writes what, the same on every rank; and the name of the attempt."""

    def describe() -> list[list[Any]]:
        files.check_tag(tag)
        for name, value in values.items():
            check_json(value, name)
        ranges = {name: Range.of(shard) for name, shard in tensors.items()}
        return [[name, list(r.shape), dtype_name(r.dtype), r.start, r.stop] for name, r in ranges.items()]

    described = _together(describe, group)
    everyone = ranks.gather_json([secrets.token_hex(4), described], group)
    held = [
        {name: Range(tuple(shape), dtype_of(dtype), start, stop) for name, shape, dtype, start, stop in rows}
        for _, rows in everyone
    ]
    return _together(lambda: plan_pieces(held, piece_bytes), group), everyone[0][0]


def _write_mine(
    path: Path,
    plans: Mapping[str, TensorPlan],
    tensors: Mapping[str, ShardLike],
    own: Mapping[str, torch.Tensor],
    rank: int,
) -> dict[str, Any]:
    """Write this rank's file; returns its size, its checksums, and what is its own."""
    entries: dict[str, torch.Tensor] = {}
    for name, plan in plans.items():
        for piece in plan.pieces:
            if piece.rank == rank:
                start = tensors[name].offsets[0]
                entries[piece_key(name, piece)] = tensors[name].local[
                    piece.start - start : piece.stop - start
                ]
    entries |= {_own_key(name): tensor for name, tensor in own.items()}
    file = path / files.rank_file(rank)
    checksums = tensor_file.write(file, entries)
    described = {name: [dtype_name(tensor.dtype), tensor.numel()] for name, tensor in own.items()}
    return {"bytes": file.stat().st_size, "crc32": checksums, "own": described}


def _own_key(name: str) -> str:
    return f"rank@{name}"


def _index(plans: Mapping[str, TensorPlan], written: list[dict[str, Any]], values: dict[str, Any]) -> Index:
    """What all ranks wrote, as one index."""

    def stored(key: str, piece: Piece) -> Stored:
        crc = written[piece.rank]["crc32"][key]
        return Stored(files.rank_file(piece.rank), key, piece.start, piece.stop, crc)

    tensors = {
        name: TensorEntry(plan.shape, plan.dtype, tuple(stored(piece_key(name, p), p) for p in plan.pieces))
        for name, plan in plans.items()
    }
    per_rank = tuple(
        {
            name: TensorEntry((numel,), dtype_of(dtype), (stored(_own_key(name), Piece(0, numel, rank)),))
            for name, (dtype, numel) in report["own"].items()
        }
        for rank, report in enumerate(written)
    )
    sizes = {files.rank_file(rank): report["bytes"] for rank, report in enumerate(written)}
    return Index(world=len(written), files=sizes, tensors=tensors, per_rank=per_rank, values=values)


def _finish(root: Path, tag: str, path: Path, index: Index, point_latest: bool) -> None:
    index.write(path)
    files.commit(root, tag, path, point_latest=point_latest)

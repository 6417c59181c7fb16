"""`save`: all ranks write what they hold, once, and commit it together.

The way of a save: `holdings.take_apart` -> all ranks hear what each holds -> `holdings.Agreed` -> `writer.write_file`
on every rank that has something to write -> the first rank writes the index and then the marker (`steps.commit`), and
only then moves `latest` and removes old steps. Until the marker is there, nothing has changed for a reader.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from .codecs import Compression
from .compression import choose_level
from .errors import CheckpointError, ConfigError
from .holdings import Agreed, Taken, take_apart
from .index import ChunkRecord, FileRecord, Index, TensorRecord, data_name, index_name
from .merge import merge_values
from .pages import PAGE_BYTES
from .places import open_directory
from .plan import Held
from .ranks import Ranks
from .steps import (
    Claim,
    Retention,
    check_name,
    check_step,
    claim,
    commit,
    discard,
    new_token,
    point_latest,
    prune,
    step_name,
)
from .stores import Directory
from .values import unpack
from .writer import Piece, Written, write_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavePolicy:
    """How a checkpoint is written.

    Attributes:
        chunk_bytes: upper bound of a chunk: what is read at once, and held in memory for it.
        compress: a zstd level; "auto" measures on the state itself and the disk whether one pays, and takes none if
            not; None stores bytes as they are.
        retention: which older steps stay.
        point_latest: let `latest` point to this step.
        timeout_s: how long ranks wait for each other.
    """

    chunk_bytes: int = 16 << 20
    compress: int | str | None = None
    retention: Retention = field(default_factory=Retention)
    point_latest: bool = True
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if type(self.chunk_bytes) is not int or self.chunk_bytes < 1:
            raise ConfigError(f"SavePolicy(chunk_bytes=...): expected bytes >= 1, got {self.chunk_bytes!r}")
        if type(self.compress) is int:
            Compression(level=self.compress)
        elif self.compress not in ("auto", None):
            raise ConfigError(
                f"SavePolicy(compress=...): expected a level, 'auto' or None, got {self.compress!r}"
            )


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    step: int,
    name: str | None = None,
    group: dist.ProcessGroup | None = None,
    policy: SavePolicy | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Save a state tree as a step; every rank of the group calls it, and returns when the step is committed.

    Args:
        path: The directory of all steps, or a URL for fsspec.
        state: Nested dictionaries and lists of tensors, `DTensor`s, shards (`tree.Shard`), numbers, text, and objects
            with `state_dict`. A plain tensor that several ranks have under one name is taken to be equal on all.
        step: Its number.
        name: Its directory's name; None: `step-` and nine digits. A step of this name is replaced, at once.
        group: The ranks; None: all, or this process alone where torch.distributed is not initialised.
        policy: How.
        progress: Told of the bytes that this rank has written, now and then.

    Returns:
        The path of the step.

    Raises:
        ConfigError: The state cannot be stored, or ranks disagree about it; nothing is left of it.
        BusyError: Another run is writing this step.
        CheckpointError: A rank could not write, or has ended; every rank raises, and what was there before is as it
            was.

    Bytes per rank: `state` stays where it is; 32 MiB of buffers, and chunks on their way from a device.
    """
    policy = policy or SavePolicy()
    ranks = Ranks(group, timeout_s=policy.timeout_s)

    def begin() -> tuple[Taken, str]:
        return take_apart(state), writing.begin()

    try:
        with ranks.telling("save"):
            target = Target.of(path, step, name)
        with Writing(target, ranks) as writing:
            (taken, _), said = ranks.share(
                "save", begin, lambda begun: (begun[0].told, begun[0].values, begun[1], target.known)
            )
            told, trees, tokens, targets = zip(*said, strict=True)
            check_alike(targets)
            agreed = Agreed.of(told, ranks.rank, policy.chunk_bytes)
            return writing.write(tokens[0], agreed.pieces(taken), trees, agreed, policy, progress)
    finally:
        ranks.close()


@dataclass(frozen=True)
class Target:
    """Where a step is to be written."""

    root: Directory
    step: int
    name: str

    @property
    def directory(self) -> Directory:
        """Of the step."""
        return self.root.child(self.name)

    @property
    def known(self) -> list[Any]:
        """What all ranks must say alike."""
        return [self.step, self.name]

    @staticmethod
    def of(path: str | os.PathLike[str], step: int, name: str | None) -> Target:
        """Checked.

        Raises:
            ConfigError: the step or the name is none.
        """
        check_step(step)
        return Target(open_directory(path), step, step_name(step) if name is None else check_name(name))


def check_alike(targets: Sequence[Any]) -> None:
    """Refuse what ranks do not call the same; `targets` are those of all ranks, `Target.known`.

    Raises:
        ConfigError: on every rank.
    """
    for rank, (step, name) in enumerate(targets):
        if [step, name] != list(targets[0]):
            raise ConfigError(
                f"save: rank 0 saves step {targets[0][0]} as {targets[0][1]!r}, and rank {rank} step {step} as "
                f"{name!r}; all ranks save the same step"
            )


class Writing:
    """A step being written, from the claim that the first rank has on it to its commit.

    Its files go when the block is left by an exception. By the first rank alone, which holds the claim: another one
    cannot know whether the first is not just committing.
    """

    def __init__(self, target: Target, ranks: Ranks) -> None:
        self.target = target
        self.ranks = ranks
        self._claim: Claim | None = None
        self._made_root = False

    def begin(self) -> str:
        """Claim the step on the first rank; the token of its files, which that rank is to tell the others.

        Raises:
            BusyError: another run is writing it.
        """
        if self.ranks.rank != 0:
            return ""
        self._made_root = self.target.root.make()
        self._claim = claim(self.target.directory, new_token())
        return self._claim.token

    def write(
        self,
        token: str,
        pieces: Sequence[Piece],
        trees: Sequence[bytes],
        agreed: Agreed,
        policy: SavePolicy,
        progress: Callable[[int], None] | None = None,
    ) -> str:
        """Write this rank's pieces, and commit all ranks'; see `save`.

        Args:
            token: see `begin`.
            pieces: what this rank has been assigned.
            trees: the packed values of all ranks.
            agreed: of all ranks.
            policy: see `save`.
            progress: see `save`.
        """
        directory, ranks = self.target.directory, self.ranks
        level = choose_level(policy.compress, pieces, directory, ranks)
        sizes = [chunk.nbytes for chunk in agreed.plan[ranks.rank]]

        def write_pieces() -> list[Any] | None:
            if not pieces:
                return None
            compression = Compression(level=level)
            name = data_name(token, ranks.rank)
            return _described(
                write_file(directory, name, pieces, sizes, compression=compression, progress=progress)
            )

        with ThreadPoolExecutor(1, thread_name_prefix="ckpt-merge") as beside:
            # Of values alone, and on the first rank: nobody waits for it before the bytes are written.
            values = beside.submit(_merged, trees) if ranks.rank == 0 else None
            said = ranks.gather_results("save: writing", write_pieces)

        def finish() -> None:
            assert values is not None
            index = _index(self.target.step, agreed, said, values.result())
            for file in index.files:
                _check_there(directory, file)
            commit(directory, index_name(token), index.pack())
            _after(self.target.root, self.target.name, policy)

        ranks.on_first("save: committing", finish)
        log.info("step %d is committed: %s", self.target.step, directory.path)
        return directory.path

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._claim is not None:
            if kind is not None:
                _remove(self.target.directory, self._claim.token)
            self._claim.release()
            if kind is not None:
                self.target.directory.remove_empty()
        if kind is not None and self._made_root:
            self.target.root.remove_empty()


def _merged(trees: Sequence[bytes]) -> Any:
    return merge_values([unpack(each, "state") for each in trees])


def _described(written: Written) -> list[Any]:
    return [written.file.name, written.file.data_bytes, written.file.footer, written.places]


def _index(
    step: int,
    agreed: Agreed,
    said: Sequence[Any],
    values: Any,
) -> Index:
    files: list[FileRecord] = []
    chunks: dict[str, list[ChunkRecord]] = {}
    for assigned, description in zip(agreed.plan, said, strict=True):
        if description is None:
            continue
        name, data_bytes, footer, places = description
        for chunk, (offset, nbytes, codec) in zip(assigned, places, strict=True):
            record = ChunkRecord(len(files), offset, nbytes, codec, chunk.box)
            chunks.setdefault(chunk.name, []).append(record)
        files.append(FileRecord(name, data_bytes, footer))
    known: dict[str, Held] = {}
    for held in reversed(agreed.holdings):
        known |= held
    tensors = {
        name: TensorRecord(held.shape, held.dtype, tuple(sorted(chunks.get(name, []), key=lambda c: c.box)))
        for name, held in known.items()
    }
    return Index(step, time.time(), len(agreed.plan), PAGE_BYTES, tuple(files), tensors, values)


def _check_there(directory: Directory, file: FileRecord) -> None:
    try:
        found = directory.size(file.name)
    except FileNotFoundError:
        found = None
    if found != file.num_bytes(PAGE_BYTES):
        raise CheckpointError(
            f"{directory.path}/{file.name}: "
            + (
                "it is not there"
                if found is None
                else f"it has {found} bytes instead of {file.num_bytes(PAGE_BYTES)}"
            )
            + ", though a rank has written it; do all ranks see the same directory?"
        )


def _remove(directory: Directory, token: str) -> None:
    """The save has failed: its files go, or else with the next save."""
    try:
        discard(directory, token)
    except (CheckpointError, OSError) as error:
        log.warning("%s: files of the failed save could not be removed: %s", directory.path, error)


def _after(root: Directory, name: str, policy: SavePolicy) -> None:
    if policy.point_latest:
        try:
            point_latest(root, name)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(
                f"{root.path}: {name} is committed, and 'latest' still names another: {error}"
            ) from error
    if policy.retention.keep_last is None:
        return
    try:
        removed = prune(root, policy.retention, keep=name)
    except (CheckpointError, OSError) as error:  # the step is committed all the same
        log.warning("%s: old steps could not be removed: %s", root.path, error)
        return
    if removed:
        log.info("%s: removed %s", root.path, ", ".join(removed))

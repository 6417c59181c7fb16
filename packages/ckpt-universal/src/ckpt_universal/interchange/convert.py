"""From any format that can be read to any that can be written.

In: a path, whose format is recognised by what lies there. Out: a step, a Hugging Face directory, or a DCP directory.
Tensors pass through part by part.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..boxes import Box
from ..codecs import Compression
from ..errors import CheckpointError, ConfigError
from ..index import ChunkRecord, Index, TensorRecord, data_name, index_name
from ..pages import PAGE_BYTES
from ..places import open_directory
from ..steps import check_step, claim, commit, discard, find_step, new_token, point_latest, step_name
from ..values import TensorRef, dtype_name
from ..writer import Piece, write_file
from .dcp import METADATA, DcpSource, write_dcp
from .deepspeed import DeepSpeedSource
from .safetensors_files import SafetensorsSource, write_safetensors
from .source import Renamed, Source, StepSource, parts_of

log = logging.getLogger(__name__)

FORMATS = ("step", "safetensors", "dcp")
CHUNK_BYTES = 16 << 20


def open_source(path: str | os.PathLike[str], name: str | None = None) -> Source:
    """What lies at a path, whatever its format.

    Raises:
        CheckpointError: none of the formats.
    """
    text = os.fspath(path)
    local = Path(text)
    if "://" not in text:
        if (local / METADATA).exists():
            return DcpSource(local)
        if any(local.glob("*model_states.pt")) or any(local.glob("*/*model_states.pt")):
            return DeepSpeedSource(local)
        if local.suffix == ".safetensors" or any(local.glob("*.safetensors")):
            return SafetensorsSource(local)
        if not local.exists():
            raise CheckpointError(f"{local}: there is nothing")
    return StepSource(find_step(open_directory(path), name))


def write_source(
    source: Source,
    path: str | os.PathLike[str],
    *,
    step: int = 0,
    compress: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Write a source as a step, and commit it; this process alone.

    Args:
        source: What to write.
        path: The directory of steps.
        step: Its number.
        compress: A zstd level.
        progress: Told of bytes written.

    Returns:
        The path of the step.

    Raises:
        ConfigError: The number is none that a step can have.

    Memory: 64 MiB and 48 MiB of buffers, whatever the sizes.
    """
    check_step(step)
    root = open_directory(path)
    directory = root.child(step_name(step))
    token = new_token()
    held = claim(directory, token)
    try:
        boxes: list[tuple[str, Box]] = []
        sizes = [size for described in source.tensors.values() for size in _part_sizes(described.nbytes)]
        written = write_file(
            directory,
            data_name(token, 0),
            _pieces(source, boxes),
            sizes,
            compression=Compression(level=compress),
            progress=progress,
        )
        chunks: dict[str, list[ChunkRecord]] = {}
        for (name, box), (offset, nbytes, codec) in zip(boxes, written.places, strict=True):
            chunks.setdefault(name, []).append(ChunkRecord(0, offset, nbytes, codec, box))
        tensors = {
            name: TensorRecord(d.shape, dtype_name(d.dtype), tuple(chunks.get(name, ())))
            for name, d in source.tensors.items()
        }
        values = tree_of(_references(source)) if source.values is None else source.values
        index = Index(step, time.time(), 1, PAGE_BYTES, (written.file,), tensors, values)
        commit(directory, index_name(token), index.pack())
    except BaseException:
        discard(directory, token)
        raise
    finally:
        held.release()
    point_latest(root, step_name(step))
    return directory.path


def _part_sizes(nbytes: int) -> list[int]:
    """An upper bound of what the parts of a tensor take, for the check of free space."""
    return [nbytes] if nbytes else []


def _pieces(source: Source, boxes: list[tuple[str, Box]]) -> Iterator[Piece]:
    for name in source.tensors:
        for box, values in parts_of(source, name, CHUNK_BYTES):
            boxes.append((name, box))
            yield Piece(name, values)


def _references(source: Source) -> dict[str, TensorRef]:
    return {name: TensorRef(name) for name in source.tensors}


def tree_of(leaves: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of what has dotted names, for formats without any: as a save of `{"model": module}` gives it.

    A module's state is flat (`{"layers.0.weight": ...}`), so a name is taken apart only as far as the prefix is that
    it was given, or at its first dot. A name that cannot be, since another one is what it begins with, stays whole.

    Args:
        leaves: By name.
        prefix: What all names begin with, where the caller has put it there.
    """
    depth = prefix.count(".") or 1
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, rest = name.split(".", depth)
        begins = [".".join(above[:n]) for n in range(1, len(above) + 1)]
        if any(begin in leaves for begin in begins):
            tree[name] = leaf
            continue
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[rest] = leaf
    return tree


def _num_values(node: Any) -> int:
    """Numbers, texts and the like in a tree."""
    if node is None or isinstance(node, TensorRef):
        return 0
    if isinstance(node, (dict, list, tuple)):
        return sum(map(_num_values, node.values() if isinstance(node, dict) else node))
    return 1


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    name: str | None = None,
    only: str = "*",
    strip: str = "",
    prefix: str = "",
    dtype: torch.dtype | None = None,
    step: int | None = None,
    compress: int | None = None,
    max_file_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, list[str]]:
    """Read one format, write another.

    Args:
        path: What to read: a directory of steps or one step, safetensors, DCP, or DeepSpeed.
        out: Where to write.
        to: "step", "safetensors" (in the layout of Hugging Face) or "dcp".
        name: The name of the step below `path`.
        only: Pattern of tensors' names.
        strip: Taken off the beginning of names.
        prefix: Put before them.
        dtype: Of floating-point tensors; None keeps each one's own.
        step: The number of the step to write; None: that of the source, or 0.
        compress: A zstd level, for a step.
        max_file_bytes: For safetensors.
        progress: Told of bytes written.

    Returns:
        What was written, and a line for each thing that could not be taken over.

    Raises:
        CheckpointError: as each format's reader and writer say.
    """
    if to not in FORMATS:
        raise ConfigError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    source = open_source(path, name)
    number = getattr(source, "step", 0) if step is None else step
    plain = only == "*" and not strip and not prefix
    chosen: Source = Renamed(
        source, only=only, rename=lambda each: prefix + each.removeprefix(strip), dtype=dtype
    )
    num_values = _num_values(source.values)
    if num_values and not plain:
        source.left_out.append(
            f"{num_values} values beside tensors: they go with all tensors under their own names, without only, strip "
            "and prefix"
        )
    elif num_values and to == "safetensors":
        source.left_out.append(f"{num_values} values beside tensors, which the format has no place for")
    if not plain:
        chosen.values = None  # its references would be to other names
    if to == "safetensors":
        written = str(write_safetensors(chosen, out, max_file_bytes=max_file_bytes, progress=progress))
    elif to == "dcp":
        written = str(write_dcp(chosen, out, progress=progress))
    else:
        if chosen.values is None or not isinstance(source, StepSource):
            chosen.values = tree_of({**(chosen.values or {}), **_references(chosen)}, prefix)
        written = write_source(chosen, out, step=number, compress=compress, progress=progress)
    return written, source.left_out


def export_safetensors(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    only: str = "model.*",
    strip: str = "model.",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the model of a step as a directory that Hugging Face's `from_pretrained` reads (beside a config.json).

    Args:
        path: As for `load`.
        out: The directory; it appears when everything is in it.
        name: As for `load`.
        only: Pattern of tensors' names.
        strip: Taken off the beginning of names.
        dtype: Of floating-point tensors; None keeps each one's own.
        max_file_bytes: A file grows no larger, unless one tensor alone is.
        progress: Told of bytes written.

    Memory: 64 MiB, whatever the sizes.
    """
    written, _ = convert(
        path,
        out,
        to="safetensors",
        name=name,
        only=only,
        strip=strip,
        dtype=dtype,
        max_file_bytes=max_file_bytes,
        progress=progress,
    )
    return Path(written)

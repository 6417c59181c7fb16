"""Directories that appear whole or not at all, and the pointer to the last one.

In: a root directory and a tag. A checkpoint is written to a hidden directory beside its place, flushed to the disk
and renamed; `latest` is replaced by a rename too. Whoever looks sees the old or the new, never a part.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..errors import CheckpointError

LATEST = "latest"
INDEX = "index.json"
_TAG = re.compile(r"[\w.+=-]([\w.+= -]*[\w.+=-])?")

FORMAT = "zerostack-checkpoint"


def check_tag(tag: str) -> None:
    """Refuse tags that are no plain directory names.

    Raises:
        CheckpointError: If so.
    """
    if not _TAG.fullmatch(tag) or tag.startswith(".") or tag == LATEST:
        raise CheckpointError(
            f"tag {tag!r}: expected a plain directory name such as 'step100', not hidden, not 'latest'"
        )


def rank_file(rank: int) -> str:
    """Name of one rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def prepare(root: Path, tag: str, nonce: str) -> Path:
    """Make the hidden directory to write in, and remove what killed attempts at the same tag left.

    Raises:
        CheckpointError: What has the tag's name is none of our checkpoints, and would be replaced.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / tag
    if final.exists() and not is_checkpoint(final):
        raise CheckpointError(
            f"{final} is there already and is no checkpoint of this format; it will not be replaced: give another "
            "directory or tag, or remove it"
        )
    leftovers = [*root.glob(f".{tag}.tmp-*"), *(root.glob(f".{tag}.old-*") if final.exists() else ())]
    for stale in leftovers:
        shutil.rmtree(stale, ignore_errors=True)
    path = hidden(root, tag, nonce)
    path.mkdir()
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is one of ours: it has an index, which names its format near its end."""
    try:
        with (path / INDEX).open("rb") as file:
            file.seek(max(0, (path / INDEX).stat().st_size - 200))
            return FORMAT.encode() in file.read()
    except OSError:
        return False


def hidden(root: Path, tag: str, nonce: str) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f".{tag}.tmp-{nonce}"


def commit(root: Path, tag: str, written: Path, *, point_latest: bool) -> Path:
    """Rename a complete checkpoint into place, and point `latest` to it.

    A checkpoint of the same tag is moved aside first and removed afterwards; if the machine stops between the two
    renames, it is still there under its hidden name.
    """
    final = root / tag
    sync_directory(written)
    aside = root / f".{tag}.old-{written.name.rpartition('-')[2]}"
    if final.exists():
        final.rename(aside)
    try:
        written.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_directory(root)
    if point_latest:
        pointer = root / f".{LATEST}.tmp"
        write_text(pointer, tag + "\n")
        pointer.replace(root / LATEST)
        sync_directory(root)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's own entries, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_tag(root: Path) -> str | None:
    """The tag that `latest` points to, or None where there is no such file."""
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def tags(root: Path) -> list[str]:
    """Every complete checkpoint in a directory."""
    return sorted(path.parent.name for path in root.glob(f"[!.]*/{INDEX}"))

"""Is a step what was written? And in what do two steps differ?

In: a step. Out: a report, or lines of text; nothing is changed. All pages of all files are read and checked, a few
megabytes at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import torch

from .boxes import disjoint_cover
from .buffers import BufferPool
from .errors import CheckpointError, ConfigError, CorruptError, NotACheckpointError
from .index import CODECS, MARKER, Index
from .pages import Checksums, first_bad_page
from .places import open_directory
from .reader import READ_BYTES, Want, read_checksums, read_into
from .steps import Step, check_name, find_step
from .stores import ALIGN, Directory
from .values import DTYPES, PerRankValues, TensorRef, pack


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        path: of the step.
        num_tensors, num_bytes: of it; bytes as stored.
        problems: one line each, with file and tensors; none: every byte is as it was written.
    """

    path: str
    num_tensors: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: str | os.PathLike[str], *, name: str | None = None, progress: Callable[[int], None] | None = None
) -> Verification:
    """Read and check every byte of a step; this process alone.

    Args:
        path: As for `load`.
        name: As for `load`.
        progress: Told of the bytes read, now and then.

    Raises:
        NotACheckpointError: There is no committed step.
    """
    root = open_directory(path)
    report = Verification(root.path if name is None else root.child(name).path)
    try:
        step = find_step(root, name)
        report.path = step.directory.path
        index = step.index()
    except (NotACheckpointError, ConfigError):
        raise
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    report.num_tensors = len(index.tensors)
    for tensor_name, tensor in index.tensors.items():
        try:
            disjoint_cover(tensor.shape, [chunk.box for chunk in tensor.chunks])
        except ValueError as error:  # noqa: PERF203 - all problems are wanted
            report.problems.append(f"{tensor_name!r}: {error}")
    for number in range(len(index.files)):
        report.problems += _check_file(step.directory, index, number, progress)
        report.num_bytes += index.files[number].data_bytes
    return report


def marked_steps(path: str | os.PathLike[str]) -> list[str | None]:
    """The names of all steps below a path that have a marker, be it a damaged one; None for the path itself.

    Raises:
        NotACheckpointError: There is none.
    """
    root = open_directory(path)
    names = root.names()
    if MARKER in names:
        return [None]
    found: list[str | None] = [name for name in sorted(names) if MARKER in _names_below(root, name)]
    if not found:
        raise NotACheckpointError(f"{root.path}: no committed checkpoint")
    return found


def _names_below(root: Directory, name: str) -> list[str]:
    try:
        return root.child(check_name(name)).names()
    except (ConfigError, NotADirectoryError):
        return []


def _check_file(
    directory: Directory, index: Index, number: int, progress: Callable[[int], None] | None
) -> list[str]:
    record, page = index.files[number], index.page_bytes
    where = f"{directory.path}/{record.name}"
    try:
        size = directory.size(record.name)
        if size != record.num_bytes(page):
            return [f"{where}: {size} bytes long, expected {record.num_bytes(page)}"]
        with closing(directory.source(record.name)) as source:
            sums = read_checksums(source, index, number, where)
            problems: list[str] = []
            step_bytes = max(READ_BYTES // page, 1) * page
            with BufferPool(1, step_bytes + ALIGN).lent() as buffer:
                for start in range(0, record.data_bytes, step_bytes):
                    need = min(step_bytes, record.data_bytes - start)
                    source.read_into(start, buffer[: -(-need // source.align) * source.align], need)
                    problems += _bad_pages(buffer[:need], start, sums, index, number, where)
                    if progress is not None:
                        progress(need)
            return problems
    except FileNotFoundError:
        return [f"{where}: missing"]
    except CorruptError as error:
        return [str(error)]


def _bad_pages(
    data: memoryview, start: int, sums: Checksums, index: Index, number: int, where: str
) -> Iterator[str]:
    page, at = index.page_bytes, 0
    while at < len(data):
        bad = first_bad_page([data[at:]], (start + at) // page, sums, page)
        if bad is None:
            return
        names = names_in(index, number, bad * page, (bad + 1) * page)
        yield f"{where}: bytes {bad * page} to {(bad + 1) * page} are not what was written: {names}"
        at = (bad + 1) * page - start


def names_in(index: Index, number: int, start: int, stop: int) -> str:
    """The tensors with bytes in a range of a file, for messages."""
    found = [
        name
        for name, tensor in index.tensors.items()
        if any(c.file == number and c.offset < stop and start < c.offset + c.nbytes for c in tensor.chunks)
    ]
    return f"parts of {', '.join(map(repr, found))}" if found else "nothing but padding"


def inspect(path: str | os.PathLike[str], *, name: str | None = None) -> Iterator[str]:
    """What a step holds, as lines of text.

    Raises:
        NotACheckpointError, CorruptError: As for `load`.
    """
    step = find_step(open_directory(path), name)
    index = step.index()
    stored = sum(chunk.nbytes for t in index.tensors.values() for chunk in t.chunks)
    raw = sum(t.nbytes for t in index.tensors.values())
    yield f"{step.directory.path}: step {index.step}, saved by {index.world} rank(s)"
    yield (
        f"{len(index.tensors)} tensors, {raw} bytes in {len(index.files)} file(s)"
        + (f", {stored} as stored ({stored / raw:.2f})" if raw and stored != raw else "")
    )
    width = max((len(each) for each in index.tensors), default=0)
    for tensor_name, tensor in index.tensors.items():
        codecs = sorted({CODECS[chunk.codec] for chunk in tensor.chunks})
        extra = f", {'/'.join(codecs)}" if codecs not in ([], ["raw"]) else ""
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        yield f"  {tensor_name:{width}}  {tensor.dtype} {shape}, {len(tensor.chunks)} chunk(s){extra}"
    yield from _value_lines(index.values, "")


def _value_lines(values: object, path: str) -> Iterator[str]:
    for at, leaf in _leaves(values, path):
        yield f"  {at} = {_shown(leaf)}"


def _leaves(node: object, path: str) -> Iterator[tuple[str, object]]:
    """The values of a tree that are shown as one, by path; tensors are none."""
    if isinstance(node, TensorRef):
        return
    pairs: Iterable[tuple[object, object]] | None = None
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, (list, tuple)) and any(isinstance(each, (dict, TensorRef)) for each in node):
        pairs = enumerate(node)
    if pairs is None:
        yield path, node
        return
    for key, each in pairs:
        yield from _leaves(each, f"{path}.{key}" if path else str(key))


def _shown(leaf: object) -> str:
    if isinstance(leaf, PerRankValues):
        return f"one value for each of {len(leaf.values)} rank(s)"
    text = repr(leaf)
    return text if len(text) <= 100 else text[:97] + "..."


def diff(
    one: str | os.PathLike[str],
    other: str | os.PathLike[str],
    progress: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """In what two steps differ, as lines of text; equal ones give none. One tensor of each at a time is in memory.

    Raises:
        NotACheckpointError, CorruptError: As for `load`.
    """
    steps = [find_step(open_directory(path)) for path in (one, other)]
    indices = [step.index() for step in steps]
    for name in dict.fromkeys([*indices[0].tensors, *indices[1].tensors]):
        records = [index.tensors.get(name) for index in indices]
        if records[0] is None or records[1] is None:
            yield f"{'<' if records[0] else '>'} {name}: only in the {'first' if records[0] else 'second'}"
            continue
        described = [f"{r.dtype} {'x'.join(map(str, r.shape)) or 'scalar'}" for r in records if r]
        if described[0] != described[1]:
            yield f"! {name}: {described[0]} and {described[1]}"
            continue
        yield from _compare(name, steps, indices, progress)
    if not _equal(indices[0].values, indices[1].values):
        yield from _differences(*(dict(_leaves(index.values, "")) for index in indices))


def _equal(a: object, b: object) -> bool:
    """Whether two trees of values are, but for the order of dictionaries."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return _keys(a) == _keys(b) and all(_equal(each, b[key]) for key, each in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return pack(a, "") == pack(b, "")


def _keys(node: dict[object, object]) -> set[tuple[type, object]]:
    return {(type(key), key) for key in node}


def _differences(first: dict[str, object], second: dict[str, object]) -> Iterator[str]:
    """A line for each value that is not equal; one if only what holds the values is not."""
    found = False
    for key in dict.fromkeys([*first, *second]):
        if key in first and key in second and _equal(first[key], second[key]):
            continue
        found = True
        a, b = (_shown(each[key]) if key in each else "nothing" for each in (first, second))
        yield (
            f"! {key}: {a} and {b}"
            if a != b
            else f"! {key}: {a} in both, and what is not shown of it differs"
        )
    if not found:
        yield "! the values are equal, and the dictionaries and lists that hold them differ"


def _compare(
    name: str, steps: list[Step], indices: list[Index], progress: Callable[[int], None] | None
) -> Iterator[str]:
    """By parts of one tensor that lie in one chunk of the first, so that memory stays bounded."""
    differing, largest = 0, 0.0
    first, second = (index.tensors[name] for index in indices)
    for chunk in first.chunks:
        parts = [torch.empty(chunk.box.sizes, dtype=DTYPES[first.dtype]) for _ in range(2)]
        for step, index, part in zip(steps, indices, parts, strict=True):
            read_into(step.directory, index, [Want(name, [(chunk.box, part)])], progress)
        raw = [part.reshape(-1).view(torch.uint8).view(-1, first.itemsize) for part in parts]
        unequal = (raw[0] != raw[1]).any(1)
        differing += int(unequal.sum())
        if differing and parts[0].dtype.is_floating_point:
            gap = (parts[0].double() - parts[1].double()).abs().max()
            largest = max(largest, float(gap))
    if differing:
        total = second.nbytes // second.itemsize
        yield f"! {name}: {differing} of {total} elements differ" + (
            f", by {largest:.3g} at most" if largest else ""
        )

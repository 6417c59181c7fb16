"""A checkpoint directory: its steps, which of them are committed, which one is the latest, and who writes one now.

In: a directory. Out: committed steps, with their indices read and checked; and the two writes on which everything
rests: the marker, which commits a step, and `latest`, which points to one. Steps that are not committed do not exist
for a reader.

Note [Tokens]
Every save has a token, and all its files carry it; the marker names one index, hence one token. So a save never touches
the files of another, even one of the same step: the marker's replacement exchanges the whole step at once. Files of
other tokens are what an interrupted save left, or what another one is writing just now, which a lock tells.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import BusyError, CheckpointError, ConfigError, CorruptError, NotACheckpointError
from .index import MARKER, Index, Marker, parse_marker, unpack_index
from .pages import checksum
from .stores import Directory

log = logging.getLogger(__name__)

LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@-]{0,199}")
_STEP = re.compile(r"step-(\d+)")
_TOKEN = re.compile(r"(?:data|index|\.writing)-([0-9a-f]{16})\b.*")
_MARKER_BYTES = 4096


def new_token() -> str:
    """Of a save."""
    return secrets.token_hex(8)


def step_name(step: int) -> str:
    """The name of a step's directory, unless the caller chose another."""
    return f"step-{step:09d}"


def check_step(step: int) -> None:
    """Refuse what is no number of a step.

    Raises:
        ConfigError: it is none.
    """
    if type(step) is not int or not 0 <= step < 2**63:
        raise ConfigError(f"step: expected a number >= 0 and below 2**63, got {step!r}")


def check_name(name: str) -> str:
    """Refuse names that are no plain name of a directory.

    Raises:
        ConfigError: it is one.
    """
    if not _NAME.fullmatch(name) or name in (LATEST, MARKER):
        raise ConfigError(
            f"name: expected letters, digits and ._+=@- (at most 200, the first a letter or digit), got {name!r}"
        )
    return name


@dataclass(frozen=True)
class Step:
    """A committed step; its index is read when asked for."""

    name: str
    directory: Directory
    marker: Marker

    def index(self) -> Index:
        """Its index, checked against the marker.

        Raises:
            CorruptError: the index is missing, or not the one that was committed.
        """
        where = f"{self.directory.path}/{self.marker.index}"
        try:
            packed = self.directory.read(self.marker.index, self.marker.nbytes)
        except FileNotFoundError:
            raise CorruptError(f"{where}: missing, though the step is committed") from None
        if len(packed) != self.marker.nbytes or checksum(packed) != self.marker.checksum:
            raise CorruptError(f"{where}: not the index that was committed (its checksum differs)")
        return unpack_index(packed, where)

    @property
    def number(self) -> int:
        """The step's number by its name; -1 for a name of the caller's."""
        found = _STEP.fullmatch(self.name)
        return int(found.group(1)) if found else -1


def read_step(directory: Directory, name: str) -> Step:
    """The committed step in a directory.

    Raises:
        NotACheckpointError: nothing is committed there.
        CorruptError: the marker is damaged.
    """
    try:
        text = directory.read(MARKER, _MARKER_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        has = "an interrupted save left files there" if directory.names() else "there is nothing"
        raise NotACheckpointError(
            f"{directory.path}: no committed checkpoint ({has}: no file {MARKER})"
        ) from None
    return Step(name, directory, parse_marker(text, f"{directory.path}/{MARKER}"))


def list_steps(root: Directory) -> list[Step]:
    """The committed steps, oldest first: by number, then names of the caller's by age of their markers."""
    found: list[Step] = []
    for name in root.names():
        if _NAME.fullmatch(name) and name != LATEST:
            try:
                found.append(read_step(root.child(name), name))
            except NotACheckpointError:
                continue
            except (CheckpointError, OSError) as error:  # such as the lost+found of a file system
                log.warning("%s; %s is passed over", error, name)
    return sorted(found, key=lambda s: (s.number >= 0, s.number, s.directory.modified_s(MARKER)))


def find_step(path_directory: Directory, name: str | None = None) -> Step:
    """The step to load: of this name, or the one at the path itself, or the latest one below it.

    Where `latest` points to nothing that is committed, the newest committed step is taken, with a warning.

    Raises:
        NotACheckpointError: there is none.
        CorruptError: its marker is damaged.
    """
    if name is not None:
        try:
            return read_step(path_directory.child(check_name(name)), name)
        except NotACheckpointError as error:
            present = ", ".join(step.name for step in list_steps(path_directory)) or "nothing"
            raise NotACheckpointError(f"{error}; present: {present}") from None
    names = path_directory.names()
    if MARKER in names:
        return read_step(path_directory, path_directory.path.rstrip("/").rpartition("/")[2])
    problem = "there is no file 'latest'"
    if any(map(_TOKEN.fullmatch, names)):
        problem = f"an interrupted save left files there: no file {MARKER}"
    if LATEST in names:
        pointed = ""
        try:
            pointed = _pointed(path_directory)
            return read_step(path_directory.child(check_name(pointed)), pointed)
        except CheckpointError as error:
            problem = f"'latest' points to {pointed!r}, and {error}"
    steps = list_steps(path_directory)
    if not steps:
        raise NotACheckpointError(f"{path_directory.path}: no committed checkpoint ({problem})")
    log.warning("%s: %s; taking %s instead", path_directory.path, problem, steps[-1].name)
    return steps[-1]


# -- writing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """The right to write a step, held while the lock is."""

    token: str
    release: Callable[[], None]


def claim(directory: Directory, token: str) -> Claim:
    """Begin to write a step, and remove what interrupted saves of it have left.

    Raises:
        BusyError: another run is writing it.
    """
    names = directory.names()
    strange = [
        name for name in names if not (name == MARKER or name.startswith(".") or _TOKEN.fullmatch(name))
    ]
    if strange and MARKER not in names:
        raise CheckpointError(
            f"{directory.path}: holds {strange[0]!r}, which is of no checkpoint of this format; it will not be "
            "replaced: choose another name"
        )
    directory.make()
    lock = f".writing-{token}"
    release = directory.lock(lock)
    assert release is not None  # the token is new
    try:
        _clear_or_refuse(directory, token)
    except BaseException:
        release()
        raise
    return Claim(token, release)


def _clear_or_refuse(directory: Directory, token: str) -> None:
    for other in _tokens(directory) - {token} if directory.has_locks else set[str]():
        lock = f".writing-{other}"
        held = lock in directory.names()
        letting_go = directory.lock(lock) if held else None
        if held and letting_go is None:
            who = directory.read(lock, _MARKER_BYTES).decode(errors="replace").strip()
            raise BusyError(
                f"{directory.path}: another run ({who}) is saving this very step; save to another directory or under "
                "another name"
            )
        # Only now: whoever held the lock may have committed before letting go.
        if other != _committed_token(directory):
            for name in list(_files_of(directory, other)):
                directory.remove(name)
        if letting_go is not None:
            letting_go()


def _tokens(directory: Directory) -> set[str]:
    return {found.group(1) for name in directory.names() if (found := _TOKEN.fullmatch(name))}


def _files_of(directory: Directory, token: str) -> Iterator[str]:
    for name in directory.names():
        found = _TOKEN.fullmatch(name)
        if found and found.group(1) == token and not name.startswith(".writing"):
            yield name


def _committed_token(directory: Directory) -> str | None:
    try:
        return parse_marker(directory.read(MARKER, _MARKER_BYTES), directory.path).token
    except (
        FileNotFoundError,
        CorruptError,
    ):  # what may not be read, or is of a later version, may be committed
        return None


def commit(directory: Directory, index_file: str, packed: bytes) -> None:
    """Write the index and then the marker; from here on the step is there, and what it replaces is removed."""
    before = _committed_token(directory)
    directory.put(index_file, packed)
    marker = Marker.of(index_file, packed)
    directory.put(MARKER, marker.text())
    if before is not None and before != marker.token:
        for name in list(_files_of(directory, before)):
            directory.remove(name)


def point_latest(root: Directory, name: str) -> None:
    """Let `latest` point to a committed step."""
    root.put(LATEST, f"{name}\n".encode())


def discard(directory: Directory, token: str) -> None:
    """Remove the files of a save that failed; one that has been committed all the same stays."""
    if token == _committed_token(directory):
        return
    for name in list(_files_of(directory, token)):
        directory.remove(name)


def remove_step(step: Step) -> None:
    """Remove a committed step: its marker first, so that it is never half there.

    Raises:
        BusyError: it is being written anew.
    """
    if step.directory.has_locks:
        _clear_or_refuse(step.directory, "")
    step.directory.remove(MARKER)
    for name in list(_files_of(step.directory, step.marker.token)):
        step.directory.remove(name)
    step.directory.remove_empty()


def _remove_old(directory: Directory, older_than_s: float) -> None:
    for token in _tokens(directory) - {_committed_token(directory)}:
        names = list(_files_of(directory, token))
        if all(time.time() - directory.modified_s(name) >= older_than_s for name in names):
            for name in names:
                directory.remove(name)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which steps stay when a new one has been committed.

    Attributes:
        keep_last: so many of the newest; None keeps all.
        keep_every: with `keep_last`: and every step whose number is a multiple of it; None: no others. Steps under
            names of the caller's always stay.
    """

    keep_last: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"Retention({name}=...): expected a number >= 1 or None, got {value!r}")
        if self.keep_every is not None and self.keep_last is None:
            raise ConfigError(
                "Retention(keep_every=...): without keep_last every step stays; say keep_last, too"
            )

    def doomed(self, numbers: list[int]) -> list[int]:
        """The numbers of the steps to remove, of those of all committed ones."""
        if self.keep_last is None:
            return []
        old = sorted(number for number in numbers if number >= 0)[: -self.keep_last]
        return [number for number in old if self.keep_every is None or number % self.keep_every]


def prune(root: Directory, retention: Retention, *, keep: str = "") -> list[str]:
    """Remove steps that the policy does not keep; returns their names.

    The one `latest` points to always stays, and `keep`, and what is being written anew.
    """
    steps = list_steps(root)
    doomed = set(retention.doomed([step.number for step in steps]))
    staying, removed = {keep}, []
    if LATEST in root.names():
        try:
            staying.add(_pointed(root))
        except CheckpointError as error:
            log.warning("%s", error)
    for step in steps:
        if step.number in doomed and step.name not in staying:
            try:
                remove_step(step)
            except BusyError as error:
                log.warning("%s; it stays", error)
            else:
                removed.append(step.name)
    return removed


def _pointed(root: Directory) -> str:
    """The name in `latest`."""
    return root.read(LATEST, _MARKER_BYTES).decode(errors="replace").strip()


def prune_partial(root: Directory, older_than_s: float = 0.0) -> list[str]:
    """Remove what interrupted saves have left, in every step; returns the names of the files.

    What is being written now stays: a lock tells; in a store without locks, only what has not changed for
    `older_than_s` is removed.
    """
    removed: list[str] = []
    for name in root.names():
        if not _NAME.fullmatch(name) or name == LATEST:
            continue
        directory = root.child(name)
        before = set(directory.names())
        try:
            if directory.has_locks:
                _clear_or_refuse(directory, "")
            else:
                _remove_old(directory, older_than_s)
        except BusyError as error:
            log.warning("%s", error)
        removed += [f"{name}/{file}" for file in sorted(before - set(directory.names()))]
        directory.remove_empty()
    return removed

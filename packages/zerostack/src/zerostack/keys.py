"""What a row of the key table is, and how a raw configuration is held against the table.

In: the dictionary that a JSON file or a caller gave, and the rows of `key_table`. Out: the dictionary without
what was switched off, and the notes that `explain` prints; or one error that lists everything wrong with it.
Next: `config` types the values that are left.
"""

from __future__ import annotations

import difflib
import enum
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

ANY = "*"
"""Among the documented names of a refused section: any name at all."""


class Policy(enum.Enum):
    """What happens to a key."""

    HONOURED = "honoured"
    NO_EFFECT = "accepted, no effect"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Key:
    """One documented key.

    Attributes:
        path: Dotted path from the root of the configuration.
        policy: What zerostack does with it.
        note: Honoured: where the value goes. No effect: why the design makes it moot. Refused: why.
        off: Refused keys: values that ask for nothing and are therefore accepted.
        inside: Refused sections: the names documented inside, with their documented defaults (`...` where
            there is none, a mapping for a section in it). None for a key that is no section.
    """

    path: str
    policy: Policy
    note: str
    off: tuple[Any, ...] = ()
    inside: Mapping[str, Any] | None = None


Rows = Mapping[str, "Key | Rows"]
"""Rows as they are written: nested like the configuration itself; the path is filled in by `KeyTable`."""


def honoured(note: str) -> Key:
    """A key that works; `note` says where its value goes."""
    return Key(path="", policy=Policy.HONOURED, note=note)


def no_effect(note: str) -> Key:
    """A key that is accepted and changes nothing; `note` says why nothing is lost."""
    return Key(path="", policy=Policy.NO_EFFECT, note=note)


def refused(
    note: str, *off: Any, inside: str | None = None, sections: Mapping[str, Any] | None = None
) -> Key:
    """A key that this version cannot honour.

    Args:
        note: What is missing, or why not.
        off: Values that ask for nothing.
        inside: For a section, its names, separated by blanks, each with its default as `name=JSON` where one
            is documented.
        sections: For a section, the sections inside it.
    """
    names = None if inside is None else {**documented(inside), **(sections or {})}
    return Key(path="", policy=Policy.REFUSED, note=note, off=off, inside=names)


def documented(names: str) -> dict[str, Any]:
    """Parse `"enabled=false job_name"` to `{"enabled": False, "job_name": ...}`."""
    parsed: dict[str, Any] = {}
    for item in names.split():
        name, equals, default = item.partition("=")
        parsed[name] = json.loads(default) if equals else ...
    return parsed


@dataclass(kw_only=True)
class Findings:
    """What a check noted: keys that do nothing here, by path and reason; and everything wrong."""

    no_effect: dict[str, str] = field(default_factory=dict)
    switched_off: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them when few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) <= 12:
        return "known here: " + ", ".join(names)
    return "no known key is close to it"


def join(prefix: str, name: str) -> str:
    """One dotted path."""
    return f"{prefix}.{name}" if prefix else name


class KeyTable:
    """The rows, indexed by path.

    Args:
        rows: Nested like the configuration; every documented key once.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows: dict[str, Key] = {}
        self._children: dict[str, set[str]] = {}
        self._add(rows, "")

    def _add(self, rows: Rows, prefix: str) -> None:
        self._children[prefix] = set(rows)
        for name, row in rows.items():
            path = join(prefix, name)
            if isinstance(row, Key):
                self._rows[path] = Key(**{**vars(row), "path": path})
            else:
                self._add(row, path)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rows.values())

    def get(self, path: str) -> Key | None:
        """The row of `path`; None where the path is a section with rows of its own, or unknown."""
        return self._rows.get(path)

    def children(self, path: str) -> set[str]:
        """The names known directly below `path` ("" is the root)."""
        return self._children.get(path, set())

    def check(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], Findings]:
        """Hold a raw configuration against the table.

        Args:
            raw: As read from JSON.

        Returns:
            The configuration without refused keys that were switched off, and what was noted.

        Raises:
            ConfigError: For unknown keys and for keys that cannot be honoured; the message lists all of them.
        """
        findings = Findings()
        kept = self._walk(raw, "", findings)
        if findings.errors:
            raise ConfigError(all_of(findings.errors))
        return kept, findings

    def _walk(self, section: Mapping[str, Any], prefix: str, findings: Findings) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in section.items():
            path = join(prefix, name)
            row = self.get(path)
            if name not in self.children(prefix):
                findings.errors.append(f"{path}: unknown key; {self._advice(name, prefix)}")
            elif row is None:
                kept[name] = self._walk(value, path, findings) if isinstance(value, Mapping) else value
            elif row.policy is Policy.REFUSED:
                _refuse(row, value, findings)
            else:
                kept[name] = value
                if row.policy is Policy.NO_EFFECT:
                    findings.no_effect[path] = row.note
        return kept

    def _advice(self, name: str, prefix: str) -> str:
        elsewhere = [path for path in self._rows if path.rpartition(".")[2] == name]
        if len(elsewhere) == 1:
            return f"it belongs at {elsewhere[0]}"
        return nearest(name, self.children(prefix))


def _refuse(row: Key, value: Any, findings: Findings) -> None:
    unknown = _unknown_names(row.path, value, row.inside)
    findings.errors.extend(unknown)
    if is_off(row, value):
        findings.switched_off[row.path] = row.note
    elif not unknown:
        reason = "known DeepSpeed key; this version of zerostack cannot honour it"
        findings.errors.append(f"{row.path}: {reason}: {row.note}")


def is_off(row: Key, value: Any) -> bool:
    """Whether a value of a refused key asks for nothing.

    That is: one of its off values; for a section also null, false, {}, `enabled: false` (or "auto": nothing here
    turns it on), `device: "none"`, or nothing but documented defaults.
    """
    if any(_same(value, off) for off in row.off):
        return True
    if row.inside is None:
        return False
    if value is None or value is False:
        return True
    if not isinstance(value, Mapping):
        return False
    return (
        value.get("enabled") in (False, "auto")
        or value.get("device") == "none"
        or _is_default(value, row.inside)
    )


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(default, Mapping):
        return isinstance(value, Mapping) and all(
            _is_default(item, default.get(name, ...)) for name, item in value.items()
        )
    return default is not ... and _same(value, default)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _unknown_names(path: str, value: Any, inside: Mapping[str, Any] | None) -> list[str]:
    if inside is None or not isinstance(value, Mapping):
        return []
    errors = []
    for name, item in value.items():
        if name not in inside and ANY not in inside:
            errors.append(f"{join(path, name)}: unknown key; {nearest(name, inside)}")
            continue
        deeper = inside.get(name, inside.get(ANY))
        errors.extend(_unknown_names(join(path, name), item, deeper if isinstance(deeper, Mapping) else None))
    return errors


def all_of(errors: list[str]) -> str:
    """One message for one or several errors."""
    if len(errors) == 1:
        return errors[0]
    return f"{len(errors)} problems in the configuration:\n" + "\n".join(f"  - {error}" for error in errors)

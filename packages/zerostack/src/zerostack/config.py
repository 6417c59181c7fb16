"""From a JSON file or a dictionary to a typed `Config`, or to one error that says everything that is wrong.

In: a path or a dictionary. `read` loads it (no duplicate keys), `key_table.TABLE.check` holds it against the
table, `parse` types it. Out: `schema.Config`. Next: `resolve` adds what only the program knows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import ConfigError
from .keys import all_of, join
from .schema import OPTIMIZERS, SCHEDULERS, Config, Section


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: nothing merged yet."""


def read(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Load a configuration.

    Args:
        config: A path to a JSON file, or the dictionary itself.

    Raises:
        ConfigError: If the file is missing or is no JSON object (with line and column), or gives a key twice.
    """
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected JSON in UTF-8, got other bytes at position {error.start}"
        ) from error
    try:
        tree = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise ConfigError(f"{where}: not valid JSON: {error.msg}{_json_hint(text, error.pos)}") from error
    if not isinstance(tree, _Pairs):
        raise ConfigError(f"{path}: expected a JSON object {{...}}, got {type(tree).__name__}")
    merged: dict[str, Any] = _merge(tree, "", str(path))
    return merged


def _merge(node: Any, prefix: str, file: str) -> Any:
    if isinstance(node, _Pairs):
        merged: dict[str, Any] = {}
        for name, value in node:
            if name in merged:
                raise ConfigError(f"{file}: {join(prefix, name)} is given twice; keep one of the two")
            merged[name] = _merge(value, join(prefix, name), file)
        return merged
    if isinstance(node, list):
        return [_merge(item, f"{prefix}[{index}]", file) for index, item in enumerate(node)]
    return node


def _json_hint(text: str, position: int) -> str:
    before, after = text[:position].rstrip(), text[position:]
    if after.startswith(("#", "//", "/*")):
        return " (JSON has no comments)"
    if after.startswith(","):  # where newer Pythons put the position
        before, after = ",", after[1:].lstrip()
    if before.endswith(",") and after[:1] in ("}", "]"):
        return " (a comma before a closing bracket)"
    return ""


def parse(raw: Mapping[str, Any]) -> Config:
    """Type a checked configuration.

    Args:
        raw: What `KeyTable.check` returned, with every `"auto"` replaced.

    Raises:
        ConfigError: For values of a wrong type or out of range; the message lists all of them by path.
    """
    errors: list[str] = []
    ready = dict(raw)
    for section, kinds in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        if isinstance(ready.get(section), Mapping):
            ready[section] = _typed(section, ready[section], kinds, errors)
    config = _validated(Config, ready, "", errors)
    if errors or not isinstance(config, Config):
        raise ConfigError(all_of(errors))
    return config


def _typed(
    section: str, raw: Mapping[str, Any], kinds: dict[str, type[Section]], errors: list[str]
) -> dict[str, Any] | None:
    name = str(raw.get("type"))
    spelling = {kind.lower(): kind for kind in kinds}.get(name.lower())
    if spelling is None:
        known = ", ".join(kinds)
        errors.append(
            f"{section}.type: expected one of {known}, got {raw.get('type')!r}{_why_not(section, name)}"
        )
        return None
    params = _validated(kinds[spelling], raw.get("params") or {}, f"{section}.params", errors)
    return {"type": spelling, "params": params} if params is not None else None


def _why_not(section: str, name: str) -> str:
    """What to do instead, for the types that DeepSpeed documents and this version lacks."""
    if section == "scheduler" or name == "None":
        return ""
    if name.lower() in {"lamb", "muon", "musgd", "muadam", "muadamw"}:
        return "; pass it as initialize(optimizer=..., whole_tensors=True), which steps whole parameters"
    return "; any other elementwise torch optimizer can be passed as initialize(optimizer=...)"


def _validated(model: type[Section], raw: Any, prefix: str, errors: list[str]) -> Section | None:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        expected: dict[str, list[str]] = {}
        given: dict[str, Any] = {}
        for item in error.errors():
            path = _path(prefix, model, item["loc"])
            expected.setdefault(path, []).append(_expected(item, model))
            given[path] = item["input"]
        for path, phrases in expected.items():
            wanted = " or ".join(dict.fromkeys(phrases))
            missing = wanted == "a value"
            errors.append(
                f"{path}: {wanted} is required"
                if missing
                else f"{path}: expected {wanted}, got {given[path]!r}"
            )
        return None


def _path(prefix: str, model: type[Section], loc: tuple[int | str, ...]) -> str:
    """The dotted path of an error; names that pydantic adds for the members of a union are left out."""
    path, known = prefix, model
    fields: Mapping[str, Any] | None = known.model_fields
    for part in loc:
        if isinstance(part, str) and fields is not None and part in fields:
            inner = fields[part].annotation
            path = join(path, part)
            fields = inner.model_fields if isinstance(inner, type) and issubclass(inner, BaseModel) else None
        elif isinstance(part, str) and fields is not None:
            path = join(path, part)
            fields = None
        elif isinstance(part, int):
            path = f"{path}[{part}]"
    return path


_PHRASES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object {...}",
    "model_type": "an object {...}",
    "model_attributes_type": "an object {...}",
    "missing": "a value",
    "finite_number": "a finite number",
}


def _expected(item: Any, model: type[Section]) -> str:
    kind, context = item["type"], item.get("ctx") or {}
    if kind in _PHRASES:
        return _PHRASES[kind]
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "extra_forbidden":
        return f"only the names of {model.__name__.removesuffix('Params')} ({', '.join(model.model_fields)})"
    limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for limit, words in limits.items():
        if limit in context:
            return f"{words} {context[limit]}"
    return str(item["msg"]).lower()

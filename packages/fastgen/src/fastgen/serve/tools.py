"""Calls of functions in a model's text, and the schema that makes it write one.

There is no one format: models write what their chat template taught them. Two spellings are understood: blocks
`<tool_call>{...}</tool_call>` between text (Hermes, Qwen), and an output that is nothing but JSON, an object or a
list of objects with `name` and `arguments` or `parameters` (Llama 3, Mistral). What is neither is text.
"""

from __future__ import annotations

import enum
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from .schemas import FunctionSpec

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# Of JSON schemas: what stands below these keywords is no schema; below those are schemas by name.
VALUES = frozenset({"const", "enum", "default", "examples"})
BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})


@dataclass(frozen=True)
class Call:
    """One call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class _Come(enum.Enum):
    """What has come of a text: it may be JSON as a whole, or a block may have begun in it."""

    SPACE = enum.auto()
    JSON = enum.auto()
    TEXT = enum.auto()
    BLOCK = enum.auto()


class ToolReader:
    """Tells text from calls in one sequence, as its text comes in; each character is looked at once.

    Args:
        names: functions that may be called; calls of others are text.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._come = _Come.SPACE
        self._held: list[str] = []

    def add(self, text: str) -> str:
        """Text to pass on; what may be (part of) a call is held back."""
        self._held.append(text)
        if self._come is _Come.SPACE and (first := text.lstrip()[:1]):
            self._come = _Come.JSON if first in "{[" else _Come.TEXT
        if self._come is not _Come.TEXT:
            return ""
        held = "".join(self._held)
        end = _first_marker(held)
        if held.startswith(OPEN, end):
            self._come = _Come.BLOCK
        self._held = [held[end:]]
        return held[:end]

    def finish(self) -> tuple[str, list[Call]]:
        """At the end: the text that was held back and is none, and the calls."""
        rest = "".join(self._held)
        calls = self._calls_in(rest) if self._come is _Come.JSON else []
        if calls:
            return "", calls
        kept, begin = [], 0
        for start, stop, inside in _blocks(rest):
            found = self._calls_in(inside)
            if found:
                calls += found
                kept.append(rest[begin:start])
                begin = stop
        text = "".join([*kept, rest[begin:]])
        return text.rstrip() if calls else text, calls

    def _calls_in(self, text: str) -> list[Call]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        found = [self._call(each) for each in (value if isinstance(value, list) else [value])]
        return [call for call in found if call is not None] if all(found) else []

    def _call(self, value: JsonValue) -> Call | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        # Halves of UTF-16 pairs, which no encoding takes, as JSON escapes them.
        arguments = arguments.encode(errors="backslashreplace").decode()
        # Nine letters and digits: templates of Mistral's models take no other ids when a client sends them back.
        return Call(uuid.uuid4().hex[:9], name, arguments)


def _blocks(text: str) -> Iterator[tuple[int, int, str]]:
    """Where each block begins and ends, and what is in it; the last may lack its end."""
    start = text.find(OPEN)
    while start >= 0:
        close = text.find(CLOSE, start)
        end = close if close >= 0 else len(text)
        stop = min(end + len(CLOSE), len(text))
        yield start, stop, text[start + len(OPEN) : end].strip()
        start = text.find(OPEN, stop)


def _first_marker(text: str) -> int:
    """Where a block begins, or may begin at the end of `text`; else its length."""
    found = text.find(OPEN)
    if found >= 0:
        return found
    for length in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if text.endswith(OPEN[:length]):
            return len(text) - length
    return len(text)


def call_schema(functions: Sequence[FunctionSpec], answer: JsonValue = None) -> str:
    """The JSON schema of a call of one of `functions`, or of an answer where that has a schema, too."""
    num_choices = len(functions) + (answer is not None)
    places = [f"/anyOf/{number}" for number in range(num_choices)] if num_choices > 1 else [""]
    choices = [] if answer is None else [placed(answer, places[0])]
    choices += [
        _one_call(function, place) for function, place in zip(functions, places[len(choices) :], strict=True)
    ]
    return json.dumps({"anyOf": choices} if num_choices > 1 else choices[0])


def _one_call(function: FunctionSpec, place: str) -> JsonValue:
    parameters: JsonValue = function.parameters if function.parameters is not None else {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": placed(parameters, f"{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def placed(schema: JsonValue, place: str) -> JsonValue:
    """A schema as it must be at a place (a JSON pointer) in another: its references to itself lead there."""
    if isinstance(schema, list):
        return [placed(each, place) for each in schema]
    if not isinstance(schema, dict) or "$id" in schema:  # with a name, references lead to it wherever it is
        return schema
    return {keyword: _placed_value(keyword, value, place) for keyword, value in schema.items()}


def _placed_value(keyword: str, value: JsonValue, place: str) -> JsonValue:
    if keyword == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return f"#{place}{value[1:]}"
    if keyword in BY_NAME and isinstance(value, dict):
        return {name: placed(each, place) for name, each in value.items()}
    return value if keyword in VALUES else placed(value, place)

"""Calls that change an engine, as bytes (msgpack): what rank 0 tells the others. Pure.

A message holds the calls since the last one, in order, with a forward at most as the last; and a digest of all that
the sender's engine had said before them, which a receiver compares with its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from ..errors import RequestError
from ..output import Output
from ..request import SamplingParams

if TYPE_CHECKING:
    from ..engine import Engine

_DEFAULTS = {each.name: each.default for each in fields(SamplingParams)}


@dataclass(frozen=True)
class Add:
    """`Engine.add`."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    adapter: str | None = None

    def make(self, engine: Engine) -> None:
        """Make the call."""
        engine.add(
            self.request_id, self.prompt_ids, self.params, priority=self.priority, adapter=self.adapter
        )


@dataclass(frozen=True)
class Abort:
    """`Engine.abort`."""

    request_id: str

    def make(self, engine: Engine) -> None:
        """Make the call."""
        engine.abort(self.request_id)


@dataclass(frozen=True)
class Step:
    """`Engine.step`: rank 0's clock decides for all."""

    prompt_tokens: int | None = None

    def make(self, engine: Engine) -> list[Output]:
        """Make the call."""
        return engine.step(self.prompt_tokens)


@dataclass(frozen=True)
class LoadAdapter:
    """`Engine.load_adapter`."""

    name: str
    directory: str

    def make(self, engine: Engine) -> None:
        """Make the call."""
        engine.load_adapter(self.name, self.directory)


@dataclass(frozen=True)
class UnloadAdapter:
    """`Engine.unload_adapter`."""

    name: str

    def make(self, engine: Engine) -> None:
        """Make the call."""
        engine.unload_adapter(self.name)


@dataclass(frozen=True)
class Embed:
    """`Engine.embed`."""

    prompt_ids: list[int]

    def make(self, engine: Engine) -> list[float] | None:
        """Make the call."""
        return engine.embed(self.prompt_ids)


C = TypeVar("C", Add, Embed)
Call = Add | Abort | Step | LoadAdapter | UnloadAdapter | Embed
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Add, Abort, Step, LoadAdapter, UnloadAdapter, Embed)
}


def packed(calls: Sequence[Call], digest: int) -> bytes:
    """A message."""
    return bytes(msgpack.packb([digest, [_row(call) for call in calls]]))


def checked(call: C) -> C:
    """A call that the other ranks can be told.

    Raises:
        RequestError: it holds something else than plain numbers of 64 bits and texts.
    """
    try:
        packed([call], 0)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            f"expected Python's own integers and texts, of 64 bits, to tell the other ranks, got another: {error}"
        ) from error
    return call


def unpacked(message: bytes) -> tuple[list[Call], int]:
    """What `packed` was given."""
    digest, rows = msgpack.unpackb(message, use_list=False, strict_map_key=False)
    return [_call(*row) for row in rows], digest


def _row(call: Call) -> list[Any]:
    values = [getattr(call, each.name) for each in fields(call)]
    return [type(call).__name__, *(_changes(v) if isinstance(v, SamplingParams) else v for v in values)]


def _changes(params: SamplingParams) -> dict[str, Any]:
    """Only what is not the default: a decode's message stays small."""
    given = {name: getattr(params, name) for name in _DEFAULTS}
    return {name: value for name, value in given.items() if value != _DEFAULTS[name]}


def _call(kind: str, *values: Any) -> Call:
    if kind == "Add":
        request_id, prompt_ids, params, priority, adapter = values
        return Add(request_id, list(prompt_ids), SamplingParams(**params), priority, adapter)
    made: Call = Embed(list(values[0])) if kind == "Embed" else _KINDS[kind](*values)
    return made


@dataclass
class Digest:
    """All that an engine has said so far, in 32 bits: ranks with equal digests have said the same."""

    value: int = field(default=0)

    def outputs(self, outputs: Iterable[Output]) -> None:
        """A step has ended with these."""
        said = [
            (each.request_id, each.index, each.new_token_ids, each.finish_reason and each.finish_reason.value)
            for each in outputs
        ]
        self.value = zlib.crc32(msgpack.packb(said), self.value)

    def refused(self, error: Exception) -> None:
        """A call has raised this, as it must on every rank."""
        self.value = zlib.crc32(type(error).__name__.encode(), self.value)

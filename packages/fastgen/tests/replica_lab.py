"""Engines that workers load in their own processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fake_engine import FakeEngine
from fastgen.errors import ModelError


@dataclass(frozen=True)
class FakeSpec:
    """A `FakeEngine`."""

    step_s: float = 0.002

    @contextmanager
    def loaded(self) -> Iterator[FakeEngine]:
        yield FakeEngine(step_s=self.step_s)


@dataclass(frozen=True)
class BrokenSpec:
    """No engine."""

    @contextmanager
    def loaded(self) -> Iterator[FakeEngine]:
        raise ModelError("config.json: expected a model, got none")
        yield FakeEngine()

"""An engine that is still to be loaded, as a value that other processes can be given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .interface import Engine

if TYPE_CHECKING:
    from ..config import EngineConfig


@dataclass(frozen=True)
class EngineSpec:
    """What is loaded, and how.

    Attributes:
        path: the model's directory.
        config: how the engine runs.
        tensor_parallel: processes that share each layer.
        adapters: (name, directory) of LoRA adapters.
        processes_here: that run engines on this machine; None: those of this one alone.
    """

    path: str
    config: EngineConfig
    tensor_parallel: int = 1
    adapters: tuple[tuple[str, str], ...] = ()
    processes_here: int | None = None

    @contextmanager
    def loaded(self) -> Iterator[Engine]:
        """The engine with its adapters; ends its processes at the end.

        Raises:
            FastgenError: the model or an adapter cannot be loaded.
        """
        if self.tensor_parallel == 1:
            from ..llm import build_engine

            engine: Engine = build_engine(self.path, self._own_config())
            self._load_adapters(engine)
            yield engine
            return
        from ..ranks import lead

        with lead(
            self.path, self.config, ranks=self.tensor_parallel, processes_here=self.processes_here
        ) as leader:
            self._load_adapters(leader)
            yield leader

    def _own_config(self) -> EngineConfig:
        """Of a process that is one of several with an engine each."""
        if self.processes_here is None:
            return self.config
        from ..ranks.places import share_cores, shares

        (config,) = shares(self.config, 1, processes=self.processes_here)
        assert config.device is not None
        if config.device.type == "cpu":
            share_cores(self.processes_here)
        return config

    def _load_adapters(self, engine: Engine) -> None:
        for name, directory in self.adapters:
            engine.load_adapter(name, directory)

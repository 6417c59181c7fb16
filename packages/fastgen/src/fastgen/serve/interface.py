"""What a server needs of an engine, and what passes between the two.

Any object that fits `Engine` can be served: `fastgen.engine`'s, or one of a test. Next: `loop` drives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import FastgenError
from ..output import Output, Stats
from ..request import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Engine(Protocol):
    """What a server needs of an engine. But for `is_prepared`, `prepare` and `room`, one thread drives it."""

    model_name: str
    max_model_len: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""

    def is_prepared(self, params: SamplingParams) -> bool:
        """Whether there is nothing to compile for `add`, in any thread."""

    def prepare(self, params: SamplingParams) -> None:
        """Compile a schema or expression, in any thread and in several at once; `RequestError` as in `add`."""

    def room(self, num_prompt_tokens: int, num_sequences: int) -> int:
        """Tokens that each of so many sequences may add to such a prompt, in any thread; 0: `add` refuses it."""

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> None:
        """Queue a request; `RequestError` if it can never run, `OverloadedError` if it cannot now."""

    def abort(self, request_id: str) -> None:
        """Free a request, whatever became of it; unknown ids are no error."""

    def step(self) -> list[Output]:
        """One forward. Where it raises, and every request is aborted then, the next ones are served as ever."""

    def stats(self) -> Stats:
        """What it is busy with."""

    def load_adapter(self, name: str, directory: str) -> None:
        """Load a LoRA adapter that requests may choose by `name`."""

    def unload_adapter(self, name: str) -> None:
        """Forget one; `RequestError` where a request uses it."""

    def embed(self, prompt_ids: list[int]) -> list[float] | None:
        """One forward of a text: its vector, or None: call again; `RequestError` or `CacheError` where it has none."""


@runtime_checkable
class MayBeLost(Protocol):
    """What an engine has, too, that may fail while nobody calls it: one that other processes share."""

    def watch(self, lost: Callable[[FastgenError], None]) -> None:
        """Call `lost`, in any thread, when it has failed."""


class Watch(Protocol):
    """Who wants to know when things happen (`metrics`); times are of `time.perf_counter`."""

    def begun(self, request_id: str, at_s: float) -> None:
        """A request has arrived."""

    def stepped(self, outputs: Sequence[Output], stats: Stats, at_s: float) -> None:
        """A step has ended."""

    def ended(self, request_id: str, num_unfinished: int, at_s: float) -> None:
        """Nobody asks for a request any more; so many of its sequences have not ended."""


class EngineError(FastgenError, RuntimeError):
    """The engine raised in step after step (one that processes share: in one), or was lost; it is not used again."""


class StepError(FastgenError, RuntimeError):
    """The engine raised in a step; what ran has ended, and others are served."""


@dataclass(frozen=True)
class Job:
    """One prompt for the engine."""

    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    adapter: str | None = None

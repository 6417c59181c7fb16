"""How an engine runs: the policies that a user sets, each with a default that works."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from .errors import ConfigError


class Weights(enum.Enum):
    """How weights of linear layers are held."""

    DENSE = "dense"
    INT8 = "int8"
    INT4 = "int4"


class Schedule(enum.Enum):
    """How prompts and decodes share forwards."""

    SPLIT_FUSE = "split_fuse"
    PREFILL_FIRST = "prefill_first"


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """The KV cache.

    Attributes:
        block_size: tokens in a block.
        max_bytes: of the whole cache; None: `fraction` of the memory that is free when the weights are loaded.
        fraction: see there.
        dtype: of keys and values; None: the model's. `torch.int8` holds them with a scale for each token and head.
        swap_bytes: host memory for the blocks of preempted sequences; 0 computes them again.
        prefix: keep blocks of ended sequences for prompts that begin alike.
    """

    block_size: int = 16
    max_bytes: int | None = None
    fraction: float = 0.8
    dtype: torch.dtype | None = None
    swap_bytes: int = 0
    prefix: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"CachePolicy(block_size=...): expected >= 1, got {self.block_size!r}")
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(
                f"CachePolicy(fraction=...): expected above 0 and at most 1, got {self.fraction!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SchedulePolicy:
    """What goes into a forward.

    Attributes:
        token_budget: most tokens of a forward; None: enough for `max_sequences` and for `prompt_fill`.
        prompt_fill: prompts fill a forward up to so many tokens, decodes among them, or get a quarter of as many where
            these leave less. None: up to the budget; where that is None too, up to where throughput saturates, which
            is measured at the start.
        gap_s: seconds that running sequences may have between two tokens for the sake of prompts beside them: nineteen
            of twenty gaps keep to it, the others to four times as long (`pace`). Where decodes alone take longer, a
            tenth more than they take. None: only the budget limits prompts.
        max_sequences: that run at once.
        kind: Dynamic SplitFuse, or (to compare) whole prompts before decodes.
        patience_steps: a waiting request's priority improves by one for so many forwards; 0: never.
        max_waiting: requests in the queue; more are refused.
    """

    token_budget: int | None = None
    prompt_fill: int | None = None
    gap_s: float | None = None
    max_sequences: int = 256
    kind: Schedule = Schedule.SPLIT_FUSE
    patience_steps: int = 1000
    max_waiting: int = 10_000

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.token_budget < 1:
            raise ConfigError(f"SchedulePolicy(token_budget=...): expected >= 1, got {self.token_budget!r}")
        if self.prompt_fill is not None and not 1 <= self.prompt_fill <= (
            self.token_budget or self.prompt_fill
        ):
            raise ConfigError(
                f"SchedulePolicy(prompt_fill=...): expected 1 to token_budget={self.token_budget!r}, "
                f"got {self.prompt_fill!r}"
            )
        if self.gap_s is not None and not 0.0 < self.gap_s < float("inf"):
            raise ConfigError(f"SchedulePolicy(gap_s=...): expected seconds above 0, got {self.gap_s!r}")
        unused = [name for name in ("prompt_fill", "gap_s") if getattr(self, name) is not None]
        if self.kind is Schedule.PREFILL_FIRST and unused:
            raise ConfigError(
                f"SchedulePolicy({unused[0]}=...): expected None with whole prompts, of which none is split, got "
                f"{getattr(self, unused[0])!r}"
            )
        if self.max_sequences < 1:
            raise ConfigError(f"SchedulePolicy(max_sequences=...): expected >= 1, got {self.max_sequences!r}")
        if self.max_waiting < 1:
            raise ConfigError(f"SchedulePolicy(max_waiting=...): expected >= 1, got {self.max_waiting!r}")


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Tokens guessed ahead and checked in one forward.

    Attributes:
        num_drafts: most tokens guessed at once.
        ngram: prompt lookup: the last so many tokens are looked for in what is before.
        draft_model: directory of a smaller model with the same tokenizer, which guesses instead.
    """

    num_drafts: int = 4
    ngram: int = 3
    draft_model: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_drafts", "ngram"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Speculation({name}=...): expected >= 1, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """An engine.

    Attributes:
        cache: see `CachePolicy`.
        schedule: see `SchedulePolicy`.
        speculation: None guesses nothing.
        dtype: of the model; None: a module's own, or as a directory's config says.
        weights: how linear weights are held.
        max_model_len: longest prompt and output; None: as the model's config says.
        replay: small forwards of a shape that has come before are made again without Python (on CUDA: as a graph); the
            same tokens, sooner.
        batch_invariant: a request's tokens and log-probabilities depend on nothing else in the batch, bit for bit.
        device: None: a CUDA device if there is one, else the CPU.
        seed: of requests without a seed of their own.
    """

    cache: CachePolicy = field(default_factory=CachePolicy)
    schedule: SchedulePolicy = field(default_factory=SchedulePolicy)
    speculation: Speculation | None = None
    dtype: torch.dtype | None = None
    weights: Weights = Weights.DENSE
    max_model_len: int | None = None
    replay: bool = True
    batch_invariant: bool = False
    device: torch.device | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"EngineConfig(max_model_len=...): expected >= 1, got {self.max_model_len!r}")

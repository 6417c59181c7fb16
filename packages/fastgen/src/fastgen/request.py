"""What is asked, and how far it has come: sampling parameters, a request, and its sequences.

In: token ids of a prompt and `SamplingParams`. The scheduler moves a sequence's `status` and `num_computed`; the engine
appends tokens. Next: `scheduler`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when a sequence ends.

    Attributes:
        max_tokens: at most so many new tokens.
        min_tokens: no end before so many, by token or text; a complete `json_schema` or `regex` ends all the same, and
            tokens at which a sequence ends may come where it allows no others.
        temperature: 0 takes the most likely token.
        top_k: only the k most likely; 0 for all.
        top_p: only the most likely that together have this probability.
        min_p: only those at least this fraction as likely as the most likely.
        repetition_penalty: divides positive logits of tokens seen (prompt and output), multiplies negative ones; 0.01
            to 100.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted for each time that a token is in the output.
        logit_bias: added to the logits of some tokens, by id; -100 all but bans one, 100 all but demands it.
        n: sequences returned.
        best_of: sequences made, of which the `n` with the greatest log-probability per token are returned; None: `n`.
        beam_width: beams of a beam search, of which the best `n` are returned; 0 samples.
        length_penalty: of beam search: scores are divided by length to this power, -10 to 10.
        stop: text at which a sequence ends; it is not part of the output.
        stop_token_ids: tokens at which a sequence ends.
        ignore_eos: go on past the end-of-sequence token.
        seed: the same logits give the same choice, whatever else is in the batch (`EngineConfig.batch_invariant`: the
            logits, too); None: no seed.
        logprobs: return so many of the most likely tokens with their log-probabilities, and the chosen one's; None: no.
        prompt_logprobs: the same for tokens of the prompt.
        json_schema: the output is JSON of this schema (as JSON text); "{}" for any JSON.
        regex: the output matches this regular expression.
        continues: the text goes on from the prompt's: its first word keeps the space that some tokenizers drop at the
            begin of a text; False: it is one of its own, as a chat's answer is.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    n: int = 1
    best_of: int | None = None
    beam_width: int = 0
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    continues: bool = True

    @cached_property
    def takes_greatest(self) -> bool:
        """One sequence of the most likely tokens, by the model's own logits alone."""
        is_one = self.num_sequences == 1 and not self.beam_width
        return is_one and self.temperature == 0.0 and not (self.has_penalties or self.logit_bias)

    @cached_property
    def has_penalties(self) -> bool:
        """Logits depend on the tokens that have come."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_k", self.top_k >= 0, ">= 0 (0: all tokens)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "between 0.01 and 100"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("logit_bias", all(map(math.isfinite, (self.logit_bias or {}).values())), "finite numbers"),
            ("n", self.n >= 1, ">= 1"),
            ("best_of", self.best_of is None or self.best_of >= self.n, ">= n"),
            ("length_penalty", -10.0 <= self.length_penalty <= 10.0, "between -10 and 10"),
            ("beam_width", self.beam_width == 0 or self.beam_width >= self.n, "0, or >= n"),
            ("best_of", self.best_of is None or not self.beam_width, "None beside beam_width"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "between 0 and 100"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 100,
                "between 0 and 100",
            ),
            ("regex", self.regex is None or self.json_schema is None, "None where json_schema is given"),
            (
                "stop",
                not isinstance(self.stop, str) and all(self.stop),
                "a tuple of texts that are not empty",
            ),
            ("stop_token_ids", isinstance(self.stop_token_ids, (tuple, list)), "a tuple of token ids"),
        ]
        for name, valid, expected in checks:
            if not valid:
                raise ConfigError(
                    f"SamplingParams({name}=...): expected {expected}, got {getattr(self, name)!r}"
                )

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once."""
        return self.beam_width or self.best_of or self.n


class Status(enum.Enum):
    """Where a sequence is.

    WAITING -> RUNNING -> FINISHED; RUNNING -> WAITING (to be computed again) or SWAPPED; SWAPPED -> RUNNING; when it is
    aborted, any -> FINISHED.
    """

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a sequence has ended: at its end; before it, for want of tokens or since its grammar became too complex."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(eq=False)
class Sequence:
    """One line of tokens of a request.

    Attributes:
        token_ids: prompt and output so far.
        num_prompt_tokens: of them, the prompt's.
        num_computed: tokens from the start whose keys and values are in the cache.
        block_table: ids of the cache blocks that hold them, in order; the last may be partly filled.
        drafts: tokens guessed to follow, to be checked in the next step.
        cumulative_logprob: of the output.
    """

    request: Request
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    drafts: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def mean_logprob(self) -> float:
        """Of the output, per token."""
        return self.cumulative_logprob / max(1, self.num_output_tokens)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to go through the model: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        """The output so far."""
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(eq=False)
class Request:
    """A prompt and what is wanted of it.

    Attributes:
        id: the caller's name for it; unique among those in the engine.
        priority: lower runs first; equals by arrival.
        arrival: its number in the order of arrival.
        adapter: name of the LoRA adapter, or None.
        cache_salt: cached blocks are shared only among requests with the same; None is one of them.
        num_cached_tokens: tokens of the prompt that the prefix cache had when the request was begun.
        preempted: it has lost its blocks; what is found of the prompt from then on counts no more.
        sequences: one at first; those of `n`, `best_of` and beams are forked when the prompt has been computed.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    arrival: int = 0
    adapter: str | None = None
    cache_salt: str | None = None
    num_cached_tokens: int = 0
    preempted: bool = False
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.sequences:
            self.sequences.append(Sequence(self, 0, list(self.prompt_ids), len(self.prompt_ids)))

    @property
    def finished(self) -> bool:
        """All its sequences have ended."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

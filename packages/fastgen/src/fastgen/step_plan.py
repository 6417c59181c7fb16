"""What one forward is to do: the scheduler's answer, which `batch` turns into tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Sequence


@dataclass(frozen=True)
class Scheduled:
    """One sequence's part of a forward.

    Attributes:
        start: position of its first token in this forward; equals `sequence.num_computed`.
        num_tokens: tokens of `sequence.token_ids` from `start` on; drafts come after them.
        drafts: guessed tokens that follow the last one, to be checked.
        wants_logits: the chunk ends with the sequence's last token, so that the next one is to be chosen.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    drafts: tuple[int, ...] = ()
    wants_logits: bool = True

    @property
    def is_decode(self) -> bool:
        """One token, after which the next is chosen."""
        return self.num_tokens == 1 and self.wants_logits


@dataclass(frozen=True)
class StepPlan:
    """One forward, and what is copied before it: all of `swap_out`, then all of `swap_in`, then all of `copies`.

    Attributes:
        scheduled: decodes first, then chunks of prompts.
        copies: cache blocks to copy last, right before the forward, (from, to): copy on write.
        swap_in: (host block, device block) to copy, after `swap_out`.
        swap_out: (device block, host block) to copy before everything else.
        preempted: sequences that lost their blocks.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return sum(each.num_tokens + len(each.drafts) for each in self.scheduled)

    @property
    def num_decodes(self) -> int:
        """Sequences of which only the last token is computed."""
        return sum(each.is_decode for each in self.scheduled)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the others."""
        return sum(each.num_tokens for each in self.scheduled if not each.is_decode)

"""Guesses of the tokens that follow, to be checked in one forward.

In: sequences with their last token chosen. Out: their `drafts`. A guess changes no token (see `sampler`), only how many
come of a forward. Two ways: what followed the last tokens when they were there before, or a smaller model's greedy
choice.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

import torch

from .batch import RaggedBatch, ragged_batch
from .kv_cache import KVCache
from .models.causal import CausalModel
from .request import Sequence
from .sampler import greatest
from .step_plan import Scheduled, StepPlan


class Guesser(Protocol):
    """Guesses."""

    def follow(self, plan: StepPlan, batch: RaggedBatch) -> None:
        """A forward is being made."""

    def guess(self, sequences: Items[Sequence]) -> list[list[int]]:
        """For each sequence what may follow its last token."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""


class PromptLookup:
    """What followed the last `ngram` tokens where they were last.

    Source: prompt lookup decoding (Saxena 2023). Each sequence has an index of its n-grams, which grows with it, so
    that a guess costs the same at any length.
    """

    def __init__(self, ngram: int, num_drafts: int) -> None:
        self._ngram = ngram
        self._num_drafts = num_drafts
        self._ends: dict[Sequence, tuple[int, dict[tuple[int, ...], int]]] = {}

    def follow(self, plan: StepPlan, batch: RaggedBatch) -> None:
        """Nothing to do."""

    def guess(self, sequences: Items[Sequence]) -> list[list[int]]:
        """See `Guesser`."""
        return [self._guess(sequence) for sequence in sequences]

    def _guess(self, sequence: Sequence) -> list[int]:
        ids, size = sequence.token_ids, self._ngram
        known, ends = self._ends.get(sequence, (size, {}))
        for end in range(known, len(ids)):  # all but the last n-gram: it would find itself
            ends[tuple(ids[end - size : end])] = end
        self._ends[sequence] = (max(known, len(ids)), ends)
        if len(ids) < size:
            return []
        found = ends.get(tuple(ids[-size:]))
        return [] if found is None else ids[found : found + self._num_drafts]

    def forget(self, sequence: Sequence) -> None:
        """See `Guesser`."""
        self._ends.pop(sequence, None)


class DraftModel:
    """A smaller model with the same tokenizer: its cache has blocks of the same ids as the large one's.

    It goes through every forward beside the large model, so that its cache holds the same tokens; what it guesses
    beyond them is overwritten by what comes. Guesses end with the blocks that a sequence has, and with its greatest
    length, of which the last block may hold more.

    Args:
        decoder: the smaller model.
        cache: its own.
        num_drafts: most tokens guessed at once.
        device: where both are.
        max_model_len: tokens of the longest sequence, for which the model has positions.
    """

    def __init__(
        self,
        decoder: CausalModel,
        cache: KVCache,
        num_drafts: int,
        device: torch.device,
        max_model_len: int,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._num_drafts = num_drafts
        self._device = device
        self._max_model_len = max_model_len

    def follow(self, plan: StepPlan, batch: RaggedBatch) -> None:
        """See `Guesser`."""
        self._cache.swap_out(plan.swap_out)
        self._cache.swap_in(plan.swap_in)
        self._cache.copy_blocks(plan.copies)
        self._decoder.hidden(batch, self._cache)

    def guess(self, sequences: Items[Sequence]) -> list[list[int]]:
        """See `Guesser`."""
        copies = [_ahead(sequence) for sequence in sequences]
        block_size = self._cache.block_size
        for _ in range(self._num_drafts):
            going = [
                each
                for each in copies
                if each.num_tokens <= min(len(each.block_table) * block_size, self._max_model_len)
            ]
            if not going:
                break
            plan = StepPlan([Scheduled(each, each.num_tokens - 1, 1) for each in going])
            batch = ragged_batch(plan, block_size, self._device)
            for each, token in zip(going, greatest(self._decoder(batch, self._cache)), strict=True):
                each.token_ids.append(token)
        return [
            copy.token_ids[sequence.num_tokens :] for copy, sequence in zip(copies, sequences, strict=True)
        ]

    def forget(self, sequence: Sequence) -> None:
        """Nothing to do."""


def _ahead(sequence: Sequence) -> Sequence:
    """A sequence that can run ahead of the true one, in the same blocks."""
    return Sequence(
        sequence.request,
        sequence.index,
        list(sequence.token_ids),
        sequence.num_prompt_tokens,
        block_table=sequence.block_table,
    )

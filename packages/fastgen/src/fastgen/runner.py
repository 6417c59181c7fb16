"""A `StepPlan` -> logits: the cache's copies, the batch's tensors, the model's forward.

In: what the scheduler has planned. Out: float32 logits of the wanted rows. Next: `engine` chooses tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import RaggedBatch, ragged_batch
from .errors import CacheError
from .kv_cache import KVCache, free_memory
from .models.causal import CausalModel
from .parallel import TensorParallel
from .replays import Replays
from .request import Request, SamplingParams, Sequence
from .speculation import Guesser
from .step_plan import Scheduled, StepPlan

_LEAST_GAIN = 1.1
_LONGEST_S = 0.5


@dataclass(frozen=True)
class Text:
    """One that is being embedded: how far it has come, and its own cache."""

    sequence: Sequence
    cache: KVCache


class Runner:
    """One model with its cache on one rank.

    Args:
        decoder: the model.
        cache: its cache.
        device: of both.
        guesser: is told of every forward; None: nobody guesses.
        replays: makes forwards of the same shapes again; None: every forward is made from Python.
        parallel: ranks that share the model.
    """

    def __init__(
        self,
        decoder: CausalModel,
        cache: KVCache,
        device: torch.device,
        guesser: Guesser | None = None,
        replays: Replays | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.device = device
        self.guesser = guesser
        self.replays = replays
        self.parallel = parallel or TensorParallel()
        self._text: Text | None = None

    def run(self, plan: StepPlan) -> tuple[Tensor, RaggedBatch]:
        """One forward: logits `[L, vocab]`, valid until the next, and the batch that says whose they are."""
        self.cache.swap_out(plan.swap_out)
        self.cache.swap_in(plan.swap_in)
        self.cache.copy_blocks(plan.copies)
        batch = ragged_batch(plan, self.cache.block_size, self.device)
        if self.guesser is not None:
            self.guesser.follow(plan, batch)
        logits_LV = self.replays.run(batch) if self.replays else self.decoder(batch, self.cache)
        return logits_LV, batch

    def embed(self, prompt_ids: list[int], most: int) -> Tensor | None:
        """One forward of a text: the last token's hidden state, `[width]` float32, of unit length; None: call again.

        Another text takes the place of one that has not come to its end.

        Args:
            prompt_ids: one or more.
            most: tokens of a forward, for which there is memory.

        Raises:
            CacheError: there is no memory for a text so long, in a cache of its own.
        """
        if self._text is None or self._text.sequence.token_ids != prompt_ids:
            self._text = None  # its memory is free before the next one's is asked for
            self._text = self._begun(prompt_ids)
        sequence, own = self._text.sequence, self._text.cache
        count = min(most, sequence.num_uncomputed)
        plan = StepPlan([Scheduled(sequence, sequence.num_computed, count)])
        hidden_TE = self.decoder.hidden(ragged_batch(plan, own.block_size, self.device), own)
        sequence.num_computed += count
        if sequence.num_uncomputed:
            return None
        self._text = None
        hidden_E = hidden_TE[-1].float()
        unit_E: Tensor = hidden_E / hidden_E.norm().clamp_min(1e-12)
        return unit_E

    def _begun(self, prompt_ids: list[int]) -> Text:
        layout, block_size = self.cache.layout, self.cache.block_size
        blocks = -(-len(prompt_ids) // block_size)
        wanted, free = (
            blocks * block_size * layout.token_bytes,
            int(self.parallel.least(free_memory(self.device))),
        )
        if wanted > free:
            raise CacheError(
                f"embedding: expected {wanted} bytes of memory for a text of {len(prompt_ids)} tokens, got {free}; "
                "shorten it, or leave more beside the KV cache with CachePolicy(max_bytes=...)"
            )
        return Text(_alone(prompt_ids, list(range(blocks))), KVCache(layout, blocks, block_size, self.device))

    def saturation_tokens(
        self, most: int, longest: int, agree: Callable[[float], float] = lambda seconds: seconds
    ) -> int:
        """Tokens of a forward from which on more of them bring no more tokens a second.

        Args:
            most: not more than these.
            longest: tokens of a sequence.
            agree: makes one of the seconds that each rank measured, so that all stop at the same count.

        Source: DeepSpeed-FastGen (Holmes et al. 2024), section 3.1. Doubles from 16 until a doubling gains less than a
        tenth, or a forward takes half a second.
        """
        best, best_rate, count = 16, 0.0, 16
        blocks = -(-longest // self.cache.block_size)
        while count <= most and -(-count // longest) * blocks <= self.cache.num_blocks:
            sequences = [
                _alone([0] * min(longest, count - begin), list(range(number * blocks, (number + 1) * blocks)))
                for number, begin in enumerate(range(0, count, longest))
            ]
            plan = StepPlan([Scheduled(each, 0, each.num_tokens) for each in sequences])
            seconds = agree(min(self._seconds(plan) for _ in range(2)))
            if count / seconds < _LEAST_GAIN * best_rate:
                break
            best, best_rate = count, count / seconds
            if seconds > _LONGEST_S:
                break
            count *= 2
        return min(best, most)

    def _seconds(self, plan: StepPlan) -> float:
        batch = ragged_batch(plan, self.cache.block_size, self.device)
        begun = time.perf_counter()
        self.decoder(batch, self.cache)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun


def _alone(prompt_ids: list[int], block_table: list[int]) -> Sequence:
    """A prompt that no scheduler knows."""
    request = Request("", prompt_ids, SamplingParams(max_tokens=1))
    return Sequence(request, 0, list(prompt_ids), len(prompt_ids), block_table=block_table)

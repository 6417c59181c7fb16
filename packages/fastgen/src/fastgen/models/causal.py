"""What an engine asks of a model, whichever way it was built: `decoder.Decoder` or `generic.GenericDecoder`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..batch import RaggedBatch
from ..kv_cache import CacheLayout, KVCache


class CausalModel(Protocol):
    """A model that reads and writes a paged cache.

    Attributes:
        replayable: a forward makes the same calls whatever the values in the tensors of its batch.
        weights_version: changes when weights are loaded again, into other tensors.
    """

    replayable: bool
    weights_version: int

    def __call__(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """Float32 logits `[L, vocab]` of the rows that the batch wants."""
        ...

    def hidden(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """Hidden states of all T tokens after the final norm, `[T, width]`, of the model's dtype."""
        ...

    def cache_layout(self, dtype: torch.dtype | None) -> CacheLayout:
        """What the KV cache keeps for each token, on this rank; of the model's dtype if None."""
        ...

    def activation_bytes(self, num_tokens: int, num_logits: int) -> int:
        """About what a forward of so many tokens and rows of logits takes beside weights and cache, on this rank."""
        ...

    def length_class(self, longest: int) -> int:
        """Sequences whose texts begin alike can share cache blocks only if this is equal for both.

        Args:
            longest: prompt tokens and `max_tokens`, as `RaggedBatch.longest_T` has them.
        """
        ...

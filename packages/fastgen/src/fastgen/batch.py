"""A forward's tensors: the sequences of a `StepPlan`, packed one after another without padding.

In: `StepPlan`. Out: `RaggedBatch`, passed from layer to layer down to `attention`. Names end in their shape: T tokens
of the forward, S sequences, B blocks of the longest sequence, L rows of which logits are wanted. All numbers lie in one
piece of memory, written with numpy: a few hundred decodes would else cost thousands of small tensor operations, and
each tensor a copy of its own to the device. Next: `models`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .step_plan import Scheduled, StepPlan

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


class Shape(NamedTuple):
    """How large a forward is: tokens, sequences, rows of logits."""

    num_tokens: int
    num_sequences: int
    num_logits: int

    @property
    def num_int64s(self) -> int:
        """Four for each token, one for each row."""
        return 4 * self.num_tokens + self.num_logits

    @property
    def num_words(self) -> int:
        """Of eight bytes, that hold all but the block tables: beside the above 2 S + 2 int32, the last unused."""
        return self.num_int64s + self.num_sequences + 1


@dataclass(frozen=True)
class RaggedBatch:
    """One forward's input.

    Attributes:
        shape: its T, S and L.
        words: int64; holds the tensors below, which are views of it.
        logits_counts: of how many rows each sequence wants logits.
        adapters: each sequence's LoRA adapter, or None.
        adapter_rows: rows of T of each adapter in the batch.
    """

    shape: Shape
    words: Tensor
    logits_counts: tuple[int, ...] = ()
    adapters: tuple[str | None, ...] = ()
    adapter_rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return self.shape.num_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences in it."""
        return self.shape.num_sequences

    @cached_property
    def input_ids_T(self) -> Tensor:
        """Tokens, int64."""
        return self._per_token(0)

    @cached_property
    def positions_T(self) -> Tensor:
        """Of each token in its sequence, int64."""
        return self._per_token(1)

    @cached_property
    def slots_T(self) -> Tensor:
        """Where each token's keys and values go, int64: block * block_size + offset."""
        return self._per_token(2)

    @cached_property
    def longest_T(self) -> Tensor:
        """The length to which each token's sequence may grow, int64.

        Models whose rotary angles depend on the length of the text choose by it, so that a sequence keeps one choice
        for life.
        """
        return self._per_token(3)

    @cached_property
    def logits_rows_L(self) -> Tensor:
        """Rows of which logits are wanted, in the order of the sequences, int64."""
        return self.words[4 * self.shape.num_tokens : self.shape.num_int64s]

    @cached_property
    def query_starts_S1(self) -> Tensor:
        """Sequence s has rows `query_starts_S1[s]` to `query_starts_S1[s + 1]`, int32."""
        return self._int32s[: self.shape.num_sequences + 1]

    @cached_property
    def context_lens_S(self) -> Tensor:
        """Tokens of each sequence with those of this forward, int32."""
        return self._int32s[self.shape.num_sequences + 1 : 2 * self.shape.num_sequences + 1]

    @cached_property
    def block_tables_SB(self) -> Tensor:
        """Cache blocks of each sequence, int32, padded with 0."""
        tables = self.words[self.shape.num_words :].view(torch.int32)
        return tables.view(self.num_sequences, tables.shape[0] // max(self.num_sequences, 1))

    @cached_property
    def _int32s(self) -> Tensor:
        return self.words[self.shape.num_int64s : self.shape.num_words].view(torch.int32)

    def _per_token(self, which: int) -> Tensor:
        return self.words[which * self.num_tokens : (which + 1) * self.num_tokens]


def table_words(num_sequences: int, num_blocks: int) -> int:
    """Words of block tables: each sequence's an even number of int32."""
    return num_sequences * -(-num_blocks // 2)


def ragged_batch(plan: StepPlan, block_size: int, device: torch.device) -> RaggedBatch:
    """Pack a plan.

    Args:
        plan: each sequence's `block_table` already holds blocks for all its tokens of this forward, drafts included.
        block_size: tokens in a cache block.
        device: where the tensors go.

    Returns:
        The batch. Logits are wanted of a chunk's last token if it `wants_logits`, also of every draft, and of every
        token of the prompt where the request asks for `prompt_logprobs`.
    """
    parts = plan.scheduled
    counts_S = [part.num_tokens + len(part.drafts) for part in parts]
    starts_S1 = [0, *accumulate(counts_S)]
    rows = [_logits_rows(part, first) for part, first in zip(parts, starts_S1, strict=False)]
    counts = tuple(map(len, rows))
    shape = Shape(starts_S1[-1], len(parts), sum(counts))
    num_blocks = max((len(part.sequence.block_table) for part in parts), default=0)

    words = np.zeros(shape.num_words + table_words(len(parts), num_blocks), dtype=np.int64)
    int32s = words[shape.num_int64s :].view(np.int32)
    lens_S = [part.start + count for part, count in zip(parts, counts_S, strict=True)]
    int32s[: 2 * len(parts) + 1] = starts_S1 + lens_S
    tables = int32s[2 * (shape.num_words - shape.num_int64s) :]
    width = len(tables) // max(len(parts), 1)
    for first, part in zip(range(0, len(tables), max(width, 1)), parts, strict=True):
        tables[first : first + len(part.sequence.block_table)] = part.sequence.block_table
    wanted = list(chain.from_iterable(rows))
    if shape.num_tokens == len(parts):  # one token of each: what a step mostly is
        words[: shape.num_int64s] = _decoded_tokens(parts, block_size) + wanted
    else:
        into_4T = words[: 4 * shape.num_tokens].reshape(4, -1)
        _write_tokens(into_4T, parts, counts_S, starts_S1, tables.reshape(len(parts), width), block_size)
        words[4 * shape.num_tokens : shape.num_int64s] = wanted

    def tensor(array: Int64s) -> Tensor:
        made = torch.from_numpy(array)
        return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)

    adapters = tuple(part.sequence.request.adapter for part in parts)
    named = [name for name in dict.fromkeys(adapters) if name is not None]
    return RaggedBatch(
        shape,
        tensor(words),
        counts,
        adapters,
        {
            name: tensor(np.flatnonzero(np.repeat([each == name for each in adapters], counts_S)))
            for name in named
        },
    )


def _decoded_tokens(parts: list[Scheduled], block_size: int) -> list[int]:
    """Input ids, positions, slots and greatest lengths of parts of one token each."""
    ids, positions, slots, longest = [], [], [], []
    for part in parts:
        sequence, start = part.sequence, part.start
        ids.append(sequence.token_ids[start])
        positions.append(start)
        slots.append(sequence.block_table[start // block_size] * block_size + start % block_size)
        longest.append(sequence.num_prompt_tokens + sequence.request.params.max_tokens)
    return ids + positions + slots + longest


def _write_tokens(
    into_4T: Int64s,
    parts: list[Scheduled],
    counts_S: list[int],
    starts_S1: list[int],
    tables_SB: Int32s,
    block_size: int,
) -> None:
    """Input ids, positions, slots and greatest lengths."""
    ids_T, positions_T, slots_T, longest_T = into_4T
    ids: list[int] = []
    for part in parts:
        ids += part.sequence.token_ids[part.start : part.start + part.num_tokens]
        ids += part.drafts
    ids_T[:] = ids
    longest_S = [part.sequence.num_prompt_tokens + part.sequence.request.params.max_tokens for part in parts]
    before_S = [part.start - first for part, first in zip(parts, starts_S1, strict=False)]
    sequence_T = np.repeat(np.arange(len(parts)), counts_S)
    np.add(np.arange(len(ids)), np.array(before_S)[sequence_T], out=positions_T)
    blocks_T, offsets_T = np.divmod(positions_T, block_size)
    slots_T[:] = tables_SB[sequence_T, blocks_T]
    slots_T *= block_size
    slots_T += offsets_T
    longest_T[:] = np.array(longest_S)[sequence_T]


def _logits_rows(part: Scheduled, first: int) -> range:
    last = first + part.num_tokens - 1
    start, stop = (last, last + 1 + len(part.drafts)) if part.wants_logits else (last + 1, last + 1)
    if part.sequence.request.params.prompt_logprobs is not None:
        start = first if part.start < part.sequence.num_prompt_tokens else start
    return range(start, stop)

"""A forward's tensors: the sequences of a `StepPlan`, packed one after another without padding.

In: `StepPlan`. Out: `RaggedBatch`, passed from layer to layer down to `attention`. Names end in their shape: T tokens
of the forward, S sequences, B blocks of the longest sequence, L rows of which logits are wanted. Built with numpy:
a few hundred decodes would else cost thousands of small tensor operations. Next: `models`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .step_plan import Scheduled, StepPlan

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RaggedBatch:
    """One forward's input.

    Attributes:
        input_ids_T: int64.
        positions_T: int64; of each token in its sequence.
        slots_T: int64; where its keys and values go: block * block_size + offset.
        query_starts_S1: int32; sequence s has rows `query_starts_S1[s]` to `query_starts_S1[s + 1]`.
        context_lens_S: int32; tokens of each sequence with those of this forward.
        block_tables_SB: int32; cache blocks of each sequence, padded with 0.
        logits_rows_L: int64; rows of which logits are wanted, in the order of the sequences.
        logits_counts: how many of them each sequence has.
        longest_T: int64; the length to which each token's sequence may grow: models whose rotary angles depend on the
            length of the text choose by it, so that a sequence keeps one choice for life.
        adapters: each sequence's LoRA adapter, or None.
        adapter_rows: rows of T of each adapter in the batch.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    query_starts_S1: Tensor
    context_lens_S: Tensor
    block_tables_SB: Tensor
    logits_rows_L: Tensor
    logits_counts: tuple[int, ...]
    longest_T: Tensor
    adapters: tuple[str | None, ...] = ()
    adapter_rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return self.input_ids_T.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences in it."""
        return self.context_lens_S.shape[0]


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
    counts_S = _array((part.num_tokens + len(part.drafts) for part in parts), len(parts))
    starts_S = _array((part.start for part in parts), len(parts))
    ends_S1 = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum(counts_S, out=ends_S1[1:])
    sequence_T = np.repeat(np.arange(len(parts)), counts_S)
    positions_T = np.arange(int(ends_S1[-1])) - (ends_S1[:-1] - starts_S)[sequence_T]
    tables_SB = _block_tables(parts)
    blocks_T = tables_SB[sequence_T, positions_T // block_size].astype(np.int64)
    rows = [_logits_rows(part, int(first)) for part, first in zip(parts, ends_S1, strict=False)]
    longest_S = _array((_longest(part) for part in parts), len(parts))
    adapters = tuple(part.sequence.request.adapter for part in parts)

    def tensor(array: Int64s | Int32s) -> Tensor:
        made = torch.from_numpy(array)
        return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)

    return RaggedBatch(
        input_ids_T=tensor(_input_ids(parts, int(ends_S1[-1]))),
        positions_T=tensor(positions_T),
        slots_T=tensor(blocks_T * block_size + positions_T % block_size),
        query_starts_S1=tensor(ends_S1.astype(np.int32)),
        context_lens_S=tensor((starts_S + counts_S).astype(np.int32)),
        block_tables_SB=tensor(tables_SB),
        logits_rows_L=tensor(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)),
        logits_counts=tuple(len(each) for each in rows),
        longest_T=tensor(longest_S[sequence_T]),
        adapters=adapters,
        adapter_rows={
            name: tensor(np.flatnonzero(np.array([each == name for each in adapters])[sequence_T]))
            for name in dict.fromkeys(adapters)
            if name is not None
        },
    )


def _array(values: object, count: int) -> Int64s:
    return np.fromiter(values, dtype=np.int64, count=count)  # type: ignore[call-overload, no-any-return]


def _input_ids(parts: list[Scheduled], num_tokens: int) -> Int64s:
    tokens: list[int] = []
    for part in parts:
        tokens += part.sequence.token_ids[part.start : part.start + part.num_tokens]
        tokens += part.drafts
    return np.array(tokens, dtype=np.int64).reshape(num_tokens)


def _block_tables(parts: list[Scheduled]) -> Int32s:
    width = max((len(part.sequence.block_table) for part in parts), default=0)
    tables_SB = np.zeros((len(parts), width), dtype=np.int32)
    for row, part in zip(tables_SB, parts, strict=True):
        row[: len(part.sequence.block_table)] = part.sequence.block_table
    return tables_SB


def _logits_rows(part: Scheduled, first: int) -> Int64s:
    last = first + part.num_tokens - 1
    if not part.wants_logits:
        start, stop = last + 1, last + 1
    else:
        start, stop = last, last + 1 + len(part.drafts)
    if part.sequence.request.params.prompt_logprobs is not None:
        start = first if part.start < part.sequence.num_prompt_tokens else start
    return np.arange(start, stop, dtype=np.int64)


def _longest(part: Scheduled) -> int:
    sequence = part.sequence
    return sequence.num_prompt_tokens + sequence.request.params.max_tokens

"""Forwards of a shape that has come before, made again without Python: recordings on the CPU, CUDA graphs on a device.

In: a `RaggedBatch`. Out: its logits. A shape that comes again and again is computed once in tensors that stay where
they are; from then on a batch's values are copied into them and the same kernels run. A decode of a few sequences is
some hundred calls of a few microseconds each: from Python, they take longer to make than to run. Next: `models`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Protocol

import accel_kernels
import torch
from torch import Tensor

from .batch import RaggedBatch, Shape, table_words
from .kv_cache import KVCache
from .models.causal import CausalModel

_MOST_TOKENS = 64
"""In larger forwards the calls are a small part."""
_TIMES_BEFORE = 2
"""A shape is recorded when it comes for the third time."""
_MOST_BYTES = 256 << 20
"""Of recordings on the CPU, whose intermediate results all have memory of their own."""


class Recorded(Protocol):
    """A forward that can be made again."""

    @property
    def num_bytes(self) -> int:
        """Memory that it keeps."""
        ...

    def run(self, batch: RaggedBatch) -> Tensor:
        """The logits of a batch; they are valid until the next forward."""
        ...


class Replays:
    """Forwards of one model over one cache, by shape.

    Args:
        decoder: whose `replayable` is true.
        cache: its cache.
        device: of both.
        max_model_len: longest sequence.
    """

    def __init__(
        self, decoder: CausalModel, cache: KVCache, device: torch.device, max_model_len: int
    ) -> None:
        self._decoder, self._cache, self._device = decoder, cache, device
        self._max_blocks = -(-max_model_len // cache.block_size)
        self._seen: Counter[Shape] = Counter()
        self._recorded: OrderedDict[Shape, Recorded] = OrderedDict()
        self._valid_for: tuple[object, ...] = ()

    def run(self, batch: RaggedBatch) -> Tensor:
        """Logits of a batch, `[L, vocab]` float32; valid until the next forward."""
        shape = self._shape(batch)
        if shape is None:
            return self._decoder(batch, self._cache)
        valid_for = (self._decoder.weights_version, torch.get_num_threads())
        if valid_for != self._valid_for:
            self._recorded.clear()
            self._valid_for = valid_for
        found = self._recorded.get(shape)
        if found is None:
            self._seen[shape] += 1
            if self._seen[shape] <= _TIMES_BEFORE:
                return self._decoder(batch, self._cache)
            found = self._record(shape)
        self._recorded.move_to_end(shape)
        return found.run(batch)

    def _shape(self, batch: RaggedBatch) -> Shape | None:
        """What a batch's forward is recorded as; None: it is not."""
        shape = batch.shape
        if batch.adapter_rows or shape.num_tokens > _MOST_TOKENS or not shape.num_logits:
            return None
        if self._device.type == "cpu":
            return shape
        if not shape.num_tokens == shape.num_sequences == shape.num_logits:
            return None
        padded = 1 << (shape.num_tokens - 1).bit_length()
        return Shape(padded, padded, padded)

    def _record(self, shape: Shape) -> Recorded:
        inputs = _empty(shape, self._max_blocks, self._device)
        made: Recorded = (
            CpuForward(self._decoder, self._cache, inputs)
            if self._device.type == "cpu"
            else CudaForward(self._decoder, self._cache, inputs)
        )
        while self._recorded and sum(each.num_bytes for each in self._recorded.values()) > _MOST_BYTES:
            self._recorded.popitem(last=False)
        self._recorded[shape] = made
        return made


class CpuForward:
    """A forward that is recorded while it is made for the first time."""

    def __init__(self, decoder: CausalModel, cache: KVCache, inputs: RaggedBatch) -> None:
        self._decoder, self._cache, self._inputs = decoder, cache, inputs
        self._recording: accel_kernels.Recording | None = None
        self._logits_LV: Tensor

    @property
    def num_bytes(self) -> int:
        """See `Recorded`."""
        return self._recording.num_bytes if self._recording else 0

    def run(self, batch: RaggedBatch) -> Tensor:
        """See `Recorded`."""
        _copy(batch, self._inputs)
        if self._recording is None:
            recording = accel_kernels.Recording()
            with recording:
                self._logits_LV = self._decoder(self._inputs, self._cache)
            self._recording = recording
        else:
            self._recording.replay()
        return self._logits_LV


class CudaForward:
    """A forward as a CUDA graph; a batch may be smaller than its inputs, and is then padded."""

    num_bytes = 0  # of the pool that all graphs share

    def __init__(self, decoder: CausalModel, cache: KVCache, inputs: RaggedBatch) -> None:
        self._inputs = inputs
        self._graph = torch.cuda.CUDAGraph()
        _pad(inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled or chosen at the first call
            decoder(inputs, cache)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph):
            self._logits_LV = decoder(inputs, cache)

    def run(self, batch: RaggedBatch) -> Tensor:
        """See `Recorded`."""
        _pad(self._inputs)
        _copy_to_larger(batch, self._inputs)
        self._graph.replay()
        return self._logits_LV[: batch.num_sequences]


def _empty(shape: Shape, max_blocks: int, device: torch.device) -> RaggedBatch:
    """Inputs of a shape, for sequences of any length."""
    words = shape.num_words + table_words(shape.num_sequences, max_blocks)
    return RaggedBatch(shape, torch.zeros(words, dtype=torch.int64, device=device))


def _copy(batch: RaggedBatch, inputs: RaggedBatch) -> None:
    """A batch's values, to inputs of its shape, whose block tables may be wider."""
    if batch.num_sequences == 1:
        inputs.words[: batch.words.shape[0]].copy_(batch.words)
        return
    numbers = batch.shape.num_words
    inputs.words[:numbers].copy_(batch.words[:numbers])
    _copy_tables(batch, inputs)


def _copy_tables(batch: RaggedBatch, inputs: RaggedBatch) -> None:
    rows, columns = batch.block_tables_SB.shape
    inputs.block_tables_SB[:rows, :columns].copy_(batch.block_tables_SB)


def _tensors(batch: RaggedBatch) -> tuple[Tensor, ...]:
    return (
        batch.input_ids_T,
        batch.positions_T,
        batch.slots_T,
        batch.query_starts_S1,
        batch.context_lens_S,
        batch.logits_rows_L,
        batch.longest_T,
    )


def _copy_to_larger(batch: RaggedBatch, inputs: RaggedBatch) -> None:
    """A batch's values, to the first places of each tensor."""
    for source, target in zip(_tensors(batch), _tensors(inputs), strict=True):
        target[: len(source)].copy_(source)
    _copy_tables(batch, inputs)


def _pad(inputs: RaggedBatch) -> None:
    """Sequences of one token each, which see only themselves and write nothing."""
    inputs.slots_T.fill_(-1)
    inputs.context_lens_S.fill_(1)
    inputs.block_tables_SB.zero_()
    for each in (inputs.query_starts_S1, inputs.logits_rows_L):
        torch.arange(len(each), out=each)
    inputs.positions_T.zero_()
    inputs.input_ids_T.zero_()
    inputs.longest_T.fill_(1)

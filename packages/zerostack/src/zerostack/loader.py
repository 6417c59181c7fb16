"""The data loader of `initialize(training_data=)`: micro-batches, each rank its own part, a new order each epoch.

In: a dataset. Out: batches of `train_micro_batch_size_per_gpu` samples on each rank. Checkpoints hold its position, in
samples of all ranks, so another number of ranks goes on after the very same ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

log = logging.getLogger(__name__)


class EpochLoader:
    """Iterates over a dataset; every `iter()` is the next epoch, in an order of its own.

    Args:
        dataset: Map-style: split and shuffled over ranks. Iterable: each rank iterates its own copy, which must
            itself yield different samples on different ranks.
        batch_size: Samples in a batch.
        rank: Of this process.
        world: Number of ranks.
        seed: Of the order.
        drop_last: Leave out the last, smaller batch.
        collate_fn: Makes a batch of samples; None is torch's own.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.epoch = 0
        self._world = world
        self._batch_size = batch_size
        self._num_taken = 0  # batches of the epoch under way, behind
        self._first = 0  # samples of this rank that were handed out before
        self._num_skipped = 0  # the same, of the next epoch
        self._sampler: _Sampler | None = None
        if not isinstance(dataset, IterableDataset):
            self._sampler = _Sampler(dataset, world, rank, shuffle=True, seed=seed, drop_last=drop_last)
        # Each `iter` of a loader draws a number; from torch's own generator it would shift what a model draws from it.
        generator = torch.Generator().manual_seed(seed)
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size,
            sampler=self._sampler,
            drop_last=drop_last,
            collate_fn=collate_fn,
            generator=generator,
        )

    @property
    def dataset(self) -> Dataset[Any]:
        """What is iterated over."""
        return self.loader.dataset

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self._first, self._num_skipped = self._num_skipped, 0
        if self._sampler is not None:
            self._sampler.set_epoch(self.epoch)
            self._sampler.first = self._first
        self.epoch += 1
        self._num_taken = 0
        return self._batches(0 if self._sampler is not None else self._first // self._batch_size)

    def _batches(self, num_passed_over: int) -> Iterator[Any]:
        for batch in islice(self.loader, num_passed_over, None):
            self._num_taken += 1
            yield batch
        self._num_taken = self._first = 0

    def state_dict(self) -> dict[str, int]:
        """The position: epochs begun, and samples of all ranks handed out in the one under way (0: it is over)."""
        taken = self._first + self._num_taken * self._batch_size
        return {"epoch": self.epoch, "samples": taken * self._world}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from a position: the next `iter()` ends the epoch that was under way.

        Samples that this number of ranks does not divide are handed out again (of an iterable dataset, those that are
        no whole batch), and said in the log.
        """
        samples = state_dict["samples"]
        self.epoch = state_dict["epoch"] - int(samples > 0)
        self._num_skipped = samples // self._world
        if self._sampler is None:
            self._num_skipped -= self._num_skipped % self._batch_size
        self._num_taken = self._first = 0
        if again := samples - self._num_skipped * self._world:
            log.warning("%d of %d samples of the epoch under way are handed out again", again, samples)


class _Sampler(DistributedSampler[Any]):
    """Begins an epoch at sample `first` of this rank."""

    first = 0

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.first, None)
